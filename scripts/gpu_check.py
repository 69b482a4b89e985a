"""Checks the cuda device on the machine at hand and writes a report: JSON and a table.

Each part runs even where another failed; the exit code is 1 if any failed. `--device host` exercises the script itself
on a machine without a GPU.
"""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from segnet_scratch import SegNet, get_device
from segnet_scratch.device import Device
from segnet_scratch.errors import SegnetError
from segnet_scratch.ops import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.proof.compare import check, run_guarded, same_bits
from segnet_scratch.proof.gradcheck import gradchecks
from segnet_scratch.proof.table import ROWS

ROOT = Path(__file__).resolve().parents[1]


def kernels(device: Device, random_cases: int) -> dict[str, Any]:
    """Every row of the op table: fixed and random cases, both element types, against the float64 reference."""
    problems: list[str] = []
    cases = 0
    for row in ROWS:
        shapes = row.cases() + [row.random_case(row.generator(5, i)) for i in range(random_cases)]
        for index, case in enumerate(shapes):
            for dtype in (np.float32, np.float64):
                problems += check(row, case, device, row.generator(6, index), dtype)
                cases += 1
        for index in range(random_cases if row.exact else 0):
            case = row.random_case(row.generator(7, index))
            problems += check(row, case, device, row.generator(8, index), integers=True)
            cases += 1
    return {"passed": not problems, "summary": f"{cases} cases, {len(problems)} problems", "problems": problems[:50]}


def same_as_host(device: Device) -> dict[str, Any]:
    """Do the kernels give the host device's bits? Only exp and log, which differ between libraries, excuse a row."""
    host = get_device("host")
    different = set()
    for row in ROWS:
        for index, case in enumerate(row.cases()):
            op = row.plan(case, np.float32)
            inputs = row.inputs(op, case, row.generator(9, index))
            ours, theirs = run_guarded(op, inputs, device).outputs, run_guarded(op, inputs, host).outputs
            if not all(same_bits(ours[name], theirs[name]) for name in ours):
                different.add(row.name)
    unexpected = [name for name in different if not name.startswith("cross_entropy")]
    text = f"{len(ROWS) - len(different)} of {len(ROWS)} rows give the host's bits"
    return {"passed": not unexpected, "summary": text, "different": sorted(different)}


def gradients(device: Device) -> dict[str, Any]:
    """Hand-written against numeric gradients, float64."""
    results = list(gradchecks(device=device))
    failed = [str(result) for result in results if not result.passed]
    worst = max(result.worst for result in results)
    text = f"{len(results) - len(failed)} of {len(results)} ops, worst error {worst:.1e}"
    return {"passed": not failed, "summary": text, "failed": failed}


def losses(device: Device, steps: int = 20) -> list[float]:
    """Twenty training steps of a narrow SegNet in float64, on data that depend on nothing else."""
    rng = np.random.default_rng(0)
    model = SegNet(11, 1 / 8, device, seed=1, dtype=np.float64)
    optimiser = SGD(model)
    values = []
    for _ in range(steps):
        images, labels = rng.standard_normal((2, 64, 48, 3)), rng.integers(0, 11, (2, 64, 48))
        model.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step(1e-3)
        values.append(loss.item())
    return values


def training(device: Device) -> dict[str, Any]:
    """The device's losses against numpy's, and against its own in two more runs."""
    first = losses(device)
    repeats = [losses(device) == first for _ in range(2)]
    difference = float(np.abs(np.array(first) - losses(get_device("numpy"))).max())
    passed = difference <= 1e-9 and all(repeats)  # a NaN fails the comparison
    text = f"20 steps: {difference:.1e} from numpy, repeats {'equal' if all(repeats) else 'DIFFER'}"
    return {"passed": passed, "summary": text, "difference": difference}


def demo(device: Device) -> dict[str, Any]:
    """Sample data, training with the demo's recipe, evaluation; by the command line."""
    segnet = [sys.executable, "-m", "segnet_scratch"]
    with tempfile.TemporaryDirectory() as folder:
        data, run, result = f"{folder}/data", f"{folder}/run", Path(folder) / "eval.json"
        recipe = str(ROOT / "segnet_scratch" / "recipes" / "demo.toml")
        start = time.perf_counter()
        subprocess.run([*segnet, "data", "sample", data], check=True)
        subprocess.run(
            [*segnet, "train", "--data", data, "--out", run, "--config", recipe, "--device", device.name], check=True
        )
        subprocess.run(
            [
                *segnet,
                "eval",
                f"{run}/best.safetensors",
                "--data",
                data,
                "--device",
                device.name,
                "--json",
                str(result),
            ],
            check=True,
        )
        seconds = time.perf_counter() - start
        miou = json.loads(result.read_text())["miou"]
    return {"passed": miou >= 0.6, "summary": f"mIoU {miou:.3f} in {seconds:.0f} s", "miou": miou, "seconds": seconds}


