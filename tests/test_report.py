"""The HTML page of a run: what it says, that it needs nothing from elsewhere, and how a browser shows it."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.evaluation import segment

from segnet_scratch import weights
from segnet_scratch.boundary import Boundary
from segnet_scratch.config import Config
from segnet_scratch.data import VOCDataset
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.inference import Segmenter
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.report.curves import smooth, thinned
from segnet_scratch.report.page import write_report
from segnet_scratch.run_record import Session
from segnet_scratch.train import Trainer

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'segnet_scratch[report]'")
pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install 'segnet_scratch[report]'")

CLASSES = ("background", "circle", "square", "triangle", "star", "ring")


@pytest.fixture(scope="module")
def run(sample, tmp_path_factory):
    """A run of four epochs. Not to be changed."""
    out = tmp_path_factory.mktemp("report") / "little run"
    config = Config(model="segnet-basic", width=0.125, size=32, batch=2, epochs=4, lr=0.05, workers=0, seed=1)
    Trainer(config, sample, out, "numpy").run()
    return out


@pytest.fixture(scope="module")
def page(run, sample):
    """The page with everything on it, as text."""
    out = run.parent / "page.html"
    assert write_report(run, out, sample, "numpy")
    return out.read_text()


class Contents(HTMLParser):
    """Attributes of every element, the text that is shown, and whether every tag is closed."""

    VOID = ("meta", "link", "img", "use", "path")

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_it_is_one_file_that_needs_nothing_from_elsewhere(page):
    contents = Contents(page)
    assert contents.all("script") == []
    for tag, attributes in contents.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_ids_are_unique_and_references_lead_somewhere(page):
    contents = Contents(page)
    ids = [attributes["id"] for _, attributes in contents.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 30
    references = [a["xlink:href"] for a in contents.all("use")] + re.findall(r"url\((#[^)]*)\)", page)
    assert len(references) > 20
    assert {reference[1:] for reference in references} <= set(ids)


def test_it_says_the_scores_of_the_best_network(page, run, sample):
    evaluation = evaluate(
        Segmenter(weights.load(run / "best.safetensors", "numpy"), (32, 32)), VOCDataset(sample, "val"), Boundary.csurka
    )
    words = Contents(page).words
    scores = evaluation.scores
    for name, value in (
        ("Mean IoU", scores.miou),
        ("Global accuracy", scores.global_accuracy),
        ("Class accuracy", scores.class_accuracy),
        ("Boundary F1", evaluation.boundary_f1),
    ):
        assert f"{name} {100 * value:.1f} %" in words
    for name, *numbers in zip(CLASSES, scores.iou, scores.accuracy, scores.precision, strict=True):
        shown = ["–" if math.isnan(number) else f"{100 * number:.1f}" for number in numbers]
        assert f"{name} {' '.join(shown)} " in words
    bars = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', page)]
    np.testing.assert_allclose(bars, 80 * np.nan_to_num(scores.iou), atol=0.01)
    truths = scores.confusion / scores.confusion.sum(axis=1, keepdims=True)
    for row, true in enumerate(CLASSES):
        for column, found in enumerate(CLASSES):
            assert f'title="{true} taken for {found}: {100 * truths[row, column]:.2f} %"' in page
    rows = MetricsLog.read(run / "metrics.jsonl")
    best = max((row for row in rows if "miou" in row), key=lambda row: row["miou"])
    assert f"validation after step {best['step']}" in words
    assert f"Last training loss {[row['loss'] for row in rows if 'loss' in row][-1]:.3f}" in words
    assert "16 steps (4 epochs)" in words


def test_it_shows_curves_settings_and_environment(page):
    contents = Contents(page)
    labels = [attributes["aria-label"] for attributes in contents.all("svg")]
    assert labels == ["Loss of training and validation", "Mean IoU of every validation", "Learning rate of every step"]
    for text in ("epoch", "loss", "mIoU %", "learning rate", "validation", "training, each step"):
        assert re.search(rf"<text [^>]*>{text}</text>", page)
    words = contents.words
    for setting in ("size 32", "lr 0.05", "model segnet-basic", "epochs 4", "flip true", "scale [1.0, 1.25]"):
        assert f" {setting} " in words
    changed = re.findall(r"<tr>\s*<td>(\w+)</td>", page)
    chosen = ["model", "width", "size", "batch", "epochs", "lr", "seed", "workers"]
    assert [name for name in changed[:10] if name not in ("engine", "precision")] == chosen  # those two were "auto"
    assert changed[10:] == []
    assert f"numpy {np.__version__}" in words
    assert "4 images" in words


def picture(attributes):
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition("base64,")[2])))


def test_best_and_worst_predictions_stand_beside_the_truth(page, run, sample):
    model, dataset = weights.load(run / "best.safetensors", "numpy"), VOCDataset(sample, "val")
    ranked = sorted(evaluate(Segmenter(model, (32, 32)), dataset).per_image, key=lambda image: -image.miou)
    images = Contents(page).all("img")
    shown = [attributes["alt"].removeprefix("image ") for attributes in images[::4]]
    # Of four images the two best, the best one first, and the two worst, the worst one first.
    assert shown == [ranked[0].id, ranked[1].id, ranked[3].id, ranked[2].id]
    for name, (image, truth, prediction, errors) in zip(shown, zip(*[iter(images)] * 4, strict=True), strict=True):
        original, mask, _ = dataset.sample(dataset.ids.index(name))
        labels = segment(model, original, (32, 32)).labels
        assert np.abs(np.asarray(picture(image), int) - original).mean() < 6
        np.testing.assert_array_equal(np.array(picture(truth)), mask)
        np.testing.assert_array_equal(np.array(picture(prediction)), labels)
        assert picture(truth).mode == picture(prediction).mode == "P"
        red = np.asarray(picture(errors), int)
        assert truth["alt"] == f"ground truth of {name}"
        wrong = (mask != labels) & (mask != 255)
        assert (red[..., 0] - red[..., 1])[wrong].mean() > 80
        assert (red[..., 0] - red[..., 1])[~wrong].mean() < 40
    scores = {image.id: image for image in ranked}
    for name in shown:
        expected = (
            f"mIoU {100 * scores[name].miou:.1f} %, {100 * scores[name].global_accuracy:.1f} % of the pixels right"
        )
        assert f"{name}: {expected}" in Contents(page).words


def test_large_images_are_made_smaller(run, sample, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    for folder, kind, resample in (("JPEGImages", "jpg", Image.BILINEAR), ("SegmentationClass", "png", Image.NEAREST)):
        for name in (data / "ImageSets/Segmentation/val.txt").read_text().split():
            path = data / folder / f"{name}.{kind}"
            Image.open(path).resize((840, 630), resample).save(path)
    write_report(run, tmp_path / "page.html", data, "numpy")
    images = Contents((tmp_path / "page.html").read_text()).all("img")
    assert {picture(image).size for image in images} == {(420, 315)}
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


def test_without_data_it_says_what_is_missing_and_how_to_get_it(run, tmp_path):
    out = tmp_path / "new" / "page.html"
    assert not write_report(run, out)
    contents = Contents(out.read_text())
    assert "segnet report RUN --data DIR" in contents.words
    assert "Best mean IoU" in contents.words
    assert "16 steps" in contents.words
    assert contents.all("img") == []
    assert len(contents.all("svg")) == 3
    assert ">step</text>" in out.read_text()


def test_the_record_of_the_run_tells_where_the_data_is_and_how_long_it_took(run, sample, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    session = Session(
        *(str(sample), "cuda", "2026-03-01T12:30:00+00:00", 0, 10, 2, 125.0, "Linux-6"),
        versions={"python": "3.11.2", "numpy": "2.0"},
        revision="0123abc+",
    )
    later = replace(session, first_step=10, last_step=16, seconds=3600.0, device="numpy")
    (folder / "sessions.json").write_text(json.dumps([asdict(session), asdict(later)]))
    assert write_report(folder, tmp_path / "page.html", device="numpy")
    contents = Contents((tmp_path / "page.html").read_text())
    assert len(contents.all("img")) == 16
    for text in (
        "Training time 1 h 2 min",
        "training from 2026-03-01 12:30:00 UTC, steps 1 to 10, on cuda, with validations 2 min 5 s 0.16 images/s",
        "steps 11 to 16, on numpy, with validations 1 h 0 min 0.00 images/s",
        "evaluation of 4 images with boundary F1, on numpy",
        "numpy, Linux-6 with python 3.11.2, numpy 2.0 source git 0123abc+",
        str(sample),
    ):
        assert text in contents.words
    (folder / "sessions.json").write_text(json.dumps([asdict(replace(session, data=str(tmp_path / "gone")))]))
    assert not write_report(folder, tmp_path / "page.html")


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(Config(steps=9).to_toml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "No step has been logged yet."),
        ([{"step": 1, "loss": 2.5, "lr": 0.1}], "Last training loss 2.500"),
        ([{"step": k, "loss": None, "lr": 0.1} for k in (1, 2)], "Last training loss nan"),
        ([{"step": 1, "loss": 2, "lr": 0.1}, {"step": 1, "val_loss": None, "miou": None}], "Last training loss 2.000"),
    ],
    ids=["no step", "one step", "losses of NaN", "a validation of NaN"],
)
def test_runs_that_have_hardly_begun_or_went_wrong(tmp_path, rows, words):
    write_report(write_rows(tmp_path / "run", rows), tmp_path / "page.html")
    assert words in Contents((tmp_path / "page.html").read_text()).words


def test_a_long_run_makes_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"step": k + 1, "loss": 3 * 0.9999**k + rng.random(), "lr": 0.01} for k in range(40_000)]
    rows[20_000]["loss"] = 99.0  # a peak is not lost
    write_report(write_rows(tmp_path / "run", rows), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 250_000
    assert ">100</text>" in text


def test_names_are_text_and_not_markup(run, sample, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "<i>run & co"
    shutil.copytree(sample, data)
    (data / "labels.txt").write_text('<b>back</b>\nci"rcle\nsquare&amp;\nd\ne\n{{ f }}')
    shutil.copytree(run, folder)
    write_report(folder, tmp_path / "page.html", data, "numpy")
    contents = Contents((tmp_path / "page.html").read_text())
    assert "<i>run & co" in contents.words
    for name in ("<b>back</b>", 'ci"rcle', "square&amp;", "{{ f }}"):
        assert name in contents.words
    assert contents.all("b") == []


def test_the_same_run_gives_the_same_page(run, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(run, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# Curves


@pytest.mark.parametrize("span", [1, 5, 40])
def test_smoothing_is_the_weighted_mean_of_the_steps_so_far(span):
    values = np.random.default_rng(0).random(60)
    values[[7, 8, 30]] = np.nan
    found = smooth(values, span)
    decay = 1 - 2 / (span + 1)
    for k in range(60):
        weights_ = decay ** np.arange(k, -1, -1) * np.isfinite(values[: k + 1])
        if np.isnan(values[k]):
            assert np.isnan(found[k])
        else:
            assert found[k] == pytest.approx((weights_ * np.nan_to_num(values[: k + 1])).sum() / weights_.sum())


def test_a_thinned_curve_keeps_its_ends_of_range_and_its_order():
    rng = np.random.default_rng(0)
    x, y = np.arange(10_000.0), rng.random(10_000)
    y[[3, 5000]], y[4000:4040] = [-7, 9], np.nan
    u, v = thinned(x, y, 200)
    assert 100 <= len(u) <= 200
    assert (np.diff(u) > 0).all()
    assert (v.min(), v.max()) == (-7, 9)
    np.testing.assert_array_equal(v, y[u.astype(int)])
    assert thinned(x[:50], y[:50], 200)[0] is not None
    np.testing.assert_array_equal(thinned(x[:50], y[:50], 200)[1], y[:50])


# Errors


def test_other_data_is_refused_and_an_old_page_kept(run, sample, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    (data / "labels.txt").write_text("\n".join(f"c{k}" for k in range(9)))
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(DataError, match="9 classes, the model 6"):
        write_report(run, tmp_path / "page.html", data, "numpy")
    assert (tmp_path / "page.html").read_text() == "old"


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
# Added to a copy of the page: what the browser made of it, as text in the page that --dump-dom prints.
PROBE = """<script>
addEventListener("load", () => {
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify({
    images: [...document.images].map((image) => [image.naturalWidth, image.getBoundingClientRect().width]),
    drawings: [...document.querySelectorAll("svg")].map(
      (svg) => [svg.clientWidth, svg.clientHeight, svg.getBBox().width]),
    bars: [...document.querySelectorAll(".bar i")].map((bar) => bar.getBoundingClientRect().width),
    overflow: document.documentElement.scrollWidth - innerWidth,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 40)),
    headings: [...document.querySelectorAll("h2")].map((heading) => heading.innerText),
    text: document.body.innerText,
  });
  document.body.append(shown);
});
</script></body>"""


def browse(page, folder, width, *more):
    """The browser's standard output and error for a page, with a profile of its own."""
    (folder / "page.html").write_text(page)
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400", *more]
    return subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
    )


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt install chromium")


