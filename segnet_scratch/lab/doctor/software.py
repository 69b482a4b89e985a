"""Python, libraries, BLAS, C++ compiler, kernel sources, cache, and the two devices that need no GPU."""

import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.doctor.findings import PACKAGE, Finding, first_lines, install_extra, last_line, pip, source_tree

_UNSET = "unset CXX"
_MODULES = {"pillow": "PIL"}  # where a package and its module have different names


def python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def system() -> Finding:
    text = f"{platform.platform()}, {os.cpu_count()} cores"
    other = f"{text}; the host device needs Linux or macOS", "wsl --install"
    return Finding("system", "ok", text) if sys.platform in ("linux", "darwin") else Finding("system", "broken", *other)


def kernels() -> Finding:
    """The `.cu` files, found and parsed."""
    from segnet_scratch.runtime.launch import shipped_kernels
    from segnet_scratch.runtime.source import cuda_directory, shipped_sources

    try:
        text = f"{len(shipped_kernels())} in {len(shipped_sources())} files of {cuda_directory()}"
    except CompileError as error:
        tree, again = PACKAGE.parent, pip("install", "--force-reinstall", "--no-deps", "segnet_scratch")
        fix = f"git -C {shlex.quote(str(tree))} checkout -- cuda" if (tree / ".git").exists() else again
        return Finding("kernels", "broken", str(error), fix)
    return Finding("kernels", "ok", text)


def libraries() -> list[Finding]:
    """One line for the libraries that are as they should be, one for all that are missing, one for each broken one."""
    requirements = source_tree().get("dependencies") or [
        text for text in importlib.metadata.requires("segnet_scratch") or () if "extra ==" not in text
    ]
    good, missing, broken = list[str](), list[str](), list[Finding]()
    for requirement in requirements:
        name, _, bounds = requirement.partition(">=")
        minimum = bounds.partition(",")[0]
        try:
            version = importlib.metadata.version(name)
            importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
        except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
            missing.append(requirement)
        except Exception as error:  # a compiled library may fail in any way
            text = f"does not import: {last_line(f'{type(error).__name__}: {error}')}"
            broken.append(Finding(name, "broken", text, pip("install", "--force-reinstall", requirement)))
        else:
            good.append(f"{name} {version}")
            if _numbers(version) < _numbers(minimum):
                text = f"{version} is too old, {minimum} or newer is needed"
                broken.append(Finding(name, "broken", text, pip("install", requirement)))
    found = [Finding("libraries", "ok", ", ".join(good))] if good else []
    if missing:
        found.append(Finding("libraries", "missing", ", ".join(missing), pip("install", *missing)))
    return found + broken


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def blas() -> Finding:
    """The library behind NumPy's matrix products, which decides how fast the numpy device is."""
    import numpy as np
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    text = ", ".join(f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads" for pool in pools)
    # macOS' Accelerate, for one, is no pool of threads.
    return Finding("BLAS", "ok", text or np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])


def compiler() -> Finding:
    """The C++ compiler of the host device; whether it compiles kernels is for `host_device` to say."""
    from segnet_scratch.runtime.host import find_compiler

    try:
        command = find_compiler()
    except CompileError as error:
        return Finding("C++ compiler", "missing", str(error), _UNSET if _chosen() else install_extra("compiler"))
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    output = (result.stdout or result.stderr).strip()
    if result.returncode:
        text = f"{shlex.join(command)} does not run: {last_line(output)}"
        return Finding("C++ compiler", "broken", text, _another_compiler())
    return Finding("C++ compiler", "ok", f"{shlex.join(command)}: {output.partition(chr(10))[0]}")


def _chosen() -> bool:
    return bool(os.environ.get("CXX", "").strip())


def _another_compiler() -> str:
    """The command that replaces a compiler which is there and does not work."""
    ours = f"{install_extra('compiler')} && export CXX={shlex.quote(f'{sys.executable} -m ziglang c++')}"
    return _UNSET if _chosen() else ours


def ranks(mpi: dict[str, Any], cupy: dict[str, Any]) -> list[Finding]:
    """What several processes need to train together, and where they are if mpirun has started this one."""
    if "error" in mpi:
        text = f"for several processes (segnet train --ranks): {mpi['error']}"
        return [Finding("MPI", "missing", text, install_extra("parallel"))]
    found = [Finding("MPI", "ok", mpi["text"])]
    if cupy.get("gpus"):
        fix = install_extra(f"nccl{cupy['runtime'] // 1000}")
        version = cupy.get("nccl")
        found.append(Finding("NCCL", "ok", version) if version else Finding("NCCL", "missing", "for several GPUs", fix))
    from segnet_scratch.parallel import world

    if world().size > 1:
        found.append(Finding("ranks", "ok", ", ".join(world().members)))
    return found


def cache() -> Finding:
    """Where compiled kernels are kept."""
    from segnet_scratch.runtime.cache import cache_directory, outlives_process, publish

    fix = f"export SEGNET_CACHE={shlex.quote(f'{tempfile.gettempdir()}/segnet_scratch')}"
    try:
        folder = cache_directory()
        if not outlives_process(folder):
            return Finding("cache", "missing", "no home folder is known: each process compiles its kernels anew", fix)
        probe = folder / f"doctor-{os.getpid()}"
        publish(probe, b"")
        probe.unlink()
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    except (CompileError, OSError) as error:
        return Finding("cache", "broken", str(error), fix)
    return Finding("cache", "ok", f"{folder}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def numpy_device(found: list[Finding]) -> Finding:
    """Can NumPy train? `found` are the findings about the libraries."""
    import numpy as np

    if any(finding.status != "ok" for finding in found):
        return Finding("numpy device", "broken", "needs the libraries above")
    ones = np.ones((64, 64), np.float32)
    if not np.array_equal(ones @ ones, np.full((64, 64), 64, np.float32)):
        text = "NumPy's matrix product gives wrong values"
        return Finding("numpy device", "broken", text, pip("install", "--force-reinstall", "numpy"))
    return Finding("numpy device", "ok", "trains on the CPU")


def host_device(found: list[Finding], answer: dict[str, Any]) -> Finding:
    """Did the C++ compiler of the findings make a kernel that ran? `answer` is that of the process that tried."""
    if any(finding.status != "ok" for finding in found):
        return Finding("host device", "missing", "needs the C++ compiler above")
    if "error" in answer:
        return Finding("host device", "broken", first_lines(answer["error"]), _another_compiler())
    return Finding("host device", "ok", "compiled and ran a kernel; for checking kernels, slow to train with")
