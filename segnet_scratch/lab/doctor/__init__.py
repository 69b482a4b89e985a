"""What works on this machine, what does not, and the command that fixes it: behind `segnet doctor`.

    findings.py       a line of the report, the report, and the commands that install things
    software.py       Python, libraries, BLAS, C++ compiler, kernel sources, cache
    gpu.py            driver, GPUs, CuPy, NVRTC
    own_process.py    whatever loads foreign code, so that a crash there is one more finding
    kernels.py        `segnet doctor --kernels`: every kernel compiled for every GPU

Nothing but the standard library is imported before a check needs it: the doctor must speak where a library is broken.
"""

from concurrent.futures import ThreadPoolExecutor

from segnet_scratch.lab.doctor import gpu, software
from segnet_scratch.lab.doctor.findings import Diagnosis, Finding, guarded
from segnet_scratch.lab.doctor.own_process import ask

__all__ = ["Diagnosis", "Finding", "diagnose"]


def diagnose() -> Diagnosis:
    """Examines this machine; a few seconds. Raises nothing, whatever is broken."""
    with ThreadPoolExecutor() as pool:
        host, nvrtc, cupy, mpi = pool.map(ask, ("host", "nvrtc", "cupy", "mpi"))
    cuda = ask("cuda") if cupy.get("gpus") else None
    libraries = guarded("libraries", software.libraries)
    compiler = guarded("C++ compiler", lambda: [software.compiler()])
    devices = [
        *guarded("numpy device", lambda: [software.numpy_device(libraries)]),
        *guarded("host device", lambda: [software.host_device(compiler, host)]),
        *guarded("cuda device", lambda: [gpu.cuda_device(cuda)]),
    ]
    findings = [
        *guarded("Python", lambda: [software.python(), software.system()]),
        *guarded("kernels", lambda: [software.kernels()]),
        *libraries,
        *guarded("BLAS", lambda: [software.blas()]),
        *compiler,
        *guarded("GPU", lambda: gpu.findings(gpu.Facts.gather(cupy, nvrtc))),
        *guarded("MPI", lambda: software.ranks(mpi, cupy)),
        *guarded("cache", lambda: [software.cache()]),
        *devices,
    ]
    return Diagnosis(findings, {finding.name.partition(" ")[0]: finding.status == "ok" for finding in devices})
