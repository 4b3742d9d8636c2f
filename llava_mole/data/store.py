"""Prepared data sets: written once, then opened by memory map in every process.

`json.load` of a million records takes seconds and more than a gigabyte in every rank and worker; a prepared set opens
in milliseconds, its pages are shared through the page cache, and a record is decoded when it is asked for. The layout
is described in `store_format`.
"""

import json
import os
import platform
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa

import llava_mole
from llava_mole.common.errors import DataError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn
from llava_mole.data.prepared import PreparedRecords
from llava_mole.data.store_format import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    SELF_HASH,
    is_prepared,
    manifest_hash,
    read_manifest,
    sha256_of,
    sync_directory,
    verify_shards,
    write_synced,
)

__all__ = ["PreparedRecords", "PreparedRow", "StoreWriter", "is_prepared", "read_manifest", "verify_shards"]

SHARD_BYTES = 64 << 20
"""Text of a shard in memory before it is written, which bounds the writer's memory."""
_LARGEST_ROW = 1 << 30
"""Offsets in a shard are 32 bits wide."""
_WORD_MARKS = bytes(b" x"[not chr(value).isspace()] for value in range(256))
"""ASCII white space becomes a space, every other byte an x."""


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One record on its way into a prepared data set; in the form of `Record`, with what only the raw data know."""

    id: str
    source: str
    """Sub-source, such as `coco`."""
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    """User first, alternating, with one `<image>` an image over the user turns; see `records.Record`."""
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) of each image; empty where they were not opened."""
    answer_type: str | None
    where: str
    """`file:line` of the raw record."""


class StoreWriter:
    """Writes a prepared data set beside its final name and renames it when it is complete.

    Usable as a context manager: leaving it without `finish` removes what was written.

    Args:
        directory: Final name; must not exist, or be empty.
        name: Of the data set, for its manifest.
        shard_rows: Most rows of a shard.

    Raises:
        DataError: `directory` exists, or cannot be written.
    """

    def __init__(self, directory: Path, *, name: str, shard_rows: int = 65536) -> None:
        self.directory = Path(directory)
        self.name = name
        self.rows = 0
        self._shard_rows = shard_rows
        self._temporary = self.directory.parent / f".tmp-{self.directory.name}-{os.getpid()}"
        self._sources, self._files, self._answer_types = _Names(1 << 15), _Names(1 << 31), _Names(1 << 15)
        self._shards: list[dict[str, Any]] = []
        self._buffer = _Shard()
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise DataError(f"{self.directory}: exists already; remove it, or give another directory to prepare into")
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir()
        except OSError as error:
            raise DataError(f"{self.directory}: cannot be written: {error.strerror}") from None

    def add(self, row: PreparedRow) -> None:
        """Append a row.

        Raises:
            DataError: turns that do not alternate, markers that do not match the images, text that is no UTF-8; the
                message starts with `where`. Or the disk is full.
        """
        shard = self._buffer
        file, _, line = row.where.rpartition(":")
        if not file or not line.isdecimal():
            raise ValueError(f"{row.where!r} is not of the form file:line")
        _check_row(row)
        try:
            encoded = [turn.text.encode() for turn in row.turns]
            names = [row.id.encode(), *(image.encode() for image in row.images)]
        except UnicodeEncodeError:
            raise DataError(f"{row.where}: holds half of a surrogate pair, which is no character; remove it") from None
        size = sum(map(len, encoded))
        if size > _LARGEST_ROW:
            raise DataError(f"{row.where}: {size} bytes of text, a record may have {_LARGEST_ROW}; shorten it")
        shard.id.add(names[0])
        shard.source.append(self._sources.index(row.source))
        shard.images.add(names[1:])
        shard.turns.add(encoded)
        shard.sizes.extend(side for pair in row.image_sizes for side in pair)
        shard.size_offsets.append(len(shard.sizes))
        shard.answer_type.append(-1 if row.answer_type is None else self._answer_types.index(row.answer_type))
        shard.where_file.append(self._files.index(file))
        shard.where_line.append(int(line))
        shard.text_bytes.append(size)
        shard.words.append(sum(map(_count_words, row.turns, encoded)))
        self.rows += 1
        if len(shard.text_bytes) >= self._shard_rows or shard.bytes >= SHARD_BYTES:
            self._flush()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the rest and the manifest, then give the directory its name.

        Args:
            report: What the converter has counted, kept in the manifest; must be JSON.

        Raises:
            DataError: no row was added, or the disk is full; nothing is left behind.
        """
        if not self.rows:
            self.close()
            raise DataError(f"{self.directory}: no record is left to be written; see the counts of what was skipped")
        self._flush()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "rows": self.rows,
            "sources": self._sources.values,
            "files": self._files.values,
            "answer_types": self._answer_types.values,
            "columns": {field.name: str(field.type) for field in SCHEMA},
            "shards": self._shards,
            "report": dict(report),
            "made_by": {
                "llava_mole": llava_mole.__version__,
                "pyarrow": pa.__version__,
                "python": platform.python_version(),
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        }
        manifest[SELF_HASH] = manifest_hash(manifest)
        try:
            write_synced(self._temporary / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            sync_directory(self._temporary)
            if self.directory.exists():
                self.directory.rmdir()  # empty, else the constructor would have refused
            os.replace(self._temporary, self.directory)
            sync_directory(self.directory.parent)
        except OSError as error:
            self.close()
            raise DataError(f"{self.directory}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Remove what has been written, unless `finish` has published it."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._buffer.text_bytes:
            return
        batch = self._buffer.record_batch()
        path = self._temporary / f"shard-{len(self._shards):05d}.arrow"
        try:
            with path.open("wb") as file:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            entry = {"file": path.name, "rows": batch.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            self.close()
            raise DataError(f"{self.directory}: cannot be written: {error.strerror or error}") from None
        self._shards.append(entry)
        self._buffer = _Shard()


def _check_row(row: PreparedRow) -> None:
    markers = 0
    for index, turn in enumerate(row.turns):
        if turn.role != ("user", "assistant")[index % 2]:
            raise DataError(f"{row.where}: turn {index + 1} is again from the {turn.role}; they must alternate")
        found = turn.text.count(DEFAULT_IMAGE_TOKEN)
        if found and turn.role == "assistant":
            raise DataError(f"{row.where}: {DEFAULT_IMAGE_TOKEN} stands in an answer; move it to a user turn")
        markers += found
    if len(row.turns) < 2:
        raise DataError(f"{row.where}: no question with an answer; there is nothing to train on")
    if markers != len(row.images):
        raise DataError(f"{row.where}: {markers} times {DEFAULT_IMAGE_TOKEN} for {len(row.images)} images")
    if row.image_sizes and len(row.image_sizes) != len(row.images):
        raise DataError(f"{row.where}: {len(row.image_sizes)} image sizes for {len(row.images)} images")


def _count_words(turn: Turn, encoded: bytes) -> int:
    """`len(text.split())`; without the list, which took a third of the time of `add`."""
    if not turn.text.isascii():
        return len(turn.text.split())
    marks = encoded.translate(_WORD_MARKS)
    return marks.count(b" x") + marks.startswith(b"x")


class _Names:
    """Values that repeat, by index."""

    def __init__(self, most: int) -> None:
        self._indices: dict[str, int] = {}
        self._most = most

    def index(self, value: str) -> int:
        found = self._indices.setdefault(value, len(self._indices))
        if found >= self._most:
            raise DataError(f"more than {self._most} different sources or answer types, such as {value!r}")
        return found

    @property
    def values(self) -> list[str]:
        return list(self._indices)


class _Strings:
    """A string column in the making."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.offsets = array("i", [0])

    def add(self, value: bytes) -> None:
        self.data += value
        self.offsets.append(len(self.data))

    def array(self) -> pa.StringArray:
        offsets, data = pa.py_buffer(self.offsets), pa.py_buffer(self.data)
        return pa.StringArray.from_buffers(len(self.offsets) - 1, offsets, data)


