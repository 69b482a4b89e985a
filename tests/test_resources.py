"""What compiled kernels take of a GPU: reading ptxas' log, the budget, and, where libnvrtc is, every kernel for every
architecture. No GPU is needed for any of it.
"""

import itertools
import re
import tomllib
from dataclasses import replace

import pytest
from support import ROOT
from support.kernels import INCLUDE, DryDevice, needs_compiler, parse

from segnet_scratch.errors import CompileError, ConfigError
from segnet_scratch.lab.proof.compare import run_guarded
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.runtime import nvrtc, resources
from segnet_scratch.runtime.budget import SHIPPED, Budget, Exemption, read_budget
from segnet_scratch.runtime.launch import shipped_kernels
from segnet_scratch.runtime.occupancy import ARCHITECTURES, largest_shared, max_threads
from segnet_scratch.runtime.resources import Compilation, Usage, compile_all, parse_log, remarks

# As NVRTC 13.5 wrote it: a spilling kernel with shared memory, a kernel that calls a function with an array of its own.
LOG_SM_90 = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spills' for 'sm_90'
ptxas info    : Function properties for spills
ptxas         .     896 bytes stack frame, 1600 bytes spill stores, 1608 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 896 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 37.630 ms
ptxas info    : Compiling entry function 'calls' for 'sm_90'
ptxas info    : Function properties for calls
ptxas         .     256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 7.114 ms
ptxas info    : Function properties for _Z6helperPKfii
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads

"""
# The same compiler for an older GPU, which has constant banks, and with a warning.
LOG_SM_75 = """ptxas warning : Value of threads per SM for entry sums is out of range. .minnctapersm will be ignored
ptxas info    : 276 bytes gmem, 32 bytes cmem[4]
ptxas info    : Compiling entry function 'sums' for 'sm_75'
ptxas info    : Function properties for sums
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 66 registers, used 1 barriers, 4096 bytes smem, 416 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 14.016 ms

"""
CLEAN = Usage("sums", "float32", "sm_75", registers=66, shared=4096, barriers=1)
SPILLS = Usage("spills", "float32", "sm_90", 32, 1600, 1608, stack=896, shared=256, barriers=1)


def compilation(*usages, remarks=()):
    return Compilation("written.cu", usages[0].element, usages[0].architecture, usages, remarks)


class TestLog:
    def test_kernels_of_a_log(self):
        calls = Usage("calls", "float32", "sm_90", 40, spill_stores=8, spill_loads=4, stack=256)
        assert parse_log(LOG_SM_90, "float32") == [SPILLS, calls]
        assert parse_log(LOG_SM_75, "float32") == [CLEAN]
        assert parse_log("", "float32") == []

    def test_a_kernel_that_spills_and_calls(self):
        """Spills add up; the stack of the functions that it calls is in the kernel's cumulative size."""
        log = LOG_SM_90.replace(
            "256 bytes stack frame, 0 bytes spill stores, 0", "16 bytes stack frame, 2 bytes spill stores, 6"
        )
        log = log.replace("ptxas         .     0 bytes stack frame, 8", "ptxas         .     128 bytes stack frame, 8")
        assert parse_log(log, "float32")[1] == Usage(
            "calls", "float32", "sm_90", 40, spill_stores=10, spill_loads=10, stack=256
        )

    @pytest.mark.parametrize("gone", ["Compiling entry", "Used "])
    def test_a_log_with_a_line_missing_is_not_taken_for_clean(self, gone):
        log = "\n".join(line for line in LOG_SM_75.splitlines() if gone not in line)
        with pytest.raises(CompileError, match="cannot read the log of ptxas"):
            parse_log(log, "float32")

    def test_warnings(self):
        assert remarks(LOG_SM_90) == []
        assert remarks(LOG_SM_75) == [LOG_SM_75.splitlines()[0]]
        serialised = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        unused = 'add.cu(7): warning #177-D: variable "i" was declared but never referenced'
        hint = 'Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"'
        assert remarks(f"{serialised}\n{unused}\n  int i;\n{hint}\n") == [serialised, unused]

    @pytest.mark.parametrize(
        ("registers", "threads"), [(0, 1024), (32, 1024), (64, 1024), (65, 896), (128, 512), (129, 480), (255, 256)]
    )
    def test_the_largest_block_that_the_register_file_holds(self, registers, threads):
        assert max_threads(registers) == threads


