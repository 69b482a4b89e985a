"""`segnet profile`, `tune`, `memory`: what a training step, or one op, costs in time and in memory."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from segnet_scratch.cli import options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, console, join_ranks, say
from segnet_scratch.display import numbers_table, write_json
from segnet_scratch.engine.ledger import Account, accounts
from segnet_scratch.engine.network import RUNG_OF_PRECISION, Network
from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.profile import measure, roofline, trace
from segnet_scratch.lab.profile.ladder import SHAPES
from segnet_scratch.lab.profile.tables import print_columns, show
from segnet_scratch.lab.profile.tune import Choice
from segnet_scratch.lab.profile.tune import tune as measure_tiles
from segnet_scratch.parallel import ALONE
from segnet_scratch.progress import watched
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.occupancy import ARCHITECTURES
from segnet_scratch.segnet import ARCHITECTURES as NETWORKS
from segnet_scratch.segnet import DECODERS

MEBIBYTE = 2**20

Batch = Annotated[int, typer.Option(min=1, help="Images.")]
ImageSize = Annotated[str, typer.Option(metavar="N|HxW", help="Of the images.")]
Model = Annotated[str, typer.Option(help="The network.", **options.one_of(NETWORKS))]
Width = Annotated[float, typer.Option(help="Multiplier of its channels.")]
Precision = Annotated[str, typer.Option(help="Of the fused engine.", **options.one_of(RUNG_OF_PRECISION))]


@command(app)
def profile(
    op: str | None = None,
    device: options.Device = "auto",
    batch: options.MaybeCount = None,
    size: str | None = None,
    model: Model = "segnet",
    decoder: Annotated[str, options.one_of(DECODERS)] = "indices",
    width: Width = 1.0,
    inference: bool = False,
    engine: Annotated[str, options.one_of(("layers", "fused"))] = "layers",
    precision: Precision = "float32",
    counts: bool = False,
    shape: str | None = None,
    outputs: options.MaybeCount = None,
    kernel: options.Count = 3,
    rung: str | None = None,
    passes: options.MaybeCount = None,
    arch: Annotated[list[str] | None, options.one_of(("all", *ARCHITECTURES))] = None,
    json: options.Json = None,
    picture: options.MaybeFile = None,
    timeline: options.MaybeFile = None,
    nvtx: bool = False,
    sync_bn: bool = False,
) -> None:
    """Measure a training step of SegNet op by op, or one op rung by rung: work, time, and how near to the ceilings.

    Example: segnet profile --roofline roofline.png --trace step.json. Example: segnet profile conv2d --shape 4,56,56,64

    Times are medians on the device's own clock; ceilings (a large copy, a large product) are measured in the same run.
    Under mpirun or srun every rank makes the step with so many images, and the first one shows what it saw.

    Options:
        op: One op in all its rungs, such as conv2d, instead of a step.
        --batch: Images; cuda 16, else 1.
        --size N|HxW: Of the images; 224, on host 32.
        --decoder: Its decoder.
        --inference: Forward in evaluation mode, no training.
        --engine: What computes the step.
        --counts: Compute nothing: operations, bytes, memory, launches, registers.
        --shape N,H,W,C: The op's map.
        --outputs: Output channels of a convolution; C unless given.
        --kernel: Kernel of a convolution, an odd number.
        --rung: One rung of the op alone, such as bf16 or hopper.
        --passes: Timed repetitions; cuda 20, numpy 5, host 2.
        --arch: GPUs whose registers and occupancy are shown; again for each.
        --roofline FILE.png: Draw what each op reaches.
        --trace FILE.json: A time line, for ui.perfetto.dev.
        --nvtx: A range for each op, under Nsight Systems.
        --sync-bn: Under mpirun: batch norm over all ranks.
    """
    ranks = join_ranks()
    if sync_bn and engine == "fused":
        raise ConfigError("--sync-bn: the fused engine has batch norm by rank; leave out --engine fused")
    if precision != "float32" and engine == "layers":
        raise ConfigError(f"--precision {precision}: it is the fused engine's; add --engine fused")
    if counts and (picture or timeline):
        raise ConfigError("--roofline and --trace show times, which --counts does not take; leave it out")
    if picture is not None:
        roofline.load()
    with watched(console, "profile") as watch:
        chosen = measure.CountingDevice() if counts else get_device(device)
        images, pixels, usual = measure.DEFAULTS[chosen.name]
        shown = ARCHITECTURES if "all" in (arch or ()) else tuple(arch or ())
        how = measure.How(passes or usual, shown, nvtx, watch.say)
        if op is not None:
            found = measure.profile_op(op, _shape(shape, chosen.name), outputs, kernel, chosen, how, rung)
        else:
            sides = (pixels, pixels) if size is None else options.image_size(size)
            shared = ALONE if counts else ranks.on(chosen)
            network = model, decoder, width, batch or images, sides
            work = measure.Workload(*network, inference, engine, precision, shared, sync_bn)
            spans = timeline is not None
            found = measure.count_step(work, how) if counts else measure.profile_step(work, chosen, how, spans)
    if not ranks.leads:
        return
    show(console, found, by_layer=op is None)
    write_json(json, found.to_json())
    if picture is not None:
        roofline.draw(found, picture, by_layer=op is None)
    if timeline is not None:
        trace.write(timeline, found.spans, found.title)


def _shape(text: str | None, device: str) -> tuple[int, int, int, int]:
    if text is None:
        return SHAPES[device]
    sizes = options.shape(f"--shape {text}", text)
    if len(sizes) != 4:
        raise ConfigError(f"--shape {text}: expected four numbers, N,H,W,C, for example 4,56,56,64")
    return sizes[0], sizes[1], sizes[2], sizes[3]


@command(app)
def tune(
    device: options.Device = "auto",
    batch: Batch = 16,
    size: ImageSize = "224",
    model: Model = "segnet",
    width: Width = 1.0,
    precision: Precision = "bf16",
) -> None:
    """Measure tiles of the tensor-core convolutions on this GPU; use the fastest from now on.

    Example: segnet tune --batch 8 --size 360x480

    For the shapes of one batch size and image size, training and inference. The choices lie in the cache folder, apart
    for each GPU and each version of the kernels. Convolutions keep their bits; batch norm's sums may round otherwise.
    """
    network = _network(model, width, measure.CLASSES, batch, options.image_size(size))
    with watched(console, "convolution") as watch:
        choices, path = measure_tiles(get_device(device), network, precision, watch.update)
    show_tiles(console, choices)
    say(f"kept in {path}")


def _network(model: str, width: float, classes: int, batch: int, size: tuple[int, int]) -> Network:
    return Network(NETWORKS[model].blocks_of(width), classes, batch, size, NETWORKS[model].classifier_kernel)


def show_tiles(console: Console, choices: list[Choice]) -> None:
    """A row a convolution, a column a tile."""
    names = list(dict.fromkeys(name for found in choices for name in found.seconds))
    say("microseconds with each tile; in brackets what is taken unless measured")
    rows = []
    for found in choices:
        cells = {name: f"{1e6 * seconds:.1f}" for name, seconds in found.seconds.items()}
        if found.default in cells:
            cells[found.default] = f"({cells[found.default]})"
        cells[found.fastest] = f"[bold]{cells[found.fastest]}[/bold]"
        rows.append(([found.key, *(cells.get(name, "") for name in names)], ""))
    print_columns(console, ["convolution", *names], rows)


@command(app)
def memory(
    batch: Batch = 16,
    size: ImageSize = "224",
    model: Model = "segnet",
    width: Width = 1.0,
    classes: Annotated[int, {"min": 1, "max": 255}] = 21,
    precision: Precision = "bf16",
    json: options.Json = None,
) -> None:
    """Count what a training step keeps in memory: the fused engine, this project's layers, PyTorch on paper.

    Example: segnet memory --batch 8 --size 360x480

    Maps, indices and workspaces; parameters and momenta, which all have, are left out. Nothing is allocated.

    Options:
        --classes: Outputs of the classifier.
    """
    sides = options.image_size(size)
    found = accounts(_network(model, width, classes, batch, sides), get_device("auto"), RUNG_OF_PRECISION[precision])
    console.print(
        _memory_table(found, f"{model}, width {width:g}, {batch} images of {sides[0]}x{sides[1]}, {precision}, MiB")
    )
    write_json(json, {account.name: account.entries | {"peak": account.peak} for account in found})


def _memory_table(found: list[Account], title: str) -> Table:
    table = numbers_table("at the fullest moment", *(account.name for account in found))
    table.title = title
    for kind in dict.fromkeys(kind for account in found for kind in account.entries):
        cells = (account.entries.get(kind) for account in found)
        table.add_row(kind, *("-" if nbytes is None else f"{nbytes / MEBIBYTE:,.1f}" for nbytes in cells))
    table.add_section()
    table.add_row("together", *(f"{account.peak / MEBIBYTE:,.1f}" for account in found), style="bold")
    table.add_row("fused is", *(f"{found[0].peak / account.peak:.2f} of it" for account in found))
    return table
