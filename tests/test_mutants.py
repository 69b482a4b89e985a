"""The suite can fail: faults are put into copies of the tree, and named tests of the suite must notice each of them.

tests/mutants/*.toml list the faults. One more is one more entry:

    [[mutant]]
    name = "pool: the later of equal values wins"
    file = "cuda/max_pool.cu"
    old = "candidate > best ||"  # stands once in the file
    new = "candidate >= best ||"
    killed_by = ["test_ops.py::..."]  # tests that must fail, every one of them; of several cases at least one
    needs = "onnx"  # if given, a library without which these tests skip, so that the fault is left out

By default a seeded sample is tried; with SEGNET_TEST_FULL=1 all of them are, and those tests are shown to pass in a
copy without a fault. `python tests/test_mutants.py [PART OF A NAME]` prints what killed what.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest
from support import FULL, ROOT, count

from segnet_scratch.runtime import cache

TREE = ("segnet_scratch", "cuda", "tests", "scripts", "pyproject.toml")  # what tests need


@dataclass(frozen=True)
class Mutant:
    """A fault: a piece of text of one file replaced by another, and the tests that must notice it."""

    name: str
    file: str
    old: str
    new: str
    killed_by: list[str]
    needs: str = ""

    def apply(self, tree: Path) -> None:
        """Puts the fault into a copy of the tree."""
        path = tree / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")
        # Python takes a compiled file for current where size and second of the source agree.
        Path(cache_from_source(path)).unlink(missing_ok=True)


MUTANTS = [
    Mutant(**entry)
    for path in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
]
USABLE = [mutant for mutant in MUTANTS if not mutant.needs or find_spec(mutant.needs)]
CHOSEN = random.Random(0).sample(USABLE, count(8, len(USABLE)))


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of what tests need, compiled Python files included."""
    tree = folder / "tree"
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def run_tests(tree: Path, tests: list[str], own_cache: Path | None = None) -> tuple[int, dict[str, str], str]:
    """(exit code, messages of the failed tests by name, report) of some tests in a copy of the tree.

    Compiled kernels come from the cache that all share, unless `own_cache` names another folder.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SEGNET_", "PYTEST_"))}
    environment |= {
        "PYTHONPATH": str(tree),
        "SEGNET_CACHE": str(own_cache or cache.cache_directory()),
        "COLUMNS": "400",
    }
    quick = [part for plugin in ("xdist", "hypothesispytest", "cacheprovider") for part in ("-p", f"no:{plugin}")]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *quick, *(f"tests/{test}" for test in tests)]
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    found = re.findall(r"^FAILED tests/(.+?)(?: - (.*))?$", ended.stdout, re.MULTILINE)
    return ended.returncode, dict(found), ended.stdout + ended.stderr


def kill(mutant: Mutant, folder: Path) -> dict[str, str]:
    """The message of each test that noticed the mutant; AssertionError with the report where one did not."""
    tree = copy_of_the_tree(folder)
    mutant.apply(tree)
    fills_the_cache = mutant.file.startswith(f"{Path(cache.__file__).parent.relative_to(ROOT)}/")
    code, failures, report = run_tests(tree, mutant.killed_by, folder / "cache" if fills_the_cache else None)
    # A fault that corrupts memory may end the process, after its test has been judged or before.
    if code < 0 and not failures and len(mutant.killed_by) == 1:
        return {mutant.killed_by[0]: f"the process ended by signal {-code}"}
    assert code in (0, 1) or (code < 0 and failures), (
        f"'{mutant.name}': the tests could not be run, exit code {code}\n{report}"
    )
    killers = {}
    for test in mutant.killed_by:
        messages = [message for name, message in failures.items() if re.match(rf"{re.escape(test)}($|\[|::)", name)]
        assert messages, f"'{mutant.name}' survives {test}\n{report}"
        killers[test] = messages[0]
    return killers


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(mutant, tmp_path):
    for test, message in kill(mutant, tmp_path).items():
        print(f"killed by {test}: {message}")
    shutil.rmtree(tmp_path / "tree")


def test_there_are_enough_of_them_and_each_fits_its_file():
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        found = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        assert found == 1, (
            f"'{mutant.name}': its text stands {found} times in {mutant.file}; bring the entry up to date"
        )
        assert mutant.new != mutant.old
        assert mutant.killed_by


@pytest.mark.skipif(not FULL, reason="two minutes: SEGNET_TEST_FULL=1")
def test_without_a_fault_they_all_pass(tmp_path):
    code, failures, report = run_tests(copy_of_the_tree(tmp_path), sorted({t for m in USABLE for t in m.killed_by}))
    assert (code, failures) == (0, {}), report


def main(wanted: str = "") -> None:
    """Prints a table: mutant, tests that killed it."""
    survivors = 0
    for mutant in MUTANTS:
        if wanted in mutant.name:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    killers = "\n".join(f"    {test}\n        {m}" for test, m in kill(mutant, Path(folder)).items())
                except AssertionError as error:
                    survivors, killers = survivors + 1, f"    SURVIVES\n{error}"
            print(f"{mutant.name} ({mutant.file})\n{killers}", flush=True)
    sys.exit(f"{survivors} mutants survive" if survivors else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
