"""The op table on the device: against the references, against the host device, against itself."""

import hashlib
from collections.abc import Callable, Iterator

from gpu_check.part import Outcome, Work, judged
from segnet_scratch import get_device
from segnet_scratch.lab.proof.compare import check, run_guarded, same_bits
from segnet_scratch.lab.proof.launches import kernels_of, rows_on
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.ops.cases import Case, Inputs, Row
from segnet_scratch.ops.convolution.conv2d_fused_cases import FusedRow
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.conv2d_hopper_cases import HopperRow
from segnet_scratch.ops.convolution.conv2d_mma_cases import TensorCoreRow
from segnet_scratch.ops.loss.cases import CrossEntropyRow
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import shipped_kernels

RANDOM_CASES = 500  # of each row at most
EXACT_CASES = 100
REPEATS = 250
SHAPES, VALUES, EXACT_SHAPES, EXACT_VALUES, SAME, REPEATED = 5, 6, 7, 8, 9, 10  # seeds


def kernels(work: Work) -> Outcome:
    """Every row of the op table, all its element types, against the float64 reference: fixed cases, then random ones.

    Rows take turns, so that whatever the time suffices for is spread over all of them.
    """
    problems: list[str] = []
    table = rows_for(work.device)
    longest = max(len(row.cases()) for row in table)
    fixed = random = 0
    for turn in range(longest + RANDOM_CASES):
        for row in table:
            cases = row.cases()
            is_fixed = turn < len(cases)
            if turn and work.over:
                break
            if not is_fixed and turn < longest:
                continue
            case = cases[turn] if is_fixed else row.random_case(row.generator(SHAPES, turn))
            for dtype in row.elements:
                problems += check(row, case, work.device, row.generator(VALUES, turn), dtype)
            fixed, random = fixed + is_fixed, random + (not is_fixed)
    wanted = sum(len(row.cases()) for row in table)
    if work.on_gpu and fixed < wanted:
        problems.append(f"time was over after {fixed} of {wanted} fixed cases")
    text = f"{len(table)} rows in their element types: {fixed} of {wanted} fixed and {random} random cases"
    return judged(text, problems)


def exact(work: Work) -> Outcome:
    """Inputs of small integers: results must be equal to the last bit."""
    rows, problems, count = [row for row in rows_for(work.device) if row.exact], [], 0
    for turn in range(EXACT_CASES):
        for row in rows:
            if turn and work.over:
                break
            case = row.random_case(row.generator(EXACT_SHAPES, turn))
            problems += check(row, case, work.device, row.generator(EXACT_VALUES, turn), integers=True)
            count += 1
    return judged(f"{len(rows)} rows, {count} random cases", problems)


def bits_of_the_host(work: Work) -> Outcome:
    """The same bits as the host device.

    Two things excuse a row: exp and log, which differ between libraries, and tensor cores, whose order of additions is
    not documented.
    """
    host, count, different = get_device("host"), 0, set()
    table = rows_for(work.device)
    for turn in range(max(len(row.cases()) for row in table)):
        for row in table:
            if turn >= len(row.cases()) or (turn and work.over):
                continue
            op, inputs = _problem(row, row.cases()[turn], SAME)
            ours, theirs = (run_guarded(op, inputs, device).outputs for device in (work.device, host))
            if not all(same_bits(ours[name], theirs[name]) for name in ours):
                different.add(row.name)
            count += 1
    excused = {row.name for row in table if isinstance(row, CrossEntropyRow | TensorCoreRow | FusedRow)}
    problems = [f"{name}: other bits than on the host" for name in different - excused]
    equal = len(table) - len(different)
    return judged(f"{count} cases, {equal} of {len(table)} rows give the host's bits", problems, different=[*different])


def determinism(work: Work) -> Outcome:
    """One case of each row, the largest, run again and again into memory of other contents: one hash."""
    runs = [(row.name, _repeated(row, work.device)) for row in rows_for(work.device)]
    first = {name: run(0) for name, run in runs}
    repeats, problems = 1, []
    while repeats < REPEATS and not work.over:
        for name, run in runs:
            if run(repeats) != first[name]:
                problems.append(f"{name}: repeat {repeats} has another hash")
        repeats += 1
    return judged(f"{len(runs)} rows, {repeats} runs of each", problems, hashes=first)


def _repeated(row: Row, device: Device) -> Callable[[int], str]:
    """Runs the row's largest fixed case and hashes the results; the number decides what outputs hold before."""
    case = max(row.cases(), key=lambda case: row.plan(case, row.elements[0]).bytes)
    op, inputs = _problem(row, case, REPEATED)
    fixed = {name: None if a is None else device.upload(a) for name, a in inputs.items() if name not in op.updates}

    def run(number: int) -> str:
        updated = {name: device.upload(inputs[name].copy()) for name in op.updates}  # type: ignore[union-attr]
        fresh = {name: device.empty(s.shape, s.dtype) for name, s in {**op.outputs, **op.workspace}.items()}
        for array in fresh.values():
            device.write(array, number % 251)
        op.run(device, Buffers(**fixed, **updated, **fresh))
        digest = hashlib.sha256()
        for name in (*op.outputs, *op.updates):
            digest.update(device.download({**fresh, **updated}[name]).tobytes())
        return digest.hexdigest()

    return run


def _problem(row: Row, case: Case, seed: int) -> tuple[Op, Inputs]:
    op = row.plan(case, row.elements[0])
    return op, row.inputs(op, case, row.generator(seed, 0))


def rows_for(device: Device) -> list[Row]:
    """The rows that the device can run: a GPU has the instructions of their kernels, and Hopper's are not forbidden."""
    forbidden = device.architecture is not None and tiles_on(device) is None
    return [row for row in rows_on(device, ROWS) if not (forbidden and isinstance(row, HopperRow))]


def problems_for_sanitizers(device: Device) -> Iterator[tuple[str, Op, Inputs]]:
    """The fixed cases in the usual type: of each row the last one, which is a map of SegNet or near to one; then those
    that launch kernels which these do not; then the rest, rows in turn."""
    table, rest = rows_for(device), []
    missing = set(shipped_kernels())
    for row in table:
        case = row.cases()[-1]
        missing -= kernels_of(row, [case])
        yield row.name, *_problem(row, case, SAME)
    for turn in range(2, max(len(row.cases()) for row in table) + 1):
        for row in (row for row in table if turn <= len(row.cases())):
            case = row.cases()[-turn]
            found = kernels_of(row, [case]) & missing if missing else set()
            missing -= found
            if found:
                yield row.name, *_problem(row, case, SAME)
            else:
                rest.append((row, case))
    for row, case in rest:
        yield row.name, *_problem(row, case, SAME)
