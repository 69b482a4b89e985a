"""`segnet run` and run_kernel: users' kernels of tests/kernels/user/ and shipped ones, right and wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, TESTS, kernels, raises
from support import kernel_references as references
from support.fake_cupy import FakeCupy
from support.kernels import FLOAT32, DryDevice, needs_compiler, needs_sanitizers, parse

from segnet_scratch.cli import options
from segnet_scratch.errors import CompileError, ConfigError, DeviceError, DTypeError, LaunchError, ShapeError
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.workbench import run_kernel
from segnet_scratch.lab.workbench.reference import deviation
from segnet_scratch.lab.workbench.setup import load_kernel, make_setup
from segnet_scratch.ops.cases import empty_outputs
from segnet_scratch.ops.op import Buffers
from segnet_scratch.runtime import host
from segnet_scratch.runtime.devices import CudaDevice
from segnet_scratch.runtime.geometry import DEFAULT_THREADS, declared_geometry, declared_threads
from segnet_scratch.runtime.host import sanitizer_runtime
from segnet_scratch.runtime.launch import shipped_kernels
from segnet_scratch.runtime.shared_memory import rewrite_shared

USER = TESTS / "kernels" / "user"
REFERENCES = TESTS / "support" / "kernel_references.py"
SUMS = {"shapes": {"x": 1000, "sums": 4}, "arguments": {"n": 1000}, "grid": 4, "orders": 3}
CONVOLUTION = {"n": 2, "h": 9, "w": 11, "c": 5, "oh": 9, "ow": 11, "o": 70, "kh": 3, "kw": 3, "pad_y": 1, "pad_x": 1}
VECTORS = {"shapes": {"a": 1000, "b": 1000, "c": 1000}, "arguments": {"n": 1000}}


def user(name, **settings):
    """Runs `file:kernel` of tests/kernels/user/."""
    file, _, kernel = name.partition(":")
    return run_kernel(f"{USER / file}.cu:{kernel}", **settings)


def failed(run):
    """{check: message} of the checks that failed."""
    return {check.name: check.message for check in run.checks if not check.passed}


def line_of(file, text):
    return kernels.line_of(f"user/{file}", text)


# ------------------------------------------------------------------------------------------------ users' kernels


@needs_compiler
class TestVectorAddition:
    def test_right(self):
        run = user("add:vector_add", **VECTORS, reference=references.add, orders=3)
        assert run.passed, failed(run)
        assert [check.name for check in run.checks] == [
            *("finished", "guard zones", "inputs", "outputs", "reads", "reference", "orders")
        ]
        np.testing.assert_array_equal(run.outputs["c"], run.arrays["a"] + run.arrays["b"])
        assert run.setup.grid == (4, 1, 1)
        assert run.setup.block == (256, 1, 1)
        assert run.seconds > 0

    def test_a_wrong_element_is_located(self):
        run = user("add:vector_add_wrong", **VECTORS, reference=references.add)
        assert list(failed(run)) == ["reference"]
        expected = run.arrays["a"][777] + run.arrays["b"][777]
        message = failed(run)["reference"]
        assert message.startswith("c: 1 of 1000 elements differ from the reference; worst c[777] = ")
        assert f"expected {expected} within 1e-05 |expected| + 1e-05" in message

    def test_unwritten_elements_are_counted(self):
        run = user("add:vector_add_short", **VECTORS)
        assert failed(run) == {"outputs": "c: 3 of 1000 elements were never written, the first is c[997]"}
        assert np.isnan(run.outputs["c"][997:]).all()

    def test_an_overrun_is_named(self):
        run = user("add:vector_add_overrun", **VECTORS)
        assert list(failed(run)) == ["guard zones"]
        assert "c: 1 element written past its end, the nearest is c[1000]" in failed(run)["guard zones"]

    def test_a_read_outside_is_noticed(self):
        run = user("add:vector_add_overread", **VECTORS)
        undetermined = "c: 1 of 1000 elements are not determined, the first is c[999]"
        assert failed(run) == {"reads": f"{undetermined}: an array is read outside its bounds"}

    @pytest.mark.parametrize("name", ["max_next", "min_next", "int_next", "shared_max", "shared_min"])
    def test_an_extreme_and_a_comparison_do_not_hide_what_was_read(self, name):
        """A maximum passes over NaN and small numbers, and a comparison gives 0 or 1, whatever number lies outside."""
        shapes = {"a": 1000, "c": 4 if "shared" in name else 1000}
        for seed in (0, 1, 2):
            run = user(f"silent:{name}", shapes=shapes, arguments={"n": 1000}, grid=4, block=256, seed=seed)
            found = failed(run)["reads"]
            assert "1 of" in found
            assert ("shared memory is read" if "shared" in name else "is read outside its bounds") in found

    def test_an_input_that_is_not_const(self, tmp_path):
        text = (USER / "add.cu").read_text()
        (tmp_path / "add.cu").write_text(text.replace("vector_add(const float* a", "vector_add(float* a"))
        run = run_kernel(f"{tmp_path}/add.cu:vector_add", **VECTORS)
        assert "a: no element was written; if it is an input, make it const" in failed(run)["outputs"]
        assert run_kernel(f"{tmp_path}/add.cu:vector_add", **VECTORS, inputs={"a": "random"}).passed

    def test_seeds(self):
        first, again, other = (user("add:vector_add", **VECTORS, seed=seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first.outputs["c"], again.outputs["c"])
        assert (first.arrays["a"] != other.arrays["a"]).any()
        assert (first.arrays["a"] != first.arrays["b"]).any()

    def test_contents(self):
        values = np.arange(1000, dtype=np.float32)
        run = user("add:vector_add", arguments={"n": 1000}, shapes={"c": 1000}, inputs={"a": values, "b": values})
        np.testing.assert_array_equal(run.outputs["c"], 2 * values)
        run = user("add:vector_add", **VECTORS, inputs={"a": 3, "b": 0.5})
        assert (run.outputs["c"] == 3.5).all()


@needs_compiler
class TestClassicBugs:
    """What every kernel gets wrong once, and what each kind of element, device and check makes of it."""

    @pytest.mark.parametrize("kernel", ["copy_unbounded", "bytes_unbounded"])
    @pytest.mark.parametrize("n", [1000, 255, 1])
    def test_a_missing_bounds_check(self, kernel, n):
        message = failed(user(f"classic:{kernel}", shapes={"a": n, "c": n}, arguments={"n": n}))["guard zones"]
        beyond = -n % 256
        # Of bytes one may be the same by chance.
        counts = range(beyond - 9 if "bytes" in kernel else beyond, beyond + 1)
        assert any(
            f"c: {k} element{'s' * (k > 1)} written past its end, the nearest is c[{n}" in message for k in counts
        ), message

    def test_a_missing_bounds_check_of_one_array(self):
        settings = {"shapes": {"c": 1000}, "arguments": {"n": 1000}, "inputs": {"c": "random"}}
        run = user("classic:shift_unbounded", **settings, block=256)
        assert "c: 24 elements written past its end" in failed(run)["guard zones"]
        assert "an array is read outside its bounds" in failed(run)["reads"]

    @pytest.mark.parametrize("kernel", ["mirror_racy", "mirror_racy_integers"])
    def test_a_missing_barrier(self, kernel):
        run = user(f"classic:{kernel}", shapes={"x": 512, "y": 512}, block=256)
        assert "y: 256 of 512 elements are not determined" in failed(run)["reads"]
        assert "a __syncthreads() is missing: --orders 6" in failed(run)["reads"]
        assert "names who disturbs whom" in failed(run)["orders"]

    def test_a_missing_barrier_that_ascending_order_hides(self):
        settings = {"shapes": {"x": 256, "y": 256}, "block": 256}
        assert list(failed(user("classic:neighbour_racy", **settings))) == ["orders"]
        (line,) = failed(user("classic:neighbour_racy", **settings)).values()
        assert line.startswith("race: y[1] is ")
        assert "--orders 6" in line
        message = failed(user("classic:neighbour_racy", **settings, orders=1))["orders"]
        assert "depends on the order of threads: of those in a block" in message

    @pytest.mark.parametrize("kernel", ["only_uninitialised", "uninitialised_flag"])
    def test_shared_memory_that_nobody_wrote(self, kernel):
        message = failed(user(f"classic:{kernel}", shapes={"y": 256}, block=256))["reads"]
        assert "256 of 256 elements are not determined, the first is y[0]: shared memory is read before" in message

    def test_a_nan_out_of_finite_inputs(self):
        settings = {"shapes": {"x": 32, "y": 32}, "block": 32}
        message = failed(user("classic:no_number", **settings))["reads"]
        assert "y: 1 of 32 elements are NaN, the first is y[7], and all inputs are finite" in message
        assert user("classic:no_number", **settings, inputs={"x": np.nan}).passed

        def expected(x):
            return np.where(np.arange(32) == 7, np.nan, x)

        assert user("classic:no_number", **settings, reference=expected).passed

    @needs_sanitizers
    def test_a_local_variable_without_a_value(self):
        settings = {"shapes": {"x": 8, "y": 4}, "arguments": {"n": 8}, "block": 4}
        message = failed(user("classic:sum_without_start", **settings, sanitize=True))["variables"]
        assert message.startswith("y: 4 of 4 elements depend on a local variable that is read before it has a value")


@needs_compiler
class TestForms:
    """Files as they are written elsewhere: what one kernel has must not stand in the way of another."""

    BLOCK = """
        extern "C" {
        struct Options { int a; };
        __global__ void of_cuda_types(const __half2* x, Options o, cudaTextureObject_t t) { x[0] = "}"; }
        // Launch: grid (n + 31) / 32, block 32
        __global__ void scale(const float* x, bool* positive, int32_t n, bool strict) {
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) positive[i] = strict ? x[i] > 0 : x[i] >= 0;  // the line of a report
        }
        }
    """

    def test_a_block_with_a_kernel_of_types_that_only_cuda_knows(self, tmp_path):
        (tmp_path / "block.cu").write_text(self.BLOCK)
        settings = {"shapes": {"x": 100, "positive": 100}, "arguments": {"n": 100, "strict": 1}}
        run = run_kernel(f"{tmp_path}/block.cu:scale", **settings, reference=lambda x: x > 0, orders=1)
        assert run.passed, failed(run)
        assert (run.setup.grid[0], run.setup.block[0]) == (4, 32)
        with pytest.raises(CompileError, match=r"block\.cu:4: .*'const __half2\* x' has type '__half2'"):
            run_kernel(f"{tmp_path}/block.cu:of_cuda_types", **settings)
        with pytest.raises(DTypeError, match=r"argument strict is 2 .*expected True or False"):
            run_kernel(f"{tmp_path}/block.cu:scale", **{**settings, "arguments": {"n": 100, "strict": 2}})


@needs_compiler
class TestRaces:
    def test_a_reduction_without_a_race(self):
        run = user("reduction:block_sums", **SUMS, reference=references.block_sums)
        assert run.passed, failed(run)

    def test_a_missing_barrier_is_named(self):
        run = user("reduction:block_sums_racy", **SUMS)
        assert list(failed(run)) == ["reads", "orders"]
        message, line = failed(run)["orders"], line_of("reduction.cu", "// racy")
        assert message.startswith(
            "race: the result depends on the order of threads: of those in a block, whatever the order of the blocks\n"
            "sums[0] is nan in ascending order, "
        )
        assert "in descending order; 4 of 4 elements of sums differ" in message
        assert "between the start of the kernel and the barrier in line " in message
        assert f"line {line} the threads disturb each other in shared array 'tile'" in message
        assert message.endswith("sums[0] is written by block (0, 0, 0) alone")

    def test_a_later_barrier(self, tmp_path):
        """The one inside the loop: the race is between two turns of it."""
        text = (USER / "reduction.cu").read_text().replace("__syncthreads();\n    }", "}", 1)
        (tmp_path / "sums.cu").write_text(text)
        with_loop = failed(run_kernel(f"{tmp_path}/sums.cu:block_sums", **SUMS))["orders"]
        assert "between the barrier in line 7 and its end the threads disturb each other in shared array" in with_loop

    def test_blocks_that_write_one_element(self):
        run = user("races:last_block_wins", shapes={"y": 64}, arguments={"n": 64}, grid=5, block=32, orders=1)
        assert failed(run)["orders"].split("\n") == [
            "race: the result depends on the order of threads: of the blocks, whatever the order inside them",
            "y[0] is 4 in ascending order, 0 in descending order; 64 of 64 elements of y differ",
            "y[0] is written by thread (0, 0, 0) of block (0, 0, 0) and by thread (0, 0, 0) of block (2, 0, 0)",
        ]

    def test_threads_that_add_without_atomics(self):
        """Every order gives the same sum here, and yet it is a race."""
        settings = {"shapes": {"x": 1000, "total": 1}, "arguments": {"n": 1000}, "inputs": {"total": 0}}
        run = user("races:total_racy", **settings, grid=4, orders=2)
        assert run.outputs["total"][0] == run.arrays["x"].sum() + 1000
        assert failed(run)["orders"].split("\n") == [
            "race: several threads write total[0], and no atomic operation keeps them apart",
            "total[0] is written by thread (0, 0, 0) of block (0, 0, 0) and by thread (1, 0, 0) of block (0, 0, 0)",
        ]

    def test_blocks_that_add_without_atomics(self):
        settings = {"shapes": {"x": 8, "total": 1}, "inputs": {"total": 0}, "grid": 8, "block": 32, "orders": 2}
        message = failed(user("races:first_of_block_racy", **settings))["orders"]
        assert "several threads write total[0]" in message
        assert message.endswith("total[0] is written by block (0, 0, 0) and by block (1, 0, 0)")

    def test_atomics_are_no_race(self):
        settings = {"shapes": {"x": 1000, "counts": 4}, "arguments": {"n": 1000}, "inputs": {"counts": 0}}
        run = user("atomics:histogram", **settings, grid=4, orders=3)
        assert run.passed, failed(run)
        np.testing.assert_array_equal(run.outputs["counts"], np.bincount(run.arrays["x"]))
        run = user("atomics:all_atomics", shapes={"y": 9}, arguments={"n": 1000}, inputs={"y": 0}, grid=4, orders=3)
        assert run.passed, failed(run)
        np.testing.assert_array_equal(run.outputs["y"], [1000, -1000, -999, 999, 1023, 0, 0, 7, 2000])

    def test_a_fault_in_another_order(self, tmp_path):
        (tmp_path / "order.cu").write_text(
            """
            extern "C" __global__ void first_turns(int* y) {
                __shared__ int first;
                if (atomicCAS(y, -1, (int)threadIdx.x) == -1) first = threadIdx.x;
                __syncthreads();
                if (first == 0 || threadIdx.x > 3) __syncthreads();
            }
            """
        )
        run = run_kernel(f"{tmp_path}/order.cu", shapes={"y": 1}, inputs={"y": -1}, block=8, orders=0)
        assert "in descending order of threads and blocks: " in failed(run)["orders"]
        assert "divergent barrier" in failed(run)["orders"]


@needs_compiler
class TestSharedMemory:
    @pytest.mark.parametrize("kernel", ["reverse_outside", "reverse_inside"])
    def test_dynamic(self, kernel):
        settings = {"shapes": {"x": 100, "y": 100}, "arguments": {"n": 100}, "block": 100}
        run = user(f"shared:{kernel}", **settings, shared=400, reference=lambda x: x[::-1], orders=2)
        assert run.passed, failed(run)
        run = user(f"shared:{kernel}", **settings)
        assert "(0 bytes); dynamic shared memory gets its size from --shared" in failed(run)["finished"]

    def test_several_arrays_of_two_dimensions(self):
        settings = {"shapes": {"x": (50, 50)}, "block": (16, 16), "grid": (4, 4)}
        run = user("shared:transpose", **settings, reference=lambda x: x.T, orders=2)
        assert run.passed, failed(run)
        assert run.setup.scalars == {"n": 50}

    def test_an_overrun_is_named(self):
        run = user("shared:shared_overrun", shapes={"x": 256, "y": 256})
        assert "wrote past the end of shared array 'tile' (1020 bytes)" in failed(run)["finished"]

    @pytest.mark.parametrize(
        ("declaration", "expected"),
        [
            ("__shared__ int n;", "typedef int n_element; SHARED_ARRAY(n_element, n, );"),
            ("__shared__ int n[4] , m [2][ N + 1 ];", "SHARED_ARRAY(m_element, m, [2][ N + 1 ]);"),
            ("__shared__ P<int, bool> p[2];", "typedef P<int, bool> p_element; SHARED_ARRAY(p_element, p, [2]);"),
            ("__shared__ float* p[2];", "typedef float* p_element; SHARED_ARRAY(p_element, p, [2]);"),
            ("static __shared__ alignas(16) float f[8];", "typedef float f_element; SHARED_ARRAY(f_element, f, [8]);"),
            ("volatile __shared__ float f[8];", "volatile typedef float f_element; SHARED_ARRAY(f_element, f, [8]);"),
            ("extern __shared__ float4 f[];", "typedef float4 f_element; SHARED_DYNAMIC(f_element, f);"),
            ("__shared__ struct { int x; } s;", "__shared__ struct { int x; } s;"),
            ("// __shared__ int n;", "// __shared__ int n;"),
        ],
    )
    def test_rewriting(self, declaration, expected):
        assert expected in rewrite_shared(f"void f() {{\n{declaration}\n}}")
        assert rewrite_shared(f"{declaration}\n\n").count("\n") == 2

    def test_scopes(self):
        declaration = "extern __shared__ float s[];"
        for before, inside in (
            ("", False),
            ("namespace a { void g() {} ", False),
            ('extern "C" {', False),
            ("void f() { if (1) {} ", True),
            ("namespace a { } void f() { ", True),
            ("/* { */ ", False),
        ):
            assert ("SHARED_DYNAMIC(" in rewrite_shared(before + declaration)) == inside, before


@needs_compiler
class TestFaults:
    def test_a_divergent_barrier(self):
        run = user("faults:divergent", shapes={"x": 32, "y": 32}, arguments={"n": 32}, block=32, orders=2)
        assert list(failed(run)) == ["finished"]
        line, message = line_of("faults.cu", "// divergent"), failed(run)["finished"]
        assert f"divergent barrier: thread (0, 0, 0) waits at line {line}, thread (16, 0, 0) has returned" in message

    def test_a_kernel_that_crashes_does_not_take_this_process_along(self):
        run = user("faults:wild", shapes={"y": 32}, arguments={"n": 32})
        assert "the kernel ended its process with SIGSEGV; it reads or writes far outside" in failed(run)["finished"]

    def test_a_changed_input(self):
        run = user("faults:changes_input", shapes={"x": 32, "y": 32}, block=32)
        assert failed(run) == {"inputs": "changed: x"}

    def test_an_output_that_is_read_first(self, tmp_path):
        (tmp_path / "axpy.cu").write_text(
            'extern "C" __global__ void axpy(const float* x, double* y, float a) '
            "{ y[threadIdx.x] += a * x[threadIdx.x]; }"
        )
        settings = {"shapes": {"x": 8, "y": 8}, "arguments": {"a": 2}, "block": 8}
        message = failed(run_kernel(tmp_path / "axpy.cu", **settings))["reads"]
        assert "an output is read before it is written (if that is meant, give it contents: --input y=r" in message
        run = run_kernel(tmp_path / "axpy.cu", **settings, inputs={"y": 1}, reference=lambda x, y, a: y + a * x)
        assert run.passed, failed(run)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_kernel_that_never_ends_can_be_interrupted(self):
        kernel = f"{USER / 'faults.cu'}:never_ends"
        host.build(load_kernel(kernel).source, FLOAT32)
        process = subprocess.Popen(
            [sys.executable, "-m", "segnet_scratch", "run", kernel, "--shape", "y=1", "--block", "1"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().strip()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
        end = time.monotonic() + 60  # a child of before the kernel ends by itself, a moment later
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < end
            time.sleep(0.05)


@needs_sanitizers
class TestSanitizers:
    def test_a_write_past_an_array(self):
        run = user("add:vector_add_overrun", **VECTORS, sanitize=True)
        line = line_of("add.cu", "// overrun")
        assert failed(run)["sanitizers"].split("\n") == [
            f"add.cu:{line}: vector_add_overrun: block (3, 0, 0), thread (231, 0, 0) writes 4 bytes past the end of c, "
            "at c[1000] of 1000 elements",
            "    if (i == n - 1) c[i + 1] = 0;  // overrun",
        ]
        assert "guard zones" in failed(run)

    def test_a_read_past_an_array(self):
        run = user("add:vector_add_overread", **VECTORS, sanitize=True)
        line = line_of("add.cu", "// overread")
        assert failed(run)["sanitizers"].startswith(f"add.cu:{line}: vector_add_overread: block (3, 0, 0), thread")
        assert "reads 4 bytes past the end of a, at a[1000] of 1000" in failed(run)["sanitizers"]

    def test_shared_memory(self):
        run = user("shared:shared_overrun", shapes={"x": 256, "y": 256}, sanitize=True)
        line = line_of("shared.cu", "// shared overrun")
        message = failed(run)["sanitizers"]
        assert f"shared.cu:{line}: shared_overrun: undefined behaviour: index 255 out of bounds" in message
        assert f"shared.cu:{line}: shared_overrun: block (0, 0, 0), thread (255, 0, 0) writes 4 bytes" in message

    def test_undefined_behaviour(self):
        run = user("faults:undefined", shapes={"y": 32}, arguments={"shift": 40}, block=32, sanitize=True)
        expected = f"{line_of('faults.cu', '// undefined')}: undefined: undefined behaviour: shift exponent 40 is too"
        assert failed(run)["sanitizers"].startswith(f"faults.cu:{expected} large")

    def test_a_crash(self):
        run = user("faults:wild", shapes={"y": 32}, arguments={"n": 32}, sanitize=True)
        line = line_of("faults.cu", "// wild")
        assert failed(run)["sanitizers"].startswith(f"faults.cu:{line}: wild: block (0, 0, 0)")

    def test_fibers_cause_no_false_alarm(self):
        """Fibers end in the middle of a function; what their frames leave behind must not be held against the next."""
        settings = {"shapes": {"x": 5000, "sums": 20}, "arguments": {"n": 5000}, "grid": 20}
        run = user("reduction:block_sums", **settings, sanitize=True)
        assert run.passed, failed(run)
        assert run.checks[0].name == "sanitizers"

    def test_a_compiler_without_sanitizers(self, tmp_path, monkeypatch):
        compiler = tmp_path / "c++"
        compiler.write_text('#!/bin/sh\ncase "$1" in -print*) echo libasan.so;; *) exec c++ "$@";; esac\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.raises(CompileError, match="brings no AddressSanitizer; install its runtime library"):
            user("add:vector_add", **VECTORS, sanitize=True)

    def test_a_linker_script_in_place_of_the_library(self, tmp_path, monkeypatch):
        (tmp_path / "libasan.so").write_text("/* GNU ld script */\nINPUT ( /usr/lib64/libasan.so.8.0.0 )\n")
        compiler = tmp_path / "c++"
        compiler.write_text(f"#!/bin/sh\necho {tmp_path}/libasan.so\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert str(sanitizer_runtime()) == "/usr/lib64/libasan.so.8.0.0"


# ------------------------------------------------------------------------------------------------ shipped kernels


@needs_compiler
class TestShippedKernels:
    def test_convolution(self):
        """More rows and columns than one tile: the grid comes from the comment above the kernel."""
        run = run_kernel("conv2d_forward_tiled", arguments=CONVOLUTION, reference=references.convolution, orders=1)
        assert run.passed, failed(run)
        assert (run.setup.grid, run.setup.block) == ((2, 2, 1), (128, 1, 1))

    def test_a_null_pointer(self):
        settings = {"arguments": CONVOLUTION, "inputs": {"bias": None}, "reference": references.convolution}
        run = run_kernel("conv2d_forward_tiled", **settings)
        assert run.passed, failed(run)
        assert run.arrays["bias"] is None

    def test_a_kernel_that_cannot_run_alone(self):
        numbers = {"parameters": 1, "chunks": 1, "chunk_size": 4, "momentum": 0.9}
        with raises(LaunchError, "sgd_step is launched by its op only, because `addresses` holds pointers"):
            run_kernel("sgd_step", arguments=numbers)


def test_declared_geometry_is_what_the_ops_launch():
    """Comments above kernels and code in ops/ say the same, for every case of the op table."""
    declared = set()
    for row in ROWS:
        for index, case in enumerate(row.cases()):
            recorder, op = DryDevice(), row.plan(case, row.elements[0])
            inputs = row.inputs(op, case, row.generator(0, index))
            workspace = {name: np.empty(s.shape, s.dtype) for name, s in op.workspace.items()}
            op.run(recorder, Buffers(**inputs, **empty_outputs(op), **workspace))
            for launched in recorder.launches:
                kernel, grid, block = launched.kernel, launched.grid, launched.block
                if launched.shared or any(p.name == "addresses" for p in kernel.parameters):
                    with pytest.raises(LaunchError, match="it cannot run alone"):
                        declared_geometry(kernel, {})
                    continue
                numbers = zip(kernel.parameters, launched.arguments, strict=True)
                integers = {p.name: int(v) for p, v in numbers if not p.pointer and v.dtype.kind in "iu"}
                geometry = declared_geometry(kernel, integers)
                if geometry is None:
                    assert block[0] <= declared_threads(kernel) == DEFAULT_THREADS
                    assert block[1:] == (1, 1)
                    continue
                declared.add(kernel.name)
                padded = tuple(size + (1,) * (3 - len(size)) for size in geometry)
                assert padded == (grid, block), (kernel.name, case)
    assert len(declared) >= 20
    comments = {name: k.source.text.split("\n")[k.line - 2] for name, k in shipped_kernels().items()}
    assert declared == {name for name, comment in comments.items() if "Launch: grid" in comment}


class TestGeometry:
    @pytest.mark.parametrize(
        ("head", "threads"),
        [
            ("void k(", 256),
            ("void __launch_bounds__(96) k(", 96),
            ("__launch_bounds__(192, 2) void k(", 192),
            ("void __launch_bounds__(ROWS * COLUMNS) k(", 32),
        ],
    )
    def test_threads(self, tmp_path, head, threads):
        text = '#define ROWS 4\nconstexpr int COLUMNS = 8;\nextern "C" __global__ '
        (kernel,) = parse(tmp_path, f"{text}{head}float* y) {{}}")
        assert declared_threads(kernel) == threads

    def test_a_comment_that_cannot_be_understood(self, tmp_path):
        (kernel,) = parse(tmp_path, '// Launch: 3 blocks\nextern "C" __global__ void k(float* y) {}')
        with pytest.raises(CompileError, match=r"written.cu:2: expected 'Launch: grid \(...\), block \(...\)'"):
            declared_geometry(kernel, {})
        (kernel,) = parse(tmp_path, '// Launch: grid (m), block 3\nextern "C" __global__ void k(float* y) {}')
        with pytest.raises(LaunchError, match="name 'm' is not defined"):
            declared_geometry(kernel, {})

    def test_a_comment_of_another_kernel_does_not_count(self, tmp_path):
        kernels = [f'extern "C" __global__ void {name}(float* y) {{}}' for name in "kj"]
        first, second = parse(tmp_path, "\n".join(["// Launch: grid 1, block 3", *kernels]))
        assert declared_geometry(first, {}) == ((1,), (3,))
        assert declared_geometry(second, {}) is None


# ------------------------------------------------------------------------------------------------ wrong usage


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            (
                {"shapes": {}, "arguments": {}},
                ConfigError,
                "vector_add: missing: the shape of a, the shape of b, the shape of c, int n; for example "
                "--shape a=1000 --shape b=1000 --shape c=1000 --arg n=1000 "
                "(in Python shapes={'a': 1000, 'b': 1000, 'c': 1000}, arguments={'n': 1000}); "
                "the kernel is vector_add(float* a, float* b, float* c, int n)",
            ),
            ({"arguments": {}}, ConfigError, "vector_add: missing: int n; for example --arg n=1000 (in Python"),
            ({"shapes": {"d": 3}}, ConfigError, "vector_add has no array 'd'; it has a, b, c"),
            ({"inputs": {"n": 3}}, ConfigError, "vector_add has no array 'n'"),
            ({"arguments": {"m": 3}}, ConfigError, "vector_add has no scalar parameter 'm'; it has n"),
            ({"arguments": {"n": 2.5}}, DTypeError, "argument n is 2.5 (float); expected an integer"),
            ({"inputs": {"a": "noise"}}, ConfigError, "expected an array, a number or 'random', got 'noise'"),
            ({"inputs": {"a": np.zeros(1000)}}, DTypeError, "a is float32, the given array float64"),
            ({"inputs": {"a": np.zeros(9, "f4")}}, ShapeError, "a has shape (1000,), the given array (9,)"),
            ({"inputs": {"a": None}}, LaunchError, "argument a is None"),
            ({"shapes": {"a": 0, "b": 1, "c": 1}}, ShapeError, "a would have shape (0,)"),
            ({"block": (16, 16)}, ConfigError, "does not say what grid covers the output"),
            ({"block": 2048}, LaunchError, "block.x is 2048, the limit is 1024"),
            ({"orders": -1}, ConfigError, "orders is -1"),
            ({"device": "numpy"}, ConfigError, "the numpy device runs no kernels; use host or cuda"),
            ({"device": "gpu"}, DeviceError, "there is no device 'gpu'"),
            ({"dtype": np.float16}, DTypeError, "float16"),
            ({"reference": "add.py"}, ConfigError, "expected file.py:function"),
            ({"reference": "nowhere.py:add"}, ConfigError, "there is no file"),
            ({"reference": f"{REFERENCES}:subtract"}, ConfigError, "has no function subtract; it has add, "),
            ({"reference": f"{REFERENCES}:NUMBER"}, ConfigError, "has no function NUMBER"),
            ({"reference": references.wrong_shape}, ShapeError, "c has shape (999,), the kernel's has (1000,)"),
            ({"reference": references.asks_for_more}, ConfigError, "it asks for d; vector_add has a, b, n to offer"),
            ({"reference": references.breaks}, ConfigError, "IndexError: a mistake of its own"),
            ({"reference": lambda a: (a, a)}, ConfigError, "it returned 2 arrays, the kernel writes 1: c"),
            ({"reference": lambda a: {"d": a}}, ConfigError, "it returned 'd', which the kernel does not write"),
        ],
    )
    @needs_compiler
    def test_run_kernel(self, settings, error, message):
        with raises(error, message):
            user("add:vector_add", **VECTORS | settings)

    def test_a_file_of_several_kernels(self):
        with pytest.raises(ConfigError, match=r"defines 5 kernels; choose one: .*add.cu:vector_add, "):
            load_kernel(USER / "add.cu")
        with pytest.raises(ConfigError, match=r"defines no kernel 'subtract'; it defines vector_add, "):
            load_kernel(f"{USER / 'add.cu'}:subtract")

    def test_a_file_without_kernels(self, tmp_path):
        (tmp_path / "plain.cu").write_text("__global__ void add(float* a) {}")
        with pytest.raises(CompileError, match=r'defines no kernel.* extern "C" in front of .* of \w+ \(line 1\)'):
            load_kernel(tmp_path / "plain.cu")
        with pytest.raises(CompileError, match="cannot read the kernel source"):
            load_kernel(tmp_path / "nowhere.cu")
        with pytest.raises(LaunchError, match="there is no kernel 'reluforward'"):
            load_kernel("reluforward")

    def test_shapes_that_contradict(self):
        kernel = load_kernel("max_pool_forward")
        shapes = {"x": (2, 9, 7, 5)}
        with pytest.raises(ConfigError, match=r"x with shape \(2, 9, 7, 5\) makes h = 9, but it is 8 already"):
            make_setup(kernel, FLOAT32, shapes, {"h": 8}, {}, None, None, 0, 0)
        flat = make_setup(load_kernel("relu_forward"), FLOAT32, {"x": (3, 4)}, {}, {}, None, None, 0, 0)
        assert flat.scalars == {"count": 12}

    @needs_compiler
    def test_names_that_only_cuda_knows(self, tmp_path):
        (tmp_path / "a.cu").write_text('extern "C" __global__ void k(float* y) { y[0] = __popc(7); }')
        with pytest.raises(CompileError, match=r"If CUDA knows __popc: .*host_runtime\.h does not"):
            run_kernel(tmp_path / "a.cu", shapes={"y": 2})
        (tmp_path / "b.cu").write_text('extern "C" __global__ void k(storage_t* y) { y[0] = 1; }')
        with pytest.raises(CompileError, match=r'come with #include "common/types.cuh"'):
            run_kernel(tmp_path / "b.cu", shapes={"y": 2})

    def test_options(self, tmp_path):
        assert options.by_name("--shape", ["x=2,45", "y=16x16"], options.shape) == {"x": (2, 45), "y": (16, 16)}
        assert options.by_name("--arg", ["n=3", "p=0.5"], options.number) == {"n": 3, "p": 0.5}
        found = options.by_name("--input", ["a=random", "b=null", "c=0"], options.contents)
        assert found == {"a": "random", "b": None, "c": 0}
        np.save(tmp_path / "x.npy", np.arange(3))
        np.testing.assert_array_equal(options.contents("--input", f"{tmp_path}/x.npy"), [0, 1, 2])
        np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
        for convert, text in (
            (options.shape, "2,-1"),
            (options.shape, "two"),
            (options.number, "two"),
            (options.contents, "two"),
            (options.contents, f"{tmp_path}/nowhere.npy"),
            (options.contents, f"{tmp_path}/objects.npy"),
        ):
            with pytest.raises(ConfigError):
                convert("--option", text)
        for texts in (["x"], ["=3"], ["x=1", "x=2"]):
            with pytest.raises(ConfigError):
                options.by_name("--shape", texts, options.shape)


class TestComparison:
    """`deviation` decides, so it is tried with what fools comparisons."""

    @pytest.mark.parametrize(
        ("got", "expected", "right"),
        [
            ([1.0, 2.0], [1.0, 2.0], True),
            ([1.0, 2.001], [1.0, 2.0], False),
            ([1.0, np.nan], [1.0, 2.0], False),
            ([1.0, 2.0], [1.0, np.nan], False),
            ([1.0, np.nan], [1.0, np.nan], True),
            ([1.0, np.inf], [1.0, np.inf], True),
            ([1.0, np.inf], [1.0, -np.inf], False),
            ([1.0, np.inf], [1.0, 2.0], False),
            ([1.0, 2.0], [1.0, np.inf], False),
        ],
    )
    def test_floats(self, got, expected, right):
        passed, message = deviation("y", np.array(got, np.float32), np.array(expected), 1e-4, 0)
        assert passed == right
        assert right or "worst y[1] = " in message

    def test_integers(self):
        got = np.array([[1, 2], [3, 4]], np.uint8)
        assert deviation("y", got, got.astype(np.int64), 1, 1)[0]
        passed, message = deviation("y", got, np.array([[1, 2], [260, 4]]), 1, 1000)
        assert not passed
        assert message == "y: 1 of 4 elements differ from the reference; worst y[1, 0] = 3, expected 260 exactly"

    def test_the_worst_is_named(self):
        message = deviation("y", np.array([1.1, 5.0, 3.2]), np.array([1.0, 2.0, 3.0]), 0, 0.01)[1]
        assert message.startswith("y: 3 of 3 elements differ from the reference; worst y[1] = 5.0, expected 2.0")


# ------------------------------------------------------------------------------------------------ command line


@needs_compiler
class TestCommand:
    ADD = ("--shape", "a=1000", "--shape", "b=1000", "--shape", "c=1000", "--arg", "n=1000")

    def test_right(self, segnet, tmp_path):
        done = segnet(
            *("run", f"{USER / 'add.cu'}:vector_add", *self.ADD, "--reference", f"{REFERENCES}:add", "--orders", "2"),
            *("--json", tmp_path / "result.json", "--output", tmp_path / "arrays"),
        )
        assert (done.code, done.err) == (0, "")
        assert "vector_add (add.cu:3) on host, float32: grid 4, block 256" in done.out
        assert "it says nothing about a GPU" in done.out
        assert "ok     reference: c equals the reference within 1e-05 |expected| + 1e-05; largest error 0" in done.out
        assert "FAILED" not in done.out
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["passed"]
        assert result["grid"] == [4, 1, 1]
        assert [a["role"] for a in result["arrays"]] == ["input", "input", "output"]
        arrays = {name: np.load(tmp_path / "arrays" / f"{name}.npy") for name in "abc"}
        np.testing.assert_array_equal(arrays["c"], arrays["a"] + arrays["b"])
        assert result["arrays"][2]["max"] == arrays["c"].max()

    def test_a_failed_check(self, segnet, tmp_path):
        kernel = f"{USER / 'add.cu'}:vector_add_short"
        done = segnet("run", kernel, *self.ADD, "--json", tmp_path / "result.json")
        assert done.code == 1
        assert "FAILED outputs: c: 3 of 1000 elements were never written, the first is c[997]" in done.out
        result = json.loads((tmp_path / "result.json").read_text())
        assert not result["passed"]
        assert [c["name"] for c in result["checks"] if not c["passed"]] == ["outputs"]
        assert result["arrays"][2]["nan"] == 3

    def test_outputs_without_a_number(self, segnet, tmp_path):
        kernel = ("run", f"{USER / 'add.cu'}:vector_add", *self.ADD, "--input", "a=nan", "--json", tmp_path / "r.json")
        assert segnet(*kernel, "--reference", f"{REFERENCES}:all_nan").code == 0
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["arrays"][2]["min"], result["arrays"][2]["nan"]) == (None, 1000)

    def test_tolerances(self, segnet):
        wrong = ("run", f"{USER / 'add.cu'}:vector_add_wrong", *self.ADD, "--reference", f"{REFERENCES}:add")
        assert segnet(*wrong, "--atol", "10").code == 0
        assert segnet(*wrong, "--atol", "0.0001").code == 1

    def test_wrong_usage(self, segnet):
        for arguments, code, message in (
            ([f"{USER / 'add.cu'}:vector_add"], 2, "missing: the shape of a"),
            (["relu_forward", "--arg", "count"], 2, "--arg count: expected NAME=VALUE"),
            (["nothing"], 1, "there is no kernel 'nothing'"),
        ):
            done = segnet("run", *arguments)
            assert done.code == code
            assert message in done.err


@needs_compiler
class TestCuda:
    def test_the_same_on_a_gpu(self, monkeypatch, tmp_path):
        """Against the stand-in for CuPy: arrays travel there and back, guard zones included."""
        cupy = FakeCupy().install(monkeypatch, tmp_path)
        device = CudaDevice()
        run = run_kernel("conv2d_forward_tiled", arguments=CONVOLUTION, device=device, reference=references.convolution)
        assert run.passed, failed(run)
        assert run.device == "cuda"
        assert [launched.name for launched in cupy.launches] == ["conv2d_forward_tiled"] * 3
        run = user("add:vector_add_overrun", **VECTORS, device=device)
        assert list(failed(run)) == ["guard zones"]
        with pytest.raises(ConfigError, match="orders and sanitizers work on the host device, not on cuda"):
            user("add:vector_add", **VECTORS, device=device, orders=1)

    def test_a_gpu_that_stops(self, monkeypatch, tmp_path):
        cupy = FakeCupy(dry=True).install(monkeypatch, tmp_path)
        device = CudaDevice()

        def fail(clock):
            if cupy.launches:
                raise RuntimeError("cudaErrorIllegalAddress")

        monkeypatch.setattr(cupy.timeline, "host_learns", fail)
        run = user("add:vector_add", **VECTORS, device=device)
        message = failed(run)["finished"]
        assert "the GPU stopped: RuntimeError: cudaErrorIllegalAddress; --device host --sanitize" in message
