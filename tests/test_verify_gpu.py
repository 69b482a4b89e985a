"""`segnet verify --device cuda`, as far as it goes without a GPU: its parts on the host device, and all of it on the
stand-in for CuPy. What it is for takes a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import TESTS, faulty_rows
from support.fake_cupy import FakeCupy
from support.kernels import needs_compiler

from segnet_scratch.lab.proof import processes, table, verify
from segnet_scratch.lab.proof.parts import PARTS, compute_sanitizer, learning, steps
from segnet_scratch.lab.proof.parts.learning import Learning
from segnet_scratch.lab.proof.parts.reference import HostBits
from segnet_scratch.lab.proof.parts.steps import Engine, Graphs, Nccl, OtherDevices, Timing, Uploads
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import FULL, QUICK, Work
from segnet_scratch.runtime.devices import CudaDevice, NumpyDevice, get_device
from segnet_scratch.runtime.launch import shipped_kernels

ROOT = TESTS.parent


def prove(part, device):
    return part.prove(Work(part.name, device.name, "SegNet"), device)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The cuda device of the stand-in, here and in worker processes."""
    cupy = FakeCupy().install(monkeypatch, tmp_path)
    device = CudaDevice()
    monkeypatch.setattr("segnet_scratch.runtime.devices._shared_device", lambda name: device)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(processes, "WORKER", "support.gpu_worker")
    monkeypatch.setitem(os.environ, "SEGNET_HOPPER", "")
    cupy.device = device
    return cupy


class TestParts:
    @needs_compiler
    @pytest.mark.parametrize("part", [OtherDevices(), Graphs(), Engine(), Timing()], ids=lambda part: part.name)
    def test_they_pass_on_the_host(self, part):
        tally = prove(part, get_device("host"))
        assert tally.failures == []
        assert sum(tally.counts.values()) > 1
        assert tally.notes

    @needs_compiler
    @pytest.mark.usefixtures("multiply_adds")
    def test_graphs_and_uploads_ask_of_cupy_what_it_has(self, monkeypatch, tmp_path):
        cupy, device = FakeCupy().install(monkeypatch, tmp_path), CudaDevice()
        device.gpu = None  # the sizes of the host
        for part in (Graphs(), Uploads()):
            assert prove(part, device).failures == []
        assert any(stream and pinned for stream, pinned in cupy.copies)
        cupy.timeline.finish()

    @needs_compiler
    def test_nccl_is_asked_and_noticed(self, monkeypatch, tmp_path):
        cupy, device = FakeCupy().install(monkeypatch, tmp_path), CudaDevice()
        assert prove(Nccl(), device).failures == []
        assert {call.what for call in cupy.cuda.nccl.calls} == {"allReduce", "allGather"}
        cupy.timeline.finish()
        monkeypatch.setattr("support.fake_nccl.FakeCommunicator.times", lambda self, values: values.fill(0))
        learned = steps.Steps.learned
        monkeypatch.setattr(steps.Steps, "learned", lambda self, count: learned(self, 1))  # the first is wrong already
        assert [failure.message[:6] for failure in prove(Nccl(), device).failures] == ["layers", "fused:"]
        cupy.cuda.nccl.available = False
        assert "CuPy finds no NCCL" in Nccl().unavailable()

    @needs_compiler
    @pytest.mark.usefixtures("multiply_adds")
    def test_a_replay_that_differs_is_noticed(self, monkeypatch, tmp_path):
        FakeCupy().install(monkeypatch, tmp_path)
        device = CudaDevice()
        device.gpu = None
        monkeypatch.setattr(CudaDevice, "capture", lambda self, step: lambda: (step(), step())[1])  # two steps for one
        *_, last = prove(Graphs(), device).failures
        assert last.message == "the weights differ"

    def test_losses_that_differ_from_other_devices(self, monkeypatch):
        monkeypatch.setattr("segnet_scratch.lab.proof.parts.steps.OTHER_DEVICES_LIMIT", -1.0)
        (failure,) = prove(OtherDevices(), NumpyDevice()).failures
        assert "losses lie 0.0 from those of numpy" in failure.message

    @pytest.mark.parametrize(
        ("pixels", "miou", "passed"), [(0.995, 0.96, True), (0.995, 0.94, False), (0.98, 1, False)]
    )
    def test_learning_is_judged_by_both_scores(self, monkeypatch, pixels, miou, passed):
        monkeypatch.delenv("SEGNET_TEST_DATA", raising=False)
        monkeypatch.setattr(learning, "MOST_STEPS", 25)
        monkeypatch.setattr(learning, "TrainingStep", lambda *a, **o: lambda *batch: None)
        found = learning.scores_of
        monkeypatch.setattr(learning, "scores_of", lambda *a: replace(found(*a), global_accuracy=pixels, miou=miou))
        tally = prove(Learning(), get_device("numpy"))
        assert (tally.failures == []) is bool(passed)
        assert "4 synthetic images" in tally.notes[0]


