"""`segnet doctor`: what it says of every state that a machine may be in. Never a traceback, always a command."""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
from support import ROOT
from support.kernels import needs_compiler

from segnet_scratch.lab import doctor
from segnet_scratch.lab.doctor import Diagnosis, Finding, gpu, own_process, software
from segnet_scratch.lab.doctor import findings as findings_module
from segnet_scratch.lab.doctor.findings import first_lines, guarded, install_extra, last_line, pip
from segnet_scratch.lab.doctor.gpu import Facts
from segnet_scratch.lab.doctor.kernels import KernelReport
from segnet_scratch.runtime import nvrtc
from segnet_scratch.runtime.resources import Compilation, Usage

H100 = {"name": "NVIDIA H100", "capability": (9, 0), "bytes": 80 * 2**30}
CUPY = {"version": "14.2.0", "runtime": 13020, "driver": 13000, "problem": "", "gpus": [H100]}
NVRTC = {"version": (13, 5), "path": "libnvrtc.so.13", "architectures": ["sm_75", "sm_90", "sm_120"]}
GOOD = Facts(
    cuda=(13, 0), smi="580.95, NVIDIA H100", packages=["cupy-cuda13x"], cupy=CUPY, nvrtc=NVRTC
)  # a machine on which everything works
NO_CUPY = {"error": "No module named 'cupy'", "type": "ModuleNotFoundError"}
NO_NVRTC = {"error": nvrtc.MISSING, "type": "CompileError"}
LAPTOP = Facts(cupy=NO_CUPY, nvrtc=NO_NVRTC)  # no driver, nothing installed


def judged(facts):
    return {finding.name: finding for finding in gpu.findings(facts)}


def laptop(**changed):
    return replace(LAPTOP, **changed)


def good(**changed):
    return replace(GOOD, **changed)


def with_cupy(**changed):
    """With another answer of CuPy."""
    return good(cupy={**CUPY, **changed})


# Finding, what the machine has, and by regular expressions what is said and the command.
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
NO_DRIVER = "couldn't communicate with the NVIDIA driver"
ASKS = "the cuda device needs it"
TWO_CUPYS = ["cupy-cuda12x", "cupy-cuda13x"]
NO_CUBLAS = {"error": "=====\nFailed\nImportError: libcublas\n=====", "type": "ImportError"}
PART_MISSING = {"error": "No module named 'cuda'", "type": "ModuleNotFoundError"}  # a part of CuPy, not CuPy
NO_BUILTINS = {"error": "nvrtc: error: failed to open libnvrtc-builtins.so.13.5"}
NO_GPU = "cudaErrorNoDevice: no device"
DEFECTS = [
    ("driver missing", laptop(on_the_bus=True), "an NVIDIA GPU is in this machine", "drivers install"),
    ("driver broken", laptop(smi_problem=MISMATCH), "version mismatch", "sudo reboot"),
    ("driver broken", laptop(smi_problem=NO_DRIVER), "communicate", "modprobe"),
    ("driver broken", laptop(smi="580.95, NVIDIA H100"), "libcuda.so.1 does not load", "CAPABILITIES"),
    ("driver broken", good(cuda=(11, 8)), "CUDA 11.8.*too old", "drivers install"),
    ("GPU broken", with_cupy(gpus=[{**H100, "capability": (7, 0)}]), "7.0.*too old", "--device numpy"),
    ("GPU missing", replace(with_cupy(gpus=[]), hidden="-1"), "'-1'", "unset CUDA_VISIBLE_DEVICES"),
    ("GPU missing", with_cupy(gpus=[], problem=NO_GPU), "cudaErrorNoDevice", "nvidia-smi"),
    ("CuPy missing", good(packages=[], cupy=NO_CUPY), ASKS, "cupy-cuda13x"),
    ("CuPy missing", good(packages=[], cupy=NO_CUPY, cuda=(12, 4)), ASKS, "cupy-cuda12x"),
    ("CuPy broken", good(cuda=(12, 4)), "for CUDA 13.* CUDA 12 at most", "uninstall -y cupy-cuda13x && .*cupy-cuda12x"),
    ("CuPy broken", good(packages=TWO_CUPYS), "overwrite", "uninstall -y cupy-cuda12x cupy-cuda13x && .*'cupy-cuda13x"),
    ("CuPy broken", good(cupy=NO_CUBLAS), "does not import: ImportError: libcublas", "uninstall -y cupy-cuda13x && "),
    ("CuPy broken", good(cupy=PART_MISSING), "No module named 'cuda'", "uninstall -y cupy-cuda13x && "),
    ("NVRTC broken", with_cupy(gpus=[{**H100, "capability": (10, 3)}]), "does not know sm_103", "cuda-toolkit"),
    ("NVRTC broken", good(cuda=(12, 4)), "the driver runs CUDA 12 at most", "nvrtc.*<13"),
    ("NVRTC missing", good(nvrtc=NO_NVRTC), "compiles the kernels", "cuda-toolkit.cudart,nvrtc"),
    ("NVRTC broken", good(nvrtc=NO_BUILTINS), "failed to open libnvrtc-builtins", "cuda-toolkit"),
]


