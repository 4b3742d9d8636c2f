"""One way to show progress: a bar on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], label: str, unit: str) -> "tqdm[T]":
    """`tqdm` over `items`; where stderr is no terminal it writes at most one line every 30 seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(items, desc=label, unit=unit, mininterval=0.2 if terminal else 30, leave=terminal, ascii=not terminal)