@needs_compiler
@pytest.mark.parametrize(("row", "equal"), [("relu_forward", True), ("conv2d_forward_tiled", False)])
def test_other_bits_than_the_host_s_are_noticed(row, equal):
    """NumPy adds in another order than the kernel."""
    tally = HostBits().prove(Work("host bits", "numpy", row, 0, 12), NumpyDevice())
    assert (tally.failures == []) is equal
    assert equal or "y: other bits than on the host device" in tally.failures[0].message


class TestComputeSanitizer:
    def test_every_kernel_is_seen(self, monkeypatch, tmp_path):
        cupy = FakeCupy(dry=True).install(monkeypatch, tmp_path)
        cupy.cuda.set_allocator = lambda allocator: None
        counts = compute_sanitizer.main(CudaDevice(), 0.0)
        assert (counts["kernels"], counts["missing"]) == (len(shipped_kernels()), [])
        assert len(ROWS) <= counts["cases"] < 3 * len(ROWS)  # some rows have several kernels, one for each tile

    @pytest.mark.parametrize(
        ("log", "child", "code", "said"),
        [
            ("ERROR SUMMARY: 0 errors", "[]", 0, ""),
            ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "[]", 0, ""),
            ("ERROR SUMMARY: 0 errors", '["relu_forward"]', 0, "initcheck: relu_forward has not run"),
            ("ERROR SUMMARY: 0 errors", "[]", 7, "memcheck (exit code 7):"),
            ("RACECHECK SUMMARY: 10 hazards displayed", "[]", 0, "RACECHECK SUMMARY: 10 hazards"),
            ("", "[]", 0, "racecheck (exit code 0):"),
        ],
        ids=["clean", "clean of races", "a kernel is left out", "exit code", "hazards", "no summary"],
    )
    def test_what_it_says(self, monkeypatch, tmp_path, log, child, code, said):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"""#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
echo '========= {log}' > "$2"
echo '{{"cases": 40, "kernels": 30, "missing": {child}}}'
exit {code}
""")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        part = compute_sanitizer.ComputeSanitizer()
        assert part.unavailable() == ""
        tally = prove(part, get_device("numpy"))
        assert tally.notes[0] == "memcheck 40 cases of 30 kernels"
        assert (tally.failures == []) is not bool(said)
        assert not said or any(said in failure.message for failure in tally.failures)