class TestGpu:
    def test_a_machine_on_which_everything_works(self):
        found = judged(GOOD)
        assert list(found) == ["driver", "GPU", "CuPy", "NVRTC"]
        assert {finding.status for finding in found.values()} == {"ok"}
        assert not any(finding.fix for finding in found.values())
        text = " ".join(finding.text for finding in found.values())
        for part in ("CUDA 13.0", "580.95", "NVIDIA H100", "capability 9.0", "80 GiB", "14.2.0", "libnvrtc.so.13"):
            assert part in text

    def test_a_laptop(self):
        found = judged(LAPTOP)
        assert {finding.status for finding in found.values()} == {"missing"}
        assert "--device numpy" in found["driver"].fix
        assert "cupy-cuda13x" in found["CuPy"].fix
        assert "nvidia-cuda-nvrtc==" in found["NVRTC"].fix

    @pytest.mark.parametrize(("what", "facts", "text", "fix"), DEFECTS)
    def test_every_defect_has_its_command(self, what, facts, text, fix):
        name, status = what.split()
        finding = judged(facts)[name]
        assert finding.status == status
        assert re.search(text, finding.text)
        assert re.search(fix, finding.fix), finding.fix

    def test_an_older_cupy_runs_on_a_newer_driver(self):
        facts = replace(
            GOOD, packages=["cupy-cuda12x"], cupy={**CUPY, "runtime": 12090}, nvrtc={**NVRTC, "version": (12, 9)}
        )
        assert {finding.status for finding in judged(facts).values()} == {"ok"}

    def test_the_cuda_device(self):
        assert gpu.cuda_device({}).status == "ok"
        assert gpu.cuda_device(None).status == "missing"
        broken = gpu.cuda_device({"error": "the GPU is out of memory\nfar too little\nmore"})
        assert (broken.status, broken.text) == ("broken", "the GPU is out of memory far too little; see above")


def program(folder, name, text):
    """A program of this name, first on the path."""
    path = folder / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_cupy(tmp_path, monkeypatch):
    """`fake_cupy(code)` is what `import cupy` runs in the doctor's processes."""

    def write(code):
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "cupy.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return write


@pytest.fixture
def only(monkeypatch):
    """`only("cupy")`: the other processes of the doctor give a laptop's answers at once."""
    answers = {"host": {}, "nvrtc": NO_NVRTC, "cupy": NO_CUPY, "mpi": {"error": "No module named 'mpi4py'"}}

    def ask_only(*tasks):
        monkeypatch.setattr(doctor, "ask", lambda task: own_process.ask(task) if task in tasks else answers[task])

    return ask_only


def findings_of(finished):
    assert "Traceback" not in finished.out + finished.err
    return [line for line in finished.out.splitlines() if not line.startswith(" ")]


