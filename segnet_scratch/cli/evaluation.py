"""`segnet eval`, `predict`, `serve`, `submit`, `report`: what is done with a trained network."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from segnet_scratch import weights
from segnet_scratch.boundary import Boundary
from segnet_scratch.cli.common import (
    CheckpointArgument,
    DataOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    PrecisionOption,
    SizeOption,
    app,
    console,
    fail,
    input_size,
    join_ranks,
    replaceable,
    say,
    sides,
)
from segnet_scratch.config import AUTO
from segnet_scratch.data import VOCDataset
from segnet_scratch.data.drawing import Style
from segnet_scratch.display import (
    evaluation_progress,
    scores_table,
    video_progress,
    write_json,
    write_per_image,
)
from segnet_scratch.errors import ConfigError, DataError, DeviceMemoryError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.extras import require
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.predict import find_images, predict_files
from segnet_scratch.progress import watched
from segnet_scratch.report import write_report
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.score import score
from segnet_scratch.serve import LOOPBACK, serve
from segnet_scratch.submit import Competition, submit
from segnet_scratch.video import camera_video, find_video, plan_videos, predict_video

Network = Callable[[], Segmenter]

_AVERAGING = "Averaging of several predictions"


def _network(
    *,
    checkpoint: CheckpointArgument,
    device: DeviceOption = "auto",
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    size: SizeOption = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Average with the mirrored image.", rich_help_panel=_AVERAGING)
    ] = False,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Average over the input size times each of these, for example 0.75,1,1.25.",
            rich_help_panel=_AVERAGING,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Do not resize the image (but for --scales): slide a window of this size over it. For images much "
            "larger than those of training.",
            rich_help_panel=_AVERAGING,
        ),
    ] = None,
    stride: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="From one window to the next; three quarters of a window unless given.",
            rich_help_panel=_AVERAGING,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Average N passes with dropout on, of a network trained with dropout=true (Bayesian SegNet).",
            rich_help_panel=_AVERAGING,
        ),
    ] = 0,
) -> Segmenter:
    """The network that the options of a command mean, and how it is applied; says so."""
    inference = Inference(
        _numbers("--scales", scales) if scales is not None else (1.0,),
        flip,
        None if window is None else sides("--window", window),
        None if stride is None else sides("--stride", stride),
        samples,
    )
    rung = "tf32" if precision == "tf32" else None
    model = weights.load(checkpoint, get_device(device), fold=True, rung=rung)
    segmenter = Segmenter(model, input_size(checkpoint, model, size), inference, engine, precision)
    say(f"{segmenter}, input {segmenter.size[0]}x{segmenter.size[1]}")
    return segmenter


def _applies_network(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `_network`; it gets the checkpoint's path, and what makes the network ready."""
    own = [p for p in signature(command).parameters.values() if p.name not in ("checkpoint", "network")]
    first, *options = signature(_network).parameters.values()
    named = {option.name for option in (first, *options)}

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: value for name, value in values.items() if name in named}
        rest = {name: value for name, value in values.items() if name not in named}
        command(checkpoint=values["checkpoint"], network=partial(_network, **given), **rest)

    merged = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (first, *own, *options)]
    run.__signature__ = Signature(merged)  # type: ignore[attr-defined]
    return run


BoundaryOption = Annotated[
    Boundary | None,
    typer.Option(
        "--boundary",
        help="Also boundary F1, contours within 0.75 % of the image diagonal: csurka, as its paper defines it; "
        "authors, as the SegNet paper's figures were computed (needs SciPy).",
    ),
]
PerImageOption = Annotated[
    Path | None,
    typer.Option(
        help="Also the scores of each image, as CSV.",
        metavar="FILE.csv",
        dir_okay=False,
        callback=replaceable("id,miou"),
    ),
]


OpacityOption = Annotated[
    float, typer.Option(min=0, max=1, help="Of the class colours over the image in overlays, 0 to 1.")
]


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between, for example 0.75,1,1.25") from None


