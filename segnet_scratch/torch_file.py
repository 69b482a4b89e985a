"""PyTorch's files (.pth, .pt) read without PyTorch, and without running what is in them.

Such a file holds a pickle, a program that may call any function, and beside it the bytes of the storages that tensors
are views of. `pickletools` takes the program apart without running it; `_run` does of its instructions what a state
dict needs, and answers the few names that it needs itself. Every other name is refused: nothing is ever imported.
"""

import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from types import NoneType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided

from segnet_scratch.runtime.precision import BFLOAT16

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_MAGIC = 0x1950A86A20F9469CFC6C  # what a file of before PyTorch 1.6 holds first

_STORAGES: dict[str, Any] = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": BFLOAT16, "Bool": "?"}
_STORAGES |= {"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1"}

_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"}
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_FRESH |= {"NONE": NoneType, "NEWFALSE": bool, "NEWTRUE": lambda: True}
# How many values at the top of the stack these make one of, or put into the one below; None: all down to the mark.
_GATHER: dict[str, int | None] = {"TUPLE": None, "LIST": None, "APPENDS": None, "SETITEMS": None}
_GATHER |= {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}


def is_torch_file(start: bytes) -> bool:
    """Whether a file with these first bytes is a zip archive or a pickle, the two formats of torch.save."""
    return start.startswith((_ZIP, _PICKLE))


def read_state_dict(file: BinaryIO) -> dict[str, np.ndarray]:
    """The tensors of the state dict in a file of torch.save, in its order; bfloat16 as float32.

    They are views of their storages, which several may share. A dict that holds the state dict (`{"state_dict": ...}`)
    will do. ValueError for a file that is cut off or damaged, and for a pickle that needs more than a state dict does.
    """
    zipped = file.read(4) == _ZIP
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        return _state_dict((_read_zip if zipped else _read_legacy)(file, _Storages(size)))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"an archive that is cut off or damaged ({error})") from None
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a pickle that is damaged ({type(error).__name__})") from None


@dataclass(frozen=True)
class _Storage:
    """Numbers in a row: `dtype` in the file, `elements` as they are used."""

    dtype: np.dtype
    elements: np.ndarray

    def fill(self, content: bytes) -> None:
        if len(content) != self.elements.size * self.dtype.itemsize:
            raise ValueError(f"a storage of {len(content)} bytes in place of {self.elements.nbytes}: it is cut off")
        self.elements[...] = np.frombuffer(content, self.dtype)


