"""The program `segnet`, also as `python -m segnet_scratch` in a source tree that is not installed."""

import sys


def main() -> None:
    """The command line; where a library that it needs is missing or broken, that and the command that fixes it."""
    try:
        from segnet_scratch.cli import main as command_line
    except KeyboardInterrupt:  # while the libraries were imported
        sys.exit(130)
    except Exception:
        from segnet_scratch.lab.doctor import Diagnosis, software

        broken = [finding for finding in software.libraries() if finding.status != "ok"]
        if not broken:
            raise
        for line, _ in Diagnosis(broken).lines():
            print(line, file=sys.stderr)
        sys.exit(1)
    command_line()


if __name__ == "__main__":
    main()
