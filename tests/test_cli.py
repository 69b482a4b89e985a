"""The command line as a user meets it: help, exit codes, messages, what it prints to a pipe."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import assert_error, plain, process, train_arguments

import segnet_scratch
from segnet_scratch import cli
from segnet_scratch.config import describe, load_config
from segnet_scratch.data import write_sample
from segnet_scratch.errors import DeviceMemoryError
from segnet_scratch.inference import Segmenter
from segnet_scratch.lab.proof.gradcheck import gradcheck
from segnet_scratch.runtime.devices import cuda_missing


@pytest.fixture(scope="session")
def trained(sample, tmp_path_factory):
    """A run of two steps. Not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    arguments = [sys.executable, "-m", "segnet_scratch", *map(str, train_arguments(sample, out))]
    subprocess.run(arguments, check=True, capture_output=True)
    return out


@pytest.fixture
def checkpoint(trained):
    return trained / "last.safetensors"


@pytest.fixture
def image(sample):
    return sample / "JPEGImages" / "sample_00000.jpg"


# Help

COMMANDS = {
    "": "train eval predict gradcheck data --version --verbose 130 | Exit codes: 0 done",
    "train": "--data --out --config --set --device --init --resume --json --tensorboard Ctrl-C Example",
    "eval": "checkpoint --data --split --device --size --batch --json VOC --boundary --flip --scales --window --stride"
    " --samples --per-image Example | 0.75 %",
    "predict": "checkpoint images --out --logits --device --size --json NAME.png camera --frames --samples Example"
    " Ctrl-C segnet_scratch[video] | folders | patterns in quotes",
    "convert": "source target --to --map PyTorch",
    "gradcheck": "ops --device --seed --json | exit code 1",
    "data": "sample",
    "data sample": "directory --train --val --seed | segnet train",
    "submit": "checkpoint --data --split test --out --competition comp5|comp6 ImageNet Example",
    "report": "RUN --data --out Example segnet_scratch[report] | no network",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(segnet, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    finished = segnet(*command.split(), "--help")
    assert (finished.code, finished.err) == (0, "")
    assert segnet(*command.split(), "-h").out == finished.out
    words, *phrases = COMMANDS[command].split(" | ")
    for part in (*words.split(), *phrases):
        assert part.lower() in plain(finished.out).lower()
    assert not re.search(r"\[/?(bold|red)\b|\\\[", finished.out)


def test_help_of_train_lists_every_setting_with_default_and_meaning(segnet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = plain(segnet("train", "--help").out)
    assert len(describe()) > 20
    for key, default, meaning in describe():
        assert f"{key} = {default}: {meaning}" in out


def test_devices_are_listed_in_help(segnet):
    for command in ("train", "eval", "predict", "gradcheck"):
        assert "auto|cuda|host|numpy" in plain(segnet(command, "--help").out)


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_without_a_command_there_is_help(segnet, arguments):
    finished = segnet(*arguments)
    assert finished.code == 2
    assert "Commands" in finished.out + finished.err


def test_version(segnet):
    finished = segnet("--version")
    assert (finished.code, finished.out) == (0, f"segnet_scratch {segnet_scratch.__version__}\n")


# Exit code 0, and results


def test_sample_train_evaluate_predict(segnet, tmp_path):
    data, out, pictures = tmp_path / "data", tmp_path / "run", tmp_path / "pictures"
    finished = segnet("data", "sample", data, "--train", 3, "--val", 2)
    assert (finished.code, finished.out) == (0, f"3 training and 2 validation images in {data}\n")

    finished = segnet(*train_arguments(data, out, "--json", tmp_path / "train.json"))
    assert finished.code == 0, finished.err
    assert "segnet-basic (width 0.0625) on numpy, 3 training and 2 validation images, 6 classes, 32x32" in finished.out
    assert "validation loss" in finished.out
    assert f"2 steps done, best mIoU {100 * json.loads((tmp_path / 'train.json').read_text())['miou']:.1f} %" in (
        finished.out
    )
    summary = json.loads((tmp_path / "train.json").read_text())
    assert (summary["step"], summary["finished"], summary["run"]) == (2, True, str(out))

    results = tmp_path / "new" / "eval.json"  # folders on the way are made
    finished = segnet("eval", out / "best.safetensors", "--data", data, "--json", results)
    assert finished.code == 0, finished.err
    scores = json.loads(results.read_text())
    names = ["background", "circle", "square", "triangle", "star", "ring"]
    assert list(scores["iou"]) == names
    assert (scores["split"], scores["images"]) == ("val", 2)
    assert scores["checkpoint"] == str(out / "best.safetensors")
    assert all(name in finished.out for name in [*names, "mean IoU", "global accuracy", "class accuracy"])
    assert f"{100 * scores['miou']:.1f}" in finished.out
    assert 0 <= scores["class_accuracy"] <= 1

    images = sorted((data / "JPEGImages").iterdir())[:2]
    arguments = ["--out", pictures, "--logits", "--json", tmp_path / "predict.json"]
    finished = segnet("predict", out / "best.safetensors", *images, *arguments)
    assert finished.code == 0, finished.err
    found = json.loads((tmp_path / "predict.json").read_text())
    assert [entry["image"] for entry in found] == list(map(str, images))
    for entry in found:
        assert Image.open(entry["labels"]).mode == "P"
        assert Image.open(entry["overlay"]).mode == "RGB"
        assert np.load(entry["logits"]).shape == (96, 128, 6)
        assert sum(entry["shares"].values()) == pytest.approx(1)
        assert f"{entry['overlay']}: " in finished.out


def test_the_demo_leaves_scores_and_pictures_and_goes_on(segnet, tmp_path, monkeypatch):
    monkeypatch.setattr("segnet_scratch.cli.data.write_sample", lambda root, **_: write_sample(root, 4, 7, (48, 64)))
    run = tmp_path / "new" / "run"
    for _ in range(2):  # a run that ended is no obstacle
        finished = segnet("demo", "--steps", 1, "--device", "numpy", "--out", run)
        assert finished.code == 0, finished.err
        assert f"\nscores:   {run}/eval.json\n" in finished.out
    assert json.loads((run / "eval.json").read_text())["images"] == 7
    assert len(list((run / "predictions").glob("*_overlay.png"))) == 6
    assert load_config(run / "config.toml").steps == 1
    assert (
        len((run / "metrics.jsonl").read_text().splitlines()) == 2
    )  # a step and its validation: nothing was trained twice


def test_resume_continues_and_a_run_is_not_overwritten(segnet, sample, tmp_path):
    out = tmp_path / "run"
    assert segnet(*train_arguments(sample, out)).code == 0
    assert_error(segnet(*train_arguments(sample, out)), 1, out, "--resume")
    finished = segnet(*train_arguments(sample, out, "--resume", "--set", "steps=3"))
    assert finished.code == 0
    assert f"resumed from {out}" in finished.out
    assert "3 steps done" in finished.out
    assert_error(segnet(*train_arguments(sample, out, "--resume", "--set", "lr=0.5")), 2, "lr (was 0.001, now 0.5)")


def test_size_and_split_of_an_evaluation(segnet, sample, checkpoint, tmp_path):
    found = {}
    for name, more in {
        "same": [],
        "given": ["--size", "32"],
        "other": ["--size", "48x64"],
        "train": ["--split", "train"],
    }.items():
        assert segnet("eval", checkpoint, "--data", sample, "--json", tmp_path / name, *more).code == 0
        found[name] = json.loads((tmp_path / name).read_text())
    assert found["same"] == found["given"]
    assert found["same"]["loss"] != found["other"]["loss"]
    assert (found["same"]["images"], found["train"]["images"]) == (4, 8)


def test_gradcheck_says_what_passed(segnet, tmp_path):
    finished = segnet("gradcheck", "add", "relu", "--device", "numpy", "--json", tmp_path / "g.json")
    assert finished.code == 0, finished.err
    assert re.findall(r"(add|relu)\W+(passed|FAILED)", finished.out) == [("add", "passed"), ("relu", "passed")]
    assert "2 ops passed on numpy" in finished.out
    assert [result["op"] for result in json.loads((tmp_path / "g.json").read_text())] == ["add", "relu"]


def test_gradcheck_fails_with_exit_code_1(segnet, monkeypatch, tmp_path):
    def wrong(ops, device, seed, cases, **options):
        for result in gradcheck(["relu", "add"], device, seed):
            yield result if result.op == "add" else type(result)(**vars(result) | {"passed": False, "worst": 0.5})

    monkeypatch.setattr(cli.proof, "run_gradcheck", wrong)
    finished = segnet("gradcheck", "--device", "numpy", "--json", tmp_path / "g.json")
    assert_error(finished, 1, "gradients of relu differ")
    assert re.search(r"relu\W+FAILED", finished.out)
    assert re.search(r"add\W+passed", finished.out)
    assert [result["passed"] for result in json.loads((tmp_path / "g.json").read_text())] == [False, True]


# Wrong usage: exit code 2


def cases_of_wrong_usage():
    yield "unknown setting", ["train", "--set", "stepz=3"], ["unknown setting 'stepz'", "did you mean steps?"]
    yield "unknown setting far off", ["train", "--set", "qqq=3"], ["the keys are model, decoder, pooling, width"]
    yield "text for a number", ["train", "--set", "steps=many"], ["steps: expected an integer", "'many'"]
    yield "number for a choice", ["train", "--set", "model=3"], ["model: expected", "segnet-basic"]
    yield "size too small", ["train", "--set", "size=16"], ["size: expected", "32"]
    yield "no equals sign", ["train", "--set", "lr"], ["--set lr: expected key=value"]
    yield "config file missing", ["train", "--config", "none.toml"], ["none.toml"]
    yield "unknown device", ["train", "--device", "gpu"], ["--device gpu", "cuda, host, numpy"]
    yield "unknown op", ["gradcheck", "conv3d"], ["there is no op 'conv3d'", "conv2d", "max_unpool"]
    yield "unknown device of gradcheck", ["gradcheck", "--device", "tpu"], ["--device tpu"]
    yield "unknown command", ["fly"], ["No such command 'fly'"]
    yield "unknown option", ["eval", "x", "--fast"], ["No such option", "--fast"]
    yield "no data", ["eval", "x"], ["Missing option", "--data"]
    yield "no images", ["predict", "x", "--out", "y"], ["Missing argument", "images"]
    yield "no batch", ["eval", "x", "--data", "y", "--batch", "0"], ["Invalid value for '--batch'", "1"]
    yield "no images in the sample", ["data", "sample", "x", "--train", "0"], ["Invalid value for '--train'", "1"]


@pytest.mark.parametrize(
    ("arguments", "parts"), [c[1:] for c in cases_of_wrong_usage()], ids=[c[0] for c in cases_of_wrong_usage()]
)
def test_wrong_usage_is_explained(segnet, sample, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train":
        arguments = [*arguments, "--data", sample, "--out", "run"]
    finished = segnet(*arguments)
    assert finished.code == 2
    assert "Traceback" not in finished.err
    for part in parts:
        assert part.lower() in plain(finished.err).lower()
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("size", ["12", "abc", "64x", "64x64x64", "0x64", ""])
def test_an_impossible_size_is_refused(segnet, sample, checkpoint, image, tmp_path, size):
    assert_error(segnet("eval", checkpoint, "--data", sample, "--size", size), 2, f"--size {size}: expected")
    finished = segnet("predict", checkpoint, image, "--out", tmp_path / "p", "--size", size)
    assert_error(finished, 2, f"--size {size}: expected")


def test_an_unknown_key_in_a_file_names_file_and_key(segnet, sample, tmp_path):
    (tmp_path / "my[1].toml").write_text("learning_rate = 0.1\n")
    finished = segnet("train", "--data", sample, "--out", tmp_path / "run", "--config", tmp_path / "my[1].toml")
    assert_error(finished, 2, tmp_path / "my[1].toml", "learning_rate")


# Errors: exit code 1


@pytest.mark.skipif(cuda_missing() is None, reason="there is a GPU here")
@pytest.mark.parametrize("command", ["train", "eval", "predict", "gradcheck"])
def test_a_missing_gpu_is_explained(segnet, sample, checkpoint, image, tmp_path, command):
    arguments = {
        "train": ["--data", sample, "--out", tmp_path / "run"],
        "eval": [checkpoint, "--data", sample],
        "predict": [checkpoint, image, "--out", tmp_path / "p"],
        "gradcheck": ["relu"],
    }
    assert_error(segnet(command, *arguments[command], "--device", "cuda"), 1, "GPU", "--device numpy")
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_what_there_is(segnet, sample, tmp_path):
    arguments = [a for a in train_arguments(sample, tmp_path / "run") if a not in ("--device", "numpy")]
    finished = segnet(*arguments, "--device", "auto")
    assert finished.code == 0
    assert f"on {'numpy' if cuda_missing() else 'cuda'}, 8 training" in finished.out


def test_a_missing_compiler_is_explained(tmp_path):
    without_zig = "import sys; sys.modules['ziglang'] = None; from segnet_scratch.cli import main; main()"
    empty = {"PATH": str(tmp_path), "CXX": None}
    finished = process("gradcheck", "relu", "--device", "host", code=without_zig, **empty)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr
    for part in ("C++17 compiler", "pip install ziglang", "--device numpy"):
        assert part in finished.stderr
    # The other device needs none.
    assert process("gradcheck", "relu", "--device", "numpy", code=without_zig, **empty).returncode == 0


def no_mask(data):
    path = data / "SegmentationClass" / "sample_00002.png"
    path.unlink()
    return [path, "1 of 8 masks are missing"]


def no_image(data):
    path = data / "JPEGImages" / "sample_00002.jpg"
    path.unlink()
    return [path, "1 of 8 images are missing"]


def corrupt_jpeg(data):
    path = data / "JPEGImages" / "sample_00002.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return [path, "damaged or cut off"]


def no_folder(data):
    shutil.rmtree(data / "SegmentationClass")
    return [data, "lacks SegmentationClass"]


@pytest.mark.parametrize(
    ("damage", "workers"), [(no_mask, 0), (no_image, 0), (corrupt_jpeg, 0), (corrupt_jpeg, 2), (no_folder, 0)]
)
def test_a_damaged_data_set_is_named(segnet, sample, checkpoint, tmp_path, damage, workers):
    """As soon as a command comes upon it: all other damage is in test_data_reading.py."""
    data = tmp_path / "data [1]"
    shutil.copytree(sample, data)
    parts = damage(data)
    finished = segnet(*train_arguments(data, tmp_path / "run", "--set", f"workers={workers}", "--set", "steps=4"))
    assert_error(finished, 1, *parts)
    assert_error(segnet("eval", checkpoint, "--data", data, "--split", "train"), 1, *parts)


def test_data_that_is_not_there(segnet, tmp_path):
    finished = segnet(*train_arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert_error(finished, 1, tmp_path / "nowhere", tmp_path / "nowhere" / "VOC2012", "no such folder")
    assert not (tmp_path / "run").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, Path.unlink])
def test_a_damaged_checkpoint_is_named(segnet, sample, trained, image, tmp_path, damage):
    run = tmp_path / "run [x]"
    shutil.copytree(trained, run)
    checkpoint = run / "last.safetensors"
    damage(checkpoint)
    assert_error(segnet("eval", checkpoint, "--data", sample), 1, checkpoint)
    assert_error(segnet("predict", checkpoint, image, "--out", tmp_path / "p"), 1, checkpoint)
    if damage is not flipped:  # initial weights may come from elsewhere, so no checksum is expected
        finished = segnet(*train_arguments(sample, tmp_path / "new", "--init", checkpoint))
        assert_error(finished, 1, checkpoint)
    if damage is not Path.unlink:
        assert_error(segnet(*train_arguments(sample, run, "--resume", "--set", "steps=3")), 1, checkpoint)
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "new").exists()


def test_another_number_of_classes_is_explained(segnet, sample, checkpoint, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    (data / "labels.txt").write_text("\n".join(f"c{k}" for k in range(9)))
    assert_error(segnet("eval", checkpoint, "--data", data), 1, data, "9 classes", "the model 6")
    # As initial weights it serves all the same, and what was left out is said.
    finished = segnet(*train_arguments(data, tmp_path / "run", "--init", checkpoint))
    assert finished.code == 0
    assert f"all weights but the classifier from {checkpoint} (6 classes there, 9 here)" in finished.out
    assert_error(segnet(*train_arguments(sample, tmp_path / "run", "--resume")), 1, tmp_path / "run", "c8", "--data")


def test_a_path_that_cannot_be_written_is_named(segnet, sample, checkpoint, image, tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    assert_error(segnet(*train_arguments(sample, below)), 1, below)
    assert_error(segnet("predict", checkpoint, image, "--out", below), 1, below)
    assert_error(segnet("data", "sample", below), 1, below)
    assert_error(segnet("eval", checkpoint, "--data", sample, "--json", below), 1, tmp_path / "file")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in (
        train_arguments(sample, loop),
        train_arguments(sample, tmp_path / "run", "--init", loop),
        ["predict", checkpoint, image, "--out", loop],
        ["predict", loop, image, "--out", tmp_path / "out"],
        ["eval", checkpoint, "--data", loop],
        ["run", f"{loop}:k"],
        *([["report", loop]] if find_spec("jinja2") else []),
    ):
        assert_error(segnet(*arguments), 1, loop)
    for arguments in (
        ["train", "--data", sample, "--out", tmp_path / "file"],
        ["predict", checkpoint, image, "--out", tmp_path / "file"],
        ["eval", checkpoint, "--data", sample, "--json", tmp_path],
    ):
        finished = segnet(*arguments)
        assert finished.code == 2
        assert "Traceback" not in finished.err


def test_a_loss_of_nan_is_explained(segnet, sample, tmp_path):
    finished = segnet(*train_arguments(sample, tmp_path / "run", "--set", "lr=1e30", "--set", "steps=5"))
    assert finished.code == 1
    assert "error: the loss is nan at step 2 (images sample_" in finished.err
    assert "there is no checkpoint; train with a smaller lr than 1e+30" in finished.err


def test_memory_that_is_short_is_explained(segnet, sample, checkpoint, monkeypatch):
    def greedy(*arguments, **options):
        return np.empty(2**60, np.uint8)

    monkeypatch.setattr(cli.evaluation, "evaluate", greedy)
    assert_error(segnet("eval", checkpoint, "--data", sample), 1, "memory", "smaller size or batch")


def test_a_result_is_not_written_over_an_input(segnet, sample, checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    for text in ('{"name": "package"}', '{\n  "name": "package"}', "[1, 2]", '{"step": 1, "loss": 2.0}\n'):
        (tmp_path / "mine.json").write_text(text)
        assert_error(segnet("eval", checkpoint, "--data", sample, "--json", tmp_path / "mine.json"), 2, "no earlier")
    finished = segnet("eval", checkpoint, "--data", sample, "--json", checkpoint)
    assert_error(finished, 2, "no earlier result", "choose another name")
    assert_error(segnet("data", "verify", sample, "--json", sample / "labels.txt"), 2, "no earlier result")
    (tmp_path / "old.csv").write_text("name,price\n")
    arguments = "eval", checkpoint, "--data", sample, "--per-image"
    assert_error(segnet(*arguments, tmp_path / "old.csv"), 2, "no earlier result")
    assert checkpoint.read_bytes() == before
    for _ in range(2):  # an earlier result is replaced
        finished = segnet(*arguments, tmp_path / "new.csv", "--json", tmp_path / "new.json")
        assert finished.code == 0, finished.err


def test_memory_that_is_short_for_one_picture_is_not_the_end(segnet, sample, checkpoint, tmp_path, monkeypatch):
    whole = Segmenter.forward
    calls = []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return whole(*arguments, **options)

    monkeypatch.setattr(Segmenter, "forward", short)
    finished = segnet("predict", checkpoint, *sorted(sample.glob("JPEGImages/*"))[:3], "--out", tmp_path / "out")
    assert_error(finished, 1, "memory is too short for this image", "1 of 3 inputs had problems")
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 2


def test_memory_that_is_short_for_a_batch_is_not_short_for_its_images(
    segnet, sample, checkpoint, tmp_path, monkeypatch
):
    forward, counts = Segmenter.forward, []

    def short(self, pixels, *more):
        counts.append(len(pixels))
        if len(pixels) > 1:
            raise DeviceMemoryError("too much", 2, 1)
        return forward(self, pixels, *more)

    arguments = "eval", checkpoint, "--data", sample, "--batch", "3", "--json"
    assert segnet(*arguments, tmp_path / "whole.json").code == 0
    monkeypatch.setattr(Segmenter, "forward", short)
    finished = segnet(*arguments, tmp_path / "one.json")
    assert (finished.code, counts) == (0, [3, 1, 1, 1, 1]), finished.err
    whole, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "one"))
    assert one | {"loss": 0} == whole | {"loss": 0}
    assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_ctrl_c_ends_any_command_with_130(segnet, sample, checkpoint, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.evaluation, "evaluate", interrupted)
    finished = segnet("eval", checkpoint, "--data", sample)
    assert finished.code == 130
    assert "Traceback" not in finished.err


# Output


def test_output_to_a_pipe_is_plain_and_keeps_brackets_and_long_lines(sample, tmp_path):
    out = tmp_path / "[bold]run[/bold] with a name that is far longer than the eighty columns of a line [0]"
    trained = process(*train_arguments(sample, out))
    scored = process("eval", out / "best.safetensors", "--data", sample)
    image = sample / "JPEGImages" / "sample_00000.jpg"
    predicted = process("predict", out / "best.safetensors", image, "--out", out / "p")
    refused = process(*train_arguments(sample, out))
    for finished in (trained, scored, predicted, refused):
        assert finished.returncode == (finished is refused), finished.stderr
        for text in (finished.stdout, finished.stderr):
            assert "\x1b" not in text
            assert "\r" not in text
    assert re.fullmatch(
        r"segnet-basic \(width 0\.0625\) on numpy, 8 training and 4 validation images, 6 classes, 32x32 pixels, He "
        r"initialisation, layers engine in float32\n"
        r"step 2/2  loss \d\.\d{4}  lr 0\.001  [\d.]+ images/s  waiting \d+%  0:00:0\d left\n"
        r"step 2: validation loss \d\.\d{4}, mIoU [\d.]+ %, global accuracy [\d.]+ %(?: \(best\))?\n"
        rf"2 steps done, best mIoU [\d.]+ %; weights: {re.escape(str(out / 'best.safetensors'))}\n",
        trained.stdout,
    )
    assert [line for line in scored.stdout.splitlines() if "circle" in line and re.search(r"\d+\.\d", line)]
    said, result = predicted.stdout.splitlines()
    assert said == "layers engine in float32 on numpy, input 32x32"
    assert result.startswith(f"{out / 'p' / 'sample_00000_overlay.png'}: ")
    assert refused.stderr == f"error: {out} already holds a run; continue it with --resume, or choose another --out\n"
    assert trained.stderr == scored.stderr == predicted.stderr == ""


def test_output_without_unicode(sample, checkpoint):
    finished = process("eval", checkpoint, "--data", sample, PYTHONIOENCODING="ascii")
    assert finished.returncode == 0, finished.stderr
    assert "mean IoU" in finished.stdout


def test_verbose_tells_about_kernels(tmp_path, segnet):
    finished = process("-v", "gradcheck", "relu", "--device", "host", SEGNET_CACHE=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "relu.cu" in finished.stderr
    assert segnet("gradcheck", "relu", "--device", "host").err == ""
