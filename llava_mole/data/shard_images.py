"""The bytes of images that lie in shards or in a remote folder, read in place.

Local tar and Arrow files are read where they are. All else passes through the cache in blocks of `BLOCK` bytes, each
compared with the CRC-32 that the index has: ranges of remote files, and the unpacked images of parquet row groups.
"""

import io
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError, StorageError
from llava_mole.common.log import get_logger
from llava_mole.config import is_remote
from llava_mole.data.block_cache import BlockCache
from llava_mole.data.prepare.images import LARGEST_IMAGE, path_problem
from llava_mole.data.remote import CONTINUE, DOWNLOAD_BYTES, Access, ask, filesystem, gone, read_range
from llava_mole.data.shard_files import ShardFile
from llava_mole.data.shards import BLOCK, Reference
from llava_mole.data.table_shard import unpacked_images

REQUESTS = 16
"""Requests that a process makes at a time."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Storage:
    """How data are reached and kept, see section `data` of the configuration."""

    cache_dir: Path
    cache_bytes: int
    access: Access = field(default_factory=Access)

    def cache(self) -> BlockCache:
        """The cache of blocks."""
        return BlockCache(self.cache_dir / "blocks", self.cache_bytes)


class Stream(NamedTuple):
    """Bytes that references point into: a file, or the unpacked images of a row group."""

    file: int
    group: int | None
    size: int
    first: int
    """Index of the checksum of its first block."""


class ShardImages:
    """Images inside the shards of one source; can be pickled into loader workers.

    Args:
        files: The shards, in the order of their numbers.
        streams: What references point into, except local files.
        crcs: File with the checksums of all streams, uint32.
        storage: Cache, time limits.
    """

    def __init__(self, files: list[ShardFile], streams: list[Stream], crcs: Path, storage: Storage) -> None:
        self._files, self._crcs_file, self._storage = files, crcs, storage
        self._streams = {(stream.file, stream.group): stream for stream in streams}
        self._remote = [is_remote(file.path) for file in files]
        unpacked = sum(stream.size for stream in streams if stream.group is not None)
        self._keeps_unpacked = unpacked <= storage.cache_bytes
        if not self._keeps_unpacked:
            logger.warning(
                "%s: its unpacked images (%.1f GB) are more than data.cache_gb (%.1f), so every image costs the "
                "reading of a row group; raise data.cache_gb, or convert the source with `llava-mole prepare`",
                files[0].path,
                unpacked / 1e9,
                storage.cache_bytes / 1e9,
            )
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._opened: dict[int, int] = {}
        self._cache = self._storage.cache()
        self._crcs: npt.NDArray[np.uint32] | None = None
        self._held: dict[tuple[Stream, int], bytes] = {}
        self._unpacked: tuple[Stream, bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        volatile = ("_opened", "_cache", "_crcs", "_held", "_unpacked", "_process")
        return {key: value for key, value in self.__dict__.items() if key not in volatile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def is_distant(self) -> bool:
        """Whether a shard is on a server."""
        return any(self._remote)

    def read(self, place: Reference) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: there is no such place; a record has made the reference up.
            StorageError: the shard cannot be read, or is not what was indexed.
        """
        if self._process != os.getpid():  # a forked worker
            self._reset()
        if not self._exists(place):
            raise DataError(f"image {str(place)!r} does not lie in the shards")
        if place.group is None and not self._remote[place.file]:
            return self._read_local(place)
        stream = self._streams[place.file, place.group]
        return self._bytes(stream, place.offset, place.offset + place.size)

    def prefetch(self, places: Iterable[Reference]) -> None:
        """Fetch what images need from servers, at once, and hold it until the next call.

        Raises:
            StorageError: as `read`.
        """
        if self._process != os.getpid():
            self._reset()
        self._held = {}
        wanted: dict[Stream, set[int]] = {}
        for place in places:
            if place.group is None and self._exists(place) and self._remote[place.file]:
                blocks = range(place.offset // BLOCK, -(-(place.offset + place.size) // BLOCK))
                wanted.setdefault(self._streams[place.file, None], set()).update(blocks)
        runs = [
            (stream, run)
            for stream, blocks in wanted.items()
            for run in _runs(n for n in sorted(blocks) if not self._cache.has(self._name(stream, n)))
        ]
        if len(runs) > 1:
            with ThreadPoolExecutor(min(REQUESTS, len(runs))) as pool:
                for fetched in pool.map(lambda job: self._fetch(*job), runs):
                    self._held.update(fetched)

    def _exists(self, place: Reference) -> bool:
        if place.file >= len(self._files):
            return False
        if place.group is None and not self._remote[place.file]:
            size = self._files[place.file].size
        else:
            stream = self._streams.get((place.file, place.group))
            size = 0 if stream is None else stream.size
        return place.offset + place.size <= size

    def _read_local(self, place: Reference) -> bytes:
        file = self._files[place.file]
        try:
            if place.file not in self._opened:
                if len(self._opened) >= 256:
                    os.close(self._opened.pop(next(iter(self._opened))))
                descriptor = os.open(file.path, os.O_RDONLY)
                status = os.fstat(descriptor)
                if (status.st_size, str(status.st_mtime_ns)) != (file.size, file.tag):
                    os.close(descriptor)
                    raise self._changed(file)
                self._opened[place.file] = descriptor
            data = os.pread(self._opened[place.file], place.size, place.offset)
        except OSError as error:
            raise StorageError(f"{file.path}: cannot be read: {error.strerror}; {CONTINUE}") from None
        if len(data) != place.size:
            raise self._changed(file)
        return data

    def _changed(self, file: ShardFile) -> StorageError:
        return StorageError(
            f"{file.path}: is not the file that was indexed when this run started; bring that one back and continue "
            "with --train.resume auto, or start a new run, which indexes it again"
        )

    # Blocks

    def _bytes(self, stream: Stream, start: int, stop: int) -> bytes:
        first, last = start // BLOCK, -(-stop // BLOCK)
        blocks: dict[int, bytes] = {}
        for n in range(first, last):
            found = self._held.get((stream, n)) or self._cache.get(self._name(stream, n), self._size(stream, n))
            if found is not None:
                blocks[n] = found
        for run in _runs(n for n in range(first, last) if n not in blocks):
            blocks.update({n: data for (_, n), data in self._fetch(stream, run).items()})
        joined = blocks[first] if last - first == 1 else b"".join(blocks[n] for n in range(first, last))
        return joined[start - first * BLOCK : stop - first * BLOCK]

    def _fetch(self, stream: Stream, run: range) -> dict[tuple[Stream, int], bytes]:
        """The blocks of a run, from the server or by unpacking, checked and added to the cache."""
        start, stop = run.start * BLOCK, min(run.stop * BLOCK, stream.size)
        file = self._files[stream.file]
        if stream.group is None:

            def problem(data: bytes) -> str | None:
                if all(self._is_sound(stream, n, data[(n - run.start) * BLOCK :][:BLOCK]) for n in run):
                    return None
                return "the bytes differ from those that were indexed (damaged on the way, or another file)"

            data = read_range(file.path, start, stop, self._storage.access, problem)
        else:
            data = self._unpack(stream)
            if self._keeps_unpacked:
                for n in range(-(-stream.size // BLOCK)):
                    self._cache.put(self._name(stream, n), data[n * BLOCK : (n + 1) * BLOCK])
            return {(stream, n): data[n * BLOCK : (n + 1) * BLOCK] for n in run}
        found = {(stream, n): data[(n - run.start) * BLOCK :][:BLOCK] for n in run}
        for (_, n), block in found.items():
            self._cache.put(self._name(stream, n), block)
        return found

    def _unpack(self, stream: Stream) -> bytes:
        if self._unpacked is not None and self._unpacked[0] == stream:
            return self._unpacked[1]
        import pyarrow as pa

        file = self._files[stream.file]
        raw = self._streams.get((stream.file, None))
        try:
            source = file.path if raw is None else pa.PythonFile(_StreamFile(self, raw), mode="r")
            data = unpacked_images(source, stream.group or 0)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"{file.path}: cannot be read: {' '.join(str(error).split())}; {CONTINUE}") from None
        blocks = range(-(-stream.size // BLOCK))
        if len(data) != stream.size or not all(
            self._is_sound(stream, n, data[n * BLOCK : (n + 1) * BLOCK]) for n in blocks
        ):
            raise self._changed(file)
        self._unpacked = (stream, data)
        return data

    def _is_sound(self, stream: Stream, n: int, block: bytes) -> bool:
        if self._crcs is None:
            self._crcs = np.load(self._crcs_file, mmap_mode="r", allow_pickle=False)
        return zlib.crc32(block) == int(self._crcs[stream.first + n])

    def _name(self, stream: Stream, n: int) -> str:
        return block_name(self._files[stream.file], stream.group, n)

    @staticmethod
    def _size(stream: Stream, n: int) -> int:
        return min(BLOCK, stream.size - n * BLOCK)


def block_name(file: ShardFile, group: int | None, n: int) -> str:
    """The name of a block in the cache."""
    return f"{file.key}.{'' if group is None else group}.{n}"


def _runs(blocks: Iterable[int]) -> Iterator[range]:
    """Successive numbers as ranges of at most `DOWNLOAD_BYTES`."""
    run = range(0)
    for n in blocks:
        if run and n == run.stop and len(run) < DOWNLOAD_BYTES // BLOCK:
            run = range(run.start, n + 1)
            continue
        if run:
            yield run
        run = range(n, n + 1)
    if run:
        yield run


class _StreamFile(io.RawIOBase):
    """A remote file as one that pyarrow reads."""

    def __init__(self, images: ShardImages, stream: Stream) -> None:
        self._images, self._stream, self._position = images, stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stream.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        stop = self._stream.size if size < 0 else min(self._stream.size, self._position + size)
        if stop <= self._position:
            return b""
        data = self._images._bytes(self._stream, self._position, stop)
        self._position = stop
        return data


class RemoteFolder:
    """Image files below an address. Each is kept in the cache whole, and taken for unchanged while it is there.

    Args:
        url: Root of the image paths.
        storage: Cache, time limits.
    """

    def __init__(self, url: str, storage: Storage) -> None:
        self.url, self._storage = url.rstrip("/"), storage
        self._held: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: the path leads elsewhere, or the image is missing or larger than an image may be.
            StorageError: as `remote.ask`.
        """
        name = self._address(path)
        cache = self._storage.cache()
        data = self._held.get(name) or cache.get(name, -1)
        if data is None:
            data = self._fetch(name)
            cache.put(name, data)
        return data

    def prefetch(self, paths: Iterable[str]) -> None:
        """Fetch images at once, and hold them until the next call. What cannot be fetched is left to `read`."""
        cache = self._storage.cache()
        self._held = {}
        names = [f"{self.url}/{path}" for path in dict.fromkeys(paths) if path_problem(path) is None]
        absent = [name for name in names if not cache.has(name)]

        def fetch(name: str) -> bytes | None:
            try:
                return self._fetch(name)
            except DataError:
                return None

        if len(absent) > 1:
            with ThreadPoolExecutor(min(REQUESTS, len(absent))) as pool:
                for name, data in zip(absent, pool.map(fetch, absent), strict=True):
                    if data is not None:
                        self._held[name] = data
                        cache.put(name, data)

    def check(self, path: str) -> None:
        """Raise DataError unless there is such a file, StorageError if the server cannot be asked."""
        name = self._address(path)
        try:
            ask(name, lambda: filesystem(name).info(name), self._storage.access)
        except FileNotFoundError:
            raise DataError(f"image {path!r} is not a file in the image folder {self.url}") from None

    def _address(self, path: str) -> str:
        if path_problem(path) is not None:
            raise DataError(f"image path {path!r} must be relative to the image folder {self.url}, without '..'")
        return f"{self.url}/{path}"

    def _fetch(self, name: str) -> bytes:
        access = self._storage.access
        try:
            info = ask(name, lambda: filesystem(name).info(name), access)
            size = int(info["size"] or 0)
            if not 0 < size <= LARGEST_IMAGE:
                raise DataError(f"image {name!r} has {size:,} bytes; an image has 1 to {LARGEST_IMAGE:,}")
            return read_range(name, 0, size, access, lambda _: None)
        except FileNotFoundError as error:
            root = self.url
            try:
                ask(root, lambda: filesystem(root).info(root), access)
            except FileNotFoundError:
                raise gone(root, error) from None
            raise DataError(f"image {name!r} does not exist") from None
