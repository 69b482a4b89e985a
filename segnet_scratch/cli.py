"""The command line: `segnet train`, `eval`, `predict`, `gradcheck`, `run`, `doctor`, `data sample`."""

import logging
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.text import Text

from segnet_scratch import __version__, weights
from segnet_scratch.config import describe
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.data import VOCDataset, write_sample
from segnet_scratch.device import NAMES, get_device
from segnet_scratch.doctor import diagnose
from segnet_scratch.doctor.kernels import examine_kernels
from segnet_scratch.errors import CheckpointError, ConfigError, SegnetError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.kernels.workbench import options, run_kernel
from segnet_scratch.kernels.workbench.display import show
from segnet_scratch.predict import predict_files
from segnet_scratch.proof.gradcheck import gradcheck as run_gradcheck
from segnet_scratch.report import TrainingDisplay, evaluation_progress, scores_table, write_json
from segnet_scratch.segnet import SegNet
from segnet_scratch.train import RunFolder, Trainer

app = typer.Typer(
    name="segnet",
    help="SegNet without a deep learning framework. Start with: segnet data sample DIR, then segnet train.",
    epilog="Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage or settings, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Data sets in PASCAL VOC's layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")
# No markup: paths, names of classes and messages of other programs may hold brackets.
console = Console(markup=False, highlight=False)
problems = Console(stderr=True, markup=False, highlight=False)


def _known_device(name: str) -> str:
    if name not in NAMES:
        raise typer.BadParameter(f"there is no device {name!r}; expected one of {', '.join(NAMES)}")
    return name


DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help="A VOC root (with JPEGImages, SegmentationClass, ImageSets/Segmentation), or a folder above it.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(NAMES),
        callback=_known_device,
        help="cuda: the kernels on a GPU. host: the same kernels on the CPU, for checking. numpy: NumPy, for training "
        "without a GPU. auto: cuda where CuPy sees a GPU, else numpy.",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result to this file.", metavar="FILE", dir_okay=False),
]
SizeOption = Annotated[
    str | None, typer.Option(help="Network input, N or HxW; as in training unless given.", metavar="N|HxW")
]
CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint, such as RUN/best.safetensors.")]


def _settings_help() -> str:
    rows = "\n".join(f"[bold]{key}[/bold] = {escape(default)}: {escape(text)}" for key, default, text in describe())
    return f"Settings and their defaults, for --config and --set:\n\n{rows}"


