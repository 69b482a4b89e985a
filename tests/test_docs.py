"""Commands in README.md and docs/ as they stand: each is one that `segnet` has, with options that it takes."""

import re
import shlex

import pytest
import typer
from support import ROOT

from segnet_scratch.cli import app

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def commands_of(text):
    """Lines of blocks that begin with `segnet`, whole with their continuations, and commands within a line."""
    joined = re.sub(r"\\\n\s*", "", text)
    parts = re.split(r"^ *```.*\n", joined, flags=re.MULTILINE)  # outside a block, inside, outside, ...
    lines = [line.strip() for block in parts[1::2] for line in block.splitlines()]
    # In a sentence an option may stand without its value: `segnet data stats --toml`.
    lines += [f"{found} VALUE" for found in re.findall(r"`(segnet [^`]+)`", "\n".join(parts[::2]))]
    return [line for line in lines if re.match(r"segnet [a-z-]", line)]


def parse(line):
    """Raises click's error for a command or an option that does not exist, or an option without its value."""
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="segnet")
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    command.make_parser(context).parse_args(args=words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_exists_with_its_options(page):
    for line in commands_of(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "cuda" / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_link_to_a_file_leads_to_one(page):
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"(?ms)^ *```.*?```", "", page.read_text(encoding="utf-8")))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_commands_are_found_and_wrong_ones_are_noticed():
    text = "`segnet recipes`\n```\nsegnet eval A --data B \\\n    --flip  # a word\nother\n```\n"
    assert commands_of(text) == ["segnet eval A --data B --flip  # a word", "segnet recipes VALUE"]
    for wrong in ("segnet evaluate A", "segnet eval A --flop", "segnet data downlod", "segnet eval A --data"):
        with pytest.raises(Exception, match=r"no command|[Nn]o such option|requires an argument"):
            parse(wrong)
