"""Reads the signatures of a `.cu` file's kernels, those with C linkage: what the launch gate checks a launch against.

A pointer parameter may carry its shape as a comment on its line, in terms of the kernel's integer parameters:

    const storage_t* __restrict__ x,  // (n, h, w, c)

The comment is not decoration: the gate evaluates it at every launch and refuses an array of another size. Of a tensor
map it is the shape of the array: `const __grid_constant__ TensorMap x,  // of (n, h, w, c)`.

Kernels that take the same may name a macro of their file in place of the list. No `//` can stand in one: there the
shape is a comment of the other kind at the end of a line, `const storage_t* x,  /* (n, h, w, c) */ \\`.
"""

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import CodeType

import numpy as np

from segnet_scratch.errors import CompileError, DTypeError
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG
from segnet_scratch.runtime.source import Source

# C types by the name they have in a signature, with `storage_t` and `accumulate_t` left to ElementTypes. (`long` has
# 4 bytes on some systems and 8 on others.)
_NAMES = {
    np.bool_: ("bool",),
    np.int8: ("char", "signed char", "int8_t"),
    np.uint8: ("uint8", "uint8_t", "unsigned char"),
    np.int16: ("short", "int16_t"),
    np.uint16: ("unsigned short", "uint16_t"),
    np.int32: ("int", "int32_t"),
    np.uint32: ("unsigned", "unsigned int", "uint32_t"),
    np.int64: ("int64", "int64_t", "long long"),
    np.uint64: ("uint64", "uint64_t", "unsigned long long", "size_t"),
    np.float32: ("float",),
    np.float64: ("double",),
    BFLOAT16.type: ("bfloat16",),
}
_FIXED_TYPES = {name: kind for kind, names in _NAMES.items() for name in names}
TENSOR_MAP = "TensorMap"  # cuda/common/tma.cuh
_QUALIFIERS = {"const", "volatile", "__restrict__", "__restrict", "OPTIONAL", "__grid_constant__"}
_ATTRIBUTES = r"(?:__\w+__\s*(?:\((?:[^()]|\([^()]*\))*\)\s*)?)*"  # __global__ __launch_bounds__(256)
_FUNCTION = re.compile(rf'(extern\s+"C"\s+)?({_ATTRIBUTES})\bvoid\s+({_ATTRIBUTES})(\w+)\s*\(')
_C_BLOCK = re.compile(r'extern\s+"C"\s*\{')
_SYNCHRONISES = re.compile(
    r"__sync\w*\s*\(|\b__\w+_sync\s*\(|\bSHARED_(?:ARRAY|DYNAMIC)\b|__shared__|\bblock_\w+\s*[(<]"
    r"|\b(?:warp|mma|ldmatrix|cp_async|mbarrier|tma|named_barrier|setmaxnreg)_\w+\s*[(<]|\bwgmma\w*\s*[(<]"
    rf"|\b{TENSOR_MAP}\b"  # boxes go to shared memory
)


