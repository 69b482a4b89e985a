"""Reads the signatures of a `.cu` file's kernels, those with C linkage: what the launch gate holds a launch against.

A pointer parameter may carry its shape as a comment on its line, in terms of the kernel's integer parameters:

    const storage_t* __restrict__ x,  // (n, h, w, c)

The comment is not decoration: the gate evaluates it at every launch and refuses an array of another size. Of a tensor
map it is the shape of the array: `const __grid_constant__ TensorMap x,  // of (n, h, w, c)`.
"""

import ast
import functools
import re
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
}
_FIXED_TYPES = {name: kind for kind, names in _NAMES.items() for name in names}
TENSOR_MAP = "TensorMap"  # cuda/common/tma.cuh
_ATTRIBUTES = r"(?:__\w+__\s*(?:\((?:[^()]|\([^()]*\))*\)\s*)?)*"  # __global__ __launch_bounds__(256)
_FUNCTION = re.compile(rf'(extern\s+"C"\s+)?({_ATTRIBUTES})\bvoid\s+({_ATTRIBUTES})(\w+)\s*\(')
_C_BLOCK = re.compile(r'extern\s+"C"\s*\{')
_SYNCHRONISES = re.compile(
    r"__sync\w*\s*\(|\b__\w+_sync\s*\(|\bSHARED_(?:ARRAY|DYNAMIC)\b|__shared__|\bblock_\w+\s*[(<]"
    r"|\b(?:warp|mma|ldmatrix|cp_async|mbarrier|tma|named_barrier|setmaxnreg)_\w+\s*[(<]|\bwgmma\w*\s*[(<]"
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
        if self.c_type == "storage_t":
            return types.storage
        if self.c_type == "accumulate_t":
            return types.accumulate
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
    declaration: tuple[int, str, str]  # of the parameters: the line they begin on, their text, that without comments
    cooperative: bool  # its threads meet, as blocks or as warps, or share memory

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it is launched with. CompileError where that is nothing the launch gate knows.

        Found out when asked for: one kernel of a file that cannot be launched from here is no obstacle to the others.
        """
        return _parse_parameters(self.source, *self.declaration)

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


@dataclass(frozen=True)
class _Definition:
    """Where a function with `__global__` stands in a text."""

    name: str
    c_linkage: bool
    start: int
    parameters: slice
    body: slice | None  # with its braces; None of a declaration


def parse_kernels(source: Source) -> tuple[Kernel, ...]:
    """All kernels of a source that have C linkage, in order. CompileError names file and line of half a kernel."""
    text = blank_comments(source.text)
    definitions = [d for d in _definitions(source, text) if d.body is not None]
    # Barriers may hide in device functions of the same file; then every kernel of it is run with fibers.
    outside = _outside(text, [(d.start, d.body.stop) for d in definitions if d.body])
    helper_synchronises = bool(_SYNCHRONISES.search(outside))
    kernels: dict[str, Kernel] = {}
    for d in definitions:
        if not d.c_linkage or d.body is None:
            continue
        line = _line(text, d.start)
        if d.name in kernels:
            first = kernels[d.name].line
            raise CompileError(f"{source.path}:{line}: the kernel {d.name} is defined twice, first at line {first}")
        declaration = _line(text, d.parameters.start), source.text[d.parameters], text[d.parameters]
        cooperative = helper_synchronises or bool(_SYNCHRONISES.search(text[d.body]))
        cooperative |= TENSOR_MAP in text[d.parameters]  # boxes go to shared memory
        kernels[d.name] = Kernel(d.name, source, line, declaration, cooperative)
    return tuple(kernels.values())


def without_linkage(source: Source) -> list[tuple[str, int]]:
    """(name, line) of the kernels without C linkage: nobody finds them under their name."""
    text = blank_comments(source.text)
    return [(d.name, _line(text, d.start)) for d in _definitions(source, text) if d.body and not d.c_linkage]


def blank_kernels(source: Source, names: set[str]) -> str:
    """The text with the definitions of these kernels replaced by spaces; lines stay what they were."""
    characters = list(source.text)
    for d in _definitions(source, blank_comments(source.text)):
        if d.body is not None and d.name in names:
            for position in range(d.start, d.body.stop):
                if characters[position] != "\n":
                    characters[position] = " "
    return "".join(characters)


def _definitions(source: Source, text: str) -> list[_Definition]:
    """Every kernel of a text without comments, and declarations of kernels.

    C linkage comes from `extern "C"` in front, from a block of it around the kernel, or from a declaration before.
    """
    blocks = [(m.end(), _closing(text, m.end() - 1, "{}")) for m in _C_BLOCK.finditer(text)]
    found: list[_Definition] = []
    linked: set[str] = set()
    for match in _FUNCTION.finditer(text):
        extern, before, after, name = match.groups()
        if "__global__" not in before + after:
            continue
        if extern or any(start <= match.start() < end for start, end in blocks):
            linked.add(name)
        parameters_end, body = _spans(source, text, match)
        found.append(_Definition(name, name in linked, match.start(), slice(match.end(), parameters_end), body))
    return found


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blank_comments(text: str) -> str:
    """The text with comments, and what strings and characters hold, replaced by spaces: lines and positions stay."""
    return _BLANKED.sub(lambda m: m[0] if m[0] == '"C"' else re.sub(r"[^\n]", " ", m[0]), text)


_BLANKED = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\[^'\n]+|[^'\\\n])'""",
    re.DOTALL,
)


