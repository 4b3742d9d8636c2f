"""Writes the files of a result: tensors as shards, and the label that says what it is."""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole import __version__
from llava_mole.common.errors import WeightsError

LABEL_FILE = "llava_mole.json"
FORMAT = "llava_mole.converted/1"
SHARD_BYTES = 1_000_000_000
"""A shard is kept in memory until it is full, so this bounds the memory of a conversion."""


def write_label(directory: Path, fields: dict[str, Any]) -> None:
    """Write `llava_mole.json`: where the files of a directory come from and whether they are exact."""
    text = json.dumps({"format": FORMAT, "version": __version__, **fields}, indent=1) + "\n"
    (directory / LABEL_FILE).write_text(text, encoding="utf-8")


def save_pickle(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a small `.bin` file. Raises OSError where torch would make something else of a full disk."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getbuffer())


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes tensors as `model.safetensors`, or as numbered shards with an index where they are more than one shard.

    Args:
        directory: exists; receives the files.
        label: of the progress bar, which counts bytes.
        total: bytes to come, for the bar; None where unknown.
        shard_bytes: size of a shard, held in memory until it is full.
    """

    def __init__(self, directory: Path, label: str, total: int | None = None, *, shard_bytes: int = SHARD_BYTES):
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor. Raises WeightsError where it has values that are not finite."""
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} has values that are not finite; download or train the weights again")
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        # A copy: memory-mapped views would keep their file's pages, and safetensors refuses shared storage.
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total += tensor.nbytes
        self._bar.update(tensor.nbytes)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        self._bar.close()
        count = len(self._shards)
        if count == 1:
            os.replace(self._shard(1), self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._shard(number), self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")

    def _shard(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._pending:
            self._shards.append(list(self._pending))
            save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0
