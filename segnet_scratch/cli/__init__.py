"""The command line. One module for each group of commands; `common` holds what they share."""

import errno
import sys

# Each registers its commands, in the order in which the help shows them.
from segnet_scratch.cli import common, data, demo, evaluation, kernels, network, profile, proof
from segnet_scratch.cli.common import app, fail
from segnet_scratch.errors import ConfigError, SegnetError, printable
from segnet_scratch.files import reason
from segnet_scratch.parallel import PeerError

__all__ = ["common", "data", "demo", "evaluation", "kernels", "main", "network", "profile", "proof"]


def main() -> None:
    """Entry point: the project's own errors become one message and an exit code, without a traceback.

    Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage or settings, 130 stopped by Ctrl-C.
    """
    try:
        _run()
    except SystemExit as end:
        lost = common.output.fault
        if end.code or lost is None or lost.errno == errno.EPIPE:  # whoever goes away has seen enough
            raise
        fail(f"what should have been shown could not be written: {reason(lost)}", 1)


def _run() -> None:
    try:
        app()
    except PeerError:
        sys.exit(1)
    except SegnetError as error:
        fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except MemoryError as error:
        fail(f"memory is short: {error}; use a smaller size or batch", 1)
    except OSError as error:  # a folder that cannot be made, a full disk
        fail(printable(f"{error.filename2 or error.filename or 'output'}: {reason(error)}"), 1)