def _spans(source: Source, text: str, match: re.Match[str]) -> tuple[int, slice | None]:
    """(end of the parameter list, body), no body where the function is only declared."""
    parameters_end = _closing(text, match.end() - 1, "()")
    body = re.compile(r"\s*[{;]").match(text, parameters_end + 1) if parameters_end >= 0 else None
    if body is not None and text[body.end() - 1] == ";":
        return parameters_end, None
    body_end = _closing(text, body.end() - 1, "{}") if body else -1
    if body is None or body_end < 0:
        line = _line(text, match.start())
        raise CompileError(f"{source.path}:{line}: the kernel {match.group(4)} has no complete parameter list and body")
    return parameters_end, slice(body.end() - 1, body_end + 1)


def _closing(text: str, start: int, pair: str) -> int:
    """Position of the bracket that closes the one at `start`; -1 where there is none."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == pair[0]:
            depth += 1
        elif text[position] == pair[1]:
            depth -= 1
            if depth == 0:
                return position
    return -1


def _outside(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the kernels: device functions and macros."""
    parts, position = [], 0
    for start, end in spans:
        parts.append(text[position:start])
        position = end
    parts.append(text[position:])
    return "".join(parts)


def _parse_parameters(source: Source, line: int, text: str, blanked: str) -> tuple[Parameter, ...]:
    """Parameters from a list that begins on `line`; `blanked` is its text without comments."""
    parameters: list[Parameter] = []
    for offset, (row, code) in enumerate(zip(text.split("\n"), blanked.split("\n"), strict=True)):
        declarations = [part.strip() for part in code.split(",") if part.strip()]
        comment = re.sub(r"/\*.*?\*/", "", row[len(code.rstrip()) :]).partition("//")[2]
        for position, declaration in enumerate(declarations):
            # A shape belongs to the last declaration before it.
            extent = (
                _leading_parenthesis(comment.strip().removeprefix("of ")) if position == len(declarations) - 1 else None
            )
            parameters.append(_parse_parameter(f"{source.path}:{line + offset}", declaration, extent))
    return tuple(parameters)


def _leading_parenthesis(comment: str) -> str | None:
    if not comment.startswith("("):
        return None
    end = _closing(comment, 0, "()")
    return comment[: end + 1] if end > 0 else None


def _parse_parameter(where: str, declaration: str, extent: str | None) -> Parameter:
    words = re.findall(r"\w+|\*|\S", declaration)
    pointer = "*" in words
    qualifiers = {"const", "volatile", "__restrict__", "__restrict", "OPTIONAL", "*", "__grid_constant__"}
    kept = [word for word in words if word not in qualifiers]
    strange = any(not (word == "*" or re.fullmatch(r"\w+", word)) for word in words)
    if strange or words.count("*") > 1 or len(kept) < 2:
        raise CompileError(
            f"{where}: cannot understand the kernel parameter '{declaration}'; expected a scalar or a pointer, "
            "for example 'const float* __restrict__ x' or 'int n'"
        )
    name, c_type = kept[-1], " ".join(kept[:-1])
    if c_type == TENSOR_MAP:
        if pointer or not {"const", "__grid_constant__"} <= set(words):
            expected = f"const __grid_constant__ {TENSOR_MAP} {name}"
            raise CompileError(f"{where}: a tensor map is passed as '{expected}', not '{declaration}'")
        code = compile_expression(where, extent) if extent else None
        return Parameter(name, c_type, False, True, False, extent if code else None, code)
    if c_type not in _FIXED_TYPES and c_type not in ("storage_t", "accumulate_t"):
        known = ", ".join(["storage_t", "accumulate_t", TENSOR_MAP, *_FIXED_TYPES])
        raise CompileError(
            f"{where}: the kernel parameter '{declaration}' has type '{c_type}'; expected one of {known}"
        )
    const = pointer and "const" in words[: words.index("*")]
    code = compile_expression(where, extent) if pointer and extent else None
    return Parameter(name, c_type, pointer, const, "OPTIONAL" in words, extent if code else None, code)


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
