"""A bounded cache of blocks of bytes in files, shared by all ranks and loader workers of a machine.

A block is a file that ends in the CRC-32 of its content, so that a damaged or half-written one is found and fetched
again. Blocks are spread over folders by the hash of their names. Each folder has its share of the limit and a lock
under which blocks are added: the least recently used make room first, so the limit holds whatever the number of
writers, and no process needs to look at the whole cache. Readers take no lock; a
block that is removed under a reader was read completely or is missing.
"""

import fcntl
import os
import time
import zlib
from hashlib import sha256
from pathlib import Path

from llava_mole.common.log import get_logger

FOLDERS = 64
_CRC_BYTES = 4
_FRESH_S = 60.0
"""A block that was used within this many seconds is not marked as used again."""
_LOCK = ".lock"
_NEW = ".new"

logger = get_logger(__name__)


class BlockCache:
    """Blocks by name.

    Args:
        directory: Made when the first block is added.
        limit: Most bytes of all blocks.
        folders: Folders to spread the blocks over; a block larger than `limit / folders` is not kept.
    """

    def __init__(self, directory: Path, limit: int, *, folders: int = FOLDERS) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._folders = folders
        self._share = limit // folders
        self._works = True

    def get(self, name: str, size: int) -> bytes | None:
        """The block `name`, which has `size` bytes; None if it is not there or damaged.

        Args:
            size: Bytes of the block; -1 takes any number.
        """
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                data = file.read(status.st_size)
                if time.time() - status.st_mtime > _FRESH_S:
                    os.utime(file.fileno())
        except OSError:
            return None
        content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if len(content) != (len(content) if size < 0 else size) or zlib.crc32(content).to_bytes(4, "little") != crc:
            logger.warning("%s: a block of the cache is damaged and is fetched again", path)
            return None
        return content

    def has(self, name: str) -> bool:
        """Whether the block is there; `get` may still find it damaged."""
        return self._path(name).exists()

    def put(self, name: str, content: bytes) -> bool:
        """Add a block, and remove the least recently used ones of its folder if there is no room.

        Returns:
            Whether it was added: not if it is larger than a folder's share, or the disk does not take it (logged once).
        """
        size = len(content) + _CRC_BYTES
        if size > self._share:
            return False
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._make_room(path, size)
                new = path.with_name(path.name + _NEW)
                new.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
                os.replace(new, path)
        except OSError as error:
            if self._works:
                self._works = False
                logger.warning("%s: cannot be written (%s); data are read without it", path.parent, error.strerror)
            return False
        return True

    def used(self) -> int:
        """Bytes of all blocks."""
        return sum(entry.stat().st_size for entry in self.directory.glob("*/*") if entry.name != _LOCK)

    def _path(self, name: str) -> Path:
        digest = sha256(name.encode()).hexdigest()
        return self.directory / f"{int(digest[:8], 16) % self._folders:02x}" / digest[:40]

    def _make_room(self, wanted: Path, size: int) -> None:
        """Remove blocks until `size` more bytes fit; called under the folder's lock."""
        blocks = []
        for entry in os.scandir(wanted.parent):
            if entry.name.endswith(_NEW):  # left by a process that was killed
                os.unlink(entry.path)
            elif entry.name not in (_LOCK, wanted.name):
                status = entry.stat()
                blocks.append((status.st_mtime, status.st_size, entry.path))
        used = sum(block[1] for block in blocks)
        for _, freed, path in sorted(blocks):
            if used + size <= self._share:
                return
            os.unlink(path)
            used -= freed
