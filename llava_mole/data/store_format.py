"""The directory of a prepared data set: its manifest, the layout of its shards, and how both are checked.

    manifest.json           format, name, rows, shards (rows, bytes, sha256), value names, the report of who made it
    shard-00000.arrow ...   uncompressed Arrow IPC files of one record batch each, memory-mapped
    lengths-<key>.npy       token counts for one tokenizer and template (see `lengths`); a cache, not in the manifest

Columns of a shard (all without nulls; any Arrow reader can open them):

| column | type | what |
|---|---|---|
| `id` | string | identifier of the record |
| `source` | int16 | sub-source, index into the manifest's `sources` |
| `images` | list<string> | paths relative to the image folder, in the order of their markers |
| `turns` | list<string> | texts; user and assistant in turn, the user first |
| `image_sizes` | list<int32> | width and height of each image; empty where they were not opened |
| `answer_type` | int16 | index into the manifest's `answer_types`; -1 for none |
| `where_file`, `where_line` | int32, int64 | the raw file (index into `files`) and line the record comes from |
| `text_bytes` | int32 | UTF-8 bytes of all turns |
| `words` | int32 | whitespace-separated words of all turns, markers included |
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from llava_mole.common.errors import DataError

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


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory with a manifest; whether it is a good one is for `read_manifest` to say."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without the field that holds it."""
    content = {key: value for key, value in manifest.items() if key != SELF_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared data set, after a look at the size of every shard.

    Raises:
        DataError: no prepared data set, another format, a manifest that differs from what was written, or a shard
            that is missing or of another size.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    again = "prepare the data set again"
    if not path.is_file():
        raise DataError(f"{directory}: no {MANIFEST}, so no prepared data set; give a directory `prepare --out` wrote")
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


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
