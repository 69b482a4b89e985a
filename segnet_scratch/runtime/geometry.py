"""Grid and block of a kernel that is launched alone, as far as its source says them.

A comment above the kernel gives grid and block in terms of its integer parameters and of integers defined in the file:

    // Launch: grid ((rows + TILE - 1) / TILE, chunks), block (32, 8)

Without one, `__launch_bounds__(THREADS)` gives the threads of a block, and the grid covers the largest output with one
thread per element. Ops compute their geometry themselves; this is for whoever runs a kernel alone.
"""

import re
from collections.abc import Mapping

from segnet_scratch.errors import CompileError, LaunchError
from segnet_scratch.runtime.signature import Kernel, compile_expression

DEFAULT_THREADS = 256

_COMMENT = re.compile(r"//\s*Launch:\s*(.*?)\.?\s*$")
_GEOMETRY = re.compile(r"grid\s+(.+),\s*block\s+(.+)")
_BOUNDS = re.compile(r"__launch_bounds__\s*\(\s*([^,()]+)")


def declared_geometry(kernel: Kernel, scalars: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(grid, block) of the comment above a kernel; None where there is none.

    LaunchError where the comment says that the kernel cannot be launched alone.
    """
    comment = _comment(kernel)
    if comment is None:
        return None
    if comment.startswith("by "):
        raise LaunchError(f"{kernel.name} is launched {comment}; it cannot run alone")
    match = _GEOMETRY.fullmatch(comment)
    if match is None:
        raise CompileError(f"{_where(kernel)}: expected 'Launch: grid (...), block (...)', found 'Launch: {comment}'")
    grid, block = (_evaluate(kernel, text, scalars) for text in match.groups())
    return grid, block


def runs_alone(kernel: Kernel) -> bool:
    """Can the kernel be launched with any memory? Not if its comment says `Launch: by its op only`."""
    return not (_comment(kernel) or "").startswith("by ")


def declared_threads(kernel: Kernel) -> int:
    """The threads of a block according to `__launch_bounds__`, 256 where the kernel does not say."""
    head = kernel.source.text.split("\n")[kernel.line - 1 :]
    match = _BOUNDS.search("\n".join(head).partition("{")[0])
    return _evaluate(kernel, match.group(1), {})[0] if match else DEFAULT_THREADS


def _comment(kernel: Kernel) -> str | None:
    """What follows `Launch:` in the comment lines directly above the kernel."""
    for line in reversed(kernel.source.text.split("\n")[: kernel.line - 1]):
        if not line.lstrip().startswith("//"):
            return None
        match = _COMMENT.match(line.lstrip())
        if match:
            return match.group(1)
    return None


def _evaluate(kernel: Kernel, text: str, scalars: Mapping[str, int]) -> tuple[int, ...]:
    code = compile_expression(_where(kernel), text.strip(), "launch geometry")
    try:
        size = eval(code, {"__builtins__": {}}, {**kernel.source.definitions, **scalars})
    except (NameError, ZeroDivisionError) as error:
        raise LaunchError(
            f"{_where(kernel)}: the launch geometry {text.strip()}: {error}; give grid and block"
        ) from error
    return size if isinstance(size, tuple) else (size,)


def _where(kernel: Kernel) -> str:
    return f"{kernel.source.path}:{kernel.line}"