@needs_browser
@pytest.mark.parametrize("width", [1200, 600])
def test_a_browser_shows_it_without_errors(page, run, tmp_path, width):
    finished = browse(page.replace("</body>", PROBE), tmp_path, width, "--dump-dom")
    assert "CONSOLE" not in finished.stderr
    probe = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', finished.stdout, re.DOTALL)[1]))
    assert len(probe["images"]) == 16
    assert all(natural > 0 and shown > 50 for natural, shown in probe["images"])
    assert len(probe["drawings"]) == 3
    assert all(width > 250 and height > 100 and box > 200 for width, height, box in probe["drawings"])
    assert len(probe["bars"]) == 6
    assert max(probe["bars"]) > 30
    assert probe["overflow"] <= 0
    assert all(name.startswith("data:") for name in probe["loaded"])
    assert probe["headings"][:5] == ["Training", "Classes", "Confusion", "Predictions", "Time"]
    for text in (run.name, "Mean IoU", "circle", "Worst, by the image's own mean IoU", "learning rate"):
        assert text in probe["text"]


@needs_browser
def test_the_console_check_can_fail(page, tmp_path):
    finished = browse(page.replace("</body>", "<script>nothing()</script></body>"), tmp_path, 1200, "--dump-dom")
    assert "CONSOLE" in finished.stderr