class TestCommand:
    @needs_compiler
    def test_here(self, segnet, tmp_path):
        finished = segnet("doctor", "--json", tmp_path / "doctor.json")
        assert finished.code == 0
        names = [line[9:22].strip() for line in findings_of(finished)]
        first = ["Python", "system", "kernels", "libraries", "BLAS", "C++ compiler", "driver"]
        last = ["CuPy", "NVRTC", "MPI", "cache", "numpy device", "host device", "cuda device"]
        assert names[: len(first)] == first
        assert names[-len(last) :] == last
        report = json.loads((tmp_path / "doctor.json").read_text())
        assert report["passed"] is True
        assert report["devices"]["numpy"] is True
        assert report["devices"]["host"] is True
        assert [finding["name"] for finding in report["findings"]] == names
        for finding in report["findings"]:
            assert finding["status"] in ("ok", "missing", "broken")
            assert finding["text"]
            assert not (finding["fix"] and finding["status"] == "ok")

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("raise ImportError('====\\nlibcublas.so.12 is missing\\n====')", "libcublas.so.12 is missing"),
            ("raise RuntimeError('built for another NumPy')", "built for another NumPy"),
            ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
            ("print('hello')\nraise SystemExit(3)", "exit code 3"),
            ("", "has no attribute 'cuda'"),
        ],
    )
    def test_a_broken_cupy(self, segnet, fake_cupy, only, code, said):
        fake_cupy(code)
        only("cupy")
        finished = segnet("doctor")
        (line,) = [line for line in findings_of(finished) if line[9:].startswith("CuPy")]
        assert line.startswith("broken")
        assert said in line
        assert finished.code == 0  # numpy trains all the same

    def test_a_gpu_that_runs_nothing(self, segnet, fake_cupy, only, tmp_path, monkeypatch):
        """As far as a stand-in goes: CuPy imports and counts a GPU, and then the kernel fails."""
        program(tmp_path, "nvidia-smi", "echo 580.95, NVIDIA H100")
        monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
        fake_cupy("""
            from types import SimpleNamespace
            __version__ = "14.2.0"
            properties = {"name": b"NVIDIA H100", "major": 9, "minor": 0, "totalGlobalMem": 80 * 2**30}
            runtime = SimpleNamespace(
                runtimeGetVersion=lambda: 13020,
                driverGetVersion=lambda: 13000,
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda index: properties,
            )
            cuda = SimpleNamespace(runtime=runtime, is_available=lambda: False)
        """)
        only("cupy", "cuda")
        finished = segnet("doctor")
        said = {line[9:22].strip(): line for line in findings_of(finished)}
        assert said["driver"].startswith("ok")
        assert "580.95" in said["driver"]
        assert said["GPU"] == "ok       GPU           NVIDIA H100, compute capability 9.0, 80 GiB"
        assert said["CuPy"].startswith("ok")
        assert said["cuda device"].startswith("broken")
        assert finished.code == 0

    def test_no_driver_but_nvidia_smi(self, segnet, only, tmp_path, monkeypatch):
        only()
        program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed, no driver; exit 9")
        monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(gpu, "_driver_cuda", lambda: None)
        (line,) = [line for line in findings_of(segnet("doctor")) if line[9:].startswith("driver")]
        assert line.startswith("broken")
        assert "NVIDIA-SMI has failed, no driver" in line

    @pytest.mark.parametrize(
        ("script", "compiler", "host"),
        [
            (None, "missing", "missing"),  # there is no such program
            ("echo broken >&2; exit 1", "broken", "missing"),
            (
                'case "$1" in --version) echo some compiler;; *) echo x.cpp: error: no >&2; exit 1;; esac',
                "ok",
                "broken",
            ),
            ('case "$1" in --version) echo some compiler;; *) exit 0;; esac', "ok", "broken"),  # and writes nothing
        ],
    )
    def test_a_broken_compiler(self, segnet, only, tmp_path, monkeypatch, script, compiler, host):
        only("host")
        path = tmp_path / "compiler" if script is None else program(tmp_path, "compiler", script)
        monkeypatch.setenv("CXX", str(path))
        finished = segnet("doctor")
        statuses = {line[9:22].strip(): line.split()[0] for line in findings_of(finished)}
        assert statuses["C++ compiler"] == compiler
        assert statuses["host device"] == host
        assert "unset CXX" in finished.out
        assert finished.code == 0

    def test_a_cache_that_cannot_be_written(self, segnet, only, tmp_path, monkeypatch):
        only()
        (tmp_path / "file").touch()
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "file" / "cache"))
        finished = segnet("doctor")
        (line,) = [line for line in findings_of(finished) if line[9:].startswith("cache")]
        assert line.startswith("broken")
        assert "export SEGNET_CACHE=" in finished.out

    def test_no_device_that_works(self, segnet, only, monkeypatch):
        only()
        monkeypatch.setattr(software, "numpy_device", lambda found: Finding("numpy device", "broken", "no NumPy"))
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert segnet("doctor").code == 1

    def test_a_check_that_fails_by_itself(self, segnet, only, monkeypatch):
        only()

        def fail(*anything):
            raise RuntimeError("nobody thought of this")

        checks = ("python", "kernels", "libraries", "blas", "compiler", "ranks", "cache", "numpy_device", "host_device")
        for name in checks:
            monkeypatch.setattr(software, name, fail)
        monkeypatch.setattr(gpu.Facts, "gather", fail)
        monkeypatch.setattr(gpu, "cuda_device", fail)
        finished = segnet("doctor")
        assert finished.code == 1
        lines = findings_of(finished)
        assert len(lines) == len(checks) + 2
        assert all(line.startswith("broken") and "nobody thought of this" in line for line in lines)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