class TestBudget:
    EXEMPTION = Exemption("spills", "float32", "sm_90", spill=3208, stack=896, reason="only an example")

    def test_nothing_is_accepted_but_what_it_names(self):
        (problem,) = Budget("13.5").check([compilation(CLEAN), compilation(SPILLS)])
        for part in ("spills, float32, sm_90", "1600 bytes of spill stores", "1608 of spill loads", "32 registers"):
            assert part in problem
        assert Budget("13.5", (self.EXEMPTION,)).check([compilation(CLEAN), compilation(SPILLS)]) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"spill": 3207}, "3207 bytes accepted"),
            ({"stack": 895}, "896 bytes of stack, 895 accepted"),
            ({"element": "float64"}, "0 bytes accepted"),
            ({"architecture": "sm_80"}, "0 bytes accepted"),
        ],
    )
    def test_one_byte_more_another_type_or_another_gpu_is_too_much(self, change, message):
        budget = Budget("13.5", (replace(self.EXEMPTION, **change),))
        assert message in budget.check([compilation(SPILLS)])[0]

    def test_a_stack_without_spills(self):
        (problem,) = Budget("13.5").check([compilation(replace(CLEAN, stack=128))])
        assert "sums, float32, sm_75: 128 bytes of stack, 0 accepted" in problem

    def test_a_warning(self):
        (problem,) = Budget("13.5").check([compilation(CLEAN, remarks=("ptxas warning : slow",))])
        assert problem == "written.cu, float32, sm_75: the compiler warns: ptxas warning : slow"

    def test_exemptions_that_nothing_needs(self):
        cured = replace(SPILLS, spill_stores=0, spill_loads=0, stack=0)
        (problem,) = Budget("13.5", (self.EXEMPTION,)).check([compilation(cured)])
        assert "spills, float32, sm_90: needs its exemption no longer" in problem
        (problem,) = Budget("13.5", (replace(self.EXEMPTION, kernel="gone"),)).check([compilation(cured)])
        assert "gone, float32, sm_90" in problem
        assert "no such kernel" in problem
        # Another architecture was compiled: nothing is known about this one.
        assert Budget("13.5", (self.EXEMPTION,)).check([compilation(CLEAN)]) == []

    def test_the_file(self, tmp_path):
        path = tmp_path / "budget.toml"
        entry = "".join(f"{name} = {value!r}\n" for name, value in vars(self.EXEMPTION).items())
        path.write_text(f"nvrtc = '13.5'\n[[exempt]]\n{entry}")
        assert read_budget(path) == Budget("13.5", (self.EXEMPTION,))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "nvrtc"),
            ("nvrtc = ", "cannot read the budget"),
            ("nvrtc = '13.5'\n[[exempt]]\nkernel = 'a'\n", "expected exactly the keys kernel, element, .* reason"),
            (
                "nvrtc = '13.5'\n[[exempt]]\nkernel = 'a'\nelement = 'float32'\narchitecture = 'sm_90'\n"
                "spill = '8'\nstack = 0\nreason = ''\n",
                "'spill': '8'.* is not understood",
            ),
        ],
    )
    def test_a_file_that_is_wrong(self, tmp_path, text, message):
        (tmp_path / "budget.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_budget(tmp_path / "budget.toml")

    def test_the_shipped_one_is_for_the_compiler_that_is_pinned(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (requirement,) = extras["nvrtc"]
        assert requirement.startswith(f"nvidia-cuda-nvrtc=={read_budget(SHIPPED).nvrtc}.")


class TestWhereNvrtcLies:
    @pytest.fixture
    def wheels(self, tmp_path, monkeypatch):
        """An environment with NVIDIA's wheels of CUDA 12 and 13, each in its own layout."""
        folder = tmp_path / "site-packages"
        for library in ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13"):
            path = folder / library
            path.parent.mkdir(parents=True)
            path.touch()
            path.with_name("libnvrtc-builtins.so.1").touch()
        found = type("Specification", (), {"submodule_search_locations": [str(folder / "nvidia")]})
        monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: found)
        monkeypatch.setattr(nvrtc, "_cupy_major", tuple)
        monkeypatch.setattr(nvrtc.sys, "prefix", str(tmp_path / "prefix"))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        return folder

    def names(self, folder):
        return [path.name for path in nvrtc._candidates() if path.is_relative_to(folder)]

    def test_both_layouts_the_newest_first(self, wheels):
        assert self.names(wheels) == ["libnvrtc.so.13", "libnvrtc.so.12"]

    def test_that_of_the_installed_cupy_first(self, wheels, monkeypatch):
        monkeypatch.setattr(nvrtc, "_cupy_major", lambda: (12,))
        assert self.names(wheels) == ["libnvrtc.so.12", "libnvrtc.so.13"]

    def test_a_toolkit_by_the_version_behind_its_links(self, wheels, tmp_path, monkeypatch):
        lib = tmp_path / "toolkit" / "lib64"
        lib.mkdir(parents=True)
        (lib / "libnvrtc.so.13.0.48").touch()
        (lib / "libnvrtc.so").symlink_to("libnvrtc.so.13.0.48")
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
        found = nvrtc._candidates()
        assert {path.parent for path in found[:2]} == {lib}
        assert [path.name for path in found[2:4]] == ["libnvrtc.so.13", "libnvrtc.so.12"]

    def test_the_major_version_of_cupy_by_the_name_of_its_package(self, tmp_path, monkeypatch):
        information = tmp_path / "cupy_cuda12x-14.0.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Name: cupy-cuda12x\nVersion: 14.0.0\n")
        monkeypatch.setattr(nvrtc.sys, "path", [str(tmp_path)])
        assert nvrtc._cupy_major() == (12,)


