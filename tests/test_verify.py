"""`segnet verify`: it runs what it says, and each part finds what it is there to find."""

import dataclasses
import json

import numpy as np
import pytest
from faulty_device import mutant_device
from kernel_support import needs_compiler

from segnet_scratch.device import get_device
from segnet_scratch.errors import ConfigError
from segnet_scratch.kernels import shipped_kernels
from segnet_scratch.kernels.source import shipped_sources
from segnet_scratch.ops.conv2d_mma import ELEMENTS_OF_RUNG
from segnet_scratch.proof.launches import kernels_of
from segnet_scratch.proof.misuse import MISUSES, valid_call
from segnet_scratch.proof.parts.gate import refusal_problems
from segnet_scratch.proof.parts.hostile import HostileInputs
from segnet_scratch.proof.parts.orders import Orders
from segnet_scratch.proof.parts.reference import Integers, Reference
from segnet_scratch.proof.parts.refusals import Refusals
from segnet_scratch.proof.parts.variables import Variables
from segnet_scratch.proof.table import ROWS, row_named
from segnet_scratch.proof.work import QUICK, Work

pytestmark = needs_compiler


def prove(part, row, device, first=0, count=8, **effort):
    """The tally of some cases of a row on a device, which may be one with a fault."""
    effort = dataclasses.replace(QUICK, **effort)
    return part.prove(row_named(row), Work(part.name, device.name, row, first, count, 0, effort), device)


class TestParts:
    @pytest.mark.parametrize("row", ["add_forward", "max_pool_forward", "conv2d_forward_tiled", "sgd_step"])
    @pytest.mark.parametrize("part", [Reference(), Orders(), Variables()], ids=lambda part: part.name)
    def test_nothing_is_found_where_nothing_is_wrong(self, part, row):
        tally = prove(part, row, get_device("host"), count=4)
        assert not tally.failures, tally.failures
        assert tally.counts["shapes"] == 4
        assert set(tally.kernels) <= set(shipped_kernels())

    @pytest.mark.parametrize(
        ("part", "row"),
        [
            (Reference(), "add_forward"),
            (Integers(), "max_pool_forward"),
            (HostileInputs(), "max_pool_forward"),
            (Orders(), "cross_entropy_forward_weights"),
            (Variables(), "conv2d_backward_weight_direct"),
        ],
        ids=lambda of: of if isinstance(of, str) else of.name,
    )
    def test_each_part_passes_what_is_right(self, part, row):
        """And finds faults: it is among those that kill the mutants of test_mutants.py."""
        tally = prove(part, row, get_device("host"), count=16)
        assert not tally.failures, tally.failures

    @pytest.mark.parametrize("row", [row.name for row in ROWS])
    def test_what_does_not_fit_is_refused(self, row):
        tally = Refusals().prove(row_named(row), Work("refusals", "numpy", row, effort=QUICK), get_device("numpy"))
        assert not tally.failures, tally.failures
        assert tally.counts["calls"] > 0

    def test_a_gate_that_refuses_nothing_or_wrongly_is_found(self):
        right = valid_call(shipped_kernels()["add_forward"])
        attempt = next(MISUSES["float64 for float32"](right))
        assert refusal_problems(right, attempt) == []
        wrong, error, named = attempt
        harmless = (right, error, named)
        assert refusal_problems(right, harmless)
        assert refusal_problems(right, (wrong, ZeroDivisionError, named))

    def test_every_kernel_belongs_to_a_row(self):
        known = set().union(*(kernels_of(row) for row in ROWS))
        assert known == set(shipped_kernels())

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
            *("verify", "--device", "numpy", "--row", "add_forward", "--only", "reference", "--only", "repeats"),
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
