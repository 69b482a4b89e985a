"""`segnet verify`: it runs what it says, and each part finds what it is there to find."""

import dataclasses
import json
import os
import select
import subprocess
from collections import Counter
from time import monotonic, sleep

import numpy as np
import pytest
from support import TESTS, faulty_rows
from support.kernels import line_of, needs_compiler, needs_sanitizers, written_kernel

from segnet_scratch.errors import CompileError, ConfigError, DeviceError
from segnet_scratch.lab.proof import processes, table, verify
from segnet_scratch.lab.proof.differentiable import NETWORKS
from segnet_scratch.lab.proof.launches import DryDevice, rows_on
from segnet_scratch.lab.proof.parts import same_bits
from segnet_scratch.lab.proof.parts.base import reason_against
from segnet_scratch.lab.proof.parts.gate import MISUSES, refusal_problems, valid_call
from segnet_scratch.lab.proof.parts.reference import Integers, Reference
from segnet_scratch.lab.proof.parts.refusals import HostileInputs
from segnet_scratch.lab.proof.parts.same_bits import Orders, Repeats, Variables
from segnet_scratch.lab.proof.processes import Process
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import FULL, QUICK, Tally, Work
from segnet_scratch.ops.convolution.split_planes import PLANES
from segnet_scratch.runtime.devices import HostDevice, get_device
from segnet_scratch.runtime.host import HostOptions, sanitizer_runtime
from segnet_scratch.runtime.launch import shipped_kernels
from segnet_scratch.runtime.precision import ELEMENTS_OF_RUNG
from segnet_scratch.runtime.source import shipped_sources

pytestmark = needs_compiler


def prove(part, row, device, first=0, count=8, **effort):
    """The tally of some cases of a row on a device, which may be one with a fault."""
    effort = dataclasses.replace(QUICK, **effort)
    return part.prove(Work(part.name, device.name, row, first, count, 0, effort), device)


class TestParts:
    @pytest.mark.parametrize(
        ("part", "row"),
        [
            (Reference(), "add_forward"),
            (Integers(), "max_pool_forward"),
            (HostileInputs(), "max_pool_forward"),
            (Orders(), "cross_entropy_forward_weights"),
            (Variables(), "conv2d_backward_weight_direct"),
            (Repeats(), "add_forward"),
        ],
        ids=lambda of: of if isinstance(of, str) else of.name,
    )
    def test_each_part_passes_what_is_right(self, part, row):
        """And finds faults: it is among those that kill the mutants of test_mutants.py."""
        tally = prove(part, row, get_device("host"), count=16)
        assert not tally.failures, tally.failures
        others = {"orders": 2 + QUICK.shuffles, "variables": 2, "repeats": QUICK.repeats - 1}.get(part.name)
        assert others is None or tally.counts[part.counted] == 16 * others

    def test_a_gate_that_refuses_nothing_or_wrongly_is_found(self):
        right = valid_call(shipped_kernels()["add_forward"])
        attempt = next(MISUSES["float64 for float32"](right))
        assert refusal_problems(right, attempt) == []
        wrong, error, named = attempt
        harmless = (right, error, named)
        assert refusal_problems(right, harmless)
        assert refusal_problems(right, (wrong, ZeroDivisionError, named))

    def test_a_gpu_is_asked_for_what_it_can_only(self):
        def names(architecture):
            device = DryDevice()
            device.architecture = architecture
            return {row.name for row in rows_on(device, ROWS)}

        everything = {row.name for row in ROWS}
        of_hopper = {name for name in everything if "hopper" in name}
        assert len(of_hopper) == 4 * len(PLANES)
        assert names("sm_90") == names(None) == everything
        assert names("sm_80") == names("sm_120") == everything - of_hopper
        assert "conv2d_forward_tiled" in names("sm_75") < names("sm_80")

    def test_every_element_type_of_every_source_is_a_row_s(self):
        types = {element.name for row in ROWS for element in row.elements} | set(ELEMENTS_OF_RUNG)
        assert {element for source in shipped_sources() for element in source.elements} <= types


def test_a_bound_that_is_no_number_admits_nothing(monkeypatch):
    monkeypatch.setattr(type(row_named("add_forward")), "bound", lambda self, op, b, eps: {"y": np.nan})
    assert prove(Reference(), "add_forward", get_device("numpy")).failures