def sanitizer(device: Device) -> dict[str, Any]:
    """compute-sanitizer's memcheck over the fixed cases, CuPy's pool off (overflows hide in a pool)."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or device.name != "cuda":
        return {"passed": None, "summary": "not run: no compute-sanitizer on this machine"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "7", sys.executable, __file__, "--under-sanitizer"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    lines = (result.stdout + result.stderr).strip().splitlines()
    return {"passed": result.returncode == 0, "summary": lines[-1] if lines else "no output", "output": lines[-40:]}


def under_sanitizer() -> int:
    """The child of `sanitizer`: each fixed case once in float32."""
    import cupy  # this script may: it is no part of the package

    cupy.cuda.set_allocator(None)
    device = get_device("cuda")
    for row in ROWS:
        for index, case in enumerate(row.cases()):
            op = row.plan(case, np.float32)
            run_guarded(op, row.inputs(op, case, row.generator(4, index)), device)
    return 0


def timing(device: Device, batch: int = 4, size: int = 224, repetitions: int = 10) -> dict[str, Any]:
    """A training step of full SegNet against PyTorch, interleaved; medians of synchronised steps."""
    if device.name != "cuda":
        return {"passed": None, "summary": "not run: timings belong to a GPU"}
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, 21, (batch, size, size)).astype(np.uint8)
    model = SegNet(21, 1.0, device)
    optimiser = SGD(model)
    x, y = device.upload(images), device.upload(labels)
    from segnet_scratch import tensor

    def ours() -> None:
        model.zero_grad()
        cross_entropy(model(tensor(x, device)), y).backward()
        optimiser.step(1e-3)
        device.synchronise()

    peers = {"ours": ours, **torch_steps(images, labels)}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for repetition in range(repetitions + 3):
        for name, step in peers.items():
            start = time.perf_counter()
            step()
            if repetition >= 3:
                seconds[name].append(time.perf_counter() - start)
    milliseconds = {name: 1000 * median(values) for name, values in seconds.items()}
    text = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    return {"passed": None, "summary": f"training step, batch {batch} at {size}x{size}: {text}", "ms": milliseconds}


def torch_steps(images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], None]]:
    """The same step in PyTorch, channels_last, strict float32 and TF32; nothing where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        return {}
    import torch_segnet

    torch.backends.cudnn.benchmark = True
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to("cuda", memory_format=torch.channels_last)
    y = torch.from_numpy(labels.astype(np.int64)).cuda()

    def make(tf32: bool) -> Callable[[], None]:
        model = torch_segnet.TorchSegNet(21, 1.0).cuda().to(memory_format=torch.channels_last)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)

        def step() -> None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), y, ignore_index=255).backward()
            optimiser.step()
            torch.cuda.synchronize()

        return step

    return {"torch float32": make(False), "torch TF32": make(True)}


def environment(device: Device) -> dict[str, Any]:
    """What ran where."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
    }
    if device.name == "cuda":
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        facts |= {"gpu": properties["name"].decode(), "cupy": cupy.__version__, "architecture": device.architecture}
        facts |= {"driver": cupy.cuda.runtime.driverGetVersion(), "runtime": cupy.cuda.runtime.runtimeGetVersion()}
    return facts


def write_report(folder: Path, facts: dict[str, Any], parts: dict[str, dict[str, Any]]) -> Path:
    """The JSON and the table, named by date and GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{facts['date']}-{facts.get('gpu', facts['device']).lower().replace(' ', '-')}"
    (folder / f"{name}.json").write_text(json.dumps({"environment": facts, "parts": parts}, indent=2) + "\n")
    marks = {True: "passed", False: "FAILED", None: "-"}
    rows = [f"| {part} | {marks[r['passed']]} | {r['summary']} | {r['seconds']:.0f} |" for part, r in parts.items()]
    head = [f"# {facts.get('gpu', facts['device'])}, {facts['date']}", "", f"`{json.dumps(facts)}`", ""]
    table = ["| part | | result | seconds |", "| --- | --- | --- | --- |", *rows, ""]
    path = folder / f"{name}.md"
    path.write_text("\n".join(head + table))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "host"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    parser.add_argument("--cases", type=int, default=20, help="random cases of each row of the op table")
    parser.add_argument("--only", nargs="*", help="parts to run, of those that the report names")
    parser.add_argument("--under-sanitizer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.under_sanitizer:
        return under_sanitizer()
    try:
        device = get_device(options.device)
    except SegnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernels(device, options.cases),
        "training": lambda: training(device),
        "gradients": lambda: gradients(device),
        "timing": lambda: timing(device),
        "bits of the host": lambda: same_as_host(device),
        "demo": lambda: demo(device),
        "memcheck": lambda: sanitizer(device),
    }
    facts, parts = environment(device), {}
    for part, run in todo.items():
        if options.only and part not in options.only:
            continue
        start = time.perf_counter()
        try:
            result = run()
        except Exception:  # whatever it was, the other parts are still worth their time on the GPU
            result = {"passed": False, "summary": traceback.format_exc().strip().splitlines()[-1]}
            traceback.print_exc()
        parts[part] = {**result, "seconds": time.perf_counter() - start}
        print(f"{part}: {result['summary']}")
        for line in result.get("problems", [])[:5]:
            print(f"    {line}")
        path = write_report(options.out, facts, parts)
    print(f"report: {path}")
    return 1 if any(result["passed"] is False for result in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
