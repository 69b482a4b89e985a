"""`segnet eval`, `predict`, `serve`, `submit`, `report`: what is done with a trained network."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from inspect import Signature
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from segnet_scratch import weights
from segnet_scratch.cli import options
from segnet_scratch.cli.command import command, documented
from segnet_scratch.cli.common import app, console, fail, join_ranks, say
from segnet_scratch.config import AUTO
from segnet_scratch.data import VOCDataset
from segnet_scratch.data.drawing import Style
from segnet_scratch.display import scores_table, write_json, write_per_image
from segnet_scratch.errors import DataError, DeviceMemoryError, require
from segnet_scratch.evaluate import Evaluation, evaluate, score
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.predict import find_images, predict_files
from segnet_scratch.progress import watched
from segnet_scratch.report.page import write_report
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.serve import LOOPBACK, serve
from segnet_scratch.submit import Competition, submit
from segnet_scratch.video import camera_video, find_video, plan_videos, predict_video

Network = Callable[[], Segmenter]


def _network(
    *,
    checkpoint: options.Checkpoint,
    device: options.Device = "auto",
    engine: options.Engine = AUTO,
    precision: options.Precision = AUTO,
    size: options.Size = None,
    flip: bool = False,
    scales: str | None = None,
    window: str | None = None,
    stride: str | None = None,
    samples: options.Number = 0,
) -> Segmenter:
    """The network that the options of a command mean, and how it is applied; says so.

    Averaging of several predictions:
        --flip: Average with the mirrored image.
        --scales A,B,...: Average over the input size times each of these, for example 0.75,1,1.25.
        --window N|HxW: Do not resize the image (but for --scales): slide a window of this size over it. For images much
            larger than those of training.
        --stride N|HxW: From one window to the next; three quarters of a window unless given.
        --samples N: Average N passes with dropout on, of a network trained with dropout=true (Bayesian SegNet).
    """
    inference = Inference(
        (1.0,) if scales is None else options.scales(scales),
        flip,
        None if window is None else options.sides("--window", window),
        None if stride is None else options.sides("--stride", stride),
        samples,
    )
    rung = "tf32" if precision == "tf32" else None
    model = weights.load(checkpoint, get_device(device), fold=True, rung=rung)
    segmenter = Segmenter(model, options.input_size(checkpoint, model, size), inference, engine, precision)
    say(f"{segmenter}, input {segmenter.size[0]}x{segmenter.size[1]}")
    return segmenter


def _with_network(own: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `_network`; it gets the checkpoint's path, and what makes the network ready."""
    _, shared = documented(_network)
    names = {parameter.name for parameter in shared}

    @wraps(own)
    def run(checkpoint: Path, **values: Any) -> None:
        given = {name: values.pop(name) for name in names & values.keys()}
        own(checkpoint=checkpoint, network=partial(_network, checkpoint=checkpoint, **given), **values)

    _, (checkpoint, _, *others) = documented(own)
    run.__signature__ = Signature([checkpoint, *others, *shared[1:]])  # type: ignore[attr-defined]
    return run


def _show_scores(evaluation: Evaluation, per_image: Path | None, json: Path | None, **more: str) -> None:
    console.print(scores_table(evaluation))
    write_per_image(per_image, evaluation)
    write_json(json, evaluation.to_json() | more)


@command(app, "eval")
@_with_network
def evaluate_command(
    *,
    checkpoint: options.Checkpoint,
    network: Network,
    data: options.Data,
    split: options.Split = "val",
    batch: options.Count = 4,
    boundary: options.BoundaryF1 = None,
    per_image: options.PerImage = None,
    json: options.Json = None,
) -> None:
    """Score a checkpoint by the VOC protocol: one confusion matrix over the whole split, void ignored.

    The image is resized to the network's input size and the logits bilinearly back to the size of the ground truth.

    Example: segnet eval runs/voc/best.safetensors --data VOC2012 --boundary csurka --flip --scales 0.75,1,1.25

    Under mpirun or srun each rank takes its share of the images.

    IoU = TP / (TP + FP + FN), accuracy = TP / (TP + FN), precision = TP / (TP + FP) of a class's pixels.

    Options:
        --batch: Images at a time, where nothing is averaged.
    """
    ranks = join_ranks()
    with ranks.guarded():
        segmenter, dataset = network(), VOCDataset(data, split)
        segmenter.batch = batch
        with watched(console, "evaluate", len(dataset)) as watch:
            evaluation = evaluate(segmenter, dataset, boundary, advance=watch.advance, ranks=ranks)
    if ranks.leads:
        _show_scores(evaluation, per_image, json, split=split, checkpoint=str(checkpoint))


