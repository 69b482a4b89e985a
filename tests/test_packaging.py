"""The wheel, installed into a fresh environment and used from another folder; the source tree, used without being
installed; and what pyproject.toml promises.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from support import ROOT
from support.kernels import needs_compiler

from segnet_scratch import __version__
from segnet_scratch.runtime.launch import shipped_kernels

pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which the extra test brings")

# Whatever is in the tree belongs into the wheel, or the other way round.
SHIPPED = {
    path.relative_to(ROOT / "cuda").as_posix(): path.read_bytes()
    for path in (ROOT / "cuda").rglob("*")
    if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".md")
}

RECIPES = sorted((ROOT / "segnet_scratch" / "recipes").glob("*.toml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The python of an environment with this wheel, and with the libraries of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    # Of this environment only the folders of packages: neither the tree nor what an editable install points to.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(packages) / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


@pytest.fixture
def segnet(installed, tmp_path, monkeypatch):
    """`segnet(...)` runs the installed program in an empty folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*arguments, program=(installed.parent / "segnet",)):
        return subprocess.run([*program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)

    return run


class TestWheel:
    def test_it_holds_kernels_recipes_and_budget_and_no_tests(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            assert len(RECIPES) > 1
            for name, contents in SHIPPED.items():
                assert archive.read(f"segnet_scratch/cuda/{name}") == contents
            metadata = next(name for name in names if name.endswith("METADATA"))
            entry_points = next(name for name in names if name.endswith("entry_points.txt"))
            text = archive.read(metadata).decode()
            assert "segnet = segnet_scratch.__main__:main" in archive.read(entry_points).decode()
        assert {f"segnet_scratch/cuda/{name}" for name in SHIPPED} == {n for n in names if "/cuda/" in n}
        for name in (
            *(path.relative_to(ROOT / "segnet_scratch").as_posix() for path in RECIPES),
            "runtime/budget.toml",
            "lab/profile/ceilings.cu",
            "lab/profile/ceilings_mma.cu",
            "cli/common.py",
            "report/page.html",
            "serve/page.html",
            "py.typed",
        ):
            assert f"segnet_scratch/{name}" in names
        # A file or folder at the top level of site-packages would belong to everybody: tests, scripts, cuda.
        assert {name.partition("/")[0] for name in names} == {"segnet_scratch", metadata.partition("/")[0]}
        assert not [name for name in names if "__pycache__" in name or "test" in Path(name).name]
        for extra in ("cuda12", "cuda13", "nvrtc", "compiler", "report", "tensorboard", "video"):
            assert f"Provides-Extra: {extra}" in text
        assert f"\nVersion: {__version__}\n" in text
        assert "\nLicense-Expression: MIT\nLicense-File: LICENSE\n" in text

    def test_every_python_file_of_the_tree_is_in_it(self, wheel):
        tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "segnet_scratch").rglob("*.py")}
        with zipfile.ZipFile(wheel) as archive:
            assert {name for name in archive.namelist() if name.endswith(".py")} == tree


def test_the_source_archive_is_complete(wheel, tmp_path, monkeypatch):
    """The wheel that is made of it is that of the tree; the tests and pages, what they need and CI are in it."""
    from hatchling.build import build_sdist, build_wheel

    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("*/")
    for name in (
        "tests",
        "docs/images/demo.png",
        "scripts/demo.sh",
        ".ci/run",
        "benchmarks",
        "CHANGELOG.md",
        "mkdocs.yml",
    ):
        assert (unpacked / name).exists(), name
    monkeypatch.chdir(unpacked)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as again, zipfile.ZipFile(wheel) as first:
        assert {(one.filename, one.CRC) for one in again.infolist()} == {
            (one.filename, one.CRC) for one in first.infolist()
        }


class TestInstalledWheel:
    def test_doctor(self, segnet, installed, tmp_path):
        result = segnet("doctor", "--json", "doctor.json")
        assert result.returncode == 0, result.stdout + result.stderr
        assert str(ROOT / "cuda") not in result.stdout
        report = json.loads((tmp_path / "doctor.json").read_text())
        found = {finding["name"]: finding for finding in report["findings"]}
        assert str(installed.parent.parent) in found["kernels"]["text"]
        assert found["kernels"]["text"].startswith(f"{len(shipped_kernels())} in ")
        assert found["libraries"]["status"] == "ok"
        assert report["devices"]["numpy"] is True

    def test_the_cuda_device_says_what_is_missing(self, segnet, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        assert segnet("data", "sample", "data", "--train", "2", "--val", "1").returncode == 0
        result = segnet("train", "--data", "data", "--out", "run", "--device", "cuda")
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "pip install 'segnet_scratch[cuda13]'" in result.stderr or "sees no NVIDIA GPU" in result.stderr

    @needs_compiler
    def test_sample_data_and_two_steps_on_the_host_device(self, segnet, tmp_path):
        result = segnet("data", "sample", "data", "--train", "2", "--val", "1")
        assert result.returncode == 0, result.stderr
        settings = [f"--set={setting}" for setting in ("width=0.0625", "size=32", "batch=2", "steps=2", "workers=0")]
        result = segnet("train", "--data", "data", "--out", "run", "--device", "host", *settings)
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
        assert (tmp_path / "run" / "last.safetensors").is_file()

    def test_the_program_as_a_module(self, segnet, installed):
        result = segnet("--version", program=[installed, "-m", "segnet_scratch"])
        assert result.returncode == 0
        assert result.stdout == f"segnet_scratch {__version__}\n"


class TestSourceTree:
    def test_it_runs_without_being_installed(self, tmp_path):
        """A Python that has the libraries but not the project; the tree is on its path."""
        libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        result = subprocess.run(
            [sys.executable, "-S", "-m", "segnet_scratch", "doctor", "--json", "doctor.json"],  # -S: no .pth files
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *libraries])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        found = {f["name"]: f for f in json.loads((tmp_path / "doctor.json").read_text())["findings"]}
        assert found["kernels"]["text"].endswith(str(ROOT / "cuda"))

    def test_an_editable_install_copies_no_kernels(self, tmp_path, monkeypatch):
        """A copy of cuda/ in site-packages would be found first, and would stay as it was."""
        from hatchling.build import build_editable

        monkeypatch.chdir(ROOT)
        name = build_editable(str(tmp_path))
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert not [name for name in archive.namelist() if "cuda" in name]
            (pointer,) = [name for name in archive.namelist() if name.endswith(".pth")]
            assert Path(archive.read(pointer).decode().strip()) == ROOT


def test_the_extras_bring_one_cuda_each():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for major in ("12", "13"):
        cupy, toolkit = extras[f"cuda{major}"]
        assert cupy.startswith(f"cupy-cuda{major}x>=")
        assert toolkit.startswith("cuda-toolkit[cudart,nvrtc]>=" + major)
        assert toolkit.endswith(f"<{int(major) + 1}")


def test_the_release_notes_are_dated_and_know_this_version():
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", notes, re.MULTILINE)
    releases = [heading for heading in headings if heading != "Unreleased"]
    assert headings.index(releases[0]) <= 1
    assert releases[0].startswith(f"{__version__}, ")
    for heading in releases:
        version, date = heading.split(", ")
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        datetime.date.fromisoformat(date)
