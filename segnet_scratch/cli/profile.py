"""`segnet profile`: what a training step, or one op, costs on a device, and how near it comes to its ceilings."""

from pathlib import Path
from typing import Annotated

import typer

from segnet_scratch.cli.common import DeviceOption, JsonOption, app, console, parse_size
from segnet_scratch.display import write_json
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.profile import roofline, trace
from segnet_scratch.lab.profile.counting import CountingDevice
from segnet_scratch.lab.profile.ladder import SHAPES
from segnet_scratch.lab.profile.measure import How, count_step, profile_op, profile_step
from segnet_scratch.lab.profile.step import DEFAULTS, Work
from segnet_scratch.lab.profile.tables import show
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.resources import ARCHITECTURES
from segnet_scratch.segnet import ARCHITECTURES as MODELS
from segnet_scratch.segnet import DECODERS


@app.command()
def profile(
    op: Annotated[
        str | None, typer.Argument(help="One op in all its rungs, such as conv2d, instead of a step.")
    ] = None,
    device: DeviceOption = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="Images; cuda 16, else 1.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|HxW", help="Of the images; 224, on host 32.")] = None,
    model: Annotated[str, typer.Option(metavar="|".join(MODELS), help="The network.")] = "segnet",
    decoder: Annotated[str, typer.Option(metavar="|".join(DECODERS), help="Its decoder.")] = "indices",
    width: Annotated[float, typer.Option(help="Multiplier of its channels.")] = 1.0,
    inference: Annotated[bool, typer.Option("--inference", help="Forward in evaluation mode, no training.")] = False,
    engine: Annotated[str, typer.Option(metavar="layers|fused", help="What computes the step.")] = "layers",
    precision: Annotated[
        str, typer.Option(metavar="|".join(RUNG_OF_PRECISION), help="Of the fused engine.")
    ] = "float32",
    counts: Annotated[
        bool, typer.Option("--counts", help="Compute nothing: operations, bytes, memory, launches, registers.")
    ] = False,
    shape: Annotated[str | None, typer.Option(metavar="N,H,W,C", help="The op's map.")] = None,
    outputs: Annotated[
        int | None, typer.Option(min=1, help="Output channels of a convolution; C unless given.")
    ] = None,
    kernel: Annotated[int, typer.Option(min=1, help="Kernel of a convolution, an odd number.")] = 3,
    passes: Annotated[int | None, typer.Option(min=1, help="Timed repetitions; cuda 20, numpy 5, host 2.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="sm_NN|all", help="GPUs whose registers and occupancy are shown; again for each."),
    ] = None,
    json: JsonOption = None,
    picture: Annotated[
        Path | None, typer.Option("--roofline", metavar="FILE.png", help="Draw what each op reaches.", dir_okay=False)
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE.json", help="A time line, for ui.perfetto.dev.", dir_okay=False),
    ] = None,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="A range for each op, under Nsight Systems.")] = False,
) -> None:
    """Measure a training step of SegNet op by op, or one op rung by rung: work, time, and how near to the ceilings.

    Example: segnet profile --roofline roofline.png --trace step.json. Example: segnet profile conv2d --shape 4,56,56,64

    Times are medians on the device's own clock; ceilings (a large copy, a large product) are measured in the same run.
    """
    if model not in MODELS:
        raise ConfigError(f"--model {model}: expected one of {', '.join(MODELS)}")
    if engine not in ("layers", "fused"):
        raise ConfigError(f"--engine {engine}: expected layers or fused")
    if precision not in RUNG_OF_PRECISION or (precision != "float32" and engine == "layers"):
        raise ConfigError(f"--precision {precision}: expected {', '.join(RUNG_OF_PRECISION)}, with --engine fused")
    if counts and (picture or timeline):
        raise ConfigError("--roofline and --trace show times, which --counts does not take; leave it out")
    if picture is not None:
        roofline.load()
    with console.status("starting") as status:
        chosen = CountingDevice() if counts else get_device(device)
        images, pixels, usual = DEFAULTS[chosen.name]
        how = How(passes or usual, _architectures(arch or []), nvtx, status.update)
        if op is not None:
            found = profile_op(op, _shape(shape, chosen.name), outputs, kernel, chosen, how)
        else:
            sides = (pixels, pixels) if size is None else parse_size(size)
            work = Work(model, decoder, width, batch or images, sides, inference, engine, precision)
            found = count_step(work, how) if counts else profile_step(work, chosen, how, timeline is not None)
    show(console, found, by_layer=op is None)
    write_json(json, found.to_json())
    if picture is not None:
        roofline.draw(found, picture, by_layer=op is None)
    if timeline is not None:
        trace.write(timeline, found.spans, found.title)


def _architectures(names: list[str]) -> tuple[str, ...]:
    for name in names:
        if name not in (*ARCHITECTURES, "all"):
            raise ConfigError(f"--arch {name}: expected all, or one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES if "all" in names else tuple(names)


def _shape(text: str | None, device: str) -> tuple[int, int, int, int]:
    if text is None:
        return SHAPES[device]
    try:
        n, h, w, c = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shape {text}: expected four numbers, N,H,W,C, for example 4,56,56,64") from None
    if min(n, h, w, c) < 1:
        raise ConfigError(f"--shape {text}: expected four numbers of at least 1")
    return n, h, w, c
