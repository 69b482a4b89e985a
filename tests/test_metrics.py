import json
import math

import numpy as np
import pytest
from support import ROOT
from support.commands import process
from support.evaluation import confusion_of

from segnet_scratch.errors import DataError, TrainingError
from segnet_scratch.metrics import MetricsLog, confusion_matrix, scores


class TestScores:
    def test_a_case_worked_by_hand(self):
        # Class 0: 3 right, 1 missed, 2 too many. Class 1: 4 right, 2 missed, 1 too many.
        # Class 2 is predicted once where class 1 is true... and never true. Class 3 does not occur at all.
        confusion = np.array([[3, 1, 0, 0], [2, 4, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.int64)
        result = scores(confusion)
        np.testing.assert_array_equal(result.iou, [3 / 6, 4 / 8, 0.0, np.nan])
        assert result.miou == (3 / 6 + 4 / 8 + 0) / 3
        assert result.global_accuracy == 7 / 11
        assert result.class_accuracy == (3 / 4 + 4 / 7) / 2
        np.testing.assert_array_equal(result.accuracy, [3 / 4, 4 / 7, np.nan, np.nan])
        np.testing.assert_array_equal(result.precision, [3 / 5, 4 / 5, 0.0, np.nan])
        np.testing.assert_array_equal(result.class_pixels, [4, 7, 0, 0])
        np.testing.assert_array_equal(result.confusion, confusion)
        assert result.pixels == 11

    def test_the_case_of_the_documentation(self):
        truth = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 6, np.uint8)
        prediction = truth.copy()
        prediction[4:, 4:7] = 0
        confusion = confusion_of(truth, prediction, 2)
        np.testing.assert_array_equal(confusion, [[24, 0], [6, 18]])
        result = scores(confusion)
        assert result.iou.tolist() == [24 / 30, 18 / 24]
        assert result.miou == 0.775
        assert result.global_accuracy == result.class_accuracy == 0.875
        assert result.precision.tolist() == [0.8, 1.0]
        text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
        for figure in ("[[24, 0], [6, 18]]", "24/30", "18/24", "0.775", "0.875"):
            assert figure in text

    def test_nothing_scored(self):
        result = scores(np.zeros((3, 3), np.int64))
        assert np.isnan(result.iou).all()
        assert math.isnan(result.miou)
        assert math.isnan(result.global_accuracy)
        assert math.isnan(result.class_accuracy)
        assert result.pixels == 0
        text = json.dumps(result.to_json(["a", "b", "c"]), allow_nan=False)
        found = json.loads(text)
        assert [found[name] for name in ("miou", "global_accuracy", "class_accuracy", "pixels")] == [None] * 3 + [0]
        for name in ("iou", "accuracy", "precision"):
            assert found[name] == {"a": None, "b": None, "c": None}
        assert found["class_pixels"] == {"a": 0, "b": 0, "c": 0}
        assert found["confusion"] == [[0] * 3] * 3

    def test_json(self):
        result = scores(np.array([[1, 1], [0, 2]], np.int64))
        assert result.to_json(["sky", "road"]) == {
            "miou": (1 / 2 + 2 / 3) / 2,
            "global_accuracy": 3 / 4,
            "class_accuracy": (1 / 2 + 1) / 2,
            "pixels": 4,
            "iou": {"sky": 1 / 2, "road": 2 / 3},
            "accuracy": {"sky": 1 / 2, "road": 1.0},
            "precision": {"sky": 1.0, "road": 2 / 3},
            "class_pixels": {"sky": 2, "road": 2},
            "confusion": [[1, 1], [0, 2]],
        }
        for names in (["sky"], ["sky", "sky"], ["sky", "road", "tree"]):
            with pytest.raises(DataError, match="class names: expected 2"):
                result.to_json(names)

    def test_counts_beyond_32_bits_stay_exact(self):
        result = scores(np.array([[2**52, 0], [1, 0]], np.int64))
        assert result.pixels == 2**52 + 1
        assert result.iou[0] == 2**52 / (2**52 + 1)

    @pytest.mark.parametrize(
        "confusion",
        [np.zeros((2, 3), int), np.zeros(4, int), np.zeros((2, 2)), np.array([[1, -1], [0, 0]]), np.zeros((0, 0), int)],
    )
    def test_no_confusion_matrix(self, confusion):
        with pytest.raises(DataError, match="confusion matrix: expected a square"):
            scores(confusion)

    def test_against_scikit_learn(self):
        oracle = pytest.importorskip("sklearn.metrics")
        generator = np.random.default_rng(7)
        for classes in (2, 5, 21):
            truth = generator.integers(0, classes, (40, 50))
            prediction = np.where(generator.random((40, 50)) < 0.6, truth, generator.integers(0, classes, (40, 50)))
            void = generator.random((40, 50)) < 0.1
            kept = truth[~void], prediction[~void]
            confusion = confusion_of(np.where(void, 255, truth).astype(np.uint8), prediction, classes)
            labels = list(range(classes))
            np.testing.assert_array_equal(confusion, oracle.confusion_matrix(*kept, labels=labels))
            result = scores(confusion)
            np.testing.assert_allclose(result.iou, oracle.jaccard_score(*kept, labels=labels, average=None), rtol=1e-12)
            assert result.miou == pytest.approx(oracle.jaccard_score(*kept, average="macro"), rel=1e-12)
            assert result.global_accuracy == pytest.approx(oracle.accuracy_score(*kept), rel=1e-12)
            assert result.class_accuracy == pytest.approx(oracle.balanced_accuracy_score(*kept), rel=1e-12)
            by_class = {"labels": labels, "average": None}
            np.testing.assert_allclose(result.accuracy, oracle.recall_score(*kept, **by_class), rtol=1e-12)
            np.testing.assert_allclose(result.precision, oracle.precision_score(*kept, **by_class), rtol=1e-12)
            assert result.class_pixels.tolist() == np.bincount(kept[0], minlength=classes).tolist()


def test_the_confusion_matrix_pixel_by_pixel():
    generator = np.random.default_rng(11)
    truth, prediction = generator.integers(0, 5, (2, 30, 40)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.2] = 255
    np.testing.assert_array_equal(confusion_matrix(truth, prediction, 5), confusion_of(truth, prediction, 5))


class TestMetricsLog:
    def rows(self, count):
        return [{"step": step, "loss": 1 / (step + 1), "lr": 0.1} for step in range(count)]

    def filled(self, tmp_path, count):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        for row in self.rows(count):
            log.append(row)
        return log

    def test_rows_come_back_in_order(self, tmp_path):
        log = self.filled(tmp_path, 5)
        assert MetricsLog.read(log.path) == self.rows(5)
        assert len(log.path.read_bytes().splitlines()) == 5

    def test_numbers_that_json_has_not_become_null(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.append(
            {
                "step": np.int64(3),
                "loss": np.float32("nan"),
                "lr": np.float32(0.5),
                "val": -math.inf,
                "iou": {"a": math.nan, "b": [math.inf, 1.0]},
            }
        )
        assert "NaN" not in log.path.read_text()
        assert "Infinity" not in log.path.read_text()
        assert MetricsLog.read(log.path) == [
            {"step": 3, "loss": None, "lr": 0.5, "val": None, "iou": {"a": None, "b": [None, 1.0]}}
        ]

    @pytest.mark.parametrize("row", [{}, {"step": 1.0}, {"step": True}, {"step": 1, "x": object()}])
    def test_rows_that_do_not_fit(self, tmp_path, row):
        log = self.filled(tmp_path, 1)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: expected a row"):
            log.append(row)
        assert MetricsLog.read(log.path) == self.rows(1)

    def test_a_line_torn_at_any_byte(self, tmp_path):
        log = self.filled(tmp_path, 3)
        whole = log.path.read_bytes()
        second_end = len(whole.splitlines(keepends=True)[0]) * 2
        for length in range(second_end, len(whole)):
            log.path.write_bytes(whole[:length])
            assert MetricsLog.read(log.path) == self.rows(2)
            log.append({"step": 9})
            assert MetricsLog.read(log.path) == [*self.rows(2), {"step": 9}]

    def test_the_first_line_torn(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        for torn in (b"", b'{"st'):
            log.path.write_bytes(torn)
            assert MetricsLog.read(log.path) == []
            log.append({"step": 0})
            assert MetricsLog.read(log.path) == [{"step": 0}]

    @pytest.mark.parametrize("damage", [b"{", b"", b"[1]", b"7", b'{"loss": 1}', b"\xff", b"[" * 100_000])
    def test_a_damaged_line_in_the_middle_is_named(self, tmp_path, damage):
        log = self.filled(tmp_path, 3)
        lines = log.path.read_bytes().split(b"\n")
        lines[1] = damage
        log.path.write_bytes(b"\n".join(lines))
        with pytest.raises(DataError, match=r"metrics\.jsonl: line 2: expected"):
            MetricsLog.read(log.path)

    def test_truncate_after(self, tmp_path):
        log = self.filled(tmp_path, 6)
        log.append({"step": 3, "val_loss": 0.5})  # rows need not be in the order of their steps
        log.path.write_bytes(log.path.read_bytes() + b'{"step": 1, "lo')
        log.truncate_after(3)
        assert MetricsLog.read(log.path) == [*self.rows(4), {"step": 3, "val_loss": 0.5}]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
        log.append({"step": 4})
        assert MetricsLog.read(log.path)[-1] == {"step": 4}
        log.truncate_after(-1)
        assert log.path.read_bytes() == b""

    def test_truncating_no_log_makes_none(self, tmp_path):
        MetricsLog(tmp_path / "metrics.jsonl").truncate_after(0)
        assert list(tmp_path.iterdir()) == []

    def test_a_truncation_that_fails_leaves_the_log(self, tmp_path, monkeypatch):
        log = self.filled(tmp_path, 4)

        def fail(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fail)
            with pytest.raises(TrainingError, match=r"metrics\.jsonl: could not be written: No space"):
                log.truncate_after(1)
        assert MetricsLog.read(log.path) == self.rows(4)
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_missing_log_and_missing_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"nothing\.jsonl: .*No such file"):
            MetricsLog.read(tmp_path / "nothing.jsonl")
        with pytest.raises(TrainingError, match="No such file"):
            MetricsLog(tmp_path / "nowhere" / "metrics.jsonl").append({"step": 0})

    def test_a_row_survives_the_kill_of_its_writer(self, tmp_path):
        code = (
            "import os, signal, sys; from segnet_scratch.metrics import MetricsLog\n"
            "MetricsLog(sys.argv[1]).append({'step': 1})\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        path = tmp_path / "metrics.jsonl"
        assert process(path, code=code).returncode == -9
        assert MetricsLog.read(path) == [{"step": 1}]
