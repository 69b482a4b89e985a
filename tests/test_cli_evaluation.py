"""eval, predict, submit and report as a user meets them: help, results, and what goes wrong."""

import csv
import json
import re
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from support.commands import assert_error, plain, process, train_arguments

from segnet_scratch import SegNetBasic, weights
from segnet_scratch.data import VOC_CLASSES

BAYESIAN = ["model=segnet-basic", "width=0.0625", "size=32", "batch=2", "steps=2", "workers=0", "dropout=true"]


@pytest.fixture(scope="session")
def bayesian(sample, tmp_path_factory):
    """A run of two steps with dropout. Not to be changed."""
    out = tmp_path_factory.mktemp("bayesian") / "run"
    finished = process(*train_arguments(sample, out, settings=BAYESIAN))
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.fixture
def checkpoint(bayesian):
    return bayesian / "best.safetensors"


# eval


def test_eval_with_everything(segnet, sample, checkpoint, tmp_path):
    averaging = ["--flip", "--scales", "1,1.25", "--samples", "2", "--window", "40x48", "--stride", "16"]
    files = ["--json", tmp_path / "a.json", "--per-image", tmp_path / "new" / "a.csv"]
    finished = segnet("eval", checkpoint, "--data", sample, "--boundary=csurka", *averaging, *files)
    assert finished.code == 0, finished.err
    scores = json.loads((tmp_path / "a.json").read_text())
    for name in ("iou", "accuracy", "precision", "class_pixels"):
        assert list(scores[name]) == ["background", "circle", "square", "triangle", "star", "ring"]
    confusion = np.array(scores["confusion"])
    assert confusion.sum() == scores["pixels"]
    assert list(scores["class_pixels"].values()) == confusion.sum(axis=1).tolist()
    assert scores["loss"] is None
    for text in ("boundary F1", f"{100 * scores['boundary_f1']:.1f}", "precision %", "accuracy %", "pixels %"):
        assert text in finished.out
    rows = list(csv.DictReader((tmp_path / "new" / "a.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == (sample / "ImageSets/Segmentation/val.txt").read_text().split()
    assert sum(int(row["pixels"]) for row in rows) == scores["pixels"]
    assert scores["boundary_f1"] == pytest.approx(np.mean([float(row["boundary_f1"]) for row in rows]))

    assert segnet("eval", checkpoint, "--data", sample, "--json", tmp_path / "b.json").code == 0
    plain_scores = json.loads((tmp_path / "b.json").read_text())
    assert "boundary_f1" not in plain_scores
    assert plain_scores["loss"] > 0
    assert plain_scores["confusion"] != scores["confusion"]


def test_an_image_of_void_has_empty_fields(segnet, sample, checkpoint, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    name = (data / "ImageSets/Segmentation/val.txt").read_text().split()[1]
    path = data / "SegmentationClass" / f"{name}.png"
    Image.open(path).point([255] * 256).save(path)
    arguments = ["--data", data, "--boundary=csurka", "--per-image", tmp_path / "a.csv", "--json", tmp_path / "a.json"]
    assert segnet("eval", checkpoint, *arguments).code == 0
    row = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))[1]
    assert row == {"id": name, "miou": "", "global_accuracy": "", "pixels": "0", "boundary_f1": ""}
    assert json.loads((tmp_path / "a.json").read_text())["boundary_f1"] is not None


# All values that cannot be: test_inference.py.
WRONG = [
    (["--scales", "1,big"], "--scales 1,big: expected numbers"),
    (["--scales", ""], "--scales : expected numbers"),
    (["--scales", "0.5"], "scale 0.5 of the input size 32x32 is 16x16"),
    (["--window", "wide"], "--window wide: expected N or HxW"),
    (["--samples", "-1"], "Invalid value for '--samples'"),
]
CASES = [("eval", *row) for row in WRONG] + [(command, *WRONG[2]) for command in ("predict", "submit")]


@pytest.mark.parametrize(("command", "options", "message"), CASES)
def test_impossible_averages_are_refused(segnet, sample, checkpoint, tmp_path, monkeypatch, command, options, message):
    monkeypatch.setenv("COLUMNS", "200")
    if command == "submit":
        monkeypatch.setattr("segnet_scratch.submit._check_classes", lambda model, dataset: None)
    arguments = {
        "eval": ["--data", sample],
        "predict": [sample / "JPEGImages", "--out", tmp_path / "out"],
        "submit": ["--data", sample, "--split", "val", "--out", tmp_path / "out.tar"],
    }
    finished = segnet(command, checkpoint, *arguments[command], *options)
    assert finished.code == 2
    assert message in plain(finished.err)
    assert "Traceback" not in finished.err
    assert list(tmp_path.iterdir()) == []


def test_samples_without_dropout_are_refused(segnet, sample, tmp_path):
    model = SegNetBasic(6, 1 / 16, "numpy")
    weights.save(tmp_path / "a.safetensors", model, {"size": [32, 32]})
    finished = segnet("eval", tmp_path / "a.safetensors", "--data", sample, "--samples", "4")
    assert_error(finished, 2, "no dropout", "dropout=true")


# predict


def test_predict_takes_folders_patterns_and_videos(segnet, sample, checkpoint, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'segnet_scratch[video]'")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    out = tmp_path / "out"
    inputs = [sample / "JPEGImages", sample / "JPEGImages" / "*00003.jpg", tmp_path / "clip.mp4"]
    options = ["--out", out, "--frames", "3", "--samples", "2", "--json", tmp_path / "a.json"]
    finished = segnet("predict", checkpoint, *inputs, *options)
    assert finished.code == 0, finished.err
    results = json.loads((tmp_path / "a.json").read_text())
    assert len(results) == 13  # 12 images, each once, and the clip
    for entry in results[:-1]:
        assert Image.open(entry["uncertainty"]).mode == "RGB"
    assert results[-1]["frames"] == 3
    rates = r"3 frames, \d+\.\d frames/s, the network alone \d+\.\d\n"
    assert re.search(rf"{re.escape(str(out / 'clip_overlay.mp4'))}: {rates}", finished.out)
    assert results[-1]["network_frames_per_second"] > results[-1]["frames_per_second"] > 0
    assert {path.suffix for path in out.iterdir()} == {".png", ".mp4"}


def test_a_bad_file_does_not_end_predict(segnet, sample, checkpoint, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(sample / "JPEGImages", folder)
    good = len(list(folder.iterdir()))
    (folder / "0.jpg").write_bytes(b"")
    (folder / "z.png").write_bytes(b"<!DOCTYPE html>")
    (folder / "._z.jpg").write_bytes(b"x")
    next(folder.glob("s*")).rename(folder / "a\nb.jpg")
    (folder / "y\n\x1b[31m.jpg").write_bytes(b"")
    result = tmp_path / "r.json"
    finished = segnet("predict", checkpoint, folder, "--out", tmp_path / "out", "--json", result)
    assert finished.code == 1
    for part in ("0.jpg: ", "z.png: ", r"y\n\x1b[31m.jpg: ", f"3 of {good + 3} inputs had problems"):
        assert part in finished.err
    assert finished.err.count("\n") == 4
    assert r"a\nb_overlay.png: " in finished.out
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == good
    assert sum("problem" in row for row in json.loads(result.read_text())) == 3


def test_what_predict_cannot_find_is_explained(segnet, sample, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'segnet_scratch[video]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for argument, parts in {
        "empty": ["empty: no images in this folder"],
        "*.jpg": ["*.jpg: no such file, and as a pattern it matches none"],
        "clip.mp4": ["clip.mp4: no such file"],
        "bad.mp4": ["bad.mp4: ", "expected a video"],
        "camera:99": ["camera 99: ", "connect one"],
    }.items():
        assert_error(segnet("predict", checkpoint, argument, "--out", "out"), 1, *parts)
        assert not list((tmp_path / "out").glob("*"))
    assert_error(segnet("predict", "none.safetensors", sample / "JPEGImages", "--out", "out"), 1, "none.safetensors")


# submit


@pytest.fixture(scope="session")
def voc_checkpoint(tmp_path_factory):
    """A network of VOC's classes with fresh weights."""
    path = tmp_path_factory.mktemp("voc") / "voc.safetensors"
    weights.save(path, SegNetBasic(21, 1 / 16, "numpy"), {"size": [32, 32], "classes": list(VOC_CLASSES)})
    return path


@pytest.fixture
def voc(sample, tmp_path):
    """VOC's test split in small: images, a list, no masks, no names of classes."""
    root = tmp_path / "VOC2012"
    shutil.copytree(sample, root, ignore=shutil.ignore_patterns("SegmentationClass", "labels.txt"))
    shutil.copy(root / "ImageSets/Segmentation/val.txt", root / "ImageSets/Segmentation/test.txt")
    return root


def test_submit_writes_an_archive(segnet, voc, voc_checkpoint, tmp_path):
    out = tmp_path / "results.tar"
    finished = segnet("submit", voc_checkpoint, "--data", tmp_path, "--out", out, "--competition", "comp5", "--flip")
    assert finished.code == 0, finished.err
    assert f"\n{out}: 4 results in results/VOC2012/Segmentation/comp5_test_cls, checked\n" in finished.out
    shutil.unpack_archive(out, tmp_path / "unpacked")
    assert len(list((tmp_path / "unpacked" / "results/VOC2012/Segmentation/comp5_test_cls").iterdir())) == 4
    assert_error(segnet("submit", voc_checkpoint, "--data", voc, "--out", out), 1, f"{out}: is there already")


def test_what_submit_cannot_do_is_explained(segnet, sample, voc, checkpoint, voc_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = ["--out", tmp_path / "a.tar"]
    assert_error(segnet("submit", checkpoint, "--data", voc, *out), 1, "the checkpoint has 6 classes", "VOC's server")
    finished = segnet("submit", voc_checkpoint, "--data", sample, "--split", "val", *out)
    assert_error(finished, 1, f"{sample}: the data set has 6 classes", "VOC's server")
    finished = segnet("submit", voc_checkpoint, "--data", sample, *out)
    assert_error(finished, 1, "there is no split 'test'", "train, trainval, val")
    finished = segnet("submit", voc_checkpoint, "--data", tmp_path / "nowhere", *out)
    assert_error(finished, 1, "nowhere", "Pass the folder that holds ImageSets/Segmentation, JPEGImages.")
    finished = segnet("submit", voc_checkpoint, "--data", voc, *out, "--competition", "comp7")
    assert finished.code == 2
    assert "comp7" in plain(finished.err)
    assert not (tmp_path / "a.tar").exists()


# report


def test_report_writes_a_page(segnet, sample, bayesian, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'segnet_scratch[report]'")
    run = tmp_path / "run"
    shutil.copytree(bayesian, run)
    finished = segnet("report", run)
    assert finished.code == 0, finished.err
    assert finished.out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "data:image/png;base64," in page  # the data was found again
    assert re.search(r"training from [-\d: ]+ UTC, steps 1 to 2, on numpy, with validations", page)
    (run / "sessions.json").unlink()
    finished = segnet("report", run, "--out", tmp_path / "new" / "page.html")
    page = tmp_path / "new" / "page.html"
    assert (finished.code, finished.out.strip()) == (0, f"{page}: without predictions; --data DIR adds them")
    assert "<img" not in page.read_text()
    finished = segnet("report", run, "--data", sample, "--out", page)
    assert (finished.code, finished.out.strip()) == (0, str(page))
    assert "data:image/png;base64," in page.read_text()


def test_what_report_cannot_find_is_explained(segnet, sample, bayesian, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'segnet_scratch[report]'")
    assert_error(segnet("report", tmp_path), 1, tmp_path, "expected the folder of a run", "--out of segnet train")
    assert_error(segnet("report", bayesian, "--data", tmp_path), 1, tmp_path, "no data set in VOC layout")
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    (data / "labels.txt").write_text("\n".join(f"c{k}" for k in range(9)))
    assert_error(segnet("report", bayesian, "--data", data), 1, data, "9 classes", "the model 6")
    run = tmp_path / "run"
    shutil.copytree(bayesian, run)
    for name in ("best.safetensors", "last.safetensors"):
        (run / name).unlink()
    assert_error(segnet("report", run, "--data", sample), 1, run / "last.safetensors", "No such file")
    (run / "metrics.jsonl").write_text("no json\n")
    assert_error(segnet("report", run), 1, run / "metrics.jsonl", "line 1")


# Missing extras


@pytest.mark.parametrize(
    ("library", "extra", "command"),
    [
        ("matplotlib", "report", "report"),
        ("jinja2", "report", "report"),
        ("tensorboardX", "tensorboard", "train"),
        ("av", "video", "predict"),
        ("onnx", "onnx", "export"),
        ("flask", "serve", "serve"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_made(
    segnet, monkeypatch, sample, bayesian, checkpoint, tmp_path, library, extra, command
):
    monkeypatch.setitem(sys.modules, "jinja2", ModuleType("jinja2"))  # so that the report misses one thing at a time
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "clip.mp4").touch()
    arguments = {
        "report": ["report", bayesian, "--out", tmp_path / "page.html"],
        "train": train_arguments(sample, tmp_path / "run", "--tensorboard"),
        "serve": ["serve", checkpoint],
        "export": ["export", checkpoint, tmp_path / "a.onnx"],
        "predict": ["predict", checkpoint, tmp_path / "clip.mp4", "--out", tmp_path / "out"],
    }
    assert_error(segnet(*arguments[command]), 1, library, f"pip install 'segnet_scratch[{extra}]'")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_training_writes_event_files_where_asked(segnet, sample, tmp_path):
    pytest.importorskip(
        "tensorboardX", reason="tensorboardX is not installed: pip install 'segnet_scratch[tensorboard]'"
    )
    assert segnet(*train_arguments(sample, tmp_path / "run", "--tensorboard")).code == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
