"""The host device: how launches are carried out on the CPU, what faults are noticed, how kernels are compiled."""

import os
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import ROOT, raises
from support.kernels import FILL, FLOAT32, FLOAT64, INCLUDE, filled, line_of, needs_compiler, parse, python, run

from segnet_scratch.errors import CompileError, ConfigError, KernelFault
from segnet_scratch.runtime import devices as device_module
from segnet_scratch.runtime import host
from segnet_scratch.runtime.cache import cache_directory
from segnet_scratch.runtime.devices import HostDevice, get_device
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import launch
from segnet_scratch.runtime.source import cuda_directory, shipped_sources

needs_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")

GEOMETRIES = [
    ((1,), (1,)),
    ((5,), (7,)),
    ((3, 4), (5, 2)),
    ((2, 3, 4), (3, 2, 5)),
    ((1, 1, 6), (1, 1, 64)),
    ((2, 1, 3), (1, 33, 2)),
    ((2,), (1024,)),
    ((1, 2), (32, 32)),
    ((2, 2), (4, 4, 64)),
]


@needs_compiler
class TestGeometry:
    @pytest.mark.parametrize("workers", [1, 2, 5])
    @pytest.mark.parametrize("kernel", ["indices_flat", "indices_fibers"])
    @pytest.mark.parametrize("order", host.ORDERS)
    def test_every_thread_runs_once_with_its_own_indices(self, kernel, order, workers):
        for grid, block in GEOMETRIES:
            full_grid, full_block = grid + (1,) * (3 - len(grid)), block + (1,) * (3 - len(block))
            blocks, threads = int(np.prod(grid)), int(np.prod(block))
            out = np.zeros((blocks, threads, 12), np.int32)
            run(kernel, out, blocks, threads, grid=grid, block=block, order=order, seed=3, workers=workers)
            z, y, x = np.unravel_index(np.arange(blocks), full_grid[::-1])
            expected = np.empty_like(out)
            expected[:, :, 0:3] = np.stack([x, y, z], axis=-1)[:, None]
            z, y, x = np.unravel_index(np.arange(threads), full_block[::-1])
            expected[:, :, 3:6] = np.stack([x, y, z], axis=-1)[None]
            expected[:, :, 6:9], expected[:, :, 9:12] = full_grid, full_block
            np.testing.assert_array_equal(out, expected, f"{grid} {block}")

    @pytest.mark.parametrize("block", [1024, (32, 32), (16, 1, 64), (4, 8, 32)])
    @pytest.mark.parametrize("types", [FLOAT32, FLOAT64], ids=["float32", "float64"])
    def test_blocks_of_1024_threads_with_dynamic_shared_memory(self, block, types):
        x = np.random.default_rng(0).random((6, 1024)).astype(types.storage)
        y = np.empty_like(x)
        shared = 1024 * types.storage.itemsize
        run("reverse_dynamic", x, y, 6, 1024, grid=6, block=block, shared=shared, types=types, workers=3)
        np.testing.assert_array_equal(y, x[:, ::-1])

    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_integer_atomics_lose_nothing(self, workers):
        counts = np.zeros(3, np.uint64)
        run("count_in_bins", counts, 3, grid=8192, block=1024, workers=workers)  # long enough for workers to collide
        np.testing.assert_array_equal(counts, np.bincount(np.arange(8192 * 1024) % 3))

    def test_every_type_of_scalar_arrives(self):
        values = (-7, 200, -30000, -(2**31), 2**32 - 1, -(2**53), 0.1, 0.1)
        expected = np.array(values)
        expected[6] = np.float32(0.1)
        out = np.empty(8)
        run("scalars", out, None, *values)
        np.testing.assert_array_equal(out, expected)
        run("scalars", out, np.full(1, 2, np.float64), *values, types=FLOAT64)
        assert out[7] == 2.1

    def test_float_atomics_do_not_compile(self, tmp_path):
        (kernel,) = parse(tmp_path, INCLUDE + 'extern "C" __global__ void f(float* x) {\n    atomicAdd(x, 1.0f);\n}')
        with pytest.raises(CompileError, match=r"atomicAdd on floating-point numbers is not deterministic"):
            launch(HostDevice(), kernel, 1, 1, (np.zeros(1, np.float32),), FLOAT32)