@app.command(epilog=_settings_help())
def train(
    data: DataOption,
    out: Annotated[
        Path,
        typer.Option("--out", help="Run folder: settings, metrics and checkpoints are written there.", file_okay=False),
    ],
    config: Annotated[Path | None, typer.Option(help="Settings as TOML.", metavar="FILE.toml")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, over those of --config; as often as you like.", metavar="KEY=VALUE"),
    ] = None,
    device: DeviceOption = "auto",
    init: Annotated[
        Path | None,
        typer.Option(
            help="Initial weights: VGG16 as safetensors (torchvision's names), or a checkpoint.",
            metavar="FILE",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from RUN/last.safetensors, as if never stopped.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train a network on the train split and validate it on the val split.

    Example: segnet train --data VOC2012 --init vgg16.safetensors --out runs/voc --set size=224 --set batch=8

    Ctrl-C saves a checkpoint; the same command with --resume goes on from it.
    """
    folder = RunFolder(out)
    resolved = folder.resolve_config(config, settings or [], resume)
    trainer = Trainer(resolved, data, out, device, init, resume)
    with TrainingDisplay(console) as display:
        finished = trainer.run(display)
    write_json(json, {"step": trainer.step, "miou": trainer.best_miou, "finished": finished, "run": str(out)})
    if not finished:
        _say(
            f"stopped at step {trainer.step} of {trainer.total_steps}, saved; go on with the same command and --resume"
        )
        raise typer.Exit(130)
    best = "" if trainer.best_miou is None else f", best mIoU {100 * trainer.best_miou:.1f} %"
    _say(f"{trainer.step} steps done{best}; weights: {folder.last if trainer.best_miou is None else folder.best}")


@app.command(name="eval")
def evaluate_command(
    checkpoint: CheckpointArgument,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")] = "val",
    device: DeviceOption = "auto",
    size: SizeOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    json: JsonOption = None,
) -> None:
    """Score a checkpoint by the VOC protocol: one confusion matrix over the whole split, void ignored.

    The image is resized to the network's input size and the logits bilinearly back to the size of the ground truth.
    """
    model = weights.load(checkpoint, get_device(device))
    dataset = VOCDataset(data, split)
    input_size = _input_size(checkpoint, model, size)
    with evaluation_progress(console, len(dataset)) as advance:
        evaluation = evaluate(model, dataset, input_size, batch, advance=advance)
    console.print(scores_table(evaluation))
    write_json(json, {**evaluation.to_json(), "split": split, "checkpoint": str(checkpoint)})


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.", file_okay=False)],
    logits: Annotated[bool, typer.Option("--logits", help="Also write NAME.npy, float32 (H, W, classes).")] = False,
    device: DeviceOption = "auto",
    size: SizeOption = None,
    json: JsonOption = None,
) -> None:
    """Segment images: NAME.png (class indices, VOC palette) and NAME_overlay.png (with a legend), in the image's size.

    Example: segnet predict runs/voc/best.safetensors photos/*.jpg --out predictions
    """
    model = weights.load(checkpoint, get_device(device))
    names = model.metadata.get("classes") or [f"class {k}" for k in range(model.classes)]
    results = []
    for prediction in predict_files(model, images, out, _input_size(checkpoint, model, size), names, logits):
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(prediction.shares.items())[:4])
        _say(f"{prediction.overlay}: {shares}")
        files = {"image": prediction.image, "labels": prediction.labels, "overlay": prediction.overlay}
        if prediction.logits:
            files["logits"] = prediction.logits
        results.append({**{key: str(path) for key, path in files.items()}, "shares": prediction.shares})
    write_json(json, results)


def _input_size(checkpoint: Path, model: SegNet, size: str | None) -> tuple[int, int]:
    """The size given as N or HxW, else the one that the model was trained at."""
    if size is None:
        if "size" not in model.metadata:
            raise CheckpointError(f"{checkpoint} does not say what size it was trained at; give --size N or --size HxW")
        height, width = model.metadata["size"]
        return height, width
    try:
        sides = [int(part) for part in size.lower().split("x")]
        height, width = sides if len(sides) == 2 else sides * 2
    except ValueError:
        raise ConfigError(f"--size {size}: expected N or HxW, for example 224 or 360x480") from None
    if min(height, width) < 32:
        raise ConfigError(f"--size {size}: expected at least 32 pixels on each side")
    return height, width


@app.command()
def gradcheck(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to check; all unless given.")] = None,
    device: DeviceOption = "host",
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    json: JsonOption = None,
) -> None:
    """Compare hand-written gradients with numeric ones in float64, one line an op; exit code 1 where one differs.

    Central differences with step 1e-6; an error of more than 1e-7 + 1e-5 |gradient| fails.
    """
    results = []
    for result in run_gradcheck(ops or None, get_device(device), seed):
        _say(str(result), style="" if result.passed else "bold red")
        results.append(result)
    write_json(json, [result.to_json() for result in results])
    failed = [result.op for result in results if not result.passed]
    if failed:
        _fail(f"the gradients of {', '.join(failed)} differ", 1)
    _say(f"{len(results)} {'op' if len(results) == 1 else 'ops'} passed on {device}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A safetensors file: a PyTorch state dict, or our checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Where to write the result.")],
    to: Annotated[str, typer.Option(help="segnet (our checkpoint) or pytorch (a state dict).")] = "segnet",
    names: Annotated[
        Path | None, typer.Option("--map", help='TOML of "their.prefix" = "encoder.1.1.conv" lines.', metavar="FILE")
    ] = None,
) -> None:
    """Convert weights from and to PyTorch SegNets. The result of --to segnet works with eval, predict and --init.

    Their tensor names are taken as ours (encoder.1.1.conv.weight ...) unless --map says otherwise.
    """
    if to == "segnet":
        model = from_pytorch(source, target, read_map(names))
        _say(f"{target}: {model.architecture}, width {model.width:g}, {model.classes} classes")
    elif to == "pytorch":
        _say(f"{target}: {to_pytorch(source, target, read_map(names))} arrays, OIHW float32")
    else:
        raise typer.BadParameter(f"{to!r}; expected segnet or pytorch", param_hint="--to")


@app.command(name="run")
def run_command(
    kernel: Annotated[str, typer.Argument(help="A kernel of this project, file.cu, or file.cu:kernel.")],
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Shape of an array, once for each: x=2,45,37.", metavar="NAME=DIMS"),
    ] = None,
    arg: Annotated[
        list[str] | None, typer.Option("--arg", help="A scalar, once for each: n=1000.", metavar="NAME=VALUE")
    ] = None,
    content: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=FILE.npy",
            help="What an array holds before: a file, a number, random, or null. Without it inputs (const pointers) "
            "are random and outputs hold NaN.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="A NumPy function that takes inputs and scalars by name and returns the outputs: an array, a tuple "
            "or a dict.",
        ),
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance; 1e-5, in float64 1e-12.")] = None,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance; the same.")] = None,
    orders: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Ascending, descending and N shuffled orders of threads and blocks: the same bits?"
        ),
    ] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Also with AddressSanitizer and UndefinedBehaviorSanitizer.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="host|cuda", help="host: on the CPU. cuda: on a GPU.")] = "host",
    grid: Annotated[str | None, typer.Option(help="Blocks, X or X,Y or X,Y,Z; else they cover the output.")] = None,
    block: Annotated[str | None, typer.Option(help="Threads of a block; else __launch_bounds__, or 256.")] = None,
    shared: Annotated[int, typer.Option(min=0, help="Bytes of dynamic shared memory.")] = 0,
    type_: Annotated[str, typer.Option("--type", metavar="float32|float64", help="What storage_t is.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Save every array as DIR/NAME.npy.", metavar="DIR")] = None,
    json: JsonOption = None,
) -> None:
    """Run one kernel, of this project or your own, and check it; exit code 1 where a check fails.

    Example: segnet run add.cu --shape a=99 --shape b=99 --shape c=99 --arg n=99 --reference add.py:add --orders 6

    Checked always: accesses outside the arrays, elements never written, changed inputs, barriers not all threads reach.
    """
    result = run_kernel(
        kernel,
        shapes=options.by_name("--shape", shape, options.shape),
        arguments=options.by_name("--arg", arg, options.number),
        inputs=options.by_name("--input", content, options.contents),
        device=device,
        grid=None if grid is None else options.shape("--grid", grid),
        block=None if block is None else options.shape("--block", block),
        shared=shared,
        dtype=options.element_type("--type", type_),
        seed=seed,
        reference=reference,
        rtol=rtol,
        atol=atol,
        orders=orders,
        sanitize=sanitize,
    )
    show(console, result)
    write_json(json, result.to_json())
    if output is not None:
        console.print(f"{len(result.save(output))} arrays saved in {output}", soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Instead compile every kernel for every GPU, and show what it takes of one."),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Say what works on this machine, what does not, and the command that fixes it.

    Exit code 1 where no device can train. With --kernels, which needs NVRTC but no GPU: 1 where registers spill to
    memory beyond what the budget (kernels/budget.toml) accepts.
    """
    with console.status("compiling kernels" if kernels else "examining this machine") as status:
        report = (
            examine_kernels(lambda done, total: status.update(f"compiling kernels, {done} of {total}"))
            if kernels
            else diagnose()
        )
    for line, style in report.lines():
        _say(line, style)
    write_json(json, report.to_json())
    if not report.passed:
        raise typer.Exit(1)


@data_app.command()
def sample(
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 160,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other images.")] = 0,
) -> None:
    """Write a small synthetic data set in VOC layout: coloured shapes on textured grounds, deterministic.

    It needs no download, and a small network learns it in some minutes without a GPU:

    segnet train --data DIR --out RUN --set width=0.25 --set size=64 --set lr=0.1 --set epochs=10
    """
    root = write_sample(directory, train=train, val=val, seed=seed)
    _say(f"{train} training and {val} validation images in {root}")


def _version(requested: bool) -> None:
    if requested:
        _say(f"segnet_scratch {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is compiled and where it is kept.")
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=problems, show_path=False)])


def main() -> None:
    """Entry point: the project's own errors become one message and an exit code, without a traceback.

    Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage or settings, 130 stopped by Ctrl-C.
    """
    try:
        app()
    except SegnetError as error:
        _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except MemoryError as error:
        _fail(f"memory is short: {error}; use a smaller size or batch", 1)
    except OSError as error:  # a folder that cannot be made, a full disk
        _fail(f"{error.filename2 or error.filename or 'output'}: {error.strerror}; correct the path or make room", 1)


def _say(text: str, style: str = "") -> None:
    console.print(text, style=style, soft_wrap=True)


def _fail(message: str, code: int) -> NoReturn:
    problems.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