class TestWithoutLibraries:
    def run(self, bare, *arguments, path=ROOT):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        return subprocess.run([bare, *arguments], env=environment, capture_output=True, text=True, cwd=bare.parent)

    @pytest.mark.parametrize("command", ["doctor", "train"])
    def test_a_bare_source_tree_says_what_to_install(self, bare, command):
        result = self.run(bare, "-m", "segnet_scratch", command)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        for package in ("numpy>=", "pillow>=", "typer>=", "threadpoolctl>="):
            assert f"'{package}" in result.stderr.splitlines()[1]
        assert "install" in result.stderr

    def test_a_library_that_does_not_import(self, bare, tmp_path):
        (tmp_path / "numpy").mkdir()
        (tmp_path / "numpy" / "__init__.py").write_text("raise ImportError('libgfortran is gone')\n")
        information = tmp_path / "numpy-2.4.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Name: numpy\nVersion: 2.4.0\n")
        result = self.run(bare, "-m", "segnet_scratch", path=f"{ROOT}{os.pathsep}{tmp_path}")
        assert "broken   numpy         does not import: ImportError: libgfortran is gone" in result.stderr
        assert "--force-reinstall 'numpy>=" in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_library_that_is_too_old(self, monkeypatch):
        project = {"dependencies": ["numpy>=99.1", "pillow>=1.0"]}
        monkeypatch.setattr(software, "source_tree", lambda: project)
        good, bad = software.libraries()
        assert good.status == "ok"
        assert "pillow" in good.text
        assert (bad.name, bad.status) == ("numpy", "broken")
        assert "99.1 or newer is needed" in bad.text
        assert "'numpy>=99.1'" in bad.fix
        assert software.numpy_device([good, bad]).status == "broken"
        assert software.numpy_device([good]).status == "ok"

    def test_the_package_itself_imports_without_libraries(self, bare):
        result = self.run(bare, "-c", "import segnet_scratch; print(segnet_scratch.__version__)")
        assert result.returncode == 0, result.stderr


