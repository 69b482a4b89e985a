"""What to launch: from the little that a user says to every scalar, every array, grid and block.

Shape comments work in both directions: `// (n, h, w, c)` gives the shape when n, h, w, c are known, and n, h, w, c when
the shape is known.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, ConfigError, DTypeError, ShapeError
from segnet_scratch.runtime.geometry import declared_geometry, declared_threads
from segnet_scratch.runtime.launch import ElementTypes, Kernel, find_kernel, three
from segnet_scratch.runtime.signature import Parameter, defined_kernels, parse_kernels
from segnet_scratch.runtime.source import Source, read_source

Shape = tuple[int, ...]
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
        raise CompileError(f"{path} defines no kernel that can be found by its name; {_what_it_has(source)}")
    if not name and len(kernels) > 1:
        raise ConfigError(
            f"{path} defines {len(kernels)} kernels; choose one: {', '.join(f'{path}:{k}' for k in kernels)}"
        )
    if name and name not in kernels:
        raise ConfigError(f"{path} defines no kernel {name!r}; it defines {', '.join(kernels)}")
    return kernels[name or next(iter(kernels))]


def _what_it_has(source: Source) -> str:
    if lines := ", ".join(f"{kernel.name} (line {kernel.line})" for kernel in defined_kernels(source)):
        return f'write extern "C" in front of the __global__ of {lines}, without template parameters'
    return 'a kernel begins with: extern "C" __global__ void name(...)'


def make_setup(
    kernel: Kernel,
    types: ElementTypes,
    shapes: Mapping[str, Sequence[int] | int],
    arguments: Mapping[str, int | float],
    inputs: Mapping[str, Contents],
    grid: Sequence[int] | int | None,
    block: Sequence[int] | int | None,
    shared: int,
    seed: int,
) -> Setup:
    """Fills in what follows from what is given. ConfigError names what is missing, unknown or contradictory."""
    arrays = {p.name: p for p in kernel.parameters if p.pointer}
    numbers = {p.name: p for p in kernel.parameters if p.scalar}
    if len(arrays) + len(numbers) < len(kernel.parameters):
        raise ConfigError(
            f"{kernel.name}: takes tensor maps, which say more than shapes: {kernel.signature}; launch it in Python, "
            "through runtime.launch with runtime.tensor_map.TensorMap"
        )
    _expect_known(kernel, "array", arrays, [*shapes, *inputs])
    _expect_known(kernel, "scalar parameter", numbers, arguments)
    given = {name: _as_shape(shape) for name, shape in shapes.items()}
    for name, content in inputs.items():
        if isinstance(content, np.ndarray):
            given.setdefault(name, content.shape)
    scalars: dict[str, int | float] = dict(arguments)
    for name, shape in given.items():
        _infer(kernel, arrays[name], shape, numbers, scalars)
    _expect_complete(kernel, types, arrays, numbers, given, scalars)
    integers = {n: int(v) for n, v in scalars.items() if numbers[n].dtype(types).kind in "iu"}
    all_shapes: dict[str, Shape] = {}
    for name, parameter in arrays.items():
        all_shapes[name] = given[name] if name in given else parameter.extent_shape(integers)
        if min(all_shapes[name], default=1) < 1:
            raise ShapeError(f"{kernel.name}: {name} would have shape {all_shapes[name]}; every size must be positive")
    contents = {
        name: _contents(kernel, parameter, types, all_shapes[name], inputs.get(name, "random"), seed)
        for name, parameter in arrays.items()
        if parameter.const or name in inputs
    }
    final_grid, final_block = _geometry(kernel, arrays, all_shapes, integers, grid, block)
    return Setup(kernel, types, scalars, contents, all_shapes, final_grid, final_block, shared)


def _expect_known(kernel: Kernel, what: str, known: Mapping[str, Parameter], given: Any) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{kernel.name} has no {what} {name!r}; it has {', '.join(known) or 'none'}: {kernel.signature}"
            )


def _as_shape(shape: Sequence[int] | int) -> Shape:
    return (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)


def _infer(
    kernel: Kernel, array: Parameter, shape: Shape, numbers: Mapping[str, Parameter], scalars: dict[str, int | float]
) -> None:
    """Adds the integers that a shape comment and a shape have in common."""
    for name, size in array.sizes(shape).items():
        if name not in numbers:
            continue
        if scalars.setdefault(name, size) != size:
            raise ConfigError(
                f"{kernel.name}: {array.name} with shape {shape} makes {name} = {size}, but it is "
                f"{scalars[name]} already; the signature says {array.name} is {array.extent}"
            )


def _expect_complete(
    kernel: Kernel,
    types: ElementTypes,
    arrays: Mapping[str, Parameter],
    numbers: Mapping[str, Parameter],
    given: Mapping[str, Shape],
    scalars: Mapping[str, int | float],
) -> None:
    no_shape = [name for name, p in arrays.items() if name not in given and p.extent is None]
    no_value = [name for name in numbers if name not in scalars]
    if not no_shape and not no_value:
        return
    missing = [f"the shape of {name}" for name in no_shape] + [f"{numbers[name].c_type} {name}" for name in no_value]
    values = {name: 1000 if numbers[name].dtype(types).kind in "iu" else 0.5 for name in no_value}
    example = [f"--shape {name}=1000" for name in no_shape] + [
        f"--arg {name}={value}" for name, value in values.items()
    ]
    settings = {"shapes": dict.fromkeys(no_shape, 1000), "arguments": values}
    in_python = [f"{name}={given}" for name, given in settings.items() if given]
    raise ConfigError(
        f"{kernel.name}: missing: {', '.join(missing)}; for example {' '.join(example)} "
        f"(in Python {', '.join(in_python)}); the kernel is {kernel.signature}"
    )


def _contents(
    kernel: Kernel, parameter: Parameter, types: ElementTypes, shape: Shape, content: Contents, seed: int
) -> np.ndarray | None:
    dtype = parameter.dtype(types)
    if content is None:
        return None
    if isinstance(content, np.ndarray):
        if content.dtype != dtype:
            raise DTypeError(f"{kernel.name}: {parameter.name} is {dtype}, the given array {content.dtype}; use astype")
        if content.size != prod(shape):
            raise ShapeError(f"{kernel.name}: {parameter.name} has shape {shape}, the given array {content.shape}")
        return np.ascontiguousarray(content).reshape(shape)
    if isinstance(content, str):
        if content != "random":
            raise ConfigError(
                f"{kernel.name}: {parameter.name}: expected an array, a number or 'random', got {content!r}"
            )
        rng = np.random.default_rng([seed, zlib.crc32(parameter.name.encode())])
        # Integers stay small: as pool codes, labels and indices they point somewhere.
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 4, shape)
        return values.astype(dtype)
    return np.full(shape, content, dtype)


def _geometry(
    kernel: Kernel,
    arrays: Mapping[str, Parameter],
    shapes: Mapping[str, Shape],
    integers: Mapping[str, int],
    grid: Sequence[int] | int | None,
    block: Sequence[int] | int | None,
) -> tuple[Shape, Shape]:
    declared = declared_geometry(kernel, integers) if grid is None or block is None else None
    if block is None:
        block = declared[1] if declared else declared_threads(kernel)
    block = three(_as_shape(block))
    if grid is None and declared:
        grid = declared[0]
    if grid is None:
        if block[1:] != (1, 1):
            raise ConfigError(
                f"{kernel.name}: a block of {block} threads does not say what grid covers the output; give it"
            )
        written = [prod(shapes[name]) for name, p in arrays.items() if not p.const]
        grid = -(-max(written or [prod(shape) for shape in shapes.values()] or [1]) // block[0])
    return three(_as_shape(grid)), block
