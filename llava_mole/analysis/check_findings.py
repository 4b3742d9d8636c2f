"""What `llava-mole check-data` has found: numbers by source and kind, and the list."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

import numpy as np
import numpy.typing as npt

BAD_RECORD = ("bad-json", "bad-record", "unknown-role", "marker", "marker-again", "turn-order", "empty-answer",
              "bad-text", "image-cut", "masked", "too-long")  # fmt: skip
"""Kinds of findings that training refuses."""
MISSING_IMAGE = ("missing-image", "outside-image", "remote-image")
BAD_IMAGE = ("corrupt-image", "too-large-image")
NOTED_IMAGE = ("huge-image", "cmyk-image", "animated-image", "wrong-extension")


@dataclass
class SourceFindings:
    """What was found in one source."""

    name: str
    records: int = 0
    """Including those that cannot be used."""
    text_only: int = 0
    images: int = 0
    """Different image files."""
    duplicates: int = 0
    truncated: int = 0
    """Longer than `data.max_length`, and cut, shortened or dropped as `data.max_length_policy` says."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of every usable record before any cut; empty where they were not counted."""

    def share(self, kinds: Iterable[str], of: int) -> float:
        """Findings of some kinds as a share."""
        return sum(self.kinds[kind] for kind in kinds) / of if of else 0.0


class FindingsFile:
    """Lists every finding, one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, source: SourceFindings, kind: str, where: str, detail: str) -> None:
        """Count a finding and list it."""
        source.kinds[kind] += 1
        line = {"source": source.name, "kind": kind, "where": where, "detail": detail[:300]}
        self._file.write(json.dumps(line) + "\n")