try:
    nvrtc.nvrtc_version()
    WITHOUT_NVRTC = ""
except CompileError as missing:
    WITHOUT_NVRTC = f"{missing}; the extra nvrtc is enough"
needs_nvrtc = pytest.mark.skipif(bool(WITHOUT_NVRTC), reason=WITHOUT_NVRTC or "it is there")

# 128 values that depend on each other, and 64 registers for each of 1024 threads.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(const storage_t* x, storage_t* y, int n) {
    storage_t t[128];
    #pragma unroll
    for (int i = 0; i < 128; i++) t[i] = x[i * n + threadIdx.x];
    for (int repeat = 0; repeat < n; repeat++)
    #pragma unroll
    for (int i = 0; i < 128; i++) t[i] = t[i] * t[(i + 1) % 128];
    #pragma unroll
    for (int i = 0; i < 128; i++) y[i * n + threadIdx.x] = t[i];
}
"""
STACKED = """
extern "C" __global__ void stacked(const storage_t* x, storage_t* y, int k) {
    storage_t t[32];
    for (int i = 0; i < 32; i++) t[i] = x[i];
    for (int i = 0; i < 32; i++) t[(i * k) & 31] += x[i];
    for (int i = 0; i < 32; i++) y[i] = t[i];
}
"""
# The spill is in a function that two kernels call.
CALLING = """
__device__ __noinline__ void work(const storage_t* x, storage_t* y, int n) { BODY }
extern "C" __global__ void __launch_bounds__(1024) first(const storage_t* x, storage_t* y, int n) { work(x, y, n); }
extern "C" __global__ void __launch_bounds__(1024) second(const storage_t* x, storage_t* y, int n) { work(y, y, n); }
""".replace("BODY", SPILLING[SPILLING.index("{") + 1 : SPILLING.rindex("}")])
WARNED = 'extern "C" __global__ void warned(storage_t* y, int n) { int unused; y[n] = 0; }\n'
CLEAN_KERNEL = 'extern "C" __global__ void clean(storage_t* y, int n) { y[n] = 0; }\n'


@needs_nvrtc
class TestCompiling:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "cache"))

    def problems(self, tmp_path, text):
        kernels = parse(tmp_path, INCLUDE + text)
        return Budget("").check(compile_all([kernels[0].source], ["sm_75", "sm_120"], ["float32"]))

    @pytest.mark.parametrize(
        ("text", "kernels", "found"),
        [
            (CLEAN_KERNEL, [], ""),
            (CLEAN_KERNEL + SPILLING, ["spilling"], r"[1-9]\d* bytes of spill stores and [1-9]\d* .* at 64 registers"),
            (CALLING, ["first", "second"], r"[1-9]\d* bytes of spill stores"),
            (STACKED, ["stacked"], "128 bytes"),
            (WARNED, ["written.cu"], '.*variable "unused" was declared but never referenced'),
        ],
        ids=["within the budget", "spill", "spill in a function", "stack", "warning"],
    )
    def test_what_is_too_much_is_caught(self, tmp_path, text, kernels, found):
        problems = self.problems(tmp_path, text)
        assert [problem.partition(": ")[0] for problem in problems] == [
            f"{kernel}, float32, {architecture}" for architecture in ("sm_75", "sm_120") for kernel in kernels
        ]
        assert all(re.match(found, problem.partition(": ")[2]) for problem in problems)

    def test_what_did_not_change_is_not_compiled_again(self, tmp_path, monkeypatch):
        source = parse(tmp_path, INCLUDE + SPILLING)[0].source
        compiled = []
        compile_cubin = resources.compile_cubin
        monkeypatch.setattr(resources, "compile_cubin", lambda *what: compiled.append(what) or compile_cubin(*what))
        steps = []
        first = compile_all([source], ["sm_90"], progress=lambda *step: steps.append(step))
        assert (len(compiled), steps) == (2, [(1, 2), (2, 2)])
        assert compile_all([source], ["sm_90"]) == first
        assert len(compiled) == 2
        changed = parse(tmp_path, INCLUDE + SPILLING.replace("128", "64"))[0].source
        assert compile_all([changed], ["sm_90"]) != first
        assert len(compiled) == 4

    def test_errors_name_source_and_architecture(self, tmp_path):
        source = parse(tmp_path, INCLUDE + CLEAN_KERNEL)[0].source
        with pytest.raises(CompileError, match=r"written\.cu does not compile for sm_1"):
            compile_all([source], ["sm_90", "sm_1"])
        broken = parse(tmp_path, INCLUDE + CLEAN_KERNEL.replace("y[n]", "z[n]"))[0].source
        with pytest.raises(CompileError, match=r"written\.cu\(2\): error: identifier \"z\" is undefined"):
            compile_all([broken], ["sm_90"])


@pytest.fixture(scope="module")
def usages():
    """Every kernel for every element type and architecture; about two minutes on two cores, or from the cache."""
    return {(u.kernel, u.element, u.architecture): u for c in compile_all() for u in c.usages}


@needs_nvrtc
class TestShippedKernels:
    def test_all_compile_within_the_budget_for_every_gpu(self, usages):
        assert set(usages) == {
            (name, element, architecture)
            for name, kernel in shipped_kernels().items()
            for element in kernel.source.elements
            for architecture in ARCHITECTURES
            if kernel.source.compiles_for(architecture)
        }
        assert all(8 <= usage.registers <= 255 for usage in usages.values())
        assert read_budget().check(compile_all()) == []

    @needs_compiler
    def test_every_launch_fits_into_every_gpu(self, usages):
        """A block takes registers times threads and static plus dynamic shared memory; too much is a failed launch."""
        device = DryDevice()
        for row in ROWS:
            for index, (case, element) in enumerate(itertools.product(row.cases(), row.elements)):
                op = row.plan(case, element)
                run_guarded(op, row.inputs(op, case, row.generator(0, index)), device)
        assert len(device.launches) > 100
        for launched in device.launches:
            kernel, types, block, shared = launched.kernel, launched.types, launched.block, launched.shared
            threads = block[0] * block[1] * block[2]
            for architecture in filter(kernel.source.compiles_for, ARCHITECTURES):
                usage = usages[kernel.name, types.name, architecture]
                assert threads <= max_threads(usage.registers), f"{kernel.name}: {threads} threads, {usage}"
                assert usage.shared <= 48 * 1024, f"{kernel.name}: {usage}"
                assert usage.shared + shared <= largest_shared(architecture), (
                    f"{kernel.name}: {shared} dynamic bytes, {usage}"
                )
