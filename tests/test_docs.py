"""README.md and docs/ as they stand: commands exist and run, links lead somewhere, the site is built."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from support import FULL, ROOT
from support.kernels import needs_compiler

from segnet_scratch import SegNet, weights
from segnet_scratch.cli import app
from segnet_scratch.data import SAMPLE_CLASSES, read_image

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def name_of(page):
    return page.relative_to(ROOT).as_posix()


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists_with_its_options(page):
    for line in commands_of(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "cuda" / "README.md"], ids=name_of)
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


# Blocks

BLOCK = re.compile(
    r"(?:^ *<!-- needs: (?P<needs>[^>]+) -->\n+)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
QUICK = {"docs/how-to/data.md"}  # the blocks of the other pages run with SEGNET_TEST_FULL
# What is added to the commands of a page, so that they take seconds.
SMALLER = {
    "train": "--device numpy --set size=32 --set batch=2 --set steps=2 --set workers=0 --set width=0.125",
    "profile": "--passes 1 --size 64",
    "verify": "--only reference",
}


def blocks_of(text):
    """(language, code, what it needs, or "") of each fenced block."""
    return [(b["language"], textwrap.dedent(b["code"]), b["needs"] or "") for b in BLOCK.finditer(text)]


def runnable(page):
    """(language, code) of the blocks of a page that run anywhere; test_python_page.py has a page of its own."""
    blocks = blocks_of(page.read_text(encoding="utf-8")) if page.name != "python.md" else []
    return [(language, code) for language, code, needs in blocks if language in ("sh", "python") and not needs]


WITH_BLOCKS = [page for page in [*PAGES, ROOT / "cuda" / "README.md"] if runnable(page)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "cuda" / "README.md"], ids=name_of)
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert len(blocks_of(text)) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE))
    for language, code, _ in blocks_of(text):
        assert language in {"sh", "python", "toml", "yaml", "cpp", "text"}, code
        assert language == "sh" or not re.search(r"^segnet ", code, re.MULTILINE), code


@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if "docs" in page.parts], ids=name_of)
def test_a_page_with_commands_says_how_long_they_take_and_on_what(page):
    assert re.search(r"^\*Times:?\*.*?(cores|H100|H200)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, sample, monkeypatch):
    """The folder of a reader who has a data set and pictures, and trained before; `segnet` with small settings."""
    for name in ("data", "VOC2012", "CamVid"):
        shutil.copytree(sample, tmp_path / name)
    shutil.copytree(sample / "JPEGImages", tmp_path / "album")
    shutil.copy(sample / "JPEGImages" / "sample_00000.jpg", tmp_path / "photo.jpg")
    weights.save(
        tmp_path / "model.safetensors",
        SegNet(6, width=0.125, device="numpy"),
        {"classes": list(SAMPLE_CLASSES), "size": [48, 64]},
    )
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "runs" / "demo" / "best.safetensors")
    program = tmp_path / "bin" / "segnet"
    program.parent.mkdir()
    cases = "\n".join(f'"{command} "*) set -- "$@" {more} ;;' for command, more in SMALLER.items())
    local = 'for word do shift; [ "$word" != vgg16 ] || word=vgg16.safetensors; set -- "$@" "$word"; done'
    ending = f'exec "{sys.executable}" -m segnet_scratch "$@"'
    program.write_text(f'#!/bin/sh\n{local}\ncase "$* " in\n{cases}\nesac\n{ending}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_film(path, picture, frames=5):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.height, stream.width = picture.shape[:2]
        for _ in range(frames):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())


def write_vgg16(path):
    rng, inputs, arrays = np.random.default_rng(0), 3, {}
    outputs = (8, 8, 16, 16, 32, 32, 32, *[64] * 6)  # of SegNet at width 1/8
    for place, channels in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), outputs, strict=True):
        arrays[f"features.{place}.weight"] = 0.05 * rng.standard_normal((channels, inputs, 3, 3), np.float32)
        arrays[f"features.{place}.bias"] = np.zeros(channels, np.float32)
        inputs = channels
    save_file(arrays, path)


@needs_compiler
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_what_a_page_shows_works(page, place):
    """Its blocks of shell and Python in their order, but for those that say what else they need."""
    if name_of(page) not in QUICK:
        if not FULL:
            pytest.skip("runs with SEGNET_TEST_FULL")
        for library in ("matplotlib", "jinja2", "onnxruntime"):
            pytest.importorskip(library)
    blocks = runnable(page)
    text = "".join(code for _, code in blocks)
    if "film.mp4" in text:
        write_film(place / "film.mp4", read_image(place / "photo.jpg"))
    if "--init vgg16" in text:
        write_vgg16(place / "vgg16.safetensors")
    if "runs/voc/" in text and "--out runs/voc" not in text:
        shutil.copytree(place / "runs" / "demo", place / "runs" / "voc")
    names = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        code = code.replace("--init vgg16 ", "--init vgg16.safetensors ")  # what would be downloaded
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_what_a_page_quotes_of_a_kernel_stands_there():
    """A block that begins with `// cuda/FILE`: its lines, in their order; others may stand between them."""
    quoted = 0
    for page in (ROOT / "docs" / "learn").glob("*.md"):
        for language, code, _ in blocks_of(page.read_text(encoding="utf-8")):
            name, *lines = (line.strip() for line in code.splitlines() if line.strip())
            if language != "cpp" or not name.startswith("// cuda/"):
                continue
            source = iter([line.strip() for line in (ROOT / name.split()[1]).read_text(encoding="utf-8").splitlines()])
            assert [line for line in lines if line not in source] == [], f"{page.name}: {name}"
            quoted += 1
    assert quoted > 5


def test_a_block_is_not_passed_over():
    text = "<!-- needs: a GPU -->\n```sh\nsegnet a\n```\n\n```sh\nsegnet b\n```\n* item\n\n  ```python\n  c()\n  ```\n"
    assert blocks_of(text) == [("sh", "segnet a\n", "a GPU"), ("sh", "segnet b\n", ""), ("python", "c()\n", "")]


# The site


@pytest.mark.skipif(not FULL, reason="runs with SEGNET_TEST_FULL")
def test_the_site_builds_and_asks_nobody_for_anything(tmp_path):
    for library in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(library, reason="the site is built with the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    loaded = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    assert {name: found for name, text in pages.items() if (found := loaded.findall(text))} == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles) == []
    assert {"source/cuda/relu.cu.html", "source/CONTRIBUTING.md.html"} <= pages.keys()
    assert "--boundary" in pages["reference/commands.html"]
    assert "Logits (n, h, w, classes)" in pages["reference/api.html"]
