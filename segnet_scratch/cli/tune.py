"""`segnet tune`: which tile is the fastest for each convolution on this GPU."""

from typing import Annotated

import typer
from rich.table import Table

from segnet_scratch.cli.common import DeviceOption, app, console, parse_size
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.profile.tune import Choice
from segnet_scratch.lab.profile.tune import tune as measure
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import ARCHITECTURES


@app.command()
def tune(
    device: DeviceOption = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 16,
    size: Annotated[str, typer.Option(metavar="N|HxW", help="Of the images.")] = "224",
    model: Annotated[str, typer.Option(metavar="|".join(ARCHITECTURES), help="The network.")] = "segnet",
    width: Annotated[float, typer.Option(help="Multiplier of its channels.")] = 1.0,
    precision: Annotated[str, typer.Option(metavar="|".join(RUNG_OF_PRECISION), help="Of the convolutions.")] = "bf16",
) -> None:
    """Measure the tiles of the tensor-core convolutions on this GPU, and use the fastest from now on.

    Example: segnet tune --batch 8 --size 360x480

    For the shapes of one batch size and image size, training and inference. The choices lie in the cache folder, apart
    for each GPU and each version of the kernels. Convolutions keep their bits; batch norm's sums may round otherwise.
    """
    if model not in ARCHITECTURES:
        raise ConfigError(f"--model {model}: expected one of {', '.join(ARCHITECTURES)}")
    if precision not in RUNG_OF_PRECISION:
        raise ConfigError(f"--precision {precision}: expected one of {', '.join(RUNG_OF_PRECISION)}")
    network, sides = ARCHITECTURES[model], parse_size(size)
    with console.status("starting") as status:
        choices, path = measure(
            *(get_device(device), network.blocks_of(width), batch, sides, precision, network.classifier_kernel),
            lambda done, total: status.update(f"convolution {done + 1} of {total}"),
        )
    console.print(_table(choices))
    console.print(f"kept in {path}")


def _table(choices: list[Choice]) -> Table:
    table = Table(title="microseconds with each tile; in brackets the one that the shape suggests")
    table.add_column("convolution")
    names = list(dict.fromkeys(name for choice in choices for name in choice.seconds))
    for name in names:
        table.add_column(name, justify="right")
    for choice in choices:
        cells = []
        for name in names:
            seconds = choice.seconds.get(name)
            text = "" if seconds is None else f"{1e6 * seconds:.1f}"
            text = f"({text})" if name == choice.default else text
            cells.append(f"[bold]{text}[/bold]" if name == choice.fastest else text)
        table.add_row(choice.key, *cells)
    return table