class TestCommandsToInstall:
    def test_from_a_source_tree_the_packages_themselves(self):
        assert install_extra("compiler") == f"{sys.executable} -m pip install 'ziglang>=0.13'"
        assert "cupy-cuda12x" in install_extra("cuda12")

    def test_from_a_wheel_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setattr(findings_module, "PACKAGE", tmp_path / "segnet_scratch")
        assert install_extra("cuda13").endswith("install 'segnet_scratch[cuda13]'")

    def test_an_environment_of_uv_has_no_pip(self, monkeypatch):
        monkeypatch.setattr(findings_module.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(findings_module.shutil, "which", lambda name: f"/bin/{name}")
        assert pip("install", "numpy>=2") == f"uv pip install --python {sys.executable} 'numpy>=2'"
        monkeypatch.setattr(findings_module.shutil, "which", lambda name: None)
        assert pip("install", "numpy").startswith(f"{sys.executable} -m ensurepip && ")


class TestParts:
    def test_a_process_that_hangs(self, fake_cupy, monkeypatch):
        fake_cupy("import time\ntime.sleep(60)")
        monkeypatch.setattr(own_process, "TIMEOUT", 2)
        assert "timed out after 2 seconds" in own_process.ask("cupy")["error"]

    def test_a_task_that_does_not_exist(self):
        assert own_process.ask("nonsense")["type"] == "KeyError"

    def test_lines_of_a_message(self):
        assert last_line("===\nthe reason\n===\n\n") == "the reason"
        assert last_line("") == "no message"
        assert first_lines("a\n  b\nc") == "a b"

    def test_an_error_in_a_check_is_a_finding(self):
        assert guarded("name", lambda: [][0]) == [Finding("name", "broken", "IndexError: list index out of range")]

    def test_one_device_is_enough(self):
        assert not Diagnosis([], {"numpy": False, "host": False, "cuda": False}).passed
        assert Diagnosis([], {"numpy": False, "host": False, "cuda": True}).passed


class TestKernels:
    def report(self, problems=(), nvrtc="13.5", left_out=()):
        usages = [
            Usage("sums", element, architecture, 40 if element == "float32" else 200, spill, 0, spill, 256, 1)
            for element in ("float64", "float32")
            for architecture, spill in (("sm_90", 0), ("sm_120", 8 if element == "float64" else 0))
        ]
        compilations = [Compilation("sums.cu", u.element, u.architecture, (u,), ()) for u in usages]
        return KernelReport(nvrtc, "13.5", compilations, list(problems), list(left_out))

    def test_the_table(self):
        lines = [line for line, _ in self.report(["sums, float64, sm_120: 8 bytes"]).lines()]
        assert lines[0].split() == ["registers", "sm_90", "sm_120", "shared", "threads"]
        assert lines[1].split() == ["sums", "float32", "40", "40", "256", "1024"]
        assert lines[2].split() == ["sums", "float64", "200", "200!", "256", "320"]
        assert lines[4:] == ["sums, float64, sm_120: 8 bytes"]
        styles = [style for _, style in self.report().lines()]
        assert (styles[1], styles[2]) == ("", "bold red")

    def test_what_passes(self):
        assert self.report().passed
        assert not self.report(["a problem"]).passed
        assert "4 compiled kernels within the budget" in self.report().lines()[-1][0]

    def test_another_compiler_than_that_of_the_budget(self):
        assert any("NVRTC 12.9; the budget is for 13.5" in line for line, _ in self.report(["x"], "12.9").lines())
        text = "\n".join(line for line, _ in self.report(nvrtc="12.4", left_out=["sm_120"]).lines())
        assert "sm_120 is left out: NVRTC 12.4 does not know it" in text

    def test_for_programs(self):
        report = self.report().to_json()
        assert report["passed"] is True
        assert report["kernels"][0] == asdict(self.report().usages[0]) | {"max_threads": 1024}
        assert [row["element"] for row in report["kernels"]] == ["float32", "float32", "float64", "float64"]

    def test_without_nvrtc(self, segnet, monkeypatch):
        monkeypatch.setattr(nvrtc, "_library", nvrtc._library.__wrapped__)
        monkeypatch.setattr(nvrtc, "_candidates", list)
        monkeypatch.setattr(nvrtc.ctypes.util, "find_library", lambda name: None)
        finished = segnet("doctor", "--kernels")
        assert finished.code == 1
        assert findings_of(finished)[0].startswith("missing  NVRTC")
        assert "nvidia-cuda-nvrtc==" in finished.out

    def test_a_budget_that_is_exceeded_fails_the_command(self, segnet, monkeypatch):
        monkeypatch.setattr(
            "segnet_scratch.cli.kernels.examine_kernels", lambda progress: self.report(["sums: spills"])
        )
        finished = segnet("doctor", "--kernels")
        assert finished.code == 1
        assert "sums: spills" in finished.out
