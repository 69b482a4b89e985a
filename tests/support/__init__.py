"""What several test files share: they import from here, never from each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

# The share of the long proofs: nothing by default, 1 is all of them, 0.1 a tenth of their counts.
FULL = float(os.environ.get("SEGNET_TEST_FULL") or 0)


def count(usual: int, full: int) -> int:
    """How often something is tried: `usual` by default, `full` with SEGNET_TEST_FULL=1, a share of it with less."""
    return max(usual, round(FULL * full))


def real(*parts: str) -> Path:
    """A file or folder of the real data: $SEGNET_TEST_DATA/data/{CamVid,VOCdevkit/VOC2012}, .../weights/*.safetensors.

    Skips the test where there is none.
    """
    folder = os.environ.get("SEGNET_TEST_DATA")
    if not folder:
        pytest.skip("real data: SEGNET_TEST_DATA names no folder that holds data/ and weights/")
    path = Path(folder).resolve().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return path


@contextmanager
def raises(error: type[BaseException], *parts: object, match: str | None = None) -> Iterator[None]:
    """As pytest.raises; the message holds each part."""
    with pytest.raises(error, match=match) as raised:
        yield
    for part in parts:
        assert str(part) in str(raised.value)
