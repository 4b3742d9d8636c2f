"""Records of a prepared data set, read through memory maps: nothing is decoded before it is asked for.

The buffers of the Arrow columns are taken once a shard, and a record is cut out of them by its offsets: a quarter of
the time of pyarrow's `to_pylist` on a row.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llava_mole.common.errors import DataError
from llava_mole.conversation import Turn
from llava_mole.data.records import Record
from llava_mole.data.store_format import SCHEMA, SELF_HASH, read_manifest
from llava_mole.data.subset import RecordSubset

if TYPE_CHECKING:
    from llava_mole.data.store import PreparedRow

_ROLES = ("user", "assistant")


class PreparedRecords(Sequence[Record]):
    """The records of a prepared data set.

    Can be pickled: the copy opens the files again, so a loader worker costs no memory of its own.

    Args:
        directory: Written by `StoreWriter`.
        source: Name of the data set in the configuration, `Record.source` of every record.

    Raises:
        DataError: see `store_format.read_manifest`; or a shard is no Arrow file of this layout.
    """

    def __init__(self, directory: str | os.PathLike[str], source: str) -> None:
        self.directory = Path(directory)
        self.source = source
        self.manifest = read_manifest(self.directory)
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])
        """Names of the sub-sources, in the order of column `source`."""
        self._files: list[str] = self.manifest["files"]
        self._answer_types: list[str] = self.manifest["answer_types"]
        self._shards = [_Shard(self.directory / entry["file"], entry["rows"]) for entry in self.manifest["shards"]]
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
        """Record number `index`. Raises DataError where the shard's bytes are no record."""
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

    def row(self, index: int) -> "PreparedRow":
        """Record number `index` with its sub-source, image sizes and answer type. Raises DataError as `[index]`."""
        from llava_mole.data.store import PreparedRow

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
        `text_bytes`, `words` (types as in `store_format`), or int32 `num_images`, `num_turns`."""
        try:
            return np.concatenate([shard.numbers(name) for shard in self._shards])
        except ValueError as error:
            raise DataError(f"{self.directory}: damaged, column {name} is cut short ({error})") from None

    def quiet_rows(self) -> npt.NDArray[np.int64]:
        """Rows, ascending, none of whose answers begins with a visible ASCII character: all without an answer are
        among them. Raises DataError where the shards' bytes are no records."""
        try:
            parts = [start + shard.quiet_rows() for start, shard in zip(self._starts, self._shards, strict=False)]
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.directory}: damaged, turns cannot be found ({error}); prepare it again") from None
        return np.concatenate(parts)

    def _locate(self, index: int) -> tuple["_Shard", int]:
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
        raise DataError(f"{directory}: has been prepared anew while it was in use; start again")
    return records


class _Strings:
    """A mapped string column."""

    def __init__(self, offsets: pa.Buffer | None, data: pa.Buffer | None) -> None:
        self.offsets = _view(offsets, "i")
        self.data = _view(data, "B")

    def get(self, index: int) -> str:
        return str(self.data[self.offsets[index] : self.offsets[index + 1]], "utf-8")


class _StringLists:
    """A mapped column of lists of strings."""

    def __init__(self, buffers: Sequence[pa.Buffer | None]) -> None:
        self.offsets = _view(buffers[1], "i")
        self.strings = _Strings(buffers[3], buffers[4])

    def get(self, index: int) -> tuple[str, ...]:
        get = self.strings.get
        return tuple([get(n) for n in range(self.offsets[index], self.offsets[index + 1])])


class _Shard:
    """The buffers of one mapped shard."""

    def __init__(self, path: Path, rows: int) -> None:
        try:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                fits = reader.schema.equals(SCHEMA) and reader.num_record_batches == 1
                batch = reader.get_batch(0) if fits else None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: no Arrow file ({' '.join(str(error).split())}); prepare it again") from None
        if batch is None or batch.num_rows != rows:
            raise DataError(f"{path}: not the columns or rows that its manifest promises; prepare it again")
        self.rows = rows
        buffers = {field.name: batch.column(field.name).buffers() for field in SCHEMA}
        self.id = _Strings(*buffers["id"][1:])
        self.images = _StringLists(buffers["images"])
        self.turns = _StringLists(buffers["turns"])
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

    def quiet_rows(self) -> npt.NDArray[np.int64]:
        rounds = np.frombuffer(self.turns.offsets, np.int32, self.rows + 1).astype(np.int64)
        texts = np.frombuffer(self.turns.strings.offsets, np.int32, int(rounds[-1]) + 1)
        data = np.frombuffer(self.turns.strings.data, np.uint8)
        row_of = np.repeat(np.arange(self.rows), np.diff(rounds))
        answers = np.flatnonzero((np.arange(len(row_of)) - rounds[row_of]) % 2 & (np.diff(texts) > 0))
        first = data[texts[answers]]
        heard = np.zeros(self.rows, dtype=bool)
        heard[row_of[answers[(first > 32) & (first < 127)]]] = True
        return np.flatnonzero(~heard)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        if name in ("num_images", "num_turns"):
            lists = self.images if name == "num_images" else self.turns
            return np.diff(np.frombuffer(lists.offsets, np.int32, self.rows + 1))
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        return np.frombuffer(self._buffers[name][1], kind, self.rows)


def _view(buffer: pa.Buffer | None, kind: str) -> memoryview:
    """The bytes of a column as `kind` (of `struct`); Arrow gives none for a column without any."""
    view = memoryview(buffer if buffer is not None else b"").cast("B")
    return view[: len(view) - len(view) % struct.calcsize(kind)].cast(kind)  # type: ignore[call-overload]  # its literals
