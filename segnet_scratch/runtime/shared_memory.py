"""Plain `__shared__` declarations of a `.cu` file, rewritten for the host device.

C++ has no word for memory that the threads of a block share. `SHARED_ARRAY` and `SHARED_DYNAMIC` of host_runtime.h put
an array between red zones and fill it with NaN for every block; a macro cannot turn `__shared__ float tile[16][17];`
into them, because it does not see the name. So the text is rewritten before the C++ compiler reads it; every line keeps
its number.
"""

import re

from segnet_scratch.runtime.signature import blank_comments

# Group 1: extern, 2: type and declarators. Types without a name of their own (struct {...}) are left alone.
_DECLARATION = re.compile(r"(?:\bstatic\s+)?(\bextern\s+)?\b__shared__\s+([^;{}()]*(?:\([^;{}()]*\)[^;{}()]*)*);")
_ALIGNMENT = re.compile(r"(?:__align__|\balignas|__attribute__)\s*\((?:[^()]|\([^()]*\))*\)\s*")
_DECLARATOR = re.compile(r"\s*(\w+)\s*((?:\[[^\]]*\]\s*)*)$")
_FIRST = re.compile(r"(.*?[\s*&>])(\w+\s*(?:\[[^\]]*\]\s*)*)$", re.DOTALL)


def rewrite_shared(text: str) -> str:
    """The text with SHARED_ARRAY, SHARED_DYNAMIC or SHARED_DYNAMIC_GLOBAL in place of `__shared__` declarations."""
    blanked = blank_comments(text)
    parts, position = [], 0
    for match in _DECLARATION.finditer(blanked):
        rewritten = _rewrite(match, _in_function(blanked[: match.start()]))
        if rewritten is None:
            continue
        parts += [text[position : match.start()], rewritten, "\n" * match.group().count("\n")]
        position = match.end()
    return "".join([*parts, text[position:]])


def _rewrite(match: re.Match[str], in_function: bool) -> str | None:
    dynamic, declaration = match.group(1), " ".join(_ALIGNMENT.sub("", match.group(2)).split())
    first, *others = _split(declaration)
    head = _FIRST.match(first)
    declarators = [_DECLARATOR.match(d) for d in ([head.group(2)] if head else []) + others]
    if head is None or not all(declarators):
        return None
    c_type = head.group(1).strip()
    statements = []
    for declarator in declarators:
        assert declarator is not None
        name, dimensions = declarator.group(1), declarator.group(2).strip()
        # The alias keeps a comma in the type out of the macro's arguments.
        alias = f"typedef {c_type} {name}_element; "
        if dynamic:
            macro = "SHARED_DYNAMIC" if in_function else "SHARED_DYNAMIC_GLOBAL"
            statements.append(f"{alias}{macro}({name}_element, {name});")
        else:
            statements.append(f"{alias}SHARED_ARRAY({name}_element, {name}, {dimensions});")
    return " ".join(statements)


def _split(declaration: str) -> list[str]:
    """Declarators at commas that are in no bracket."""
    parts, depth = [""], 0
    for character in declaration:
        depth += (character in "<[(") - (character in ">])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _in_function(text: str) -> bool:
    """Does the text end inside braces other than those of namespaces and of `extern "C"`?"""
    open_braces: list[bool] = []
    for match in re.finditer(r'((?:\bnamespace\b[\s\w:]*|\bextern\s+"C"\s*)?)\{|\}', text):
        if match.group() == "}":
            del open_braces[-1:]
        else:
            open_braces.append(match.group(1) == "")
    return any(open_braces)
