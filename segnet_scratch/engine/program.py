"""A program: ops on named arrays, one after the other, described before any array exists.

What an array is (its Spec) comes from the plan of the op that makes it; how long it lives from the steps that touch it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from segnet_scratch.engine.arena import Lifetime
from segnet_scratch.errors import ShapeError
from segnet_scratch.ops.op import Buffers, Op, Spec
from segnet_scratch.runtime.compilation import Progress, compile_for, launched_by, no_progress
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.observe import carry_out, scope


@dataclass(frozen=True)
class Step:
    """One op, the layer and phase it belongs to, and the array behind each of its inputs, outputs and workspaces."""

    op: Op
    layer: str
    phase: str
    arrays: Mapping[str, str]


@dataclass
class Program:
    """Steps in their order, and every array that they name.

    `given` are the arrays that somebody else owns: parameters, gradients, images. All others live in an arena.
    """

    given: dict[str, Spec] = field(default_factory=dict)
    made: dict[str, Spec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    phase: str = "forward"  # of the steps that are added

    def give(self, name: str, spec: Spec) -> str:
        """Declares an array that somebody else owns."""
        self.given[name] = spec
        return name

    def add(self, layer: str, op: Op, **arrays: str) -> None:
        """Appends a step. `arrays` names the array behind each input and output of the op.

        What an output or a workspace is called is free: it is made here unless it is given. ShapeError where an input
        does not exist or is not what the op was planned for.
        """
        for key, spec in op.inputs.items():
            if key in arrays or key not in op.optional:
                self._expect(op, key, self._spec(op, arrays.get(key)), spec)
        for key, spec in op.outputs.items():
            name = arrays.get(key)
            if name is None:
                raise ShapeError(f"{layer}: {op.name} has an output {key} that is not named")
            if name in self.given:
                self._expect(op, key, self.given[name], spec)
            else:
                self.made[name] = spec
        for key, spec in op.workspace.items():
            arrays[key] = f"workspace.{len(self.steps)}.{key}"
            self.made[arrays[key]] = spec
        self.steps.append(Step(op, layer, self.phase, arrays))

    def spec_of(self, array: str) -> Spec:
        """What an array is."""
        return self.given.get(array) or self.made[array]

    def _spec(self, op: Op, name: str | None) -> Spec:
        spec = self.given.get(name or "") or self.made.get(name or "")
        if spec is None:
            raise ShapeError(f"{op.name}: there is no array {name!r} yet")
        return spec

    def _expect(self, op: Op, key: str, got: Spec, expected: Spec) -> None:
        if got != expected:
            raise ShapeError(f"{op.name}: {key} is {got.shape} {got.dtype}, expected {expected.shape} {expected.dtype}")

    def lifetimes(self, kept: Iterable[str] = ()) -> dict[str, Lifetime]:
        """When each array that is made is touched first and last; those in `kept` live to the end."""
        touched: dict[str, list[int]] = {}
        for number, step in enumerate(self.steps):
            for name in step.arrays.values():
                touched.setdefault(name, []).append(number)
        ends = {name: len(self.steps) - 1 for name in kept}
        return {
            name: Lifetime(spec, touched[name][0], ends.get(name, touched[name][-1]))
            for name, spec in self.made.items()
        }

    def bind(self, arrays: Mapping[str, Array]) -> "BoundProgram":
        """The program on arrays that exist."""
        return BoundProgram([(step, self._buffers(step, arrays)) for step in self.steps])

    def _buffers(self, step: Step, arrays: Mapping[str, Array]) -> Buffers:
        absent: dict[str, Array | None] = dict.fromkeys(step.op.optional)
        return Buffers(**absent | {key: arrays[name] for key, name in step.arrays.items()})


class BoundProgram:
    """A program whose arrays are all in place: to run it allocates nothing and waits for nothing."""

    def __init__(self, steps: list[tuple[Step, Buffers]]) -> None:
        self._steps = steps
        self._compiled = False

    def compile(self, device: Device, progress: Progress = no_progress) -> None:
        """Compiles every kernel of the program, on all cores; `run` would do so, without saying how far it is."""
        if device.runs_kernels and not self._compiled:
            compile_for(device, launched_by(lambda: self._launch(device)), progress)
        self._compiled = True

    def _launch(self, device: Device) -> None:
        for step, buffers in self._steps:
            step.op.run(device, buffers)

    def run(self, device: Device, enter: Callable[[str], None] = lambda phase: None) -> None:
        """Carries out every step; `enter` is told when another phase begins."""
        self.compile(device)
        phase = ""
        for step, buffers in self._steps:
            if step.phase != phase:
                phase = step.phase
                enter(phase)
            with scope(step.layer):
                carry_out(step.op, lambda op=step.op, b=buffers: op.run(device, b))  # type: ignore[misc]