@needs_compiler
class TestOrders:
    def tickets(self, threads: int, grid: int = 1, **options: Any) -> np.ndarray:
        numbers = np.full((2, threads), -1, np.int32)
        run("tickets", np.zeros(1, np.int32), numbers, threads, grid=grid, block=threads // grid, workers=1, **options)
        return numbers

    def test_threads_run_in_the_order_asked_for(self):
        np.testing.assert_array_equal(self.tickets(8), np.arange(16).reshape(2, 8))
        np.testing.assert_array_equal(self.tickets(8, order="descending"), [range(7, -1, -1), range(15, 7, -1)])

    def test_blocks_run_in_the_order_asked_for(self):
        np.testing.assert_array_equal(self.tickets(4, grid=4)[0], [0, 2, 4, 6])
        np.testing.assert_array_equal(self.tickets(4, grid=4, order="descending")[0], [6, 4, 2, 0])
        shuffled = {tuple(self.tickets(4, grid=4, order="shuffled", seed=seed)[0]) for seed in range(8)}
        assert len(shuffled) > 2
        assert all(sorted(numbers) == [0, 2, 4, 6] for numbers in shuffled)

    def test_shuffles(self):
        first = self.tickets(64, order="shuffled", seed=1)
        np.testing.assert_array_equal(first, self.tickets(64, order="shuffled", seed=1))
        np.testing.assert_array_equal(np.sort(first, axis=1), np.arange(128).reshape(2, 64))
        assert (first[0] != np.arange(64)).any()
        assert (first[0] != first[1] - 64).any(), "the phases of a block have one order"
        assert (first != self.tickets(64, order="shuffled", seed=2)).any()

    ORDERS = tuple({"order": order} for order in host.ORDERS) + tuple(
        {"order": "shuffled", "seed": s} for s in range(1, 6)
    )

    def sums(self, kernel: str, **options: Any) -> np.ndarray:
        x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
        y = np.full(40, np.nan, np.float32)
        run(kernel, x, y, 40, grid=40, block=64, **options)
        return y

    def test_a_correct_reduction_has_equal_bits_in_every_order(self):
        expected = self.sums("sum_correct").tobytes()
        for options in self.ORDERS:
            for workers in (1, 3):
                assert self.sums("sum_correct", workers=workers, **options).tobytes() == expected, options

    def test_a_race_shows_in_the_result(self):
        results = {self.sums("sum_racy", workers=1, **options).tobytes() for options in self.ORDERS}
        assert len(results) == len(self.ORDERS)
        assert self.sums("sum_racy", order="ascending").tobytes() != self.sums("sum_racy", order="descending").tobytes()

    def test_a_shuffled_failure_can_be_reproduced_with_any_number_of_workers(self):
        expected = self.sums("sum_racy", order="shuffled", seed=7, workers=1).tobytes()
        for workers in (1, 2, 3, 4) * 3:
            assert self.sums("sum_racy", order="shuffled", seed=7, workers=workers).tobytes() == expected


@needs_compiler
class TestFaults:
    def fault(self, kernel: str, *arguments: Any, **geometry: Any) -> str:
        with pytest.raises(KernelFault) as caught:
            run(kernel, *arguments, **geometry)
        message = str(caught.value)
        assert re.match(rf"\w+\.cu: {kernel}: block \(\d+, \d+, \d+\): ", message)
        return message

    @pytest.mark.parametrize("options", TestOrders.ORDERS, ids=str)
    @pytest.mark.parametrize("workers", [1, 3])
    def test_a_barrier_that_some_threads_never_reach(self, options, workers):
        out = np.zeros(1, np.int32)
        for first, waiting, returned in (
            (3, r"\([0-2], 0, 0\)", r"\(3, 0, 0\)|\([0-3], 1, 0\)"),
            (7, r"\(\d, \d, 0\)", r"\(3, 1, 0\)"),
        ):
            message = self.fault("barrier_skipped", out, first, 5, grid=9, block=(4, 2), workers=workers, **options)
            line = line_of("barriers.cu", "line of barrier_skipped")
            assert message.startswith("barriers.cu: barrier_skipped: block (5, 0, 0): divergent barrier: ")
            assert re.search(rf"thread (?:{waiting}) waits at line {line}, thread (?:{returned}) has returned", message)

    @pytest.mark.parametrize("options", TestOrders.ORDERS, ids=str)
    def test_barriers_at_two_lines(self, options):
        message = self.fault("barrier_two_lines", np.zeros(1, np.int32), 3, block=4, **options)
        lower, upper = line_of("barriers.cu", "lower line"), line_of("barriers.cu", "upper line")
        assert f"thread (0, 0, 0) waits at line {lower}, thread (3, 0, 0) at line {upper}" in message

    def test_the_same_kernels_without_divergence(self):
        for first in (0, 4):
            out = np.zeros(1, np.int32)
            run("barrier_two_lines", out, first, block=4)
            assert out[0] == 1
        for first, block in ((8, 0), (0, 9), (0, 0)):  # nobody returns; not in any block; everybody returns
            out = np.zeros(1, np.int32)
            run("barrier_skipped", out, first, block, grid=9, block=(4, 2))
            assert out[0] == (1 if (first, block) != (0, 0) else 0)

    def test_the_next_launch_after_a_fault_works(self):
        out = np.zeros(1, np.int32)
        for workers in (1, 2, 3):
            for _ in range(20):
                self.fault("barrier_skipped", out, 3, 0, grid=4, block=8, workers=workers)
                run("barrier_skipped", out, 8, 0, grid=4, block=8, workers=workers)
                self.fault("write_shared", out, 5, 0, grid=3, workers=workers)
                run("write_shared", out, 4, 0, grid=3, workers=workers)
                self.fault("hidden_barrier", out, grid=3, workers=workers)

    @pytest.mark.parametrize("types", [FLOAT32, FLOAT64], ids=["float32", "float64"])
    def test_writes_outside_a_shared_array(self, types):
        out, bytes_of_second = np.zeros(1, np.int32), 16 * types.storage.itemsize
        for first, second in ((0, 0), (4, 15)):
            run("write_shared", out, first, second, types=types)
        for first, second, expected in (
            (5, 0, "past the end of shared array 'first' (5 bytes)"),
            (60, 0, "past the end of shared array 'first' (5 bytes)"),
            (-1, 0, "before shared array 'first' (5 bytes)"),
            (-64, 0, "before shared array 'first' (5 bytes)"),
            (0, 16, f"past the end of shared array 'second' ({bytes_of_second} bytes)"),
            (0, -1, f"before shared array 'second' ({bytes_of_second} bytes)"),
        ):
            message = self.fault("write_shared", out, first, second, types=types)
            assert message.endswith(f"wrote {expected}")

    def test_writes_outside_dynamic_shared_memory(self):
        out = np.zeros(1, np.int32)
        for index, shared in ((0, 4), (15, 64), (16, 65 * 4)):
            run("write_dynamic", out, index, shared=shared)
        for index, shared, place in (
            (0, 0, "past the end of"),
            (16, 64, "past the end of"),
            (1, 7, "past the end of"),
            (-1, 64, "before"),
        ):
            message = self.fault("write_dynamic", out, index, shared=shared)
            assert message.endswith(f"wrote {place} shared array 'scratch' ({shared} bytes)")

    @pytest.mark.parametrize("types", [FLOAT32, FLOAT64], ids=["float32", "float64"])
    def test_shared_memory_that_nobody_wrote_is_nan(self, types):
        # Block 0 writes; in descending order it is the last, and the first one finds memory that no block has used.
        for order, workers in (("ascending", 1), ("ascending", 2), ("descending", 1)):
            values, integers = np.zeros((8, 32), types.storage), np.zeros((8, 32), np.int32)
            run("read_shared", values, integers, 8, grid=8, block=32, types=types, order=order, workers=workers)
            np.testing.assert_array_equal(values[0], np.arange(32))
            assert np.isnan(values[1:]).all()
            assert (integers[1:] == -1).all()

    def test_more_shared_memory_than_any_gpu_has(self):
        result = python(
            """
            import numpy as np
            from support.kernels import run
            from segnet_scratch.errors import KernelFault
            out = np.zeros(1, np.int32)
            run("much_shared", out, grid=2, block=4)
            try:
                run("too_much_shared", out, grid=3, block=4)
            except KernelFault as error:
                print(error)
            run("much_shared", out)
            """
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("shared_memory.cu: too_much_shared: block (0, 0, 0): shared array 'huge'")
        assert "400000 bytes" in result.stdout

    def test_a_barrier_that_the_parser_did_not_see(self):
        out = np.zeros(1, np.int32)
        for workers in (1, 3):
            message = self.fault("hidden_barrier", out, grid=5, block=4, workers=workers)
            assert "barrier" in message
            assert "__syncthreads()" in message  # the fix: name it in the kernel
        assert out[0] == 0

    def test_a_shared_array_that_the_parser_did_not_see(self):
        result = python(
            """
            import numpy as np
            from support.kernels import run
            from segnet_scratch.errors import KernelFault
            for _ in range(2):
                try:
                    run("hidden_shared", np.zeros(1, np.int32), grid=5, block=4)
                except KernelFault as error:
                    print(error)
            """
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("hidden.cu: hidden_shared: block (") == 2
        assert "SHARED_ARRAY" in result.stdout

    def test_a_barrier_behind_a_macro(self):
        out = np.zeros(6, np.int32)
        run("macro_barrier", np.zeros(1, np.int32), out, 6, block=6)
        np.testing.assert_array_equal(out, [6] * 6)

    def test_deep_recursion(self):
        out = np.zeros(3, np.int32)
        run("recurse", out, 60, 3, block=3)
        np.testing.assert_array_equal(out, [60] * 3)

    def test_recursion_too_deep_is_a_fault(self):
        result = python(
            """
            import numpy as np
            from support.kernels import run
            from segnet_scratch.errors import KernelFault
            out = np.zeros(3, np.int32)
            for _ in range(2):
                try:
                    run("recurse", out, 140, 3, block=3)
                except KernelFault as error:
                    print(error)
                run("recurse", out, 60, 3, block=3)
                assert (out == 60).all()
            """
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("stack.cu: recurse: block (0, 0, 0): a thread needs more stack") == 2

    @needs_linux
    def test_a_system_that_gives_no_more_threads(self):
        result = python(
            """
            import resource
            import numpy as np
            from support.kernels import run
            counts = np.zeros(3, np.uint64)
            run("count_in_bins", counts, 3, grid=64, block=64)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)  # room for a few stacks of 8 MiB
            run("count_in_bins", counts, 3, grid=64, block=64, workers=64)
            print(counts)
            """
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == "[2732 2730 2730]\n"

    @needs_linux
    def test_stacks_are_used_again(self):
        out, x = np.zeros(1, np.int32), np.zeros((1, 512), np.float32)
        y = np.empty_like(x)

        def some_launches() -> None:
            for _ in range(20):
                run("reverse_dynamic", x, y, 1, 512, block=512, shared=2048, workers=1)
                self.fault("barrier_skipped", out, 3, 0, block=512, workers=1)
                self.fault("write_shared", out, 5, 0, block=512, workers=1)

        def mapped() -> int:
            return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

        some_launches()
        before = mapped()
        some_launches()
        # One block's stacks alone are 512 x 160 KiB = 80 MiB; sixty launches would leak nearly 5 GiB.
        assert mapped() - before < 16 << 20

    def test_many_threads_may_launch_at_once(self):
        x = np.random.default_rng(0).random((4, 64)).astype(np.float32)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(50):
                    y = np.empty_like(x)
                    run("reverse_dynamic", x, y, 4, 64, grid=4, block=64, shared=256, workers=2)
                    np.testing.assert_array_equal(y, x[:, ::-1])
                    self.fault("write_shared", np.zeros(1, np.int32), 5, 0)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestHostOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"order": "random"}, "order is 'random'.*ascending, descending, shuffled"),
            ({"order": None}, "order is None"),
            ({"workers": -1}, "workers is -1"),
            ({"workers": 1.5}, r"workers is 1\.5"),
            ({"workers": True}, "workers is True"),
            ({"workers": 1025}, "workers is 1025"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": 2**64}, "seed is 18446744073709551616"),
            ({"seed": 0.5}, r"seed is 0\.5"),
            ({"seed": None}, "seed is None"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ConfigError, match=f"host device: {message}"):
            HostOptions(**options)


@pytest.fixture
def cold_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no memory of what this process has built."""
    monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "cache"))
    host.build.cache_clear()
    host._entry.cache_clear()
    yield tmp_path / "cache"
    host.build.cache_clear()
    host._entry.cache_clear()


@pytest.fixture
def counting_compiler(tmp_path, monkeypatch):
    """$CXX is a script that passes everything on to the real compiler; calls() tells how often it made a library."""
    log, script = tmp_path / "calls", tmp_path / "counting-c++"
    real = " ".join(host.find_compiler())
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo "$*" >> "{log}";; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def instant_compiler(tmp_path, monkeypatch):
    """$CXX is a script that writes an empty library; for tests of names in the cache."""
    script = tmp_path / "instant-c++"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


KERNEL = 'extern "C" __global__ void f(float* x) {}\n'


@needs_compiler
class TestCompilation:
    @pytest.mark.parametrize(
        ("text", "messages"),
        [
            (KERNEL.replace("{}", "{\n    x[0] = undeclared;\n}"), ["broken.cu:3", "undeclared"]),
            ('#include "part.cuh"\n' + KERNEL, ["part.cuh:3"]),
            ('#include "absent.cuh"\n' + KERNEL, ["broken.cu:2", "absent.cuh"]),
        ],
        ids=["syntax", "in a header", "no header"],
    )
    def test_an_error_names_its_line(self, tmp_path, text, messages):
        (tmp_path / "part.cuh").write_text("\n\nint broken( { }\n")
        (kernel,) = parse(tmp_path, INCLUDE + text, "broken.cu")
        with raises(CompileError, *messages, match=r"\A(.*\n){,48}.*\Z"):
            launch(HostDevice(), kernel, 1, 1, (np.zeros(1, np.float32),), FLOAT32)

    def test_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setitem(sys.modules, "ziglang", None)
        # Without memory of a host device that other tests made.
        monkeypatch.setattr(device_module, "_shared_device", device_module._shared_device.__wrapped__)
        for attempt in (HostDevice, lambda: get_device("host")):
            with raises(CompileError, "C++17 compiler", "apt install g++", "pip install ziglang", "--device numpy"):
                attempt()

    def test_the_wheel_that_brings_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setitem(sys.modules, "ziglang", SimpleNamespace())
        assert host.find_compiler() == [sys.executable, "-m", "ziglang", "c++"]

    def test_cxx_that_does_not_exist(self, monkeypatch):
        monkeypatch.setenv("CXX", "/nowhere/g++ -O1")
        with raises(CompileError, "$CXX is '/nowhere/g++ -O1'", "no program '/nowhere/g++'", "unset it", "ziglang"):
            HostDevice()

    def test_cxx_that_is_no_compiler(self, cold_cache, monkeypatch):
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(CompileError, match="'false' does not run"):
            run("count_in_bins", np.zeros(1, np.uint64), 1)
        monkeypatch.setenv("CXX", "true")
        with pytest.raises(CompileError, match="'true' wrote no library"):
            run("count_in_bins", np.zeros(1, np.uint64), 1)

    def test_cxx_may_carry_options_and_may_be_blank(self, monkeypatch):
        usual = host.find_compiler()[0]
        monkeypatch.setenv("CXX", f"{usual} -DANSWER=42")
        assert host.find_compiler() == [usual, "-DANSWER=42"]
        monkeypatch.setenv("CXX", "  ")
        assert host.find_compiler() != []

    def test_a_second_build_does_not_compile(self, tmp_path, cold_cache, counting_compiler):
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "3"))
        assert filled(kernel) == 3
        assert filled(kernel) == 3
        assert counting_compiler() == 1
        host.build.cache_clear()  # as in another process
        host._entry.cache_clear()
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "3"))
        assert filled(kernel) == 3
        assert counting_compiler() == 1
        assert len(list(cold_cache.rglob("*.so"))) == 1

    def test_a_changed_source_or_header_compiles_again(self, tmp_path, cold_cache, counting_compiler):
        # The header of the header lies beside the .cu file, where only the compiler's search path finds it.
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "value.cuh").write_text('#include "deep.cuh"\n#define VALUE DEEP\n')
        (tmp_path / "deep.cuh").write_text("#define DEEP 1\n")
        text = '#include "parts/value.cuh"\n' + FILL
        assert filled(*parse(tmp_path, text)) == 1
        (tmp_path / "deep.cuh").write_text("#define DEEP 2\n")
        assert filled(*parse(tmp_path, text)) == 2
        (tmp_path / "parts" / "value.cuh").write_text("#define VALUE 3\n")
        assert filled(*parse(tmp_path, text)) == 3
        assert counting_compiler() == 3
        (tmp_path / "parts" / "value.cuh").write_text('#include "deep.cuh"\n#define VALUE DEEP\n')
        assert filled(*parse(tmp_path, text)) == 2
        assert counting_compiler() == 3, "an old version is still in the cache"

    @pytest.mark.usefixtures("instant_compiler")
    def test_a_source_that_changes_before_it_is_compiled(self, tmp_path, cold_cache):
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "3"))
        (tmp_path / "written.cu").write_text(FILL.replace("VALUE", "4"))
        with pytest.raises(CompileError, match=r"written\.cu or a header of it has changed since it was read"):
            host.build(kernel.source, FLOAT32)
        assert list(cold_cache.rglob("*.so")) == [], "4 is kept under the name of 3"
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "3"))
        assert host.build(kernel.source, FLOAT32).is_file()

    @pytest.mark.usefixtures("cold_cache", "instant_compiler")
    def test_the_key_covers_compiler_flags_and_how_kernels_are_run(self, tmp_path, monkeypatch):
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "5"))
        (changed,) = parse(tmp_path, FILL.replace("VALUE", "6"), "changed.cu")
        libraries = {host.build(kernel.source, FLOAT32), host.build(kernel.source, FLOAT64)}
        libraries.add(host.build(changed.source, FLOAT32))
        monkeypatch.setattr(host, "_compiler_identity", lambda command: "another version")
        host.build.cache_clear()
        libraries.add(host.build(kernel.source, FLOAT32))
        monkeypatch.setattr(host, "_processor_identity", lambda: "another processor")
        host.build.cache_clear()
        libraries.add(host.build(kernel.source, FLOAT32))
        flags = [flag for flag in host.compiler_flags() if flag != "-O3"]
        monkeypatch.setattr(host, "compiler_flags", lambda: [*flags, "-O0"])
        host.build.cache_clear()
        libraries.add(host.build(kernel.source, FLOAT32))
        # The parser decides which kernels get fibers; a library from before it learned better must not be used.
        monkeypatch.setattr(host, "parse_kernels", lambda source: [replace(kernel, cooperative=True)])
        host.build.cache_clear()
        libraries.add(host.build(kernel.source, FLOAT32))
        assert len(libraries) == 7

    @pytest.mark.usefixtures("cold_cache", "instant_compiler")
    def test_clones_share_libraries_but_not_those_whose_reports_name_the_file(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        sources = [parse(tmp_path / clone, FILL.replace("VALUE", "8"))[0].source for clone in "ab"]
        assert len({host.build(source, FLOAT32) for source in sources}) == 1
        assert len({host.build(source, FLOAT32, sanitize=True) for source in sources}) == 2

    def test_a_failed_compilation_leaves_nothing_behind(self, tmp_path, cold_cache):
        (kernel,) = parse(tmp_path, FILL)
        with pytest.raises(CompileError, match="VALUE"):
            filled(kernel)
        assert list(cold_cache.rglob("written*")) == []

    @pytest.mark.usefixtures("cold_cache", "instant_compiler")
    def test_a_library_that_does_not_load(self, tmp_path):
        (kernel,) = parse(tmp_path, FILL.replace("VALUE", "6"))
        library = host.build(kernel.source, FLOAT32)
        assert library.read_bytes() == b""  # what that compiler makes
        with pytest.raises(CompileError, match=rf"{library.name}.* do not load.*delete"):
            filled(kernel)

    def test_the_cache_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "mine"))
        assert cache_directory() == tmp_path / "mine"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("SEGNET_CACHE", "~/mine")  # quoted, so that no shell has looked at it
        assert cache_directory() == tmp_path / "mine"
        monkeypatch.delenv("SEGNET_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "segnet_scratch"


class TestSources:
    def test_the_source_tree(self):
        assert cuda_directory() == ROOT / "cuda"
        assert [source.path.name for source in shipped_sources()] == sorted(
            p.name for p in (ROOT / "cuda").glob("*.cu")
        )

    def test_a_package_without_its_kernels(self, tmp_path):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "segnet_scratch", tmp_path / "segnet_scratch", ignore=ignore)
        code = "from segnet_scratch.runtime.launch import shipped_kernels; shipped_kernels()"
        result = python(code, PYTHONPATH=str(tmp_path))
        assert result.returncode != 0
        assert "CompileError: the kernel sources are missing: expected a folder 'cuda'" in result.stderr