class TestCommand:
    def test_a_row_in_numbers(self, segnet, tmp_path):
        file = tmp_path / "report.json"
        done = segnet(
            *("verify", *2 * ("--device", "numpy", "--row", "add_forward", "--only", "reference"), "--only", "repeats"),
            *("--json", file),
        )
        assert done.code == 0, done.out + done.err
        report = json.loads(file.read_text())
        assert [line["part"] for line in report["parts"]] == ["reference", "repeats"]
        assert all(line["verdict"] == "passed" for line in report["parts"])
        assert report["parts"][0]["counts"]["shapes"] >= len(row_named("add_forward").cases())

    @pytest.mark.parametrize(
        ("option", "value", "hint"), [("--row", "add_forwart", "add_forward"), ("--only", "orderz", "orders")]
    )
    def test_unknown_names(self, segnet, option, value, hint):
        done = segnet("verify", "--device", "numpy", option, value)
        assert done.code == 2
        assert hint in done.err

    def test_a_row_that_is_not_there(self):
        with pytest.raises(ConfigError, match="add_forward"):
            row_named("nothing")


def line_of_fault(kind):
    return f"faulty.cu:{line_of('faulty.cu', f'// line of faulty_{kind}')}"


def prove_faulty(part, kind):
    """The failures of a part on a kernel of tests/kernels/faulty.cu, each in a single text."""
    device = HostDevice(HostOptions(workers=1))
    tally = part.prove(Work(part.name, "host", faulty_rows.ROWS[kind].name, 0, 3, 0, QUICK), device)
    return [str(failure) for failure in tally.failures]


class TestFaultyKernels:
    """Each fault is found by the part that is there for it, and named: kernel, block, thread, line."""

    @pytest.fixture(autouse=True)
    def rows(self, monkeypatch):
        monkeypatch.setattr(table, "ROWS", (*ROWS, *faulty_rows.ROWS.values()))

    @pytest.mark.parametrize("part", [Reference(), Integers()], ids=lambda part: part.name)
    def test_a_wrong_value(self, part):
        first, *_ = prove_faulty(part, "value")
        assert "y: 1 of 64 elements are wrong; worst y[5] = " in first
        assert f"y is written by faulty_value (faulty.cu:{written_kernel('faulty_value').line})" in first
        assert "y[5] is written by thread (5, 0, 0) of block (0, 0, 0) alone" in first

    def test_a_write_past_the_end(self):
        first, *_ = prove_faulty(Reference(), "write")
        assert "y: 1 element written past its end, the nearest is y[64]; the array has 64 elements" in first
        if not reason_against(sanitizer_runtime):
            assert f"{line_of_fault('write')}: faulty_write: block (0, 0, 0), thread (63, 0, 0) writes 4 bytes" in first

    def test_a_race(self):
        first, *_ = prove_faulty(Orders(), "race")
        assert "y[0] has other bits than in ascending order of threads and blocks" in first
        assert "race: the result depends on the order of threads" in first
        line = line_of("faulty.cu", "// line of faulty_race")
        assert f"between the start of the kernel and the barrier in line {line}" in first
        assert "disturb each other in shared array 'turned'" in first

    def test_a_divergent_barrier(self):
        first, *_ = prove_faulty(Orders(), "barrier")
        line = line_of("faulty.cu", "// line of faulty_barrier")
        assert "KernelFault: faulty.cu: faulty_barrier: block (0, 0, 0): divergent barrier" in first
        assert f"waits at line {line}, thread (63, 0, 0) has returned" in first

    def test_a_variable_without_a_value(self):
        failures = prove_faulty(Variables(), "variable")
        assert any("automatic variables: pattern" in failure for failure in failures)
        assert "y[3] depends on a variable that is read before it is set" in failures[0]
        assert "y[3] is written by thread (3, 0, 0) of block (0, 0, 0) alone" in failures[0]

    def test_a_read_that_changes_nothing_passes_all_but_the_sanitizers(self):
        for part in (Reference(), Integers(), Orders(), Variables()):
            assert prove_faulty(part, "read") == []


