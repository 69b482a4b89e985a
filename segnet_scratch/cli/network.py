"""`segnet train`, `recipes`, `bn-recalibrate`, `convert` and `export`: where a trained network comes from and goes."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape

from segnet_scratch import weights
from segnet_scratch.cli import options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, console, join_ranks, output, say
from segnet_scratch.cli.data import transferred
from segnet_scratch.config import PRETRAINED, describe
from segnet_scratch.convert import from_pytorch, read_map, to_pytorch
from segnet_scratch.data import EvalTransform, Loader, VOCDataset
from segnet_scratch.data.download.install import pretrained_file
from segnet_scratch.display import TrainingDisplay, write_json
from segnet_scratch.errors import ConfigError
from segnet_scratch.evaluate import check_classes
from segnet_scratch.export import INPUTS, OPSET, OUTPUTS, UNPOOLS, export
from segnet_scratch.files import expect_apart
from segnet_scratch.ops.normalisation.batch_norm import EPS
from segnet_scratch.parallel import start_ranks
from segnet_scratch.progress import watched
from segnet_scratch.recalibrate import recalibrate
from segnet_scratch.recipes import find_config
from segnet_scratch.recipes import recipes as shipped_recipes
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.run_record import RunRecord
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import POOLINGS
from segnet_scratch.tensorboard import TensorBoard
from segnet_scratch.train import Trainer


def _settings_help() -> str:
    rows = "\n".join(f"[bold]{key}[/bold] = {escape(default)}: {escape(text)}" for key, default, text in describe())
    return f"Settings and their defaults, for --config and --set:\n\n{rows}"


@command(app, epilog=_settings_help())
def train(
    data: options.Data,
    out: options.Folder,
    config: options.Texts = None,
    settings: options.Texts = None,
    device: options.Device = "auto",
    init: Annotated[str | None, {"metavar": f"FILE|{'|'.join(PRETRAINED)}"}] = None,
    resume: bool = False,
    tensorboard: bool = False,
    ranks: options.MaybeCount = None,
    json: options.Json = None,
) -> None:
    """Train a network, by default on the split train, and validate it on val (--set train_split=..., val_split=...).

    Example: segnet train --data VOC2012 --init vgg16 --out runs/voc --set size=224 --set batch=8

    Ctrl-C saves a checkpoint; the same command with --resume goes on from it.

    Options:
        --out: Run folder: settings, metrics and checkpoints are written there.
        --config FILE.toml|NAME: Settings as TOML, or the name of a recipe: see segnet recipes. Of several the later one
            wins.
        --set KEY=VALUE: One setting, over those of --config; as often as you like.
        --init: Initial weights: VGG16's (a file with torchvision's names, or by name, to be downloaded once), or a
            checkpoint.
        --resume: Go on from RUN/last.safetensors, as if never stopped.
        --tensorboard: Also write event files to RUN/tensorboard. Needs pip install 'segnet_scratch\\[tensorboard]'.
        --ranks, --gpus: Processes that train together on this machine, one a GPU, or one a share of the cores. On
            several machines: mpirun or srun segnet train. Needs pip install 'segnet_scratch\\[parallel]'.
    """
    start_ranks(ranks)
    team = join_ranks()
    with team.guarded():
        # First: a missing library is noticed before the run folder is made.
        shown = [TrainingDisplay(console), RunRecord(), *([TensorBoard()] if tensorboard else [])] if team.leads else []
        folder, files = RunFolder(out), [find_config(name) for name in config or ()]
        resolved = team.broadcast(lambda: folder.resolve_config(files, settings or [], resume, init))
        if resolved.init in PRETRAINED and not resume:
            team.broadcast(lambda: _download(resolved.init))
        trainer = Trainer(resolved, data, out, device, resume=resume, ranks=team)
        finished = trainer.run(*shown)
        left_out = team.all_gather({trainer.train_set.ids[index]: why for index, why in trainer.loader.bad.items()})
    if not team.leads:
        raise typer.Exit(0 if finished else 130)
    bad = {name: why for of_rank in left_out for name, why in of_rank.items()}
    if bad:
        say(f"{len(bad)} training images could not be read and were left out: {', '.join(bad)}")
    result = {"step": trainer.step, "miou": trainer.best_miou, "finished": finished, "run": str(out), "left_out": bad}
    write_json(json, result)
    if not finished:
        say(f"stopped at step {trainer.step} of {trainer.total_steps}, saved; go on with the same command and --resume")
        raise typer.Exit(130)
    output.fault = None  # what could not be shown is in metrics.jsonl: that is no failure of a run
    best = "" if trainer.best_miou is None else f", best mIoU {100 * trainer.best_miou:.1f} %"
    if trainer.stopped_early:
        say(f"ended early: no better mIoU in {resolved.patience} validations (patience)")
    say(f"{trainer.step} steps done{best}; weights: {folder.last if trainer.best_miou is None else folder.best}")


def _download(weights: str) -> None:
    with transferred(console) as progress:
        pretrained_file(weights, progress)


@command(app)
def recipes() -> None:
    """List the settings that ship with the program, for segnet train --config NAME."""
    for name, purpose in shipped_recipes().items():
        say(f"{name:24}{purpose}")


@command(app, "bn-recalibrate")
def bn_recalibrate(
    checkpoint: options.Checkpoint,
    data: options.Data,
    out: options.File,
    split: options.Split = "train",
    batches: options.MaybeCount = None,
    batch: options.Count = 8,
    seed: options.Number = 0,
    device: options.Device = "auto",
    size: options.Size = None,
) -> None:
    """Count the batch-norm statistics of a trained network anew, over many images with the weights at rest.

    Helps where training ended amid large steps or with few images a batch. The images are resized to the network's
    input size and not augmented.

    Example: segnet bn-recalibrate runs/voc/best.safetensors --data VOC2012 --out runs/voc/recalibrated.safetensors

    Options:
        --out: The new checkpoint.
        --batches: So many batches; the whole split unless given.
        --batch: Images at a time.
        --seed: Of the order of the images.
    """
    expect_apart(out, checkpoint)
    model = weights.load(checkpoint, get_device(device))
    dataset = VOCDataset(data, split)
    check_classes(model, dataset)
    transform = EvalTransform(options.input_size(checkpoint, model, size))
    # The last batch is often small, and its statistics the worst.
    loader = Loader(dataset, transform, batch, seed, drop_last=len(dataset) >= batch)
    count = min(batches or loader.batches_per_epoch, loader.batches_per_epoch)
    with watched(console, "recalibrate", count * batch) as watch, closing(loader.epoch(0)) as epoch:

        def counted() -> Iterator[np.ndarray]:
            for found in islice(epoch, count):
                yield found.images
                watch.advance(len(found.images))

        images = recalibrate(model, counted())
    metadata = {key: value for key, value in model.metadata.items() if key != "model"}
    weights.save(out, model, metadata | {"recalibrated": {"split": split, "images": images, "batch": batch}})
    say(f"{out}: batch-norm statistics of {images} images of {split}")


@command(app)
def convert(
    source: Path,
    target: Path,
    to: Annotated[str, options.one_of(("segnet", "pytorch"))] = "segnet",
    like: Path | None = None,
    names: Path | None = None,
    pooling: Annotated[str | None, options.one_of(POOLINGS)] = None,
    eps: Annotated[float, {"min": 0}] = EPS,
    labels: Path | None = None,
    size: str | None = None,
) -> None:
    """Convert weights from and to PyTorch SegNets. The result of --to segnet works with eval, predict and --init.

    Which array is which is found by itself where names, or order and shapes, tell; else --map tells.

    Options:
        source: A PyTorch state dict (.pth, .safetensors), or our checkpoint.
        target: Where to write the result, a safetensors file.
        --to: segnet: our checkpoint. pytorch: a state dict.
        --like FILE: To PyTorch, with the names and arrays of this state dict, for load_state_dict(strict=True).
        --map FILE: TOML of "their.prefix" = "encoder.1.1.conv" lines; = false leaves out.
        --pooling: Of a network that is read: floor where it pools by MaxPool2d(2, 2).
        --eps: Of the batch norms of the PyTorch network.
        --labels FILE: Class names of a network that is read, one a line.
        --size SIZE: Input size of a network that is read: S or HxW.
    """
    expect_apart(target, source, *([like] if like else []))
    if to == "segnet" and like is None:
        classes = None if labels is None else labels.read_text(encoding="utf-8").split("\n")
        classes = classes and [name.strip() for name in classes if name.strip()]
        shape = None if size is None else options.sides("--size", size)
        model = from_pytorch(source, target, read_map(names), pooling, eps, classes, shape, report=say)
        say(f"{target}: {model.architecture}, width {model.width:g}, {model.classes} classes, pooling {model.pooling}")
        if pooling is None and model.pooling == "ceil":
            say(
                "Pools take the last row and column of odd maps (ceil mode), as the authors'. PyTorch's "
                "MaxPool2d(2, 2) does not: if the network was trained so, convert it with --pooling floor"
            )
    elif names and not like:
        raise ConfigError("--map: names of another network are taken from a state dict of it; give one with --like")
    else:
        count = to_pytorch(source, target, like, read_map(names), eps)
        say(f"{target}: {count} arrays, for load_file of safetensors.torch")


@command(app, "export")
def export_command(
    checkpoint: options.Checkpoint,
    target: options.File,
    inputs: Annotated[str, options.one_of(INPUTS)] = "normalised",
    result: Annotated[str, options.one_of(OUTPUTS)] = "logits",
    unpool: Annotated[str, options.one_of(UNPOOLS)] = "indices",
    keep_batch_norm: bool = False,
    float16: bool = False,
) -> None:
    """Write a trained network as an ONNX file for other runtimes: any batch, height and width, dropout off.

    The file is checked with onnxruntime before it is written. Needs pip install 'segnet_scratch\\[onnx]'.

    Example: segnet export runs/voc/best.safetensors voc.onnx --input uint8 --output labels

    Options:
        FILE.onnx: The ONNX file.
        --input: What `image` (n, 3, h, w) holds, RGB. normalised: float32 by ImageNet's mean and deviation. float:
            float32 in [0, 1]. uint8: as pictures are stored.
        --output: logits: float32 (n, classes, h, w). labels: the class of each pixel, uint8 (n, h, w).
        --unpool: indices: MaxPool's indices and MaxUnpool. codes: without these, for runtimes that lack them.
        --keep-batch-norm: As nodes of its own, not folded into the convolutions.
        --float16: Weights and maps in half precision.
    """
    expect_apart(target, checkpoint)
    found = export(weights.load(checkpoint, "numpy"), target, inputs, result, unpool, keep_batch_norm, float16)
    say(f"{target}: opset {OPSET}, {target.stat().st_size / 2**20:.1f} MiB")
    say(
        f"onnxruntime against the numpy device: logits differ by at most {found.error:.2g} (the largest is "
        f"{found.largest:.3g}), {found.differing} of {found.pixels:,} pixels get another class"
    )