class _Storages(dict[str, _Storage]):
    """The storages of a file of so many bytes by their keys. Memory is taken for no more than that."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = size

    def find(self, told: tuple[Any, ...]) -> _Storage:
        """What a program tells of a storage: a word, type, key, device, count, and what it is a view of."""
        match told:
            case ("storage", np.dtype() as dtype, str(key), _, int(count), *view) if not any(view):
                if key not in self:
                    self.left -= count * dtype.itemsize
                    if count < 0 or self.left < 0:
                        raise ValueError(f"a storage of {count} elements, more than there are: it is cut off")
                    self[key] = _Storage(dtype, np.empty(count, "<f4" if dtype == BFLOAT16 else dtype))
                return self[key]
        raise ValueError("a pickle with objects of its own, or views of storages as of before PyTorch 0.4")


def _read_zip(file: BinaryIO, storages: _Storages) -> Any:
    with zipfile.ZipFile(file) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("a zip archive that torch.save did not write")
        folder = programs[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers in big-endian order")
        loaded = _run(BytesIO(archive.read(programs[0])), storages)
        for key, storage in storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
    return loaded


def _read_legacy(file: BinaryIO, storages: _Storages) -> Any:
    """Five pickles (a number, a version, the machine, the object, the keys of its storages), then the storages."""
    if _run(file, storages) != _MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    _run(file, storages)
    if not _run(file, storages)["little_endian"]:
        raise ValueError("numbers in big-endian order")
    loaded = _run(file, storages)
    for key in _run(file, storages):
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.elements.size:
            raise ValueError(f"a storage that has not {storage.elements.size} elements: it is cut off or damaged")
        storage.fill(file.read(storage.elements.size * storage.dtype.itemsize))
    return loaded


def _run(program: BinaryIO, storages: _Storages) -> Any:
    """What a pickle makes, by the instructions that torch.save writes for a state dict; ValueError for any other."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # of each mark the stack below it
    memo: dict[int, Any] = {}
    for opcode, told, _ in pickletools.genops(program):
        name, argument = opcode.name, cast(Any, told)
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case _ if name in _GATHER:
                count = _GATHER[name]
                items, stack = (stack, below.pop()) if count is None else (stack[-count:], stack[:-count])
                match name:
                    case "APPEND" | "APPENDS":
                        stack[-1].extend(items)
                    case "SETITEM" | "SETITEMS":
                        _put(stack[-1], zip(items[::2], items[1::2], strict=True))
                    case _:
                        stack.append(items if name == "LIST" else tuple(items))
            case "GLOBAL":
                stack.append(_answer(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_answer(*stack[-2:])]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [stack[-2](*stack[-1])]
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Parameter) and len(state) == 5:
                    stack[-1].data = state[0]  # else: attributes that are no tensors, such as the versions of modules
            case "BINPERSID":
                stack.append(storages.find(stack.pop()))
            case _ if name in _FRESH:
                stack.append(_FRESH[name]())
            case _ if name in _LITERALS:
                stack.append(argument)
            case _:
                raise ValueError(f"a pickle with the instruction {name}, which no state dict needs")
    raise ValueError("a pickle without an end")


def _put(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    for key, value in pairs:
        if type(target) is not dict or not isinstance(key, str | int):
            raise ValueError("a pickle with keys that are neither names nor numbers")
        target[key] = value


def _ordered_dict(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _put(made, pairs)
    return made


class _Parameter:
    """A parameter of before PyTorch 0.4, whose tensor comes at once or with its state."""

    def __init__(self, data: Any = None, *_: Any) -> None:
        self.data = data


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """The view of a storage that begins at `offset`; ValueError where it would reach beyond it."""
    elements = storage.elements
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor with sides or strides that are no sizes")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if max(last, offset - 1) >= len(elements) or np.prod(size, dtype=float) > max(1, len(elements)):
        raise ValueError(f"a tensor {size} that is larger than its storage of {len(elements)} elements")
    return as_strided(elements[offset:], size, [step * elements.itemsize for step in stride])


# What stands for the names of a pickle: functions of ours, and the element types of storages.
_NAMES: dict[str, Any] = {f"torch.{kind}Storage": np.dtype(code) for kind, code in _STORAGES.items()}
_NAMES |= {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.nn.parameter.Parameter": _Parameter,
}


def _answer(module: str, name: str) -> Any:
    if f"{module}.{name}" not in _NAMES:
        raise ValueError(f"a pickle that wants {module}.{name}, which no state dict needs and which may run code")
    return _NAMES[f"{module}.{name}"]


def _state_dict(loaded: Any) -> dict[str, np.ndarray]:
    """The state dict: what was loaded, what it holds as "state_dict", or its only dict of tensors."""

    def items(value: Any) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else ()
        return {str(name): item.data if isinstance(item, _Parameter) else item for name, item in pairs}

    def tensors(value: Any) -> dict[str, np.ndarray]:
        return {name: array for name, array in items(value).items() if isinstance(array, np.ndarray)}

    if own := tensors(loaded):
        return own
    inner = {name: found for name, value in items(loaded).items() if (found := tensors(value))}
    if "state_dict" not in inner and len(inner) != 1:
        names = f"several ({', '.join(inner)}), of which none is named state_dict" if inner else "none"
        raise ValueError(f"a file that should hold a dict of tensors and holds {names}")
    return inner.get("state_dict") or next(iter(inner.values()))
