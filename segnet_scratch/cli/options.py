"""Options that several commands share, and what the values of options mean."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from segnet_scratch.boundary import Boundary
from segnet_scratch.config import ENGINES, MINIMUM_SIZE, PRECISIONS
from segnet_scratch.errors import CheckpointError, ConfigError
from segnet_scratch.lab.workbench.setup import Contents, Shape
from segnet_scratch.runtime.devices import NAMES
from segnet_scratch.segnet import SegNet

T = TypeVar("T")


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """Of an option whose value is one of these words; ConfigError for any other."""
    known = tuple(names)

    def check(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
        for word in [value] if isinstance(value, str) else value or ():
            if word not in known:
                raise ConfigError(f"{option.opts[0]} {word}: expected one of {', '.join(known)}")
        return value

    return {"metavar": "|".join(known), "callback": check}


def _replaceable(beginning: str) -> Callable[[Path | None], Path | None]:
    """Refuses a file for results that begins otherwise now, as a pattern: it is an input, most often."""

    def check(path: Path | None) -> Path | None:
        if path is not None and path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                start = file.read(80)
            if not re.match(beginning.encode(), start):
                raise typer.BadParameter(f"{path} is there already and no earlier result; choose another name")
        return path

    return check


_RESULTS = "image|video|miou|step|root|split|op|kernel|title|fused|passed"  # with `image` begins what predict writes
_VOC_ROOT = "A VOC root (with JPEGImages, SegmentationClass, ImageSets/Segmentation), or a folder above it."
_DEVICES = (
    "cuda: the kernels on a GPU. host: the same kernels on the CPU, for checking. numpy: NumPy, for training "
    "without a GPU. auto: cuda where CuPy sees a GPU, else numpy."
)
_ENGINES = (
    "fused: a few large kernels for tensor cores. layers: one kernel an op. auto: fused on a GPU of sm_80 or newer "
    "where the network fits, else layers."
)
_PRECISIONS = "How convolutions multiply. auto: bf16 with the fused engine on a GPU, else float32."
_BOUNDARY = (
    "Also boundary F1, contours within 0.75 % of the image diagonal: csurka, as its paper defines it; "
    "authors, as the SegNet paper's figures were computed (needs SciPy)."
)

Texts = list[str] | None  # of an option that may be given more than once
Count = Annotated[int, {"min": 1}]
MaybeCount = Annotated[int | None, {"min": 1}]
Number = Annotated[int, {"min": 0}]
File = Annotated[Path, {"dir_okay": False}]
MaybeFile = Annotated[Path | None, {"dir_okay": False}]
Folder = Annotated[Path, {"file_okay": False}]

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint, such as RUN/best.safetensors.")]
Data = Annotated[Path, typer.Option(help=_VOC_ROOT)]
Split = Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")]
Device = Annotated[str, typer.Option(help=_DEVICES, **one_of(NAMES))]
Engine = Annotated[str, typer.Option(help=_ENGINES, **one_of(ENGINES))]
Precision = Annotated[str, typer.Option(help=_PRECISIONS, **one_of(PRECISIONS))]
Size = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Network input, N or HxW; as in training unless given.")
]
BoundaryF1 = Annotated[Boundary | None, typer.Option(help=_BOUNDARY)]
Opacity = Annotated[float, typer.Option(min=0, max=1, help="Of the class colours over the image in overlays, 0 to 1.")]
_SCORES = {"metavar": "FILE.csv", "dir_okay": False, "callback": _replaceable("id,miou")}
PerImage = Annotated[Path | None, typer.Option(help="Also the scores of each image, as CSV.", **_SCORES)]
_RESULT = {"metavar": "FILE", "dir_okay": False, "callback": _replaceable(rf'(\[\n  )?\{{\n +"({_RESULTS})": |\[\]\n$')}
Json = Annotated[Path | None, typer.Option(help="Also write the result to this file.", **_RESULT)]


def by_name(option: str, texts: Sequence[str] | None, convert: Callable[[str, str], T]) -> dict[str, T]:
    """NAME=VALUE texts as a dict; `convert` gets the option, for messages, and the value."""
    values: dict[str, T] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            example = f"{option} x={_EXAMPLES[option]}"
            raise ConfigError(f"{option} {text}: expected NAME=VALUE, for example {example}")
        if name in values:
            raise ConfigError(f"{option} {text}: {name} is given twice")
        values[name] = convert(f"{option} {text}", value)
    return values


_EXAMPLES = {"--shape": "2,45,37,64", "--arg": "1000", "--input": "x.npy"}


def _numbers(kind: Callable[[str], T], separator: str, text: str) -> tuple[T, ...]:
    """The numbers that are written with a separator, a pattern, between; none where something else is among them."""
    try:
        return tuple(kind(part) for part in re.split(separator, text.lower()))
    except ValueError:
        return ()


def shape(option: str, text: str) -> Shape:
    """Sizes separated by commas or x: 2,45,37,64 or 16x16."""
    sizes = _numbers(int, "[x,]", text)
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{option}: expected positive sizes separated by commas, for example 2,45,37,64")
    return sizes


def scales(text: str) -> tuple[float, ...]:
    """Of `--scales A,B,...`."""
    if not (found := _numbers(float, ",", text)):
        raise ConfigError(f"--scales {text}: expected numbers with commas between, for example 0.75,1,1.25")
    return found


def sides(option: str, text: str) -> tuple[int, int]:
    """(height, width) of an option's value N or HxW; ConfigError for anything else."""
    numbers = _numbers(int, "x", text)
    if not 1 <= len(numbers) <= 2:
        raise ConfigError(f"{option} {text}: expected N or HxW, for example 224 or 360x480")
    return numbers[0], numbers[-1]


def image_size(size: str) -> tuple[int, int]:
    """(height, width) of `--size N` or `--size HxW`; ConfigError for anything else, or below the smallest side."""
    height, width = sides("--size", size)
    if min(height, width) < MINIMUM_SIZE:
        raise ConfigError(f"--size {size}: expected at least {MINIMUM_SIZE} pixels on each side")
    return height, width


def input_size(checkpoint: Path, model: SegNet, size: str | None) -> tuple[int, int]:
    """The size given as N or HxW, else the one that the model was trained at."""
    if size is not None:
        return image_size(size)
    if "size" not in model.metadata:
        raise CheckpointError(f"{checkpoint} does not say what size it was trained at; give --size N or --size HxW")
    height, width = model.metadata["size"]
    return height, width


def number(option: str, text: str) -> int | float:
    """An integer if it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{option}: expected a number")


def contents(option: str, text: str) -> Contents:
    """FILE.npy, a number, `random`, or `null`."""
    if text in ("random", "null"):
        return text if text == "random" else None
    if not text.endswith(".npy"):
        return number(f"{option} (or FILE.npy, random, null)", text)
    try:
        return np.asarray(np.load(Path(text), allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{option}: cannot read {text}: {error}") from error
