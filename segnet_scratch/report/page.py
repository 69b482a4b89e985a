"""What a page says and shows of a run, gathered from its folder and, where the data is at hand, its best network."""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from segnet_scratch import weights
from segnet_scratch.boundary import Boundary
from segnet_scratch.config import AUTO, NO_VALIDATION, Config, describe, difference, load_config
from segnet_scratch.data import VOID, VOCDataset, indexed_picture, resize_image, resize_mask
from segnet_scratch.data.drawing import jpeg_uri, png_uri
from segnet_scratch.errors import DataError, require
from segnet_scratch.evaluate import Evaluation, ImageScore, evaluate
from segnet_scratch.files import write_durably
from segnet_scratch.inference import Segmenter, scaled
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.report.curves import Rows, draw_curves, series
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.run_record import Session, read_sessions, versions
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import SegNet

_EXAMPLES = 4  # best ones, and as many worst ones
_WIDTH = 420  # pixels of a picture at most: twice what the page gives it, for fine screens and for print
_WRONG = np.array([214, 40, 40])

Progress = Callable[[int], Callable[[int], None]]  # told the number of images, gives what is told how many are done


@dataclass(frozen=True)
class Example:
    """One image of the validation set on the page; its pictures are data URIs."""

    score: ImageScore
    image: str
    truth: str
    prediction: str
    errors: str


def example(score: ImageScore, index: int, dataset: VOCDataset, segmenter: Segmenter) -> Example:
    """Image, truth and prediction of a sample, made as small as the page needs them."""
    image, truth, _ = dataset.sample(index)
    found = segmenter(image).labels
    size = scaled(truth.shape, min(1.0, _WIDTH / truth.shape[1]))
    image, truth, found = resize_image(image, size), resize_mask(truth, size), resize_mask(found, size)
    wrong = (truth != found) & (truth != VOID)
    grey = 0.6 * image.mean(axis=2, keepdims=True) + 90  # pale, so that red stands out
    errors = np.where(wrong[..., None], _WRONG, np.where((truth == VOID)[..., None], 255, grey))
    right, predicted = (png_uri(indexed_picture(mask, dataset.palette)) for mask in (truth, found))
    return Example(score, jpeg_uri(image), right, predicted, jpeg_uri(np.rint(errors.clip(0, 255)).astype(np.uint8)))


@dataclass(frozen=True)
class Validation:
    """The best network of a run on the validation split."""

    model: SegNet
    evaluation: Evaluation
    best: list[Example]
    worst: list[Example]
    seconds: float
    palette: np.ndarray  # the colour of every label, uint8 (256, 3)

    @property
    def parameters(self) -> int:
        """Numbers that were learnt."""
        return sum(math.prod(parameter.shape) for parameter in self.model.parameters())

    @property
    def classes(self) -> list[dict[str, Any]]:
        """One row per class, in the order of labels: fractions, NaN where there is no number."""
        scores = self.evaluation.scores
        names = ("name", "colour", "iou", "accuracy", "precision", "share")
        colours = ["#" + bytes(colour).hex() for colour in self.palette]
        shares = scores.class_pixels / max(1, scores.pixels)
        columns = (self.evaluation.names, colours, scores.iou, scores.accuracy, scores.precision, shares)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=False)]

    @property
    def confusion(self) -> list[tuple[str, list[float]]]:
        """Name of a true class, and the share of its pixels that went to each class (NaN where it has none)."""
        counts = self.evaluation.scores.confusion
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.where(totals > 0, counts / np.maximum(1, totals), np.nan)
        return list(zip(self.evaluation.names, shares.tolist(), strict=True))


def write_report(
    run: Path,
    out: Path,
    data: Path | None = None,
    device: str = "auto",
    engine: str = AUTO,
    precision: str = AUTO,
    progress: Progress = lambda images: lambda done: None,
) -> bool:
    """Writes the page of a run folder; whether it shows scores by class and predictions, which need the data set.

    Without `data` it is looked for where the run's own record says that it was.

    `progress` is told the number of validation images and gives a function that is told how many more are done. Raises
    DataError for a folder without a run, MissingLibraryError without matplotlib or jinja2, and what `evaluate` raises.
    """
    jinja2 = require("jinja2", "report", "the report")
    require("matplotlib", "report", "the report")
    folder = RunFolder(run)
    if not folder.metrics.is_file() or not folder.config.is_file():
        what = f"expected the folder of a run, with {folder.config.name} and {folder.metrics.name}"
        raise DataError(f"{run}: {what}; give the folder that was --out of segnet train")
    config, rows, sessions = load_config(folder.config), MetricsLog.read(folder.metrics), read_sessions(run)
    if data is None and sessions and Path(sessions[-1].data).is_dir():
        data = Path(sessions[-1].data)
    scored = data if config.val_split != NO_VALIDATION else None
    validation = None if scored is None else _validate(folder, config, scored, (device, engine, precision), progress)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "thousands": _thousands, "duration": _duration}
    html = environment.get_template("page.html").render(**_content(run, config, rows, sessions, validation, data))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, [html.encode()])
    return validation is not None


def _content(
    run: Path, config: Config, rows: Rows, sessions: list[Session], validation: Validation | None, data: Path | None
) -> dict[str, Any]:
    """Every value that the template names."""
    steps, losses = series(rows, "loss")
    known = [(row["step"], row["miou"]) for row in rows if row.get("miou") is not None]
    per_epoch = max(1, len(VOCDataset(data, config.train_split)) // config.batch) if data else None
    changed = difference(Config(), config)
    settings = [(key, getattr(config, key), meaning, key in changed) for key, _, meaning in describe()]
    return {
        "name": run.resolve().name,
        "dataset": data and data.resolve().name,
        "config": config,
        "size": "{}\u2009×\u2009{}".format(*config.image_size),
        "steps": int(steps.max(initial=0)),
        "epochs": steps[-1] / per_epoch if per_epoch and len(steps) else None,
        "best": max(known, key=lambda pair: pair[1], default=None),
        "last_loss": losses[-1] if len(losses) else None,
        **draw_curves(rows, per_epoch),
        "validation": validation,
        "settings": [setting for setting in settings if setting[1] is not None],
        "sessions": sessions,
        "here": {"system": platform.platform(), **versions()},
    }


def _validate(
    folder: RunFolder, config: Config, data: Path, how: tuple[str, str, str], progress: Progress
) -> Validation:
    """Scores the best network, and segments the images it does best and worst once more, for their pictures."""
    device, engine, precision = how
    checkpoint = folder.best if folder.best.is_file() else folder.last
    model = weights.load(checkpoint, get_device(device), rung="tf32" if precision == "tf32" else None)
    dataset = VOCDataset(data, config.val_split)
    began = perf_counter()
    segmenter = Segmenter(model, config.image_size, engine=engine, precision=precision, batch=4)
    evaluation = evaluate(segmenter, dataset, Boundary.csurka, advance=progress(len(dataset)))
    seconds = perf_counter() - began
    scored = [index for index, image in enumerate(evaluation.per_image) if math.isfinite(image.miou)]
    ranked = sorted(scored, key=lambda index: evaluation.per_image[index].miou)
    count = min(_EXAMPLES, len(ranked) // 2) or len(ranked)

    def shown(indices: Sequence[int]) -> list[Example]:
        return [example(evaluation.per_image[index], index, dataset, segmenter) for index in indices]

    worst = ranked[:count] if len(ranked) > 1 else []
    return Validation(model, evaluation, shown(ranked[::-1][:count]), shown(worst), seconds, dataset.palette)


def _percent(fraction: float, digits: int = 1) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\u2009")


def _duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
