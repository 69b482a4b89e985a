"""Hooks of mkdocs.yml: navigation as in docs/README.md, files of the tree that pages link to, the commands.

Pages link to kernels and modules as files of the tree, so that they can be followed there. In the site such a file is
a page of its own, `source/PATH.md`, and so is what it links to.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {
    ".cu": "cuda",
    ".cuh": "cuda",
    ".h": "cpp",
    ".cpp": "cpp",
    ".py": "python",
    ".toml": "toml",
    ".html": "html",
    ".sh": "bash",
}


def on_config(config: Any) -> None:
    """Sections and pages of the navigation are the headings and the lists of docs/README.md."""
    config.nav = [{"Home": "README.md"}]
    for section in (ROOT / "docs" / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        pages = re.findall(r"^\* \[(.+?)\]\(([^)]+\.md)", section, re.MULTILINE)
        if pages:
            places = [{title.replace("`", ""): address(ROOT / "docs" / link)} for title, link in pages]
            config.nav.append({section.partition("\n")[0]: places})


def on_files(files: Any, config: Any) -> None:
    """Adds a page for each file beyond docs/ that a page links to, and for those that these link to."""
    todo = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    done = set(todo)
    while todo:
        page = todo.pop()

        def follow(target: Path) -> str:
            if target not in done and not target.is_relative_to(ROOT / "docs"):
                done.add(target)
                todo.append(target)
                files.append(File.generated(config, address(target), content=_source(target)))
            return ""

        _links(_source(page), page, follow)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the tree into links to their pages; writes out the commands."""
    uri = page.file.src_uri
    here = ROOT / uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else ROOT / "docs" / uri
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", _commands())
    return _links(markdown, here, lambda target: os.path.relpath(address(target), Path(uri).parent))


def address(path: Path) -> str:
    """Where a file of the tree stands in the site."""
    path = Path(os.path.normpath(path))
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _links(markdown: str, page: Path, change: Callable[[Path], str]) -> str:
    """The text with the target of each link to an existing file or folder changed, but for code blocks."""

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / found[1]))
        if "://" in found[1] or not target.exists() or not target.is_relative_to(ROOT):
            return found[0]
        return f"]({change(target)}"

    parts = re.split(r"(?ms)(^ *```.*?^ *```|^ *~~~~.*?^ *~~~~)", markdown)
    return "".join(part if i % 2 else re.sub(r"\]\(([^)#\s]+)", link, part) for i, part in enumerate(parts))


def _source(path: Path) -> str:
    """A page that shows a file, or lists a folder."""
    if path.is_dir():
        rows = [f"* [{one.name}]({path.name}/{one.name})" for one in sorted(path.iterdir()) if one.suffix in LANGUAGES]
        return "\n".join([f"# {path.relative_to(ROOT)}", "", *rows])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    head = f"---\nsearch: {{exclude: true}}\n---\n# {path.relative_to(ROOT)}\n\n"
    return f'{head}~~~~{LANGUAGES.get(path.suffix, "text")} linenums="1"\n{text}\n~~~~\n'


def _commands() -> str:
    command = [sys.executable, "-m", "typer", "segnet_scratch.cli", "utils", "docs", "--name", "segnet"]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}
    ).stdout
    return re.sub(r"\[/?bold\]", "**", text.partition("\n")[2])
