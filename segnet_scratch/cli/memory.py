"""`segnet memory`: what a training step keeps in memory, by engine, counted from shapes alone."""

from typing import Annotated

import typer
from rich.table import Table

from segnet_scratch.cli.common import JsonOption, app, console, parse_size
from segnet_scratch.display import write_json
from segnet_scratch.engine.ledger import Account, accounts
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.errors import ConfigError
from segnet_scratch.segnet import ARCHITECTURES

MEBIBYTE = 2**20


@app.command()
def memory(
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 16,
    size: Annotated[str, typer.Option(metavar="N|HxW", help="Of the images.")] = "224",
    model: Annotated[str, typer.Option(metavar="|".join(ARCHITECTURES), help="The network.")] = "segnet",
    width: Annotated[float, typer.Option(help="Multiplier of its channels.")] = 1.0,
    classes: Annotated[int, typer.Option(min=1, max=255, help="Outputs of the classifier.")] = 21,
    precision: Annotated[str, typer.Option(metavar="|".join(RUNG_OF_PRECISION), help="Of the fused engine.")] = "bf16",
    json: JsonOption = None,
) -> None:
    """Count what a training step keeps in memory: the fused engine, this project's layers, PyTorch on paper.

    Example: segnet memory --batch 8 --size 360x480

    Maps, indices and workspaces; parameters, gradients and momenta, which all have, are left out. Nothing is allocated.
    """
    if model not in ARCHITECTURES:
        raise ConfigError(f"--model {model}: expected one of {', '.join(ARCHITECTURES)}")
    if precision not in RUNG_OF_PRECISION:
        raise ConfigError(f"--precision {precision}: expected one of {', '.join(RUNG_OF_PRECISION)}")
    sides = parse_size(size)
    network = ARCHITECTURES[model]
    rung = RUNG_OF_PRECISION[precision]
    found = accounts(network.blocks_of(width), classes, batch, sides, rung, network.classifier_kernel)
    console.print(_table(found, f"{model}, width {width:g}, {batch} images of {sides[0]}x{sides[1]}, {precision}, MiB"))
    write_json(json, {account.name: account.entries | {"peak": account.peak} for account in found})


def _table(found: list[Account], title: str) -> Table:
    table = Table(title=title)
    table.add_column("at the fullest moment")
    for account in found:
        table.add_column(account.name, justify="right")
    for kind in dict.fromkeys(kind for account in found for kind in account.entries):
        cells = (account.entries.get(kind) for account in found)
        table.add_row(kind, *("-" if nbytes is None else f"{nbytes / MEBIBYTE:,.1f}" for nbytes in cells))
    table.add_section()
    table.add_row("together", *(f"{account.peak / MEBIBYTE:,.1f}" for account in found), style="bold")
    table.add_row("fused is", *(f"{found[0].peak / account.peak:.2f} of it" for account in found))
    return table