@command(app, "score")
def score_command(
    predictions: options.Folder,
    data: options.Data,
    split: options.Split = "val",
    boundary: options.BoundaryF1 = None,
    per_image: options.PerImage = None,
    json: options.Json = None,
) -> None:
    """Score label maps that were made elsewhere, by the same code as segnet eval.

    ID.png: class numbers, indexed or grey, of the size of the ground truth, as segnet predict and submit write them.

    Example: segnet score results/VOC2012/Segmentation/comp6_val_cls --data VOC2012

    Options:
        PREDICTIONS: A folder with ID.png for every image.
    """
    dataset = VOCDataset(data, split)
    with watched(console, "score", len(dataset)) as watch:
        evaluation = score(predictions, dataset, boundary, advance=watch.advance)
    _show_scores(evaluation, per_image, json, split=split, predictions=str(predictions))


@command(app)
@_with_network
def predict(
    *,
    checkpoint: options.Checkpoint,
    network: Network,
    inputs: options.Texts = None,
    out: options.Folder,
    camera: Annotated[int | None, {"min": 0}] = None,
    logits: bool = False,
    frames: options.MaybeCount = None,
    opacity: options.Opacity = 0.55,
    json: options.Json = None,
) -> None:
    """Segment images: NAME.png (class indices and a palette) and NAME_overlay.png (with a legend), in the image's size.

    Example: segnet predict runs/voc/best.safetensors photos 'more/*.jpg' --out predictions

    With --samples also NAME_uncertainty.png: where the samples disagree.

    Of a video or camera NAME_overlay.mp4, and the frames per second: of all that is done, and of the network alone.
    That needs PyAV: pip install 'segnet_scratch\\[video]'.

    Options:
        IMAGES: Images, folders of images, patterns in quotes ('photos/*.jpg'), videos, or camera (camera:1: the second
            one).
        --out: Folder for the results.
        --camera N: Also the camera of this number, 0 the first, until Ctrl-C.
        --logits: Also write NAME.npy, float32 (H, W, classes), and the uncertainty as an array.
        --frames: Of each video at most so many; a camera goes on until Ctrl-C.
    """
    named = [(argument, find_video(argument)) for argument in inputs or ()]
    videos = [video for _, video in named if video] + ([camera_video(camera)] if camera is not None else [])
    if not named and not videos:
        raise typer.BadParameter("missing argument IMAGES: name images, folders or videos, or give --camera")
    images = find_images([argument for argument, video in named if not video])
    targets = plan_videos(videos, out)
    segmenter = network()
    style = Style.of(segmenter.model.metadata, segmenter.model.classes, opacity)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    stopped = False
    try:
        with watched(console, "windows") as watch:
            segmenter.watch = watch.update
            for found in predict_files(segmenter, images, out, style, logits):
                if found.problem:
                    failed.append(found.problem)
                    results.append({"image": str(found.image), "problem": found.problem})
                    continue
                shares = (f"{name} {100 * share:.0f} %" for name, share in islice(found.shares.items(), 4))
                say(f"{found.files['overlay']}: {', '.join(shares)}")
                files = {kind: str(path) for kind, path in found.files.items()}
                results.append({"image": str(found.image), **files, "shares": found.shares})
        segmenter.watch = lambda done, windows: None
        for video, target in zip(videos, targets, strict=True):
            try:
                with watched(console, video.name) as watch:
                    written = predict_video(
                        *(segmenter, video, target, style, frames),
                        lambda done, length, rate: watch.update(done, length, f"{rate:.1f} frames/s"),
                    )
            except (DataError, DeviceMemoryError, MemoryError) as error:
                short = f"{video.name}: memory is short; pass a smaller --size or end other programs"
                failed.append(str(error) or short)
                results.append({"video": video.name, "problem": failed[-1]})
                continue
            failed += [written.problem] if written.problem else []
            cut = ", stopped by Ctrl-C" if written.interrupted else ", not all of it" if written.problem else ""
            rate, alone = written.frames_per_second, written.network_frames_per_second
            say(f"{target}: {written.frames} frames, {rate:.1f} frames/s, the network alone {alone:.1f}{cut}")
            figures = {"frames": written.frames, "frames_per_second": rate, "network_frames_per_second": alone}
            results.append({"video": written.source, "overlay": str(target), **figures})
            stopped = written.interrupted and video.path is not None  # a camera has no other end
            if stopped:
                break
    except KeyboardInterrupt:
        stopped = True
    write_json(json, results)
    if stopped:
        raise typer.Exit(130)
    inputs_given = len(images) + len(videos)
    if failed and inputs_given > 1:
        failed.append(f"{len(failed)} of {inputs_given} inputs had problems; the others are done")
    if failed:
        fail("\nerror: ".join(failed), 1)


