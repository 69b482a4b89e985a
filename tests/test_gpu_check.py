"""scripts/gpu_check, as far as it goes without a GPU: its parts on the host device, and on the cuda device with the
stand-in for CuPy. What it is for takes a GPU."""

import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from gpu_check import __main__ as gpu_check
from gpu_check import op_table, report, sanitizers, streams, training
from gpu_check.part import Outcome, Work
from support.fake_cupy import FakeCupy
from support.kernels import needs_compiler

from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.runtime.devices import CudaDevice, get_device
from segnet_scratch.runtime.launch import shipped_kernels


def run(monkeypatch, tmp_path, *arguments):
    """The program's exit code and the JSON of its report."""
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "report"), *arguments])
    code = gpu_check.main()
    (path,) = (tmp_path / "report").glob("*.json")
    return code, json.loads(path.read_text())


@needs_compiler
class TestOnTheHost:
    def test_parts_and_report(self, monkeypatch, tmp_path, capsys):
        parts = ["kernels", "integers", "determinism", "bits of the host", "graphs", "demo"]
        code, found = run(monkeypatch, tmp_path, "--device", "host", "--seconds", "1", "--only", *parts)
        assert code == 0
        assert list(found["parts"]) == parts
        assert [found["parts"][p]["passed"] for p in parts] == [True] * 5 + [None]
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("gpu_check, host, ")
        assert last.endswith(f"5 passed ({', '.join(parts[:5])}); 1 not judged (demo)")
        table = next((tmp_path / "report").glob("*.md")).read_text()
        assert "| kernels | passed | " in table
        assert "| demo | - | not run: it takes a GPU | 0 |" in table

    def test_a_wrong_kernel_is_reported(self, monkeypatch, tmp_path, capsys):
        check = op_table.check
        monkeypatch.setattr(
            op_table, "check", lambda row, *rest, **o: ["bad"] if row.name == "relu_forward" else check(row, *rest, **o)
        )
        code, found = run(monkeypatch, tmp_path, "--device", "host", "--seconds", "0", "--only", "kernels", "demo")
        assert code == 1
        assert found["parts"]["kernels"]["problems"] == ["bad", "bad"]
        assert "1 FAILED (kernels)" in capsys.readouterr().out

    def test_a_part_that_raises_is_a_failure(self, monkeypatch, tmp_path):
        def broken(work):
            raise RuntimeError("the GPU has fallen off the bus")

        monkeypatch.setitem(gpu_check.PARTS, "demo", (broken, 0.1))
        code, found = run(monkeypatch, tmp_path, "--device", "host", "--only", "demo")
        assert code == 1
        assert found["parts"]["demo"]["summary"] == "RuntimeError: the GPU has fallen off the bus"

    def test_changing_bits_are_noticed(self, monkeypatch):
        device = get_device("host")
        work, calls = Work(device, 10.0), []
        monkeypatch.setattr(op_table, "REPEATS", 3)
        monkeypatch.setattr(op_table, "ROWS", ROWS[:12])
        assert op_table.determinism(work).passed
        download = device.download

        def flickering(array):
            values = download(array).copy()
            calls.append(0)
            if len(calls) == 20 and values.size:
                values.view(np.uint8).reshape(-1)[0] ^= 1
            return values

        monkeypatch.setattr(device, "download", flickering)
        assert not op_table.determinism(work).passed

    def test_shares_leave_time(self):
        assert sum(share for _, share in gpu_check.PARTS.values()) <= 1