@pytest.fixture
def process(monkeypatch):
    """A worker process that knows the faulty rows; sanitized or not."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(processes, "WORKER", "support.faulty_rows")
    started = []

    def start(sanitized=False):
        started.append(Process(sanitized))
        return started[-1]

    yield start
    for one in started:
        one.close()


def work(part, kind, sanitized=False, count=3):
    return Work(part, "host", f"faulty_{kind}", 0, count, 0, QUICK, sanitize=sanitized)


class TestProcesses:
    def test_work_is_done_and_counted(self, process):
        tally = process().do(Work("reference", "host", "add_forward", 0, 5, 0, QUICK))
        assert tally.failures == []
        assert tally.counts["shapes"] == 5
        assert tally.kernels == {"add_forward": 5}
        assert tally.seconds > 0
        assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally

    def test_a_crash_is_a_failure_and_the_next_work_is_done(self, process):
        worker = process()
        (failure,) = worker.do(work("reference", "address")).failures
        assert failure.message.startswith("crashed: the process ended with SIGSEGV")
        assert failure.target == "faulty_address"
        assert worker.do(Work("reference", "host", "add_forward", 0, 2, 0, QUICK)).failures == []

    def test_a_kernel_that_never_ends_is_a_failure(self, process):
        endless = dataclasses.replace(work("reference", "end", count=1), limit=3.0)
        (failure,) = process().do(endless).failures
        assert failure.message == "hung: it did not end within 3 s"

    def test_what_it_has_started_ends_with_it(self, process, monkeypatch):
        """As compute-sanitizer may leave the process that it looks at behind."""
        (end, other), popen = os.pipe(), subprocess.Popen
        beside = ["sh", "-c", 'sleep 600 >/dev/null & exec "$@"', "sh"]
        monkeypatch.setattr(subprocess, "Popen", lambda c, **o: popen([*beside, *c], pass_fds=[other], **o))
        process().do(work("reference", "address", count=1))
        os.close(other)
        assert select.select([end], [], [], 5)[0]  # the last that could write to it is gone
        os.close(end)

    def test_what_goes_on_when_time_is_long_over_is_left_out(self, process, monkeypatch):
        monkeypatch.setattr(processes, "GRACE", 0.0)
        assert process().do(work("reference", "end", count=1), until=monotonic() + 0.5) is None

    def test_an_error_that_nobody_expects_shows_where(self, process):
        (failure,) = process().do(Work("a part that nobody wrote", "host", "add_forward")).failures
        assert "Traceback" in failure.message
        assert "KeyError: 'a part that nobody wrote'" in failure.message

    def test_all_work_is_done_once(self, monkeypatch):
        works = [Work("losses", "numpy", str(number)) for number in range(20)]
        works += [Work("losses", "cuda", str(number)) for number in range(3)]
        done = []
        monkeypatch.setattr(Process, "do", lambda self, work, until: Tally(seconds=1.0))
        processes.do_all(works, lambda work, tally: done.append(work), lanes=3)
        assert sorted(w.target for w in done) == sorted(w.target for w in works)

    def test_what_is_measured_has_a_gpu_for_itself(self, monkeypatch):
        running, beside = [], {}

        def do(self, work, until):
            running.append(work.target)
            sleep(0.02)
            beside[work.target] = {*beside.get(work.target, ()), *running}
            running.remove(work.target)
            return Tally()

        monkeypatch.setattr(Process, "do", do)
        works = [Work("losses", "cuda", str(number), alone=number in (3, 4)) for number in range(9)]
        processes.do_all(works, lambda work, tally: None, lanes=4)
        assert (beside["3"], beside["4"]) == ({"3"}, {"4"})
        assert any(len(others) > 1 for others in beside.values())

    def test_an_exception_ends_it(self, monkeypatch):
        def interrupted(self, work, until):
            raise KeyboardInterrupt

        monkeypatch.setattr(Process, "do", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes.do_all([Work("losses", "numpy", "0")] * 5, lambda work, tally: None)


@needs_sanitizers
class TestUnderSanitizers:
    def test_a_read_past_the_end(self, process):
        (failure,) = process(True).do(work("sanitizers", "read", True)).failures
        assert failure.message.startswith(f"{line_of_fault('read')}: faulty_read: block (0, 0, 0), thread (63, 0, 0)")
        assert "reads 4 bytes past the end of x, at x[64] of 64 elements" in failure.message
        assert "case 0 of seed 0" in failure.case

    def test_undefined_behaviour(self, process):
        (failure,) = process(True).do(work("sanitizers", "shift", True)).failures
        assert (
            f"{line_of_fault('shift')}: faulty_shift: undefined behaviour: shift exponent 65 is too" in failure.message
        )

    def test_nothing_to_report(self, process):
        tally = process(True).do(Work("sanitizers", "host", "conv2d_backward_bias", 0, 4, 0, QUICK, sanitize=True))
        assert tally.failures == []
        assert tally.counts["shapes"] == 4


class TestVerify:
    def test_the_figures_of_the_full_proof(self):
        assert (FULL.shapes, FULL.integers, FULL.gradients, FULL.networks, FULL.directions) == (500, 100, 50, 3, 5)
        assert FULL.kinds == len(NETWORKS)
        assert (FULL.ordered, 2 + FULL.shuffles, FULL.sanitized, FULL.variables) == (50, 8, 100, 100)
        assert (FULL.hostile, FULL.repeats, FULL.steps, FULL.runs) == (200, 250, 50, 3)

    def test_a_kernel_without_a_row_is_a_failure(self, monkeypatch):
        kernels = {**shipped_kernels(), "forgotten": None}
        monkeypatch.setattr("segnet_scratch.lab.proof.parts.base.shipped_kernels", lambda: kernels)
        tally = Tally(kernels=Counter(shipped_kernels()), counts=Counter(shapes=1))
        line = verify.Line(Reference(), "host", tally)
        verify._expect_every_kernel({("reference", "host"): line})
        (failure,) = tally.failures
        assert failure.target == "forgotten"
        assert "no row of the op table" in failure.message

    def test_a_device_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(verify, "cuda_missing", lambda: "there is no GPU; get one")
        with pytest.raises(DeviceError, match="get one"):
            verify.verify(["cuda"], parts=["loss edges"])
        report = verify.verify(parts=["loss edges"])
        assert report.missing == {"cuda": "there is no GPU; get one"}
        assert report.passed
        assert [(line.part.name, line.device) for line in report.lines] == [
            ("loss edges", "host"),
            ("loss edges", "numpy"),
        ]

    def test_a_compiler_without_sanitizers(self, monkeypatch):
        def missing():
            raise CompileError("it brings none; install one")

        monkeypatch.setattr(same_bits, "sanitizer_runtime", missing)
        report = verify.verify(["host"], parts=["sanitizers"], rows=["add_forward"])
        (line,) = report.lines
        assert line.verdict == "skipped"
        assert line.tally.skipped == "it brings none; install one"
        assert not report.passed  # nothing has been shown

    def test_host_options_reach_the_work(self, monkeypatch):
        seen = []
        monkeypatch.setattr(verify, "do_all", lambda works, *_, **__: seen.extend(works))
        verify.verify(["host", "numpy"], parts=["reference"], rows=["add_forward"], order="descending", sanitize=True)
        assert {(w.device, w.order, w.sanitize) for w in seen} == {
            ("host", "descending", True),
            ("numpy", "ascending", False),
        }

    def test_failures_are_reported(self, segnet, monkeypatch, tmp_path):
        def broken(works, done, wanted, until):
            for one in filter(wanted, works):
                tally = Tally(counts=Counter(derivatives=7), worst=float("inf"))
                tally.fail(one, "x=(3,4)", "y[0] is wrong\nadd.cu:7: thread (0, 0, 0)")
                done(one, tally)

        monkeypatch.setattr(verify, "do_all", broken)
        file = tmp_path / "report.json"
        done = segnet("verify", "--device", "numpy", "--only", "gradients", "--json", file)
        assert done.code == 1
        assert "gradients, add on numpy, x=(3,4): y[0] is wrong" in done.out
        assert "add.cu:7: thread (0, 0, 0)" in done.out
        assert "FAILED: gradients, on numpy, seed 0" in done.out
        report = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert report["passed"] is False
        assert report["parts"][0]["worst"] is None
        assert report["parts"][0]["failures"][0]["target"] == "add"
