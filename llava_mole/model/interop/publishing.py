"""Writes a result whole or not at all: beside its final name first, then renamed; and says what it is."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole import __version__
from llava_mole.errors import WeightsError

LABEL_FILE = "llava_mole.json"
FORMAT = "llava_mole.converted/1"
SHARD_BYTES = 1_000_000_000
"""A shard is kept in memory until it is full, so this bounds the memory of a conversion."""


@contextmanager
def publish(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path that becomes `out` when the block ends without an error, and is removed when it does not.

    Raises:
        WeightsError: `out` exists and `overwrite` is not given, or is a directory that no conversion has written.
    """
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".tmp-{out.name}-{os.getpid()}"
    old = out.parent / f".old-{out.name}-{os.getpid()}"
    _remove(temporary)
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            fsync(path)
        if out.is_dir():
            os.replace(out, old)
        os.replace(temporary, out)
        fsync(out.parent)
        _remove(old)
    except BaseException:
        _remove(temporary)
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise WeightsError where `out` must not be written to; called before hours of work, too."""
    if not out.exists():
        return
    if not overwrite:
        raise WeightsError(f"{out} exists; give another --out, or --overwrite to replace it")
    if out.is_dir() and any(out.iterdir()) and not (out / LABEL_FILE).is_file():
        raise WeightsError(
            f"{out} is a directory that no conversion has written (no {LABEL_FILE}); it stays: remove it"
        )


def write_label(directory: Path, fields: dict[str, Any]) -> None:
    """Write `llava_mole.json`: where the files of a directory come from and whether they are exact."""
    text = json.dumps({"format": FORMAT, "version": __version__, **fields}, indent=1) + "\n"
    (directory / LABEL_FILE).write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
