"""What a page says of a run, gathered from its folder and, where the data is at hand, from its best network."""

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
from segnet_scratch.data import VOCDataset
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import Evaluation, evaluate
from segnet_scratch.extras import require
from segnet_scratch.files import write_durably
from segnet_scratch.inference import Segmenter
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.report.curves import Axis, loss_curve, miou_curve, rate_curve
from segnet_scratch.report.pictures import Example, example
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.run_record import Session, read_sessions, versions
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import SegNet

_EXAMPLES = 4  # best ones, and as many worst ones


@dataclass(frozen=True)
class Validation:
    """The best network of a run on the validation split."""

    model: SegNet
    evaluation: Evaluation
    best: list[Example]
    worst: list[Example]
    seconds: float
    palette: np.ndarray  # the colour of every label, uint8 (256, 3)


def write_report(
    run: Path,
    out: Path,
    data: Path | None = None,
    device: str = "auto",
    engine: str = AUTO,
    precision: str = AUTO,
    progress: Callable[[int], Callable[[int], None]] = lambda images: lambda done: None,
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
        raise DataError(
            f"{run}: expected the folder of a run, with {folder.config.name} and {folder.metrics.name}; "
            "give the folder that was --out of segnet train"
        )
    config = load_config(folder.config)
    rows = MetricsLog.read(folder.metrics)
    sessions = read_sessions(run)
    data = data or _recorded_data(sessions)
    scored = data if config.val_split != NO_VALIDATION else None
    validation = None if scored is None else _validate(folder, config, scored, (device, engine, precision), progress)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "thousands": _thousands, "duration": _duration}
    html = environment.get_template("page.html").render(**_content(run, config, rows, sessions, validation, data))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, [html.encode()])
    return validation is not None


def _content(
    run: Path,
    config: Config,
    rows: list[dict[str, Any]],
    sessions: list[Session],
    validation: Validation | None,
    data: Path | None,
) -> dict[str, Any]:
    """Every value that the template names."""
    trained = [row for row in rows if "loss" in row]
    validated = [row for row in rows if "miou" in row]
    steps = [row["step"] for row in trained]
    per_epoch = _steps_per_epoch(config, data)
    axis, span = Axis(per_epoch), max(5, len(steps) // 40)
    losses = [_number(row["loss"]) for row in trained]
    mious = [(row["step"], _number(row["miou"])) for row in validated]
    known = [(step, miou) for step, miou in mious if math.isfinite(miou)]
    best = max(known, key=lambda pair: pair[1], default=None)
    val_losses = [(row["step"], _number(row["val_loss"])) for row in validated]
    return {
        "name": run.resolve().name,
        "dataset": None if data is None else data.resolve().name,
        "config": config,
        "parameters": None if validation is None else _parameters(validation.model),
        "size": "{}\u2009×\u2009{}".format(*config.image_size),
        "steps": steps[-1] if steps else 0,
        "epochs": None if per_epoch is None or not steps else steps[-1] / per_epoch,
        "best": best,
        "last_loss": losses[-1] if losses else None,
        "loss_svg": loss_curve(steps, losses, val_losses, span, axis) if steps else None,
        "miou_svg": miou_curve(known, axis) if known else None,
        "rate_svg": rate_curve(steps, [row["lr"] for row in trained], axis) if steps else None,
        "validation": validation,
        "classes": [] if validation is None else _class_rows(validation.evaluation, validation.palette),
        "confusion": [] if validation is None else _confusion_rows(validation.evaluation),
        "settings": _settings(config),
        "sessions": sessions,
        "here": {"system": platform.platform(), **versions()},
    }


def _validate(
    folder: RunFolder,
    config: Config,
    data: Path,
    how: tuple[str, str, str],
    progress: Callable[[int], Callable[[int], None]],
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
        examples = []
        for index in indices:
            image, mask, _ = dataset.sample(index)
            found = segmenter(image).labels
            examples.append(example(evaluation.per_image[index], image, mask, found, dataset.palette))
        return examples

    worst = ranked[:count] if len(ranked) > 1 else []
    return Validation(model, evaluation, shown(ranked[::-1][:count]), shown(worst), seconds, dataset.palette)


def _recorded_data(sessions: Sequence[Session]) -> Path | None:
    """The data set of the run's last session, where it still is there."""
    data = Path(sessions[-1].data) if sessions else None
    return data if data and data.is_dir() else None


def _steps_per_epoch(config: Config, data: Path | None) -> int | None:
    if data is None:
        return None
    return max(1, len(VOCDataset(data, config.train_split)) // config.batch)


def _class_rows(evaluation: Evaluation, palette: np.ndarray) -> list[dict[str, Any]]:
    """One row a class, in the order of labels: fractions, None where there is no number."""
    scores = evaluation.scores
    columns = zip(evaluation.names, scores.iou, scores.accuracy, scores.precision, scores.class_pixels, strict=True)
    return [
        {
            "name": name,
            "colour": "#{:02x}{:02x}{:02x}".format(*palette[label].tolist()),
            "iou": iou,
            "accuracy": accuracy,
            "precision": precision,
            "share": pixels / max(1, scores.pixels),
        }
        for label, (name, iou, accuracy, precision, pixels) in enumerate(columns)
    ]


def _confusion_rows(evaluation: Evaluation) -> list[tuple[str, list[float]]]:
    """Name of a true class, and the share of its pixels that went to each class (NaN where it has none)."""
    counts = evaluation.scores.confusion
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, counts / np.maximum(1, totals), np.nan)
    return list(zip(evaluation.names, shares.tolist(), strict=True))


def _parameters(model: SegNet) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())


def _settings(config: Config) -> list[tuple[str, Any, str, bool]]:
    """(key, value, meaning, whether it differs from the default) of every setting that has a value."""
    changed = difference(Config(), config)
    rows = []
    for key, _, meaning in describe():
        value = getattr(config, key)
        if value is not None:
            rows.append((key, list(value) if isinstance(value, tuple) else value, meaning, key in changed))
    return rows


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)  # null is how the log spells NaN


def _percent(fraction: float | None, digits: int = 1) -> str:
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", "\u2009")


def _duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
