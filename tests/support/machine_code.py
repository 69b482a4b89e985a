"""The machine code of compiled kernels, as NVIDIA's disassembler shows it."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime import nvrtc
from segnet_scratch.runtime.launch import ElementTypes, find_kernel


def disassembler():
    """nvdisasm of the wheel, or of a CUDA toolkit; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    wheels = [path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm")]
    return str(wheels[0]) if wheels else shutil.which("nvdisasm")


def missing():
    try:
        nvrtc.nvrtc_version()
    except CompileError as error:
        return f"{error}; the extra nvrtc is enough"
    return "" if disassembler() else "there is no nvdisasm; the extra sass brings it"


needs_disassembler = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


def main_loops(sass):
    """The instructions of every kernel's loop that holds HMMA, with loops inside: {kernel: ["LDSM.16.M88.4", ...]}."""
    loops, labels, kernel, code, begin = {}, {}, None, [], {}
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            kernel, labels, code = section[1], {}, []
        elif label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            predicate, name, operands = instruction.groups()
            if predicate and predicate.split()[0] == "@!PT":  # never executed: it only keeps others apart
                continue
            code.append(name)
            target = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None
            if target and target[1] in labels:
                body = code[labels[target[1]] :]
                if any(name.startswith("HMMA") for name in body):
                    assert labels[target[1]] <= begin.get(kernel, len(code)), f"{kernel} has two loops with HMMA"
                    loops[kernel], begin[kernel] = body, labels[target[1]]
    return loops


@functools.cache
def sass_of(source, element, architecture):
    cubin = nvrtc.cached_cubin(source, ElementTypes.named(element), architecture)
    command = [disassembler(), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def loops_of(source, element, architecture):
    return main_loops(sass_of(source, element, architecture))


def instructions_of(kernel, element, architecture):
    """The machine code of a kernel: [("LDG.E.128", [numbers of the registers that it names]), ...]."""
    sass = sass_of(find_kernel(kernel).source, element, architecture)
    (own,) = (body for body in re.split(r"^\.text\.", sass, flags=re.MULTILINE) if body.startswith(f"{kernel}:"))
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", own)
    return [(name, [int(n) for n in re.findall(r"\bR(\d+)", operands)]) for name, operands in lines]


def loads_before_a_use(code, kind="LDG.E"):
    """The most loads of a kind that begin before an instruction reads what one of them brings."""
    most, waiting = 0, set()
    for name, registers in code:
        if waiting.intersection(registers[1:] if name.startswith("LDG") else registers):
            most, waiting = max(most, len(waiting)), set()
        if name.startswith(kind):
            waiting.add(registers[0])  # of a wider load the first, which its use names
    return max(most, len(waiting))
