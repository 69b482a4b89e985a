"""What a verification found."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.data.findings import CODES, Finding
from segnet_scratch.data.palette import VOID


@dataclass(frozen=True)
class Report:
    """The facts about a data set and what is wrong with it.

    splits: number of ids by split. pairs: number of ids looked at, each once. sizes: number of images by
    (height, width). image_modes, mask_modes: number of files by Pillow's mode. unlisted: images and masks that no
    split names. pixels: int64 (256,), pixels by label over all masks; images: int64 (256,), masks that hold a label.
    findings: errors first, then by code, then by file.
    """

    root: Path
    names: tuple[str, ...]
    splits: dict[str, int]
    pairs: int
    sizes: Counter[tuple[int, int]]
    image_modes: Counter[str]
    mask_modes: Counter[str]
    unlisted: dict[str, int]
    pixels: np.ndarray
    images: np.ndarray
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing but warnings was found."""
        return not any(finding.is_error for finding in self.findings)

    @property
    def void_share(self) -> float:
        """The fraction of all pixels that are void; 0 where no mask could be read."""
        return float(self.pixels[VOID] / max(1, self.pixels.sum()))

    def by_code(self) -> dict[str, list[Finding]]:
        """The findings of each code that occurs, in their order."""
        return {code: list(group) for code, group in groupby(self.findings, lambda finding: finding.code)}

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object; sizes as "HEIGHTxWIDTH", pixels and images by class name and "void"."""
        labels = {**dict(enumerate(self.names)), VOID: "void"}
        return {
            "root": str(self.root),
            "passed": self.passed,
            "splits": self.splits,
            "pairs": self.pairs,
            "sizes": {f"{height}x{width}": count for (height, width), count in self.sizes.most_common()},
            "image_modes": dict(self.image_modes),
            "mask_modes": dict(self.mask_modes),
            "unlisted": self.unlisted,
            "pixels": {name: int(self.pixels[label]) for label, name in labels.items()},
            "images": {name: int(self.images[label]) for label, name in labels.items()},
            "void_share": self.void_share,
            "findings": [
                {"code": f.code, "error": f.is_error, "meaning": CODES[f.code], "file": str(f.path), "detail": f.detail}
                for f in self.findings
            ],
        }
