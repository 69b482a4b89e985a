"""What to launch: from the little that a user says to every scalar, every array, grid and block.

Shape comments work in both directions: `// (n, h, w, c)` gives the shape when n, h, w, c are known, and n, h, w, c when
the shape is known.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from segnet_scratch.errors import CompileError, ConfigError, DTypeError, ShapeError
from segnet_scratch.runtime.geometry import declared_geometry, declared_threads
from segnet_scratch.runtime.launch import ElementTypes, Kernel, dim3, find_kernel
from segnet_scratch.runtime.signature import Parameter, defined_kernels, parse_kernels
from segnet_scratch.runtime.source import read_source

Shape = tuple[int, ...]
Size = Sequence[int] | int
Contents = np.ndarray | float | str | None  # an array, a number for all elements, "random", or None for a null pointer


@dataclass(frozen=True)
class Setup:
    """One launch, complete but for the memory that its arrays lie in."""

    kernel: Kernel
    types: ElementTypes
    scalars: dict[str, int | float]
    contents: dict[str, np.ndarray | None]  # of every array that holds something before the launch
    shapes: dict[str, Shape]  # of every array
    grid: Shape
    block: Shape
    shared: int  # bytes of dynamic shared memory

    def dtype(self, name: str) -> np.dtype:
        """The element type of an array."""
        return self._parameter(name).dtype(self.types)

    def role(self, name: str) -> str:
        """`input`: the kernel may only read it. `updated`: it reads and writes it. `output`: it only writes it."""
        if self._parameter(name).const:
            return "input"
        return "updated" if name in self.contents else "output"

    def of_role(self, *roles: str) -> list[str]:
        """The names of the arrays with these roles that are no null pointers."""
        return [name for name in self.shapes if self.role(name) in roles and self.contents.get(name, 0) is not None]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return prod(self.grid)

    def _parameter(self, name: str) -> Parameter:
        return next(p for p in self.kernel.parameters if p.name == name)


def load_kernel(kernel: str | Path | Kernel) -> Kernel:
    """The kernel of a name, of `file.cu` where that holds a single one, or of `file.cu:name`."""
    if isinstance(kernel, Kernel):
        return kernel
    text = str(kernel)
    path, separator, name = text.rpartition(":") if ".cu:" in text else (text, "", "")
    if not separator and not text.endswith(".cu"):
        return find_kernel(text)
    source = read_source(Path(path))
    kernels = {k.name: k for k in parse_kernels(source)}
    if not kernels:
        lines = ", ".join(f"{kernel.name} (line {kernel.line})" for kernel in defined_kernels(source))
        fix = 'a kernel begins with: extern "C" __global__ void name(...)'
        if lines:
            fix = f'write extern "C" in front of the __global__ of {lines}, without template parameters'
        raise CompileError(f"{path} defines no kernel that can be found by its name; {fix}")
    if not name and len(kernels) > 1:
        choices = ", ".join(f"{path}:{k}" for k in kernels)
        raise ConfigError(f"{path} defines {len(kernels)} kernels; choose one: {choices}")
    if name and name not in kernels:
        raise ConfigError(f"{path} defines no kernel {name!r}; it defines {', '.join(kernels)}")
    return kernels[name or next(iter(kernels))]


def make_setup(
    kernel: Kernel,
    types: ElementTypes,
    shapes: Mapping[str, Size],
    arguments: Mapping[str, int | float],
    inputs: Mapping[str, Contents],
    grid: Size | None,
    block: Size | None,
    shared: int,
    seed: int,
) -> Setup:
    """Fills in what follows from what is given. ConfigError names what is missing, unknown or contradictory."""
    arrays = {p.name: p for p in kernel.parameters if p.pointer}
    numbers = {p.name: p for p in kernel.parameters if p.scalar}
    if len(arrays) + len(numbers) < len(kernel.parameters):
        fix = "launch it in Python, through runtime.launch with runtime.tensor_map.TensorMap"
        raise ConfigError(f"{kernel.name}: takes tensor maps, which say more than shapes: {kernel.signature}; {fix}")
    for what, known, asked in (("array", arrays, [*shapes, *inputs]), ("scalar parameter", numbers, [*arguments])):
        for name in asked:
            if name not in known:
                has = f"it has {', '.join(known) or 'none'}: {kernel.signature}"
                raise ConfigError(f"{kernel.name} has no {what} {name!r}; {has}")
    given: dict[str, Shape] = {name: c.shape for name, c in inputs.items() if isinstance(c, np.ndarray)}
    given |= {name: _as_shape(shape) for name, shape in shapes.items()}
    scalars = dict(arguments)
    for name, shape in given.items():
        for integer, size in arrays[name].sizes(shape).items():  # that its shape comment and its shape have in common
            if integer in numbers and scalars.setdefault(integer, size) != size:
                but = f"but it is {scalars[integer]} already; the signature says {name} is {arrays[name].extent}"
                raise ConfigError(f"{kernel.name}: {name} with shape {shape} makes {integer} = {size}, {but}")
    no_shape = {name: 1000 for name, p in arrays.items() if name not in given and p.extent is None}
    no_value = {n: 1000 if p.dtype(types).kind in "iu" else 0.5 for n, p in numbers.items() if n not in scalars}
    if no_shape or no_value:
        missing = [f"the shape of {n}" for n in no_shape] + [f"{numbers[n].c_type} {n}" for n in no_value]
        example = [f"--shape {n}={v}" for n, v in no_shape.items()] + [f"--arg {n}={v}" for n, v in no_value.items()]
        in_python = [f"{n}={v}" for n, v in (("shapes", no_shape), ("arguments", no_value)) if v]
        example.append(f"(in Python {', '.join(in_python)}); the kernel is {kernel.signature}")
        raise ConfigError(f"{kernel.name}: missing: {', '.join(missing)}; for example {' '.join(example)}")
    integers = {n: int(v) for n, v in scalars.items() if numbers[n].dtype(types).kind in "iu"}
    all_shapes = {name: given[name] if name in given else p.extent_shape(integers) for name, p in arrays.items()}
    for name, shape in all_shapes.items():
        if min(shape, default=1) < 1:
            raise ShapeError(f"{kernel.name}: {name} would have shape {shape}; every size must be positive")
    contents = {}
    for name, p in arrays.items():
        if p.const or name in inputs:
            content, rng = inputs.get(name, "random"), np.random.default_rng([seed, zlib.crc32(name.encode())])
            contents[name] = _contents(f"{kernel.name}: {name}", p.dtype(types), all_shapes[name], content, rng)
    if grid is None or block is None:
        written = [prod(all_shapes[name]) for name, p in arrays.items() if not p.const]
        elements = max(written or [prod(shape) for shape in all_shapes.values()] or [1])
        grid, block = _geometry(kernel, integers, elements, grid, block)
    return Setup(kernel, types, scalars, contents, all_shapes, dim3(_as_shape(grid)), dim3(_as_shape(block)), shared)


def _as_shape(shape: Sequence[int] | int) -> Shape:
    return (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)


def _contents(
    place: str, dtype: np.dtype, shape: Shape, content: Contents, rng: np.random.Generator
) -> np.ndarray | None:
    if content is None:
        return None
    if isinstance(content, np.ndarray):
        if content.dtype != dtype:
            raise DTypeError(f"{place} is {dtype}, the given array {content.dtype}; use astype")
        if content.size != prod(shape):
            raise ShapeError(f"{place} has shape {shape}, the given array {content.shape}")
        return np.ascontiguousarray(content).reshape(shape)
    if isinstance(content, str):
        if content != "random":
            raise ConfigError(f"{place}: expected an array, a number or 'random', got {content!r}")
        # Integers stay small: as pool codes, labels and indices they point somewhere.
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 4, shape)
        return values.astype(dtype)
    return np.full(shape, content, dtype)


def _geometry(
    kernel: Kernel, integers: Mapping[str, int], elements: int, grid: Size | None, block: Size | None
) -> tuple[Size, Size]:
    """What the source says of grid and block; without its word a thread for each element of the largest output."""
    declared = declared_geometry(kernel, integers)
    if block is None:
        block = declared[1] if declared else declared_threads(kernel)
    if grid is None and declared:
        grid = declared[0]
    if grid is None:
        threads, *others = dim3(_as_shape(block))
        if others != [1, 1]:
            size = f"{kernel.name}: a block of {(threads, *others)} threads"
            raise ConfigError(f"{size} does not say what grid covers the output; give it")
        grid = -(-elements // threads)
    return grid, block