class _StringLists:
    """A column of lists of strings in the making."""

    def __init__(self) -> None:
        self.strings = _Strings()
        self.offsets = array("i", [0])

    def add(self, values: Sequence[bytes]) -> None:
        for value in values:
            self.strings.add(value)
        self.offsets.append(len(self.strings.offsets) - 1)

    def array(self, kind: pa.DataType) -> pa.ListArray:
        return _list_array(self.offsets, self.strings.array(), kind)


def _list_array(offsets: array, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[values])


class _Shard:
    """The rows of a shard before it is written."""

    def __init__(self) -> None:
        self.id = _Strings()
        self.images, self.turns = _StringLists(), _StringLists()
        self.sizes, self.size_offsets = array("i"), array("i", [0])
        self.source, self.answer_type = array("h"), array("h")
        self.where_file, self.where_line = array("i"), array("q")
        self.text_bytes, self.words = array("i"), array("i")

    @property
    def bytes(self) -> int:
        return len(self.turns.strings.data) + len(self.images.strings.data) + len(self.id.data)

    def record_batch(self) -> pa.RecordBatch:
        def numbers(name: str, values: array) -> pa.Array:
            return pa.Array.from_buffers(SCHEMA.field(name).type, len(values), [None, pa.py_buffer(values)])

        sizes = pa.Array.from_buffers(pa.int32(), len(self.sizes), [None, pa.py_buffer(self.sizes)])
        columns = [
            self.id.array(),
            numbers("source", self.source),
            self.images.array(SCHEMA.field("images").type),
            self.turns.array(SCHEMA.field("turns").type),
            _list_array(self.size_offsets, sizes, SCHEMA.field("image_sizes").type),
            numbers("answer_type", self.answer_type),
            numbers("where_file", self.where_file),
            numbers("where_line", self.where_line),
            numbers("text_bytes", self.text_bytes),
            numbers("words", self.words),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
