"""Which files a source of shards consists of: a file, a folder or a pattern, on this machine or on a server."""

import fnmatch
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_mole.common.errors import DataError
from llava_mole.common.files import sha256_of_json
from llava_mole.config import is_remote
from llava_mole.data.json_stream import JSON_SUFFIXES
from llava_mole.data.prepare.files import split_of
from llava_mole.data.remote import Access, list_files
from llava_mole.data.store import MANIFEST, is_prepared

KINDS = {".tar": "tar", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")
_SPLITS = "dataset_dict.json"
"""In a folder with the splits of a data set that `datasets` saved."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a source."""

    path: str
    """Absolute path, or address."""
    size: int
    """Bytes."""
    tag: str
    """Differs when the content does: the time of change, or what the server says."""

    @property
    def key(self) -> str:
        """Identifies file and content."""
        return sha256_of_json([self.path, self.size, self.tag])[:24]


def is_sharded(place: str) -> bool:
    """Whether `place` is read by this file: everything remote, and shards on this machine."""
    if is_remote(place) or place.lower().endswith((*KINDS, *_COMPRESSED_TAR)):
        return True
    path = Path(place)
    if path.is_dir():
        names = os.listdir(path)
        return MANIFEST not in names and (_SPLITS in names or any(_is_shard(name) for name in names))
    return not path.exists() and bool(_WILD.search(place) or _BRACES.search(place))


def find_shards(place: str, access: Access) -> tuple[str, list[ShardFile]]:
    """The kind of the files at `place`, a value of `KINDS` or `json`, and the files in order of their names.

    Raises:
        DataError: nothing is there, the files are of different kinds or splits, or compressed tar files.
        StorageError, ConfigError: as `remote.ask`.
    """
    files: dict[str, ShardFile] = {}
    for part in _without_braces(place):
        files.update((file.path, file) for file in (_remote(part, access) if is_remote(part) else _local(part)))
    names = {os.path.basename(path): file for path, file in files.items()}
    if _SPLITS in names:
        raise DataError(f"{place}: holds the splits of a data set; name one of its folders, such as {place}/train")
    if MANIFEST in names:
        raise DataError(f"{place}: is a prepared set, which is read from a local folder; copy it to this machine")
    if packed := [name for name in names if name.lower().endswith(_COMPRESSED_TAR)]:
        raise DataError(f"{place}: {packed[0]} is a compressed tar file, in which nothing can be found; unpack it")
    chosen = [file for name, file in sorted(names.items()) if _is_shard(name)] or list(names.values())
    kinds = {_kind(file.path) for file in chosen}
    if not chosen or None in kinds:
        ends = ", ".join(f"*{suffix}" for suffix in KINDS)
        raise DataError(f"{place}: no shard is there ({ends}; remote also .json and .jsonl); check data.sources")
    if len(kinds) > 1 or (kinds == {"json"} and len(chosen) > 1):
        listed = ", ".join(sorted(os.path.basename(file.path) for file in chosen)[:4])
        raise DataError(f"{place}: holds files of several kinds or several annotation files ({listed}); name one kind")
    splits = sorted({split_of(os.path.basename(file.path)) for file in chosen})
    if len(splits) > 1:
        raise DataError(
            f"{place}: holds files of the splits {', '.join(splits)}; name those to train on, such as "
            f"{place.rstrip('/')}/train-*"
        )
    return str(kinds.pop()), sorted(chosen, key=lambda file: file.path)


def _kind(path: str) -> str | None:
    name = path.lower()
    if name.endswith(JSON_SUFFIXES):
        return "json"
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _is_shard(name: str) -> bool:
    # `datasets` writes cache-*.arrow beside the data; macOS adds ._*.
    return name.lower().endswith(tuple(KINDS)) and not name.startswith(("cache-", "."))


def _local(part: str) -> Iterator[ShardFile]:
    path = Path(part)
    if path.is_dir():
        if is_prepared(path):
            raise DataError(f"{part}: is a prepared set and not a shard")
        found = [entry for entry in path.iterdir() if entry.is_file()]
    elif path.is_file():
        found = [path]
    elif _WILD.search(path.name) and path.parent.is_dir():
        found = [entry for entry in path.parent.glob(path.name) if entry.is_file()]
    else:
        found = []
    if not found:
        raise DataError(f"{part}: no such file or folder, or nothing in it; check data.sources.<name>.annotations")
    for file in found:
        status = file.stat()
        yield ShardFile(os.path.abspath(file), status.st_size, str(status.st_mtime_ns))


def _remote(part: str, access: Access) -> list[ShardFile]:
    parent, _, name = part.rpartition("/")
    wild = bool(_WILD.search(name))
    listed = list_files(parent if wild else part, ("",), access)
    return [
        ShardFile(file.url, file.size, file.tag)
        for file in listed
        if not wild or fnmatch.fnmatchcase(file.url.rpartition("/")[2], name)
    ]


def _without_braces(place: str) -> list[str]:
    """The places that `{000..127}` and `{a,b}` stand for, as in WebDataset and the shell."""
    found = None if os.path.exists(place) else _BRACES.search(place)
    if found is None:
        return [place]
    first, dots, last = found[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        width = len(first) if first.startswith("0") else 0
        values = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        values = found[1].split(",")
    parts = (_without_braces(f"{place[: found.start()]}{value}{place[found.end() :]}") for value in values)
    return list(itertools.chain.from_iterable(parts))