@app.command(name="eval")
@_applies_network
def evaluate_command(
    *,
    checkpoint: Path,
    network: Network,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")] = "val",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time, where nothing is averaged.")] = 4,
    boundary: BoundaryOption = None,
    per_image: PerImageOption = None,
    json: JsonOption = None,
) -> None:
    """Score a checkpoint by the VOC protocol: one confusion matrix over the whole split, void ignored.

    The image is resized to the network's input size and the logits bilinearly back to the size of the ground truth.

    Example: segnet eval runs/voc/best.safetensors --data VOC2012 --boundary csurka --flip --scales 0.75,1,1.25

    Under mpirun or srun each rank takes its share of the images.

    IoU = TP / (TP + FP + FN), accuracy = TP / (TP + FN), precision = TP / (TP + FP) of a class's pixels.
    """
    ranks = join_ranks()
    with ranks.guarded():
        segmenter, dataset = network(), VOCDataset(data, split)
        segmenter.batch = batch
        with evaluation_progress(console, len(dataset)) as advance:
            evaluation = evaluate(segmenter, dataset, boundary, advance=advance, ranks=ranks)
    if not ranks.leads:
        return
    console.print(scores_table(evaluation))
    write_per_image(per_image, evaluation)
    write_json(json, {**evaluation.to_json(), "split": split, "checkpoint": str(checkpoint)})


@app.command(name="score")
def score_command(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="A folder with ID.png for every image.", file_okay=False)
    ],
    data: DataOption,
    split: Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")] = "val",
    boundary: BoundaryOption = None,
    per_image: PerImageOption = None,
    json: JsonOption = None,
) -> None:
    """Score label maps that were made elsewhere, by the same code as segnet eval.

    ID.png: class numbers, indexed or grey, of the size of the ground truth, as segnet predict and submit write them.

    Example: segnet score results/VOC2012/Segmentation/comp6_val_cls --data VOC2012
    """
    dataset = VOCDataset(data, split)
    with evaluation_progress(console, len(dataset), "score") as advance:
        evaluation = score(predictions, dataset, boundary, advance=advance)
    console.print(scores_table(evaluation))
    write_per_image(per_image, evaluation)
    write_json(json, {**evaluation.to_json(), "split": split, "predictions": str(predictions)})


