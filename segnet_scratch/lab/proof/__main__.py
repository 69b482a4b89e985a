"""`segnet verify` where typer and rich are missing: `python -m segnet_scratch.lab.proof --device cuda`.

It needs NumPy, ml_dtypes, Pillow and safetensors, and CuPy on a GPU.
"""

import argparse
import json
import sys
from math import inf
from pathlib import Path

from segnet_scratch.errors import SegnetError
from segnet_scratch.files import write_durably
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.verify import DEVICES, Report, verify
from segnet_scratch.lab.proof.work import FULL, QUICK


def main() -> int:
    """Exit code 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m segnet_scratch.lab.proof", description="see segnet verify --help")
    parser.add_argument("--device", action="append", choices=DEVICES)
    parser.add_argument("--only", action="append", metavar="PART", help=f"once for each: {', '.join(PARTS)}")
    parser.add_argument("--row", action="append", help="of the op table")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--minutes", type=float, default=inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each part")
    options = parser.parse_args()

    def keep(report: Report) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_durably(options.json, [json.dumps(report.to_json(), indent=2).encode() + b"\n"])

    try:
        effort = FULL if options.full else QUICK
        what = options.device, effort, options.seed, options.only, options.row
        report = verify(*what, minutes=options.minutes, keep=keep)
    except SegnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for _, text in report.text():
        print(text)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