class TestAsOnAGpu:
    """The cuda device on the stand-in: what is asked of CuPy is what CuPy has."""

    @needs_compiler
    def test_graphs_and_uploads(self, monkeypatch, tmp_path):
        cupy = FakeCupy().install(monkeypatch, tmp_path)
        # The smaller sizes of the host, and nothing that asks CuPy for times.
        monkeypatch.setattr(Work, "on_gpu", False)
        work = Work(CudaDevice(), 0.0)
        for part in (streams.graphs, streams.uploads):
            outcome = part(work)
            assert outcome.passed, outcome
        assert any(stream and pinned for stream, pinned in cupy.copies)
        cupy.timeline.finish()

    @needs_compiler
    def test_a_replay_that_differs_is_noticed(self, monkeypatch, tmp_path):
        FakeCupy().install(monkeypatch, tmp_path)
        monkeypatch.setattr(Work, "on_gpu", False)
        monkeypatch.setattr(
            CudaDevice, "capture", lambda device, step: lambda: (step(), step())[1]
        )  # two steps for one

        outcome = streams.graphs(Work(CudaDevice(), 0.0))
        assert outcome.passed is False
        assert outcome.problems[-1] == "the weights differ"

    def test_sanitizers_see_every_kernel(self, monkeypatch, tmp_path, capsys):
        cupy = FakeCupy(dry=True).install(monkeypatch, tmp_path)
        cupy.cuda.set_allocator = lambda allocator: None
        sanitized = importlib.import_module("gpu_check.sanitized")
        monkeypatch.setattr(sanitized, "cupy", cupy)
        monkeypatch.setattr(sanitized, "get_device", lambda name: CudaDevice())
        sanitized.main(0.0)
        counts = json.loads(capsys.readouterr().out)
        assert (counts["kernels"], counts["missing"]) == (len(shipped_kernels()), [])
        assert len(ROWS) <= counts["cases"] < 3 * len(ROWS)  # some rows have several kernels, one for each tile

    @pytest.mark.parametrize(
        ("log", "child", "code", "passed", "said"),
        [
            ("ERROR SUMMARY: 0 errors", "[]", 0, True, "memcheck 40 cases of 30 kernels; racecheck 40"),
            ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "[]", 0, True, "synccheck 40 cases"),
            ("ERROR SUMMARY: 0 errors", '["relu_forward"]', 0, False, "initcheck: relu_forward has not run"),
            ("ERROR SUMMARY: 0 errors", "[]", 7, False, "memcheck (exit code 7):"),
            ("RACECHECK SUMMARY: 10 hazards displayed", "[]", 0, False, "RACECHECK SUMMARY: 10 hazards"),
            ("", "[]", 0, False, "racecheck (exit code 0):"),
        ],
        ids=["clean", "clean of races", "a kernel is left out", "exit code", "hazards", "no summary"],
    )
    def test_what_a_sanitizer_says(self, monkeypatch, tmp_path, log, child, code, passed, said):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"""#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
echo '========= {log}' > "$2"
echo '{{"cases": 40, "kernels": 30, "missing": {child}}}'
exit {code}
""")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(Work, "on_gpu", True)
        outcome = sanitizers.sanitizers(Work(get_device("numpy"), 1.0))
        assert outcome.passed is passed
        assert any(said in line for line in (outcome.summary, *outcome.problems))

    def test_no_gpu_is_one_line(self, monkeypatch, tmp_path, capsys):
        FakeCupy(gpus=0).install(monkeypatch, tmp_path)
        monkeypatch.setattr("segnet_scratch.runtime.devices._shared_device", lambda name: CudaDevice())
        monkeypatch.setattr(sys, "argv", ["gpu_check"])
        assert gpu_check.main() == 1
        assert capsys.readouterr().err.startswith("error: the NVIDIA driver (CUDA 13.0) sees no GPU")


def test_learning_is_judged_by_both_scores(monkeypatch):
    work = Work(get_device("numpy"), 0.0)
    monkeypatch.delenv("SEGNET_TEST_DATA", raising=False)
    outcome = training.learning(work)
    assert outcome.passed is None  # on a GPU it would have failed
    assert "4 synthetic images" in outcome.summary
    good = training._scores
    monkeypatch.setattr(training, "_scores", lambda *a: replace(good(*a), global_accuracy=0.995, miou=0.96))
    assert training.learning(work).passed
    monkeypatch.setattr(training, "_scores", lambda *a: replace(good(*a), global_accuracy=0.995, miou=0.94))
    assert training.learning(work).passed is None
    monkeypatch.setattr(Work, "on_gpu", True)
    assert training.learning(work).passed is False


def test_the_closing_line_names_what_failed():
    results = {"a": (Outcome(True, ""), 1.0), "b": (Outcome(False, ""), 2.0), "c": (Outcome(None, ""), 0.0)}
    line = report.closing_line({"device": "cuda", "gpu": "NVIDIA H100"}, results)
    assert line == "gpu_check, NVIDIA H100, 3 s: 1 passed (a); 1 FAILED (b); 1 not judged (c)"