@needs_compiler
class TestOnAGpu:
    """The whole way: builds first, results to compare with from processes ahead of the GPU's, its own process."""

    def test_rows_pass(self, gpu, tmp_path):
        kept = []
        report = verify.verify(
            ["cuda"],
            parts=["host builds", "cuda builds", "reference", "integers", "host bits", "repeats"],
            rows=["add_forward", "relu_forward"],
            keep=lambda report: kept.append(json.dumps(report.to_json())),
        )
        assert report.failures == []
        lines = {(line.part.name, line.device): line for line in report.lines}
        assert all(line.verdict == "passed" for line in report.lines)
        assert {device for _, device in lines} == {"cuda", "host"}  # what the host's bits come from is built
        cases = sum(len(row_named(name).cases()) for name in ("add_forward", "relu_forward"))
        assert lines["reference", "cuda"].tally.counts["shapes"] == cases + 2 * QUICK.shapes
        assert lines["host bits", "cuda"].tally.counts["shapes"] == cases
        parts = [{part["part"]: part["verdict"] for part in json.loads(text)["parts"]} for text in kept]
        assert len(kept) > len(report.lines)  # after each round of a part
        assert (parts[0]["repeats"], parts[-1]["repeats"]) == ("not reached", "passed")
        assert report.environment["gpu"]

    def test_what_has_no_time_is_never_passed(self, gpu):
        report = verify.verify(["cuda"], parts=["reference"], rows=["add_forward"], minutes=0)
        (line,) = report.lines
        fixed = len(row_named("add_forward").cases())
        assert (line.verdict, report.passed) == ("not reached", False)
        assert line.remark == "time was over before it began"
        assert [text for _, text in report.text()][-2:-1] == ["not shown, since not all of it was run: reference"]
        assert line.to_json()["left_out"] == {"fixed": {"add_forward": fixed}, "random": {"add_forward": FULL.shapes}}
        line.tally.counts["shapes"] = 1
        assert line.verdict == "incomplete"
        assert line.remark.startswith(f"no time for {fixed} of {fixed} fixed cases: add_forward; no time for 500 of")
        for work in [work for work in line.left if work.kind == "fixed"]:
            del line.left[work]
        assert line.verdict == "passed"  # random cases may be left out
        assert line.remark == "no time for 500 of 500 random cases"

    def test_what_hangs_or_crashes_costs_itself_alone(self, gpu, monkeypatch):
        """In a process of its own each, on one lane: the row that is right meets what the others leave behind."""
        monkeypatch.setattr(table, "ROWS", (*ROWS, *faulty_rows.ROWS.values()))
        monkeypatch.setattr("segnet_scratch.lab.proof.verify.rows_on", lambda device, rows: rows)
        monkeypatch.setattr(processes, "GPU_PROCESSES", 1)
        monkeypatch.setattr(verify, "HOPPER", {"faulty_end"})
        monkeypatch.setattr(verify, "RISKY_LIMIT", 1.0)
        monkeypatch.setattr(verify, "BUILD_LIMIT", 2.0)  # as there is no part that builds
        wrong = [f"faulty_{kind}" for kind in ("end", "address", "context")]
        report = verify.verify(["cuda"], parts=["reference", "repeats"], rows=[*wrong, "add_forward"])
        said = {failure.target: failure for failure in report.failures}
        assert len(report.failures) == len(said) == 3  # once each
        assert said["faulty_end"].message.startswith("hung: it did not end within 3 s")
        assert "1 blocks" in said["faulty_end"].case
        assert said["faulty_address"].message.startswith("crashed: the process ended with SIGSEGV")
        assert said["faulty_context"].message.startswith("crashed: the process ended with exit code 1\nTraceback")
        reference, repeats = report.lines
        assert reference.tally.counts["shapes"] == len(row_named("add_forward").cases()) + QUICK.shapes
        assert repeats.tally.counts["repetitions"] == QUICK.repeats - 1
        assert "faulty_address, which crashed in reference, faulty_context, which crashed in" in repeats.remark
        assert report.environment["SEGNET_HOPPER"] == "0"  # the engine does without what has failed

    def test_a_part_that_is_for_others_says_so(self):
        report = verify.verify(["host"], parts=["learning"])
        assert [line.remark for line in report.lines] == ["it is for cuda, not for host"]
        assert not report.passed

    def test_a_few_cases_of_everything_come_before_many_of_anything(self, gpu, monkeypatch):
        batches = []
        monkeypatch.setattr(verify, "do_all", lambda works, *_, **__: batches.append(works))
        gpu.device.architecture = "sm_90"
        verify.verify(["cuda"], minutes=8)
        builds, risky, rest = batches
        assert {work.part for work in builds} == {"host builds", "cuda builds"}
        assert {work.target for work in risky if work.part == "reference"} == verify.HOPPER
        assert {work.limit for work in risky} == {verify.RISKY_LIMIT}
        assert [work.round for work in rest] == sorted(work.round for work in rest)
        first = [work for work in rest if work.round == 0]
        assert {work.target for work in [*risky, *first] if work.part == "reference"} == {row.name for row in ROWS}
        assert max(work.count for work in first if work.part == "reference") == 3
        parts = {name for name, part in PARTS.items() if "cuda" in part.devices and not part.unavailable()}
        assert {work.part for work in [*builds, *first]} == parts
        random = sum(work.count for work in rest if work.kind == "random" and work.part == "reference")
        assert random == len(ROWS) * FULL.shapes  # as many as there is time for
        assert {work.part for work in rest if work.alone} == {"graphs", "uploads", "timing"}
        gpu.device.architecture = "sm_80"
        verify.verify(["cuda"])
        assert not any("hopper" in work.target for batch in batches[3:] for work in batch if work.device == "cuda")
        assert any("tf32" in work.target for work in batches[-1])


def test_the_script_is_a_thin_call():
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", "--only", "reference"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.stderr.startswith("error: ")
    assert len((ROOT / "scripts" / "gpu_check.sh").read_text().splitlines()) < 12
