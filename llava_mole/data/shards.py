"""What every kind of shard has in common: samples, references to the images inside it, and checksums of its blocks.

Images stay in their shards. In a sample each image is replaced by a reference, a text such as
`shard:3:10240+51200:cat.jpg`: 51200 bytes from byte 10240 on of file 3 of the source. Parquet packs its columns, so a
reference into it (`shard:3.0:...`) counts in the unpacked bytes of all images of a row group, here row group 0.
"""

import re
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.images import LARGEST_IMAGE

BLOCK = 1 << 18
"""Bytes of a block, the unit in which data are checked and cached."""
_REFERENCE = re.compile(r"shard:(\d{1,9})(?:\.(\d{1,9}))?:(\d{1,18})\+(\d{1,9}):(.*)", re.DOTALL)
_LONGEST_NAME = 200


class Reference(NamedTuple):
    """Where an image lies."""

    file: int
    """Number of the file in its source."""
    group: int | None
    """Row group whose unpacked images are meant; None for the file itself."""
    offset: int
    size: int
    """Bytes."""
    name: str
    """The image's own name, for messages."""

    def __str__(self) -> str:
        part = "" if self.group is None else f".{self.group}"
        return f"shard:{self.file}{part}:{self.offset}+{self.size}:{self.name[-_LONGEST_NAME:]}"


def parse_reference(text: str) -> Reference | None:
    """The reference that a text is; None if it is a path."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        return None
    file, group, offset, size, name = found.groups()
    return Reference(int(file), None if group is None else int(group), int(offset), int(size), name)


class Sample(NamedTuple):
    """One raw sample of a shard."""

    value: Any
    """As parsed from JSON; images are references, or paths into the image folder."""
    key: str
    """Its name in the shard, or its row."""
    line: int
    """Its number in the file, from 1."""


@dataclass
class Checksums:
    """The size of a stream of bytes, and the CRC-32 of every `BLOCK` of it."""

    size: int = 0
    crcs: list[int] = field(default_factory=list)
    _rest: bytes = b""

    def add(self, data: bytes) -> None:
        """Take the next bytes; call `finish` after the last ones."""
        self.size += len(data)
        data = self._rest + data
        whole = len(data) - len(data) % BLOCK
        self.crcs += [zlib.crc32(data[start : start + BLOCK]) for start in range(0, whole, BLOCK)]
        self._rest = data[whole:]

    def finish(self) -> "Checksums":
        """Take the last block, which may be shorter."""
        if self._rest:
            self.crcs.append(zlib.crc32(self._rest))
        self._rest = b""
        return self


def check_image_size(size: int, where: str, name: str) -> None:
    """Raise DataError for an image of more than `LARGEST_IMAGE` bytes."""
    if size > LARGEST_IMAGE:
        raise DataError(f"{where}: image {name!r} has {size:,} bytes, it may have {LARGEST_IMAGE:,}; scale it down")
