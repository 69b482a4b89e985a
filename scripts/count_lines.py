#!/usr/bin/env python3
"""Counts lines of code, without blanks, comments and docstrings, and fails above the limits in pyproject.toml.

`[tool.segnet.size]` names folders, each with the most lines that it may have. Size is a budget: a feature is
finished when its second copy is gone.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
KERNELS = {".cu", ".cuh", ".h", ".cpp"}


def python_lines(text: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in IGNORED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def kernel_lines(text: str) -> int:
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    return sum(bool(line.strip()) for line in bare.splitlines())


def lines_in(folder: Path) -> int:
    """Of the Python files and kernels of a folder and all below it."""
    python = sum(python_lines(path.read_text()) for path in folder.rglob("*.py"))
    return python + sum(kernel_lines(path.read_text()) for path in folder.rglob("*") if path.suffix in KERNELS)


def main() -> int:
    limits = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["segnet"]["size"]
    too_large = False
    for folder, limit in limits.items():
        found = lines_in(ROOT / folder)
        too_large |= found > limit
        print(f"{folder}: {found:,} lines of code, at most {limit:,}{'  TOO MANY' if found > limit else ''}")
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