@dataclass(frozen=True)
class ElementTypes:
    """What `storage_t` and `accumulate_t` stand for in one compilation, and how tensor cores multiply, if they do."""

    storage: np.dtype
    accumulate: np.dtype
    multiply: str = ""  # a rung of tensor cores (precision.py), or nothing

    @staticmethod
    def of(dtype: np.dtype) -> "ElementTypes":
        """The pair that arrays of `dtype` are computed with: bfloat16 in float32, others accumulated in the same."""
        dtype = np.dtype(dtype)
        return ElementTypes(dtype, np.dtype(np.float32) if dtype == BFLOAT16 else dtype)

    @staticmethod
    def named(name: str) -> "ElementTypes":
        """Of "float32", "float64", "bfloat16", or of a way to multiply; the inverse of `name`."""
        if name in ELEMENTS_OF_RUNG:
            return ElementTypes(ELEMENTS_OF_RUNG[name], np.dtype(np.float32), name)
        return ElementTypes.of(BFLOAT16 if name == BFLOAT16.name else np.dtype(name))

    @property
    def factors(self) -> np.dtype:
        """What tensor maps are of: Hopper's tensor cores multiply bfloat16, into which float32 is split before."""
        return BFLOAT16 if self.multiply else self.storage

    @property
    def name(self) -> str:
        """What messages, tables and file names call them."""
        return self.multiply or self.storage.name

    def c_name(self, dtype: np.dtype) -> str:
        """The C++ type of the compilation flag -DSTORAGE or -DACCUMULATE; DTypeError where kernels know none."""
        names = {"float32": "float", "float64": "double", "bfloat16": "bfloat16"}
        if dtype.name not in names:
            raise DTypeError(f"kernels cannot be compiled for {dtype.name}; expected float32, float64 or bfloat16")
        return names[dtype.name]

    @property
    def defines(self) -> tuple[str, ...]:
        """The compiler flags that choose these types."""
        pair = f"-DSTORAGE={self.c_name(self.storage)}", f"-DACCUMULATE={self.c_name(self.accumulate)}"
        return (*pair, f"-DMULTIPLY={self.multiply.upper()}") if self.multiply else pair


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    name: str
    c_type: str  # without const, pointer and qualifiers; "TensorMap" for the map of an array (tensor_map.py)
    pointer: bool
    const: bool
    optional: bool  # a pointer that may be null
    extent: str | None  # the shape given as a comment, e.g. "(n, h, w, c)"
    extent_code: CodeType | None

    @property
    def tensor_map(self) -> bool:
        """Does it take the description of an array, for the GPU's tensor memory accelerator?"""
        return self.c_type == TENSOR_MAP

    @property
    def scalar(self) -> bool:
        """Is it a number?"""
        return not self.pointer and not self.tensor_map

    def dtype(self, types: ElementTypes) -> np.dtype:
        """The element type of the array, or the type of the scalar."""
        if self.c_type in ("storage_t", "accumulate_t"):
            return types.storage if self.c_type == "storage_t" else types.accumulate
        return np.dtype("V128" if self.tensor_map else _FIXED_TYPES[self.c_type])

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The integers that an array of this shape gives by the shape comment; its leading axes may be one there."""
        tree = ast.parse(self.extent or "()", mode="eval").body
        dimensions = tree.elts if isinstance(tree, ast.Tuple) else [tree]
        first = len(shape) - len(dimensions) + 1
        if first < 0 or not dimensions:
            return {}
        sizes = list(zip(dimensions, (prod(shape[:first]), *shape[first:]), strict=True))
        if any(isinstance(dimension, ast.Constant) and dimension.value != size for dimension, size in sizes):
            return {}  # another array than the comment means: whoever launches gives the sizes
        return {dimension.id: size for dimension, size in sizes if isinstance(dimension, ast.Name)}

    def extent_shape(self, scalars: dict[str, int]) -> tuple[int, ...]:
        """The shape that the comment promises, for these values of the integer parameters."""
        assert self.extent_code is not None
        shape = eval(self.extent_code, {"__builtins__": {}}, scalars)
        return shape if isinstance(shape, tuple) else (shape,)


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, where it is defined, and its parameters."""

    name: str
    source: Source
    line: int
    span: tuple[int, int]  # of its definition in the source's text
    list_span: tuple[int, int]  # of its parameters, between the parentheses
    c_linkage: bool  # without it nobody finds it under its name
    cooperative: bool  # its threads meet, as blocks or as warps, or share memory

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it is launched with. CompileError where that is nothing the launch gate knows.

        Found out when asked for: one kernel of a file that cannot be launched from here is no obstacle to the others.
        """
        return tuple(_parameters(self.source, *self.list_span))

    @property
    def launchable(self) -> bool:
        """Are all of its parameters understood?"""
        try:
            _ = self.parameters
        except CompileError:
            return False
        return True

    @property
    def signature(self) -> str:
        """One line for messages: `relu_forward(storage_t* x, storage_t* y, int64 count)`."""
        return f"{self.name}({', '.join(p.c_type + ('* ' if p.pointer else ' ') + p.name for p in self.parameters)})"


def parse_kernels(source: Source) -> tuple[Kernel, ...]:
    """All kernels of a source that have C linkage, in order. CompileError names file and line of half a kernel."""
    kernels: dict[str, Kernel] = {}
    for kernel in defined_kernels(source):
        if kernel.c_linkage and kernels.setdefault(kernel.name, kernel) is not kernel:
            first = f"first at line {kernels[kernel.name].line}"
            raise CompileError(f"{source.path}:{kernel.line}: the kernel {kernel.name} is defined twice, {first}")
    return tuple(kernels.values())


def defined_kernels(source: Source) -> list[Kernel]:
    """Every kernel of a source, in order, whatever its linkage.

    C linkage comes from `extern "C"` in front, from a block of it around the kernel, or from a declaration before.
    """
    text = blank_comments(source.text)
    blocks = [(m.end(), _closing(text, m.end() - 1, "{}")) for m in _C_BLOCK.finditer(text)]
    found: list[tuple[str, tuple[int, int], tuple[int, int], bool]] = []
    linked: set[str] = set()
    for match in _FUNCTION.finditer(text):
        extern, before, after, name = match.groups()
        if "__global__" not in before + after:
            continue
        if extern or any(start <= match.start() < end for start, end in blocks):
            linked.add(name)
        list_end = _closing(text, match.end() - 1, "()")
        body = re.compile(r"\s*[{;]").match(text, list_end + 1) if list_end >= 0 else None
        if body and body[0].endswith(";"):
            continue
        end = _closing(text, body.end() - 1, "{}") + 1 if body else 0
        if not end:
            where = f"{source.path}:{_line(text, match.start())}"
            raise CompileError(f"{where}: the kernel {name} has no complete parameter list and body")
        found.append((name, (match.start(), end), (match.end(), list_end), name in linked))
    # Barriers may hide in device functions of the same file; then every kernel of it is run with fibers.
    helpers_meet = _SYNCHRONISES.search(blank(text, [span for _, span, _, _ in found])) is not None
    return [
        Kernel(
            *(name, source, _line(text, span[0]), span, inside, linkage),
            cooperative=helpers_meet or _SYNCHRONISES.search(text, inside[0], span[1]) is not None,
        )
        for name, span, inside, linkage in found
    ]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blank_comments(text: str) -> str:
    """The text with comments, and what strings and characters hold, replaced by spaces: lines and positions stay."""
    return _BLANKED.sub(lambda m: m[0] if m[0] == '"C"' else _spaces(m[0]), text)


_BLANKED = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\[^'\n]+|[^'\\\n])'""", re.DOTALL)


