"""Arrow files of `datasets` (`save_to_disk`) and parquet files whose images are bytes in a column.

In an Arrow file the bytes of a value lie in one piece, so references point into the file itself. Parquet compresses and
encodes its columns: its references count in the unpacked images of a row group, see `unpacked_images`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llava_mole.common.errors import DataError
from llava_mole.data.shards import Checksums, Reference, Sample, check_image_size

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAGIC = b"ARROW1"


@dataclass
class ImageColumn:
    """The values of a column of images in one batch."""

    data: pa.Buffer | None
    offsets: npt.NDArray[Any]
    """[n + 1] of the values in `data`."""
    valid: npt.NDArray[np.bool_]
    """[n], False for null."""
    paths: list[str | None]
    """[n], or empty if there are none."""
    cells: list[range]
    """For each row its values."""

    def bytes(self) -> bytes:
        """All values, one after the other."""
        return b"" if self.data is None else self.data[int(self.offsets[0]) : int(self.offsets[-1])].to_pybytes()


def is_media(kind: pa.DataType) -> bool:
    """Whether a column holds bytes: `binary`, a struct with `bytes` (an image of `datasets`), or lists of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_media(kind.value_type)
    if pa.types.is_struct(kind):
        return any(part.name == "bytes" and is_media(part.type) for part in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def image_column(schema: pa.Schema, name: str) -> str | None:
    """The column with images as bytes; None without one.

    Args:
        name: Of the file, for messages.

    Raises:
        DataError: several columns hold bytes, and none is called `image` or `images`.
    """
    found = [column for column, kind in zip(schema.names, schema.types, strict=True) if is_media(kind)]
    chosen = [column for column in ("images", "image") if column in found] or found
    if len(found) > 1 and chosen is found:
        raise DataError(
            f"{name}: columns {', '.join(found)} all hold bytes; call the one with the images 'image' or 'images'"
        )
    return chosen[0] if chosen else None


def read_images(column: pa.Array) -> ImageColumn:
    """Where the values of a column of images lie."""
    rows, paths = len(column), list[str | None]()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        ends = column.offsets.to_numpy().astype(np.int64)
        filled = column.is_valid().to_numpy(zero_copy_only=False)
        bounds = zip(ends[:-1] - ends[0], ends[1:] - ends[0], filled, strict=True)
        cells = [range(int(first), int(last)) if valid else range(0) for first, last, valid in bounds]
        column = column.values.slice(int(ends[0]), int(ends[-1] - ends[0]))
    else:
        cells = [range(row, row + 1) for row in range(rows)]
    if pa.types.is_struct(column.type):
        parts = dict(zip([part.name for part in column.type], column.flatten(), strict=True))
        column = parts["bytes"]
        if "path" in parts and pa.types.is_string(parts["path"].type):
            paths = parts["path"].to_pylist()
    _, ends_buffer, data = column.buffers()
    wide: Any = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets: npt.NDArray[Any] = np.zeros(1, wide)
    if ends_buffer is not None and len(column):
        offsets = np.frombuffer(ends_buffer, wide)[column.offset : column.offset + len(column) + 1]
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return ImageColumn(data, offsets, valid, paths, cells)


def arrow_samples(path: Path, number: int, name: str, columns: dict[str, str]) -> Iterator[Sample]:
    """Yield the rows of an Arrow file or stream.

    Args:
        path, number, name: See `tar_samples`.
        columns: Receives the columns' names and types.

    Raises:
        DataError: the file ends early or is compressed, or a column cannot be used.
        ArrowException, OSError: it is damaged.
    """
    with pa.memory_map(str(path)) as source:
        is_file = bytes(source.read(len(_MAGIC))) == _MAGIC
        mark = _MAGIC if is_file else _END_OF_STREAM
        source.seek(max(0, source.size() - len(mark)))
        if bytes(source.read(len(mark))) != mark:
            raise DataError(f"{name}: is cut short: it has no end mark; write or download it again")
        source.seek(8 if is_file else 0)
        schema = pa.ipc.read_schema(source)
        columns.update(zip(schema.names, map(str, schema.types), strict=True))
        media, line = image_column(schema, name), 0
        while True:
            try:
                message = pa.ipc.read_message(source)
            except EOFError:
                return
            if message.type != "record batch":
                raise DataError(f"{name}: has a column of categories (dictionary), which is not read; write it as text")
            batch = pa.ipc.read_record_batch(message, schema)
            body = message.body
            start = source.tell() - body.size
            images = None if media is None else read_images(batch.column(media))
            first = 0
            if images is not None and images.data is not None and images.data.size:
                first = images.data.address - body.address
                if not 0 <= first <= body.size - images.data.size:
                    raise DataError(f"{name}: is compressed, so images cannot be read in place; write it uncompressed")
            yield from _rows(batch, images, start + first, number, None, name, line, media)
            line += batch.num_rows


def parquet_samples(
    path: Path, number: int, name: str, columns: dict[str, str], streams: dict[int, Checksums]
) -> Iterator[Sample]:
    """Yield the rows of a parquet file.

    Args:
        path, number, name, columns: See `arrow_samples`.
        streams: Receives the checksums of the unpacked images of each row group.

    Raises:
        DataError: a column cannot be used.
        ArrowException, OSError: the file is damaged.
    """
    import pyarrow.parquet as pq

    line = 0
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        columns.update(zip(schema.names, map(str, schema.types), strict=True))
        media = image_column(schema, name)
        for group in range(file.num_row_groups):
            unpacked = Checksums()
            for batch in file.read_row_group(group).to_batches():
                images, at = None, unpacked.size
                if media is not None:
                    images = read_images(batch.column(media))
                    at -= int(images.offsets[0])
                    unpacked.add(images.bytes())
                yield from _rows(batch, images, at, number, group, name, line, media)
                line += batch.num_rows
            if media is not None:
                streams[group] = unpacked.finish()


def unpacked_images(file: Any, group: int) -> bytes:
    """The bytes of all images of a row group one after the other, as references count them.

    Args:
        file: Path or open file of a parquet file.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        media = image_column(opened.schema_arrow, "the file")
        batches = opened.read_row_group(group, columns=[media]).to_batches()
        return b"".join(read_images(batch.column(0)).bytes() for batch in batches)


def _rows(
    batch: pa.RecordBatch,
    images: ImageColumn | None,
    start: int,
    number: int,
    group: int | None,
    name: str,
    line: int,
    media: str | None,
) -> Iterator[Sample]:
    kept = [column for column, kind in zip(batch.schema.names, batch.schema.types, strict=True) if not is_media(kind)]
    for row, given in enumerate(batch.select(kept).to_pylist()):
        line += 1
        value = {key: content for key, content in given.items() if content is not None}  # tables have nulls
        found = [] if images is None else _places(images, row, start, number, group, f"{name}:{line}", str(media))
        if found:
            value.pop("image", None)
            value["images"] = found
        yield Sample(value, str(line), line)


def _places(
    images: ImageColumn, row: int, start: int, number: int, group: int | None, where: str, media: str
) -> list[str]:
    """References to the images of a row, and paths of images that have no bytes."""
    found = []
    for n in images.cells[row]:
        own = images.paths[n] if images.paths else None
        if images.valid[n]:
            offset, size = int(images.offsets[n]), int(images.offsets[n + 1] - images.offsets[n])
            check_image_size(size, where, own or media)
            found.append(str(Reference(number, group, start + offset, size, own or media)))
        elif own:
            found.append(own)
    return found