@app.command()
@_applies_network
def predict(
    *,
    checkpoint: Path,
    network: Network,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES",
            help="Images, folders of images, patterns in quotes ('photos/*.jpg'), videos, or camera (camera:1: the "
            "second one).",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.", file_okay=False)],
    camera: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Also the camera of this number, 0 the first, until Ctrl-C.")
    ] = None,
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Also write NAME.npy, float32 (H, W, classes), and the uncertainty as an array."),
    ] = False,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Of each video at most so many; a camera goes on until Ctrl-C.")
    ] = None,
    opacity: OpacityOption = 0.55,
    json: JsonOption = None,
) -> None:
    """Segment images: NAME.png (class indices and a palette) and NAME_overlay.png (with a legend), in the image's size.

    Example: segnet predict runs/voc/best.safetensors photos 'more/*.jpg' --out predictions

    With --samples also NAME_uncertainty.png: where the samples disagree.

    Of a video or camera NAME_overlay.mp4, and the frames per second: of all that is done, and of the network alone.
    That needs PyAV: pip install 'segnet_scratch\\[video]'.
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
            for prediction in predict_files(segmenter, images, out, style, logits):
                if prediction.problem:
                    failed.append(prediction.problem)
                    results.append({"image": str(prediction.image), "problem": prediction.problem})
                    continue
                shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(prediction.shares.items())[:4])
                say(f"{prediction.files['overlay']}: {shares}")
                files = {kind: str(path) for kind, path in prediction.files.items()}
                results.append({"image": str(prediction.image), **files, "shares": prediction.shares})
        for video, target in zip(videos, targets, strict=True):
            try:
                with video_progress(console, video.name) as show:
                    segmenter.watch = lambda done, windows: None
                    written = predict_video(segmenter, video, target, style, frames, show)
            except (DataError, DeviceMemoryError, MemoryError) as error:
                failed.append(
                    str(error) or f"{video.name}: memory is short; pass a smaller --size or end other programs"
                )
                results.append({"video": video.name, "problem": str(error)})
                continue
            failed += [written.problem] if written.problem else []
            cut = ", stopped by Ctrl-C" if written.interrupted else ", not all of it" if written.problem else ""
            rates = (
                f"{written.frames_per_second:.1f} frames/s, the network alone {written.network_frames_per_second:.1f}"
            )
            say(f"{target}: {written.frames} frames, {rates}{cut}")
            results.append(
                {
                    "video": written.source,
                    "overlay": str(target),
                    "frames": written.frames,
                    "frames_per_second": written.frames_per_second,
                    "network_frames_per_second": written.network_frames_per_second,
                }
            )
            stopped = written.interrupted and not video.is_camera  # a camera has no other end
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


@app.command(name="serve")
@_applies_network
def serve_command(
    *,
    checkpoint: Path,
    network: Network,
    host: Annotated[
        str, typer.Option(help="The address to listen on; by default only this machine reaches it.")
    ] = LOOPBACK[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    opacity: OpacityOption = 0.55,
) -> None:
    """Open a page on this machine that segments the photos that are dropped on it, until Ctrl-C.

    Classes can be switched off and on; with --samples, of a Bayesian network, it shows where the samples disagree.
    Needs pip install 'segnet_scratch\\[serve]'.

    Example: segnet serve runs/voc/best.safetensors
    """
    require("flask", "serve", "segnet serve")
    segmenter = network()
    if segmenter.model.has_dropout and not segmenter.inference.samples:
        say("a Bayesian network: --samples 10 would show its uncertainty")
    if host not in LOOPBACK:
        say(f"everybody who reaches {host} can use it; there is no password", "yellow")
    style = Style.of(segmenter.model.metadata, segmenter.model.classes, opacity)
    serve(segmenter, style, checkpoint.name, host, port, lambda url: say(f"{url}  (Ctrl-C ends it)", "bold"))


@app.command(name="submit")
@_applies_network
def submit_command(
    *,
    checkpoint: Path,
    network: Network,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="The archive, NAME.tar or NAME.tgz, or a folder.")],
    split: Annotated[
        str, typer.Option(help="Name of the list in ImageSets/Segmentation; test needs images only, no masks.")
    ] = "test",
    competition: Annotated[
        Competition, typer.Option(help="comp5: trained on VOC2012's own data alone. comp6: on other data too.")
    ] = Competition.comp6,
) -> None:
    """Write the results archive that VOC2012's evaluation server takes, and check it.

    results/VOC2012/Segmentation/comp6_test_cls/ID.png: indexed PNGs with VOC's palette, each as large as its image.
    Weights from ImageNet are other data: that is comp6.

    Example: segnet submit runs/voc/best.safetensors --data VOC2012 --out results.tar --flip
    """
    segmenter, dataset = network(), VOCDataset(data, split, with_masks=False)
    with evaluation_progress(console, len(dataset), "segment") as advance:
        folder = submit(segmenter, dataset, out, competition, advance)
    say(f"{out}: {len(dataset)} results in {folder}, checked")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run: --out of segnet train.", metavar="RUN")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="The data set of the run; adds scores by class, confusion, best and worst predictions."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; RUN/report.html unless given.", dir_okay=False)
    ] = None,
    device: DeviceOption = "auto",
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
) -> None:
    """Write one HTML page of a run: curves, scores by class, confusion matrix, best and worst predictions, settings.

    It is one file that needs no network. Needs matplotlib and jinja2: pip install 'segnet_scratch\\[report]'.

    Example: segnet report runs/voc --data VOC2012
    """
    page = out or run / "report.html"
    with ExitStack() as bars:
        complete = write_report(
            *(run, page, data, device, engine, precision),
            lambda images: bars.enter_context(evaluation_progress(console, images)),
        )
    say(f"{page}" if complete else f"{page}: without predictions; --data DIR adds them")
