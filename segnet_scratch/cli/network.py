"""`segnet train`, `eval`, `predict`, `convert`: networks and what is done with them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from segnet_scratch import weights
from segnet_scratch.cli.common import (
    CheckpointArgument,
    DataOption,
    DeviceOption,
    JsonOption,
    SizeOption,
    app,
    console,
    input_size,
    say,
)
from segnet_scratch.config import describe
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.data import VOCDataset
from segnet_scratch.device import get_device
from segnet_scratch.evaluate import evaluate
from segnet_scratch.predict import predict_files
from segnet_scratch.report import TrainingDisplay, evaluation_progress, scores_table, write_json
from segnet_scratch.train import RunFolder, Trainer


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
        say(f"stopped at step {trainer.step} of {trainer.total_steps}, saved; go on with the same command and --resume")
        raise typer.Exit(130)
    best = "" if trainer.best_miou is None else f", best mIoU {100 * trainer.best_miou:.1f} %"
    say(f"{trainer.step} steps done{best}; weights: {folder.last if trainer.best_miou is None else folder.best}")


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
    sides = input_size(checkpoint, model, size)
    with evaluation_progress(console, len(dataset)) as advance:
        evaluation = evaluate(model, dataset, sides, batch, advance=advance)
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
    for prediction in predict_files(model, images, out, input_size(checkpoint, model, size), names, logits):
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(prediction.shares.items())[:4])
        say(f"{prediction.overlay}: {shares}")
        files = {"image": prediction.image, "labels": prediction.labels, "overlay": prediction.overlay}
        if prediction.logits:
            files["logits"] = prediction.logits
        results.append({**{key: str(path) for key, path in files.items()}, "shares": prediction.shares})
    write_json(json, results)


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
        say(f"{target}: {model.architecture}, width {model.width:g}, {model.classes} classes")
    elif to == "pytorch":
        say(f"{target}: {to_pytorch(source, target, read_map(names))} arrays, OIHW float32")
    else:
        raise typer.BadParameter(f"{to!r}; expected segnet or pytorch", param_hint="--to")