def blank(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with these parts of it replaced by spaces; lines stay what they were."""
    for start, end in spans:
        text = text[:start] + _spaces(text[start:end]) + text[end:]
    return text


def _spaces(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _closing(text: str, start: int, pair: str) -> int:
    """Position of the bracket that closes the one at `start`; -1 where there is none."""
    depth = 0
    for match in re.compile(f"[{re.escape(pair)}]").finditer(text, start):
        depth += 1 if match[0] == pair[0] else -1
        if depth == 0:
            return match.start()
    return -1


def _parameters(source: Source, start: int, end: int) -> Iterator[Parameter]:
    """Those of the list that a source has between two positions."""
    text = source.text[start:end]
    if name := re.fullmatch(r"\s*([A-Za-z_]\w*)\s*", text):
        macro = re.search(rf"^[ \t]*#[ \t]*define[ \t]+{name[1]}\b((?:.*\\\n)*.*)", source.text, re.MULTILINE)
        if macro:
            start = macro.start(1)
            text = re.sub(r"/\*(.*?)\*/([ \t]*\\?)$", r"//\1", macro[1], flags=re.MULTILINE).replace("\\\n", "\n")
    rows = zip(text.split("\n"), blank_comments(text).split("\n"), strict=True)
    for number, (row, code) in enumerate(rows, _line(source.text, start)):
        declarations = [part.strip() for part in code.split(",") if part.strip()]
        comment = re.sub(r"/\*.*?\*/", "", row[len(code.rstrip()) :]).partition("//")[2].strip().removeprefix("of ")
        shape = comment[: _closing(comment, 0, "()") + 1] if comment.startswith("(") else ""
        for left, declaration in enumerate(declarations, 1 - len(declarations)):
            yield _parameter(f"{source.path}:{number}", declaration, shape if left == 0 else "")  # the last one's


def _parameter(where: str, declaration: str, shape: str) -> Parameter:
    before, star, after = declaration.partition("*")
    words = f"{before} {after}".split()
    *type_words, name = [word for word in words if word not in _QUALIFIERS] or [""]
    if not type_words or not all(re.fullmatch(r"\w+", word) for word in words):
        raise CompileError(
            f"{where}: cannot understand the kernel parameter '{declaration}'; expected a scalar or a pointer, "
            "for example 'const float* __restrict__ x' or 'int n'"
        )
    c_type = " ".join(type_words)
    tensor_map = c_type == TENSOR_MAP
    if tensor_map and (star or not {"const", "__grid_constant__"} <= set(words)):
        expected = f"const __grid_constant__ {TENSOR_MAP} {name}"
        raise CompileError(f"{where}: a tensor map is passed as '{expected}', not '{declaration}'")
    if c_type not in (known := ("storage_t", "accumulate_t", TENSOR_MAP, *_FIXED_TYPES)):
        raise CompileError(
            f"{where}: the kernel parameter '{declaration}' has type '{c_type}'; expected one of {', '.join(known)}"
        )
    const = tensor_map or (bool(star) and "const" in before.split())
    code = compile_expression(where, shape) if shape and (star or tensor_map) else None
    return Parameter(name, c_type, bool(star), const, "OPTIONAL" in words, shape if code else None, code)


def compile_expression(where: str, text: str, what: str = "shape comment") -> CodeType:
    """Python code for a comment; only names, integers, + - * / and parentheses are let through."""
    try:
        tree = ast.parse(text.replace("/", "//"), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise CompileError(f"{where}: the {what} {text} is not an expression in the kernel's integers") from error
    allowed = (ast.BinOp, ast.Name, ast.Load, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)
    dimensions = tree.body.elts if isinstance(tree.body, ast.Tuple) else [tree.body]
    for node in (node for dimension in dimensions for node in ast.walk(dimension)):
        integer = isinstance(node, ast.Constant) and type(node.value) is int
        if not (integer or isinstance(node, allowed)):
            raise CompileError(f"{where}: the {what} {text} may use names, integers, + - * / only")
    return compile(tree, where, "eval")
