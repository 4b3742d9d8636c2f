"""Prepared data sets: written once, then opened by memory map in every process.

`json.load` of a million records takes seconds and more than a gigabyte in every rank and worker. A prepared set opens
in milliseconds, its pages are shared through the page cache, and a record is decoded when it is asked for.

A set is a directory of `shard-*.arrow` files (uncompressed Arrow, one record batch of `SCHEMA` each) and a
`manifest.json`: rows, names of sub-sources, raw files and answer types (columns hold their indices), size and SHA-256
of every shard, and a hash of the manifest itself.
"""

import json
import os
import platform
import shutil
import struct
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import llava_mole
from llava_mole.common.errors import DataError
from llava_mole.common.files import sha256_of, sha256_of_json, sync
from llava_mole.common.log import get_logger
from llava_mole.common.text import UNPAIRED_SURROGATE
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.records import Record, RecordSubset, parse_record

logger = get_logger(__name__)

FORMAT = "llava_mole.prepared/1"
MANIFEST = "manifest.json"
SELF_HASH = "manifest_sha256"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.int16(), nullable=False),
        pa.field("images", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        pa.field("turns", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        pa.field("image_sizes", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("answer_type", pa.int16(), nullable=False),
        pa.field("where_file", pa.int32(), nullable=False),
        pa.field("where_line", pa.int64(), nullable=False),
        pa.field("text_bytes", pa.int32(), nullable=False),
        pa.field("words", pa.int32(), nullable=False),
    ]
)
"""`turns` alternate, user first. `image_sizes` holds width and height in turn, or nothing if no image was opened.
`source`, `answer_type` (-1: none) and `where_file` index the manifest's names."""
SHARD_BYTES = 64 << 20
"""Bytes of text after which a shard is written, which bounds the writer's memory."""
_LARGEST_ROW = 1 << 30
"""Bytes of text in a row; the offsets in a shard are 32 bits wide."""
_ROLES = ("user", "assistant")
_WORD_MARKS = bytes(b" x"[not chr(value).isspace()] for value in range(256))
"""ASCII white space becomes a space, every other byte an x."""


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory with a manifest, valid or not."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without the field that holds it."""
    return sha256_of_json({key: value for key, value in manifest.items() if key != SELF_HASH})


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared data set. The size of every shard is checked.

    Raises:
        DataError: not a prepared data set, another format, a manifest that differs from what was written, or a shard
            that is missing or has another size.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    again = "prepare the data set again"
    if not path.is_file():
        raise DataError(
            f"{directory}: no {MANIFEST}, so not a prepared data set; give a directory that `prepare --out` wrote"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())}); {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{path}: format {found!r}, but this version reads {FORMAT!r}; {again}")
    if manifest.get(SELF_HASH) != manifest_hash(manifest):
        raise DataError(f"{path}: damaged (it differs from what was written); {again}")
    for shard in manifest["shards"]:
        file = directory / shard["file"]
        try:
            size = file.stat().st_size
        except OSError:
            raise DataError(f"{directory}: incomplete, {shard['file']} is missing; {again}") from None
        if size != shard["bytes"]:
            raise DataError(
                f"{directory}: damaged, {shard['file']} has {size} bytes where {shard['bytes']} were written; {again}"
            )
    return manifest


def verify_shards(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every byte and compare it with the manifest, which is returned. Raises DataError that names the file."""
    manifest = read_manifest(directory)
    for shard in manifest["shards"]:
        if sha256_of(Path(directory) / shard["file"]) != shard["sha256"]:
            raise DataError(
                f"{directory}: damaged, {shard['file']} differs from what was written (sha256); prepare it again"
            )
    return manifest


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One record to be written: the fields of `Record`, and what only the raw data know."""

    id: str
    source: str
    """Sub-source, such as `coco`."""
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    """User first, alternating, with one `<image>` per image in the user turns."""
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) of each image; empty if the images were not opened."""
    answer_type: str | None
    where: str
    """`file:line` of the raw record."""


class StoreWriter:
    """Writes a prepared data set under a temporary name and renames it when it is complete.

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
        self._shard = _Shard()
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
            DataError: the turns do not alternate, the markers do not match the images, or a text is not UTF-8; the
                message starts with `where`. Or the disk is full.
        """
        file, _, line = row.where.rpartition(":")
        if not file or not line.isdecimal():
            raise ValueError(f"{row.where!r} is not of the form file:line")
        _check_row(row)
        try:
            texts = [turn.text.encode() for turn in row.turns]
            identifier, images = row.id.encode(), [image.encode() for image in row.images]
        except UnicodeEncodeError:
            raise DataError(f"{row.where}: {UNPAIRED_SURROGATE}") from None
        text_bytes = sum(map(len, texts))
        if text_bytes > _LARGEST_ROW:
            raise DataError(f"{row.where}: {text_bytes} bytes of text; a record may have {_LARGEST_ROW}; shorten it")
        shard = self._shard
        shard.id.add(identifier)
        shard.source.append(self._sources.index(row.source))
        shard.images.add(images)
        shard.turns.add(texts)
        shard.sizes.extend(side for pair in row.image_sizes for side in pair)
        shard.size_offsets.append(len(shard.sizes))
        shard.answer_type.append(-1 if row.answer_type is None else self._answer_types.index(row.answer_type))
        shard.where_file.append(self._files.index(file))
        shard.where_line.append(int(line))
        shard.text_bytes.append(text_bytes)
        shard.words.append(sum(map(_count_words, row.turns, texts)))
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
            (self._temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            sync(self._temporary / MANIFEST)
            sync(self._temporary)
            if self.directory.exists():
                self.directory.rmdir()  # empty, else the constructor would have refused
            os.replace(self._temporary, self.directory)
            sync(self.directory.parent)
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
        if not self._shard.text_bytes:
            return
        batch, self._shard = self._shard.record_batch(), _Shard()
        path = self._temporary / f"shard-{len(self._shards):05d}.arrow"
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                writer.write_batch(batch)
            sync(path)
            entry = {"file": path.name, "rows": batch.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            self.close()
            raise DataError(f"{self.directory}: cannot be written: {error.strerror or error}") from None
        self._shards.append(entry)


def _check_row(row: PreparedRow) -> None:
    markers = 0
    for index, turn in enumerate(row.turns):
        if turn.role != _ROLES[index % 2]:
            turns = f"turns {index} and {index + 1}"
            raise DataError(f"{row.where}: two consecutive turns from the {turn.role} ({turns}); they must alternate")
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
    """`len(text.split())`, without making the list, which took a third of the time of `add`."""
    if not turn.text.isascii():
        return len(turn.text.split())
    marks = encoded.translate(_WORD_MARKS)
    return marks.count(b" x") + marks.startswith(b"x")


class _Names:
    """Numbers names in the order in which they first occur."""

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
    """A string column under construction."""

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
    """A column of lists of strings under construction."""

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
    """The rows of a shard before it is written, in Arrow's layout.

    Arrays of pyarrow's that are made from Python lists would take 1.5 times the memory of the whole process.
    """

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


class PreparedRecords(Sequence[Record]):
    """The records of a prepared data set.

    A pickled copy opens the files again, so a loader worker costs no memory of its own. A record is cut out of the
    mapped buffers by its offsets, which takes a quarter of the time of pyarrow's `to_pylist` on a row.

    Args:
        directory: Written by `StoreWriter`.
        source: Name of the data set in the configuration, `Record.source` of every record.

    Raises:
        DataError: as `read_manifest`; or a shard is not an Arrow file of this layout.
    """

    def __init__(self, directory: str | os.PathLike[str], source: str) -> None:
        self.directory = Path(directory)
        self.source = source
        self.manifest = read_manifest(self.directory)
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])
        """Names of the sub-sources, in the order of column `source`."""
        self._files: list[str] = self.manifest["files"]
        self._answer_types: list[str] = self.manifest["answer_types"]
        self._shards = [
            _MappedShard(self.directory / entry["file"], entry["rows"]) for entry in self.manifest["shards"]
        ]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.rows)
        if self._starts[-1] != self.manifest["rows"]:
            raise DataError(f"{self.directory}: damaged, its shards do not have the rows of its manifest")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) that covers the manifest and so every shard."""
        return self.manifest[SELF_HASH]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Record number `index`. Raises DataError if the shard's bytes are not a record."""
        if isinstance(index, slice):
            return RecordSubset(self, np.arange(len(self))[index])
        shard, row = self._locate(index)
        try:
            file = self._files[shard.where_file[row]]
            images = shard.images.get(row)
            return Record(
                shard.id.get(row), images, shard.turn_tuple(row), self.source, f"{file}:{shard.where_line[row]}"
            )
        except (UnicodeDecodeError, IndexError) as error:
            raise self._damaged(index, error) from None

    def row(self, index: int) -> PreparedRow:
        """Record number `index` with its sub-source, image sizes and answer type. Raises DataError as `[index]`."""
        record = self[index]
        shard, row = self._locate(index)
        sides = shard.sizes[shard.size_offsets[row] : shard.size_offsets[row + 1]].tolist()
        try:
            kind = shard.answer_type[row]
            return PreparedRow(
                id=record.id,
                source=self.sources[shard.source[row]],
                images=record.images,
                turns=record.turns,
                image_sizes=tuple(zip(sides[::2], sides[1::2], strict=True)),
                answer_type=None if kind < 0 else self._answer_types[kind],
                where=record.where,
            )
        except (ValueError, IndexError) as error:
            raise self._damaged(index, error) from None

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers for all rows, in memory: `source`, `answer_type`, `where_file`, `where_line`,
        `text_bytes`, `words` (types as in `SCHEMA`), or int32 `num_images`, `num_turns`."""
        try:
            return np.concatenate([shard.numbers(name) for shard in self._shards])
        except ValueError as error:
            raise DataError(f"{self.directory}: damaged, column {name} is cut short ({error})") from None

    def rows_without_answer(self) -> npt.NDArray[np.int64]:
        """Rows, ascending, that may have no answer: none of their answers begins with a visible ASCII character.

        Raises:
            DataError: the shards' bytes are not records.
        """
        try:
            parts = [
                start + shard.rows_without_answer() for start, shard in zip(self._starts, self._shards, strict=False)
            ]
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.directory}: damaged, turns cannot be found ({error}); prepare it again") from None
        return np.concatenate(parts)

    def _locate(self, index: int) -> tuple["_MappedShard", int]:
        size = self._starts[-1]
        position = index + size if index < 0 else index
        if not 0 <= position < size:
            raise IndexError(f"record {index} of a data set with {size}")
        number = bisect_right(self._starts, position) - 1
        return self._shards[number], position - self._starts[number]

    def _damaged(self, index: int, error: Exception) -> DataError:
        return DataError(f"{self.directory}: damaged, record {index} cannot be decoded ({error}); prepare it again")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.directory), self.source, self.digest)


def _reopen(directory: str, source: str, digest: str) -> PreparedRecords:
    records = PreparedRecords(directory, source)
    if records.digest != digest:
        raise DataError(f"{directory}: was prepared again while it was in use; start again")
    return records


class _MappedStrings:
    """A mapped string column."""

    def __init__(self, offsets: pa.Buffer | None, data: pa.Buffer | None) -> None:
        self.offsets = _view(offsets, "i")
        self.data = _view(data, "B")

    def get(self, index: int) -> str:
        return str(self.data[self.offsets[index] : self.offsets[index + 1]], "utf-8")


class _MappedStringLists:
    """A mapped column of lists of strings."""

    def __init__(self, buffers: Sequence[pa.Buffer | None]) -> None:
        self.offsets = _view(buffers[1], "i")
        self.strings = _MappedStrings(buffers[3], buffers[4])

    def get(self, index: int) -> tuple[str, ...]:
        get = self.strings.get
        return tuple([get(n) for n in range(self.offsets[index], self.offsets[index + 1])])


class _MappedShard:
    """The buffers of one mapped shard."""

    def __init__(self, path: Path, rows: int) -> None:
        try:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                fits = reader.schema.equals(SCHEMA) and reader.num_record_batches == 1
                batch = reader.get_batch(0) if fits else None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: not an Arrow file ({' '.join(str(error).split())}); prepare it again") from None
        if batch is None or batch.num_rows != rows:
            raise DataError(f"{path}: not the columns or rows that its manifest promises; prepare it again")
        self.rows = rows
        buffers = {field.name: batch.column(field.name).buffers() for field in SCHEMA}
        self.id = _MappedStrings(*buffers["id"][1:])
        self.images = _MappedStringLists(buffers["images"])
        self.turns = _MappedStringLists(buffers["turns"])
        self.size_offsets = _view(buffers["image_sizes"][1], "i")
        self.sizes = _view(buffers["image_sizes"][3], "i")
        self.source = _view(buffers["source"][1], "h")
        self.answer_type = _view(buffers["answer_type"][1], "h")
        self.where_file = _view(buffers["where_file"][1], "i")
        self.where_line = _view(buffers["where_line"][1], "q")
        self._buffers = buffers

    def turn_tuple(self, row: int) -> tuple[Turn, ...]:
        get, first = self.turns.strings.get, self.turns.offsets[row]
        return tuple([Turn(_ROLES[(n - first) & 1], get(n)) for n in range(first, self.turns.offsets[row + 1])])  # type: ignore[arg-type]

    def rows_without_answer(self) -> npt.NDArray[np.int64]:
        rounds = np.frombuffer(self.turns.offsets, np.int32, self.rows + 1).astype(np.int64)
        texts = np.frombuffer(self.turns.strings.offsets, np.int32, int(rounds[-1]) + 1)
        data = np.frombuffer(self.turns.strings.data, np.uint8)
        row_of = np.repeat(np.arange(self.rows), np.diff(rounds))
        answers = np.flatnonzero((np.arange(len(row_of)) - rounds[row_of]) % 2 & (np.diff(texts) > 0))
        first = data[texts[answers]]
        answered = np.zeros(self.rows, dtype=bool)
        answered[row_of[answers[(first > 32) & (first < 127)]]] = True
        return np.flatnonzero(~answered)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        if name in ("num_images", "num_turns"):
            lists = self.images if name == "num_images" else self.turns
            return np.diff(np.frombuffer(lists.offsets, np.int32, self.rows + 1))
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        return np.frombuffer(self._buffers[name][1], kind, self.rows)


def _view(buffer: pa.Buffer | None, kind: str) -> memoryview:
    """The bytes of a column as items of `kind` (of `struct`). Arrow has no buffer for an empty column."""
    view = memoryview(buffer if buffer is not None else b"").cast("B")
    return view[: len(view) - len(view) % struct.calcsize(kind)].cast(kind)  # type: ignore[call-overload]  # its literals


def read_records(path: str | os.PathLike[str], source: str) -> Sequence[Record]:
    """The records of `path`: a prepared data set if it is a directory, JSONL if its name ends in `.jsonl`, else a JSON
    list. A prepared set is opened lazily; a file is read and checked to its end.

    Args:
        path: Annotation file, UTF-8, or directory.
        source: Name of the dataset, stored in each record.

    Raises:
        DataError: the file is missing or empty, or a record in it is wrong; the message starts with `file:line`.
    """
    path = Path(path)
    if is_prepared(path):
        return PreparedRecords(path, source)
    if path.is_dir():
        raise DataError(f"{path}: cannot read the annotation file: it is a directory without {MANIFEST}")
    if not path.exists():
        raise DataError(f"{path}: the annotation file does not exist; check data.sources.<name>.annotations")
    records = []
    dropped = 0
    for value, line in iterate_json(path):
        record, without_question = parse_record(value, source, f"{path}:{line}")
        dropped += without_question
        records.append(record)
    if not records:
        raise DataError(f"{path}:1: the file holds no record; give at least one or take the source out of data.sources")
    if dropped:
        logger.warning("%s: left out the first answer of %d records, which no question precedes", path, dropped)
    return records
