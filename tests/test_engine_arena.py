"""The arena's placement, and programs: arrays that are declared, made, kept and bound."""

import numpy as np
import pytest

from segnet_scratch.engine.arena import ALIGNMENT, Arena, Lifetime
from segnet_scratch.engine.program import BoundProgram, Program
from segnet_scratch.errors import ShapeError
from segnet_scratch.ops.elementwise.relu import ReluBackward, ReluForward
from segnet_scratch.ops.op import Spec, spec
from segnet_scratch.runtime.devices import get_device

BYTE = np.dtype(np.uint8)


def lifetime(nbytes, first, last):
    return Lifetime(Spec((nbytes,), BYTE), first, last)


def overlaps(arena):
    """Pairs of arrays that live at one time and share a byte."""
    placed = [(name, arena.offsets[name], life) for name, life in arena.lifetimes.items()]
    return [
        (a, b)
        for i, (a, start, life) in enumerate(placed)
        for b, other_start, other in placed[i + 1 :]
        if life.meets(other) and start < other_start + other.nbytes and other_start < start + life.nbytes
    ]


def needed(arena):
    """Bytes that are alive at the fullest step: the least that any placement takes."""
    return max(sum(arena.alive(life.first).values()) for life in arena.lifetimes.values())


class TestArena:
    @pytest.mark.parametrize("seed", range(20))
    def test_nothing_that_lives_together_overlaps(self, seed):
        rng = np.random.default_rng(seed)
        lifetimes = {}
        for i in range(int(rng.integers(1, 60))):
            first = int(rng.integers(0, 40))
            lifetimes[f"a{i}"] = lifetime(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 12)))
        arena = Arena.plan(lifetimes)
        assert overlaps(arena) == []
        assert all(offset % ALIGNMENT == 0 for offset in arena.offsets.values())
        assert needed(arena) <= arena.nbytes <= sum(life.nbytes for life in lifetimes.values())

    def test_an_overlap_would_be_seen(self):
        lifetimes = {"a": lifetime(300, 0, 2), "b": lifetime(300, 2, 3)}
        assert overlaps(Arena(lifetimes, {"a": 0, "b": 256}, 812)) == [("a", "b")]
        assert overlaps(Arena(lifetimes, {"a": 0, "b": 512}, 1024)) == []

    def test_what_lives_at_other_times_shares_its_place(self):
        arena = Arena.plan({"a": lifetime(1000, 0, 1), "b": lifetime(1000, 2, 3), "c": lifetime(500, 1, 2)})
        assert arena.offsets == {"a": 0, "b": 0, "c": 1024}
        assert arena.nbytes == needed(arena) == 1536
        assert arena.alive(1) == {"a": 1024, "c": 512}

    def test_arrays_are_views_that_keep_to_themselves(self):
        specs = {"a": spec((3, 5), np.float32), "b": spec((7,), np.float64), "c": spec((2, 2), np.uint8)}
        arena = Arena.plan({name: Lifetime(s, 0, 0) for name, s in specs.items()})
        arrays = arena.allocate(get_device("numpy"))
        for number, (name, s) in enumerate(specs.items()):
            assert arrays[name].shape == s.shape
            assert arrays[name].dtype == s.dtype
            arrays[name][...] = number
        assert all((arrays[name] == number).all() for number, name in enumerate(specs))

    def test_nothing(self):
        assert Arena.plan({}).nbytes == 0


def relu_program():
    x = spec((2, 3), np.float32)
    program = Program()
    program.declare("x", x)
    program.declare("dy", x)
    program.add("forward", ReluForward.plan(x), x="x", y="y")
    program.add("backward", ReluBackward.plan(x), y="y", dy="dy", dx="dx")
    return program


class TestProgram:
    def test_lifetimes_reach_from_the_first_step_to_the_last(self):
        program = relu_program()
        x = spec((2, 3), np.float32)
        assert program.lifetimes() == {"y": Lifetime(x, 0, 1), "dx": Lifetime(x, 1, 1)}
        program.add("again", ReluForward.plan(x), x="x", y="z")
        assert program.lifetimes(kept=("dx",))["dx"] == Lifetime(x, 1, 2)

    @pytest.mark.parametrize("device", ["numpy", "host"])
    def test_runs_on_what_it_is_bound_to(self, device):
        device, program = get_device(device), relu_program()
        x = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
        bound = BoundProgram(program, device, {"x": x, "dy": np.ones((2, 3), np.float32)})
        bound.run()
        np.testing.assert_array_equal(bound.arrays["dx"], x > 0)

    def test_what_does_not_fit_is_refused(self):
        program, x = relu_program(), spec((2, 3), np.float32)
        with pytest.raises(ShapeError, match="there is no array 'q' yet"):
            program.add("l", ReluForward.plan(x), x="q", y="y2")
        with pytest.raises(ShapeError, match=r"x is \(2, 3\) float32, expected \(3, 2\) float32"):
            program.add("l", ReluForward.plan(spec((3, 2), np.float32)), x="x", y="y2")
        with pytest.raises(ShapeError, match="an output y that is not named"):
            program.add("l", ReluForward.plan(x), x="x")
        double = spec((2, 3), np.float64)
        program.declare("x2", double)
        with pytest.raises(ShapeError, match=r"y is \(2, 3\) float32, expected \(2, 3\) float64"):
            program.add("l", ReluForward.plan(double), x="x2", y="dy")
