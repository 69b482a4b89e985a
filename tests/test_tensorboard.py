"""TensorBoard's event files against metrics.jsonl, read record by record."""

import struct

import pytest
from support.training import Recorder

from segnet_scratch.config import Config
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.tensorboard import TensorBoard
from segnet_scratch.train import Trainer

SETTINGS = {"model": "segnet-basic", "width": 0.0625, "size": 32, "batch": 4, "workers": 0}


def scalars(folder):
    """{name: {step: value}} of all event files, and the steps from which TensorBoard is told to start anew.

    A record is its length, a checksum, an Event, a checksum.
    """
    events = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")
    found, starts = {}, []
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = events.Event.FromString(content[position + 12 : position + 12 + length])
            position += 12 + length + 4
            if event.HasField("session_log"):
                starts.append(event.step)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found, starts


def train(sample, out, resume=False, **settings):
    pytest.importorskip(
        "tensorboardX", reason="tensorboardX is not installed: pip install 'segnet_scratch[tensorboard]'"
    )
    recorder = Recorder()
    Trainer(Config(**SETTINGS, **settings), sample, out, "numpy", resume=resume).run(TensorBoard(), recorder)
    return recorder.told


def test_event_files_hold_what_the_log_holds(sample, tmp_path):
    told = train(sample, tmp_path, epochs=2)
    found, _ = scalars(tmp_path / "tensorboard")
    rows = MetricsLog.read(tmp_path / "metrics.jsonl")
    for name, key in (
        ("loss/training", "loss"),
        ("learning_rate", "lr"),
        ("loss/validation", "val_loss"),
        ("mean_IoU", "miou"),
    ):
        assert found[name] == pytest.approx({row["step"]: row[key] for row in rows if key in row}, rel=1e-6)
    evaluations = dict(zip((2, 4), [event for event in told if isinstance(event, Evaluation)], strict=True))
    assert list(found["accuracy/global"]) == list(evaluations)
    for step, evaluation in evaluations.items():
        assert found["accuracy/global"][step] == pytest.approx(evaluation.scores.global_accuracy, rel=1e-6)
        assert found["accuracy/class"][step] == pytest.approx(evaluation.scores.class_accuracy, rel=1e-6)
        for name, iou in zip(evaluation.names, evaluation.scores.iou, strict=True):
            assert found[f"IoU/{name}"][step] == pytest.approx(iou, rel=1e-6)


def test_a_resumed_run_starts_anew_behind_its_checkpoint(sample, tmp_path):
    train(sample, tmp_path, steps=2)
    train(sample, tmp_path, resume=True, steps=4)
    found, starts = scalars(tmp_path / "tensorboard")
    assert sorted(found["loss/training"]) == [1, 2, 3, 4]
    assert starts == [1, 3]


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_under_its_file_ends_the_writing_and_not_the_run(sample, tmp_path, monkeypatch, caplog, at):
    files = pytest.importorskip("tensorboardX.event_file_writer", reason="tensorboardX is not installed")
    write, calls = files.EventsWriter.write_event, []

    def full(self, event):
        calls.append(event)
        if len(calls) >= at:
            raise OSError(28, "No space left on device")
        return write(self, event)

    monkeypatch.setattr(files.EventsWriter, "write_event", full)
    train(sample, tmp_path, steps=4)
    assert [row["step"] for row in MetricsLog.read(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert len(calls) == at
    assert "tensorboard: No space left on device" in caplog.text
