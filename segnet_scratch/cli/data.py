"""`segnet data ...`: data sets in PASCAL VOC's layout."""

from pathlib import Path
from typing import Annotated

import typer

from segnet_scratch.cli.common import app, say
from segnet_scratch.data import write_sample

data_app = typer.Typer(help="Data sets in PASCAL VOC's layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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
    say(f"{train} training and {val} validation images in {root}")
