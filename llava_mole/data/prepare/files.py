"""Finding raw files and reading their values one by one, whatever they are stored in."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.prepare.drafts import Defects, Split

JSON_SUFFIXES = (".json", ".jsonl")
ARROW_BATCH_ROWS = 64
"""Rows of a parquet or Arrow file in memory at a time: they may hold images of megabytes."""

_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|dev|test|testing)(?:[^a-z]|$)")
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> Split:
    """The split that a file or folder name speaks of; `train` where it speaks of none."""
    match = _SPLIT.search(name.lower())
    return _SPLIT_NAMES[match[1]] if match else "train"


def find_one(raw: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` (relative paths) that is a file below `raw`, or `raw` itself if it is a file.

    Raises:
        DataError: there is none of them.
    """
    if raw.is_file():
        return raw
    for name in names:
        if (raw / name).is_file():
            return raw / name
    raise DataError(f"{raw}: {what} is not there; looked for {', '.join(names)}")


def find_files(raw: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Every file below `raw` with one of the suffixes, sorted; `raw` itself if it is a file.

    Hidden files and folders are left out, and so are links to folders.

    Raises:
        DataError: there is none.
    """
    if raw.is_file():
        return [raw]
    found = sorted(
        path
        for path in raw.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(raw).parts)
    )
    if not found:
        raise DataError(f"{raw}: no {what} below it ({', '.join('*' + suffix for suffix in suffixes)})")
    return found


def show(path: Path, raw: Path) -> str:
    """Name of a raw file for `where`: relative to `--raw`, so that it does not depend on where that lies."""
    return path.name if path == raw else path.relative_to(raw).as_posix()


def read_values(path: Path, raw: Path, defects: Defects) -> Iterator[tuple[Any, str]]:
    """Every value of a JSON list or JSONL file with its `file:line`; lines that are no JSON are counted and skipped."""
    name = show(path, raw)

    def skip(line: int, problem: str) -> None:
        defects.add("bad-json", f"{name}:{line}", problem)

    for value, line in iterate_json(path, on_error=skip):
        yield value, f"{name}:{line}"


def read_rows(path: Path, raw: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Every row of a parquet file, an Arrow file or an Arrow stream, as plain values, with its `file:row` from 1.

    Raises:
        DataError: the file cannot be read, or lacks one of `columns`.
    """
    import pyarrow as pa

    name = show(path, raw)
    row = 0
    try:
        for batch in _batches(path, columns, name):
            for value in batch.to_pylist():
                row += 1
                yield value, f"{name}:{row}"
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # such as of dates that Python has not
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}:{row + 1}: cannot be read: {reason}; download the file again, or leave out that column"
        ) from None


def column_names(path: Path) -> list[str]:
    """Columns of a parquet or Arrow file. Raises DataError where it is neither."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with pa.memory_map(str(path)) as source:
            return list(_open_arrow(source).schema.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}; download the file again") from None


def _batches(path: Path, columns: Sequence[str] | None, name: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    absent = sorted(set(columns or ()) - set(column_names(path)))
    if absent:
        raise DataError(f"{name}: no column {', '.join(absent)}; there are {', '.join(column_names(path))}")
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=ARROW_BATCH_ROWS, columns=columns)
        return
    with pa.memory_map(str(path)) as source:
        reader = _open_arrow(source)
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        )
        for batch in batches:
            batch = batch.select(columns) if columns is not None else batch
            for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
                yield batch.slice(start, ARROW_BATCH_ROWS)


def _open_arrow(source: Any) -> Any:
    """Reader of an Arrow file or, as `datasets` saves them, an Arrow stream."""
    import pyarrow as pa

    if bytes(source.read(6)) == b"ARROW1":
        source.seek(0)
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)
