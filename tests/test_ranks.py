"""Several processes that train one network, on the numpy device with a real MPI; each launch is bounded in time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from support import FULL, rank_program
from support.training import losses, rows, steps

from segnet_scratch import weights
from segnet_scratch.config import Config
from segnet_scratch.data.palette import VOID, save_indexed_png
from segnet_scratch.train import Trainer

pytest.importorskip("mpi4py", reason="the extra parallel brings mpi4py and an MPI library")
MPIRUN = next(filter(None, (shutil.which("mpirun", path=str(Path(sys.executable).parent)), shutil.which("mpirun"))), "")
if not MPIRUN:
    pytest.skip("there is no mpirun; the extra parallel brings one", allow_module_level=True)

SECONDS = 300  # that a launch may take before it counts as hung; on an idle machine each takes three
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ended:
    code: int
    out: str
    err: str
    seconds: float


class Launch:
    """Processes that have been started; `end` waits for them, and kills what hangs."""

    def __init__(self, ranks, *command, start=MPIRUN):
        count = ["-n", str(ranks)] if ranks else []
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        openmpi = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
        self.began = monotonic()
        self.process = subprocess.Popen(
            [*([start, *count] if start else []), sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | dict.fromkeys(openmpi, "1") | {"PYTHONPATH": path, "SEGNET_THREADS": "1"},
            start_new_session=True,
        )

    def end(self):
        try:
            out, err = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running after {SECONDS} s: {self.process.args}")
        return Ended(self.process.returncode, out, err, monotonic() - self.began)


def job(data, out, resume=False, faults=None, **settings):
    settings = {"batch": 4, "steps": 4, "validate_every": 2, "dtype": "float64"} | settings
    return {"data": str(data), "out": str(out), "resume": resume, "faults": faults or {}, "settings": settings}


def launch(ranks, folder, *jobs):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{ranks}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    return Launch(ranks, rank_program.__file__, file)


def alone(data, out, resume=False, faults=None, settings=()):
    """The same by one process."""
    Trainer(Config(**rank_program.TINY | dict(settings)), data, out, "numpy", resume).run()


def assert_same(out, expected, rtol):
    """Every loss, validation loss and score, and the weights, momenta and statistics behind them."""
    for got, row in zip(rows(out), rows(expected), strict=True):
        assert got.keys() == row.keys()
        np.testing.assert_allclose(list(got.values()), list(row.values()), rtol=rtol)
    single = max(rtol, 1e-6)  # of checkpoints
    pairs = zip(*(weights.read(path / "last.safetensors")[:2] for path in (out, expected)), strict=True)
    for got, whole in pairs:
        for name, array in whole.items():
            np.testing.assert_allclose(got[name], array, rtol=single, atol=single * np.abs(array).max(), err_msg=name)


@pytest.fixture(scope="module")
def partly_void(sample, tmp_path_factory):
    """The sample with nothing but void in every second training image: in all images of a rank now and then."""
    root = tmp_path_factory.mktemp("void") / "sample"
    shutil.copytree(sample, root)
    for name in (root / "ImageSets/Segmentation/train.txt").read_text().split()[::2]:
        save_indexed_png(root / f"SegmentationClass/{name}.png", np.full((48, 64), VOID, np.uint8))
    return root


EVERYTHING = {"class_weights": [1, 2, 3, 0.5, 4, 0.1], "label_smoothing": 0.1, "clip_norm": 0.5, "schedule": "poly"}
SAME = {  # name: (ranks, relative tolerance, settings)
    "four": (4, 1e-9, {}),
    "everything": (2, 1e-9, EVERYTHING),
    "parts": (2, 1e-9, EVERYTHING | {"accumulate": 2, "batch": 8}),
    "uneven shares": (2, 1e-9, {"batch": 3}),
    "one uneven batch, larger than the data set": (4, 1e-9, {"batch": 16, "train_split": "seven"}),
    "void": (2, 1e-9, EVERYTHING | {"batch": 2, "steps": 8}),
    "float32": (2, 2e-5, EVERYTHING | {"dtype": "float32"}),
}
if FULL:
    SAME |= {
        "valid": (2, 1e-9, EVERYTHING | {"loss_normalisation": "valid"}),
        "memory on the device": (2, 1e-9, {"cache": "device"}),
    }


@pytest.fixture(scope="module")
def seven(sample, tmp_path_factory):
    """The sample with a split of seven images."""
    root = tmp_path_factory.mktemp("seven") / "sample"
    shutil.copytree(sample, root)
    names = (root / "ImageSets/Segmentation/train.txt").read_text().split()[:7]
    (root / "ImageSets/Segmentation/seven.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture(scope="module")
def compared(sample, seven, partly_void, tmp_path_factory):
    """The folder with every run of SAME, by its ranks and by one process; and how its launches ended."""
    folder = tmp_path_factory.mktemp("same")
    jobs = {}
    for name, (ranks, _, settings) in SAME.items():
        data = partly_void if name == "void" else seven if "train_split" in settings else sample
        jobs.setdefault(ranks, []).append(job(data, folder / name, **settings))
    local = job(sample, folder / "local", sync_bn=False)
    fused = {"engine": "fused", "width": 1 / 8, "dtype": "float32", "gradient_sum": "bf16", "sync_bn": False}
    jobs[2] += [local, local | {"out": str(folder / "again")}, job(sample, folder / "fused", **fused)]
    # Begun by four ranks, gone on with by two, ended by one; beside it by one each time.
    jobs[4].append(job(sample, folder / "resumed", steps=2))
    ended = [launch(4, folder, *jobs[4]).end()]
    jobs[2].append(job(sample, folder / "resumed", resume=True, steps=5))
    ended.append(launch(2, folder, *jobs[2]).end())
    alone(**job(sample, folder / "resumed", resume=True, steps=7))
    for resume, count in ((False, 2), (True, 5), (True, 7)):
        alone(**job(sample, folder / "resumed alone", resume=resume, steps=count))
    for of_ranks in jobs.values():
        for one in of_ranks:
            if Path(one["out"]).name in SAME:
                alone(**one | {"out": one["out"] + " alone"})
    return folder, ended


@pytest.mark.parametrize("name", SAME)
def test_ranks_make_the_steps_of_one_process(compared, name):
    folder, ended = compared
    assert [(end.code, end.out.splitlines()[-1]) for end in ended] == [(0, "finished")] * 2, ended
    assert_same(folder / name, folder / f"{name} alone", SAME[name][1])


def test_a_run_goes_on_with_another_number_of_ranks(compared):
    folder, _ = compared
    assert steps(folder / "resumed") == [1, 2, 3, 4, 5, 6, 7]
    assert_same(folder / "resumed", folder / "resumed alone", 1e-9)


def test_as_many_ranks_have_the_same_bits_and_statistics_of_their_own_are_averaged(compared):
    folder, _ = compared
    one, again, whole = (folder / name / "last.safetensors" for name in ("local", "again", "local alone"))
    assert one.read_bytes() == again.read_bytes()
    assert rows(folder / "local") == rows(folder / "again")
    assert not whole.exists()
    state, synchronised = (weights.read(path)[0] for path in (one, folder / "four" / "last.safetensors"))
    differ = [name for name in state if not np.allclose(state[name], synchronised[name], rtol=1e-4)]
    assert any(name.endswith("running_mean") for name in differ)
    assert losses(folder / "local") != losses(folder / "four")
    assert steps(folder / "fused") == [1, 2, 3, 4]


FAULTS = [  # the rank and step of each, the exit code, what is said, and the step that is saved
    ("kill", [1, 5], 9, "", 4),
    ("terminate", [1, 5], 0, "stopped at step 6", 6),
    ("full", [0, 5], 1, r"rank 0 on .*metrics.jsonl: could not be written", 4),
    ("nan", [1, 5], 1, r"the loss is nan at step 6 \(rank 1 on \S+: images sample_\d+, .*first in: images", 4),
]
if FULL:
    FAULTS += [
        ("raise", [1, 5], 1, "RuntimeError: nobody thought of this", 5),
        ("break", [1, 5], 1, "rank 1 on .*TypeError: 'NoneType' object is not callable", 4),
    ]


@pytest.fixture(scope="module")
def faults(sample, tmp_path_factory):
    """How runs of two ranks ended, in each of which something goes wrong; all at once, for they mostly wait."""
    folder = tmp_path_factory.mktemp("faults")
    options = {"steps": 400, "checkpoint_every": 2, "validate_every": 400}
    started = {
        fault: launch(2, folder, job(sample, folder / fault, faults={fault: place}, **options))
        for fault, place, *_ in FAULTS
    }
    return folder, {fault: begun.end() for fault, begun in started.items()}


@pytest.mark.parametrize(("fault", "place", "code", "message", "saved"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_all_ranks_end_when_one_does(faults, fault, place, code, message, saved):
    folder, ended = faults
    end = ended[fault]
    assert end.code == code, end
    assert re.search(message, end.out + end.err), end
    if killed := re.search(r"PID (\d+) RUNNING AT (\S+)", end.out):  # MPICH's words
        assert f"1 on {killed[2]} (process {killed[1]}" in end.out
    assert weights.read(folder / fault / "last.safetensors")[2]["step"] == saved
    assert [path.name for path in (folder / fault).iterdir() if "tmp" in path.name] == []


@pytest.mark.skipif(not FULL, reason="two launches of the command line: SEGNET_TEST_FULL")
def test_the_command(sample, tmp_path):
    """Trains by ranks that it starts itself, and evaluates by ranks that mpirun starts: one of them speaks."""
    settings = [p for key, value in rank_program.TINY.items() for p in ("--set", f"{key}={str(value).lower()}")]
    segnet, out = ("-m", "segnet_scratch"), tmp_path / "run"
    more = ("--set", "steps=4", "--device", "numpy", "--ranks", "2")
    trained = Launch(0, *segnet, "train", "--data", sample, "--out", out, *settings, *more, start="").end()
    assert (trained.code, trained.err) == (0, "")
    assert trained.out.count("4 steps done") == trained.out.count("2 ranks: 0 on ") == 1
    files = tmp_path / "one.json", tmp_path / "two.json"
    for ranks, file in enumerate(files, start=1):
        command = (*segnet, "eval", out / "best.safetensors", "--data", sample, "--device", "numpy", "--json", file)
        ended = Launch(ranks, *command).end()
        assert (ended.code, ended.err, ended.out.count("mean IoU")) == (0, "", 1)
    one, two = (json.loads(file.read_text()) for file in files)
    assert one["images"] == two["images"] == 4
    np.testing.assert_allclose(two["confusion"], one["confusion"], atol=3)
