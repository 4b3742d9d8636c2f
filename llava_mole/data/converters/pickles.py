"""Pickles of plain containers. A pickle is a program; this reader refuses every one that would call anything."""

import pickle
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError

LARGEST = 1 << 30
"""Bytes; PathVQA's files have two million."""

# What the unpickler raises for damage, depending on where it is.
_REFUSALS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to another file")


def load_plain(path: Path) -> Any:
    """The value of a pickle that holds lists, dicts, tuples, texts, numbers, True, False and None only.

    Raises:
        DataError: anything else is in it (nothing of it is called), or it is damaged.
    """
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path}: {path.stat().st_size} bytes; a pickle of questions has far less than {LARGEST}")
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: refused as a pickle of plain lists and dicts: {reason}; use the file as published"
        ) from None
