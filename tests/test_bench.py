"""The benchmark against PyTorch: all of a CPU's, and what of a GPU's needs none. Clocks and contenders are made up."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch", reason="the benchmark compares with PyTorch")
from bench import end_to_end, gate, run, timing
from bench.cases import CASES, Case, initial_state
from bench.contenders import OURS, Peer, makers_of, peers_of
from bench.timing import BLOCKS, WARM_UP, Times, in_turn, latencies

from segnet_scratch import get_device

TRAINING = Case("training", 2, (32, 32), "float32")
ONE_IMAGE = Case("inference", 1, (32, 32), "tf32")


class FakeClock:
    """Counts what the contenders say they take."""

    def __init__(self):
        self.now, self.began, self.log = 0.0, 0.0, []

    def start(self):
        self.began = self.now

    def stop(self):
        return self.now - self.began

    def contender(self, name, seconds):
        def call(*_):
            self.now += seconds
            self.log.append(name)

        return call


class TestTiming:
    def test_blocks_are_taken_in_turn_and_long_enough(self):
        clock = FakeClock()
        calls = {"a": clock.contender("a", 0.01), "b": clock.contender("b", 0.002)}
        times = in_turn(calls, clock, 4.0)
        assert {name: t.median for name, t in times.items()} == pytest.approx({"a": 0.01, "b": 0.002})
        assert all(len(t.seconds) == BLOCKS for t in times.values())
        measured = clock.log[2 * WARM_UP :]
        share = 4.0 / (2 * BLOCKS)
        first = ["a"] * round(share / 0.01) + ["b"] * round(share / 0.002)
        assert measured == first * BLOCKS

    def test_latencies_wait_for_every_call(self):
        clock = FakeClock()
        times = latencies({"a": clock.contender("a", 0.5), "b": clock.contender("b", 0.25)}, clock)
        assert (times["a"].median, times["b"].median) == (0.5, 0.25)
        assert clock.log[:4] == ["a", "b", "a", "b"]

    def test_quartiles(self):
        assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)


def makers(clock, **seconds):
    return {name: lambda name=name, s=s: (clock.contender(name, s), 100) for name, s in seconds.items()}


class TestCases:
    def test_the_best_of_each_side_are_compared(self):
        clock = FakeClock()
        contenders = makers(clock, **{"ours, a": 2.0, "ours, b": 1.0, "PyTorch, x": 3.0, "PyTorch, y": 1.5})
        result = run.run_case(TRAINING, contenders, clock, 10.0)
        assert (result.best("ours"), result.best("PyTorch")) == ("ours, b", "PyTorch, y")
        assert result.speedup == pytest.approx(1.5)
        assert result.latency == {}
        assert run.run_case(ONE_IMAGE, contenders, clock, 10.0).latency.keys() == contenders.keys()

    def test_what_cannot_run_is_said_and_the_others_go_on(self):
        def broken():
            raise ImportError("there is no triton")

        clock = FakeClock()
        contenders = {"PyTorch, compile": broken, **makers(clock, **{"ours, a": 1.0, "PyTorch, eager": 1.0})}
        result = run.run_case(TRAINING, contenders, clock, 10.0)
        assert result.unavailable == {"PyTorch, compile": "ImportError: there is no triton"}
        assert set(result.times) == {"ours, a", "PyTorch, eager"}
        with pytest.raises(RuntimeError, match=r"no contender of PyTorch runs: .*triton"):
            run.run_case(TRAINING, {"PyTorch, compile": broken, **makers(clock, **{"ours, a": 1.0})}, clock, 1.0)

    def test_batches_rotate(self):
        seen = []
        call = run._rotating(seen.append)
        for _ in range(run.INPUTS + 1):
            call()
        assert seen == [*range(run.INPUTS), 0]

    def test_table_and_json(self, tmp_path):
        clock = FakeClock()
        contenders = makers(clock, **{"ours, fused": 1.0, "PyTorch, channels_last, graph": 1.2})
        results = [run.run_case(case, contenders, clock, 10.0) for case in (TRAINING, ONE_IMAGE)]
        out = io.StringIO()
        Console(file=out, width=250).print(run.report(results, "a GPU"))
        assert "1.20" in out.getvalue()
        assert "2.0 MISSED" in out.getvalue()
        run.write(tmp_path / "out" / "b.json", {"cases": [result.to_json() for result in results]})
        cases = json.loads((tmp_path / "out" / "b.json").read_text())["cases"]
        assert cases[1]["speedup"] == pytest.approx(1.2)
        assert len(cases[1]["latency"]["ours, fused"]["seconds"]) == 50

    def test_every_task_shape_and_precision_is_a_case_the_most_important_first(self):
        assert len(set(CASES)) == len(CASES) == 16
        assert CASES[0] == Case("training", 16, (224, 224), "bf16")
        assert CASES[0].target == 1.5

    def test_pytorch_at_its_best(self):
        names = peers_of(ONE_IMAGE, thorough=True)
        assert len(names) == 2 * 2 * 5
        assert set(peers_of(ONE_IMAGE, thorough=False)) < set(names)
        assert "PyTorch, channels_last, graph, folded" in peers_of(ONE_IMAGE, thorough=False)


class TestGate:
    def test_right_contenders_pass(self):
        errors = gate.errors_of(get_device("numpy"), width=1 / 8, on_gpu=False)
        for precision in ("bf16", "float32"):  # on the CPU PyTorch has no tf32
            assert all(gate.right(errors[precision]).values()), (precision, errors[precision])
        assert "ours, layers" not in errors["bf16"]
        assert errors["float32"]["ours, fused"]["logits"] < 1e-4 < errors["bf16"]["ours, fused"]["logits"]

    @pytest.mark.parametrize("value", [1.0, float("nan")])
    def test_wrong_ones_do_not(self, value):
        fine = {"logits": 1e-6, "gradients": 1e-5}
        errors = {"ours, fused": {**fine, "gradients": value}, "ours, layers": fine, "PyTorch": fine}
        assert gate.right(errors) == {"ours, fused": False, "ours, layers": True}

    def test_contenders_take_steps(self):
        case = replace(TRAINING, width=1 / 8, on_gpu=False)
        state = initial_state(0, 1 / 8)
        images, labels = case.data(0)
        ours = OURS["ours, fused"](case, get_device("numpy"), state)
        before = ours.model.classifier.weight.numpy().copy()
        for _ in range(3):
            ours.call(images, labels)
        assert (ours.model.classifier.weight.numpy() != before).any()
        folded = Peer(replace(ONE_IMAGE, width=1 / 8, on_gpu=False), state, folded=True)
        import torch

        folded.call(torch.from_numpy(case.data(0)[0][:1].transpose(0, 3, 1, 2).copy()), None)


def test_the_benchmark_of_a_cpu(monkeypatch):
    """From the gate to the table, on the NumPy device."""
    monkeypatch.setattr(timing, "BLOCKS", 1)
    monkeypatch.setattr(gate, "DRAWS", 1)
    found = {}
    cases = [Case(task, 1, (32, 32), "float32", 1 / 8, on_gpu=False) for task in ("training", "inference")]
    run.run(get_device("numpy"), cases, np.inf, False, lambda **parts: found.update(parts), lambda case, name: 100)
    assert [case["case"] for case in found["cases"]] == [str(case) for case in cases]
    training, inference = (case["times"] for case in found["cases"])
    assert set(training) == {"ours, layers", "PyTorch, channels_last, eager", "PyTorch, contiguous, eager"}
    assert "PyTorch, channels_last, eager, folded" in inference
    assert found["cases"][0]["memory"] == dict.fromkeys(training, 100)
    build = makers_of(cases[0], get_device("numpy"), ["ours, layers"], False)["ours, layers"]
    assert build()[1] >= 0  # bytes of this process


def test_the_command_beside_the_bare_step(monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "ROUNDS", 1)
    seconds = {"device": iter([3.0, 5.0]), "memory": iter([3.0, 4.0])}
    asked = []

    def command(data, out, device, settings):
        asked.append(settings)
        return next(seconds[next(s for s in settings if s.startswith("cache=")).removeprefix("cache=")])

    monkeypatch.setattr(end_to_end, "_command", command)
    monkeypatch.setattr(end_to_end._Bare, "seconds", lambda self, count: 0.5)
    found = end_to_end.measure("numpy", 2, 32, 1 / 16, 2.0, None)
    assert found["steps"] == 4
    assert found["images_a_second"] == {"bare step": 4.0, "device": 4.0, "memory": 8.0}
    first, second = (next(s for s in settings if s.startswith("steps=")) for settings in asked[:2])
    assert int(second.removeprefix("steps=")) - int(first.removeprefix("steps=")) == 4
    assert "1.000 of the step, target 0.95: met" in capsys.readouterr().out.replace("\n", " ")