@command(app, "serve")
@_with_network
def serve_command(
    *,
    checkpoint: options.Checkpoint,
    network: Network,
    host: str = LOOPBACK[0],
    port: Annotated[int, {"min": 0, "max": 65535}] = 8000,
    opacity: options.Opacity = 0.55,
) -> None:
    """Open a page on this machine that segments the photos that are dropped on it, until Ctrl-C.

    Classes can be switched off and on; with --samples, of a Bayesian network, it shows where the samples disagree.
    Needs pip install 'segnet_scratch\\[serve]'.

    Example: segnet serve runs/voc/best.safetensors

    Options:
        --host: The address to listen on; by default only this machine reaches it.
        --port: 0: any that is free.
    """
    require("flask", "serve", "segnet serve")
    segmenter = network()
    if segmenter.model.has_dropout and not segmenter.inference.samples:
        say("a Bayesian network: --samples 10 would show its uncertainty")
    if host not in LOOPBACK:
        say(f"everybody who reaches {host} can use it; there is no password", "yellow")
    style = Style.of(segmenter.model.metadata, segmenter.model.classes, opacity)
    serve(segmenter, style, checkpoint.name, host, port, lambda url: say(f"{url}  (Ctrl-C ends it)", "bold"))


@command(app, "submit")
@_with_network
def submit_command(
    *,
    checkpoint: options.Checkpoint,
    network: Network,
    data: options.Data,
    out: Path,
    split: str = "test",
    competition: Competition = Competition.comp6,
) -> None:
    """Write the results archive that VOC2012's evaluation server takes, and check it.

    results/VOC2012/Segmentation/comp6_test_cls/ID.png: indexed PNGs with VOC's palette, each as large as its image.
    Weights from ImageNet are other data: that is comp6.

    Example: segnet submit runs/voc/best.safetensors --data VOC2012 --out results.tar --flip

    Options:
        --out: The archive, NAME.tar or NAME.tgz, or a folder.
        --split: Name of the list in ImageSets/Segmentation; test needs images only, no masks.
        --competition: comp5: trained on VOC2012's own data alone. comp6: on other data too.
    """
    segmenter, dataset = network(), VOCDataset(data, split, with_masks=False)
    with watched(console, "segment", len(dataset)) as watch:
        folder = submit(segmenter, dataset, out, competition, watch.advance)
    say(f"{out}: {len(dataset)} results in {folder}, checked")


@command(app)
def report(
    run: Path,
    data: Path | None = None,
    out: options.MaybeFile = None,
    device: options.Device = "auto",
    engine: options.Engine = AUTO,
    precision: options.Precision = AUTO,
) -> None:
    """Write one HTML page of a run: curves, scores by class, confusion matrix, best and worst predictions, settings.

    It is one file that needs no network. Needs matplotlib and jinja2: pip install 'segnet_scratch\\[report]'.

    Example: segnet report runs/voc --data VOC2012

    Options:
        RUN: The folder of a run: --out of segnet train.
        --data: The data set of the run; adds scores by class, confusion, best and worst predictions.
        --out: The page; RUN/report.html unless given.
    """
    page = out or run / "report.html"
    with ExitStack() as bars:
        complete = write_report(
            *(run, page, data, device, engine, precision),
            lambda images: bars.enter_context(watched(console, "evaluate", images)).advance,
        )
    say(f"{page}" if complete else f"{page}: without predictions; --data DIR adds them")
