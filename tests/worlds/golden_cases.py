"""Reader of the recorded results in `tests/golden`, or in the folder that `LLAVA_MOLE_GOLDEN` names.

Nothing here or in the tests depends on which cases a folder holds: they are found by their fields.
"""

import functools
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(os.environ.get("LLAVA_MOLE_GOLDEN") or Path(__file__).parents[1] / "golden")


def read_bytes(name: str) -> bytes:
    """Contents of `name`, or of `name.gz` unpacked."""
    path = GOLDEN / name
    return path.read_bytes() if path.exists() else gzip.decompress((GOLDEN / f"{name}.gz").read_bytes())


@functools.cache
def load_cases(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file-wide fields and the cases of `<name>.json`. Treat both as read-only: they are cached."""
    document = json.loads(read_bytes(f"{name}.json"))
    return document, document.pop("cases")


@functools.cache
def load_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz` or `<name>.safetensors`; a case's arrays start with its `key`."""
    if (GOLDEN / f"{name}.npz").exists():
        with np.load(GOLDEN / f"{name}.npz") as archive:
            return {key: archive[key] for key in archive.files}
    from safetensors.numpy import load_file

    return load_file(GOLDEN / f"{name}.safetensors")
