"""A program: ops on named arrays, one after the other, described before any array exists.

What an array is (its Spec) comes from the plan of the op that makes it; how long it lives from the steps that touch it.

Steps on the `side_stream` are a branch: on a GPU they run beside the steps after them until the step that
`Program.join_of` names. What they touch lives until then, so that no step beside them is given its memory.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from segnet_scratch.engine.arena import Arena, Lifetime
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
    side_stream: bool = False

    @property
    def written(self) -> set[str]:
        """The arrays that it changes."""
        inputs = self.op.inputs.keys() - set(self.op.updates)
        return {name for key, name in self.arrays.items() if key not in inputs}


@dataclass
class Program:
    """Steps in their order, and every array that they name.

    `external` are the arrays that somebody else owns: parameters, images. The `intermediate` ones live in an arena.
    """

    external: dict[str, Spec] = field(default_factory=dict)
    intermediate: dict[str, Spec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    phase: str = "forward"  # of the steps that are added
    side_stream: bool = False

    def declare(self, name: str, spec: Spec) -> str:
        """Declares an array that somebody else owns."""
        self.external[name] = spec
        return name

    def add(self, layer: str, op: Op, **arrays: str) -> None:
        """Appends a step. `arrays` names the array behind each input and output of the op.

        What an output or a workspace is called is free; it is intermediate unless declared before. ShapeError where an
        input does not exist or is not what the op was planned for.
        """
        for key, spec in op.inputs.items():
            if key in arrays or key not in op.optional:
                self._expect(op, key, arrays.get(key, ""), spec)
        for key, spec in op.outputs.items():
            if key not in arrays:
                raise ShapeError(f"{layer}: {op.name} has an output {key} that is not named")
            if arrays[key] in self.external:
                self._expect(op, key, arrays[key], spec)
            else:
                self.intermediate[arrays[key]] = spec
        for key, spec in op.workspace.items():
            arrays[key] = f"workspace.{len(self.steps)}.{key}"
            self.intermediate[arrays[key]] = spec
        self.steps.append(Step(op, layer, self.phase, arrays, self.side_stream))

    def spec_of(self, array: str) -> Spec:
        """What an array is."""
        return self.external.get(array) or self.intermediate[array]

    def _expect(self, op: Op, key: str, array: str, expected: Spec) -> None:
        got = self.external.get(array) or self.intermediate.get(array)
        if got is None:
            raise ShapeError(f"{op.name}: there is no array {array!r} yet")
        if got != expected:
            raise ShapeError(f"{op.name}: {key} is {got.shape} {got.dtype}, expected {expected.shape} {expected.dtype}")

    def last_touch(self, array: str) -> int:
        """The last step that reads or changes an array."""
        return max(number for number, step in enumerate(self.steps) if array in step.arrays.values())

    def lifetimes(self, kept: Iterable[str] = ()) -> dict[str, Lifetime]:
        """When each intermediate array is touched first and last; those in `kept` live to the end."""
        touched: dict[str, list[int]] = {}
        for number, step in enumerate(self.steps):
            over = self.join_of(number) - 1 if step.side_stream else number
            for name in step.arrays.values():
                touched.setdefault(name, []).extend((number, over))
        ends = {name: len(self.steps) - 1 for name in kept}
        return {
            name: Lifetime(spec, touched[name][0], ends.get(name, max(touched[name])))
            for name, spec in self.intermediate.items()
        }

    def join_of(self, number: int) -> int:
        """The step before which the others wait for a step of the side stream; the number of steps where none needs to.

        That is where another branch begins, so that memory is soon free again, or a step that needs what the branch
        makes, or changes what it touches.
        """
        first = last = number
        while last + 1 < len(self.steps) and self.steps[last + 1].side_stream:
            last += 1
        while first and self.steps[first - 1].side_stream:
            first -= 1
        branch = self.steps[first : last + 1]
        touched = {name for step in branch for name in step.arrays.values()}
        written = {name for step in branch for name in step.written}
        for later in range(last + 1, len(self.steps)):
            step = self.steps[later]
            if step.side_stream or step.written & touched or written & set(step.arrays.values()):
                return later
        return len(self.steps)


class BoundProgram:
    """A program on arrays of a device: those `given`, and all others in one arena, those in `kept` to the end of a run.

    To run it allocates nothing and waits for nothing.
    """

    def __init__(
        self, program: Program, device: Device, given: Mapping[str, Array | None], kept: Iterable[str] = ()
    ) -> None:
        self.device = device
        self.arrays = {**given, **Arena.plan(program.lifetimes(kept)).allocate(device)}
        self._steps = [(step, self._buffers(step)) for step in program.steps]
        self._joins = {program.join_of(number) for number, step in enumerate(program.steps) if step.side_stream}
        self._compiled = False

    def _buffers(self, step: Step) -> Buffers:
        absent: dict[str, Array | None] = dict.fromkeys(step.op.optional)
        return Buffers(**absent | {key: self.arrays[name] for key, name in step.arrays.items()})

    def compile(self, progress: Progress = no_progress) -> None:
        """Compiles every kernel of the program, on all cores; `run` would do so, without saying how far it is."""
        if self.device.runs_kernels and not self._compiled:
            compile_for(self.device, launched_by(self._launch), progress)
        self._compiled = True

    def _launch(self) -> None:
        for step, buffers in self._steps:
            step.op.run(self.device, buffers)

    def run(
        self, on_phase: Callable[[str], None] = lambda phase: None, after: Callable[[int], None] = lambda number: None
    ) -> None:
        """Carries out every step; `on_phase` is told when another phase begins, `after` when a step has been given."""
        self.compile()
        phase = ""
        for number, (step, buffers) in enumerate(self._steps):
            if step.phase != phase:
                phase = step.phase
                on_phase(phase)
            if number in self._joins:
                self.device.join()
            with scope(step.layer), self.device.side_stream() if step.side_stream else nullcontext():
                carry_out(step.op, lambda op=step.op, b=buffers: op.run(self.device, b))  # type: ignore[misc]
            after(number)
        if len(self._steps) in self._joins:
            self.device.join()
