"""The index of a source of shards: its texts, and references to its images, as a prepared data set.

Because the index is a prepared set, everything that is exact for prepared sets holds for shards too, wherever they lie:
plan, token counts (kept in the index), validation samples, resume. It is built once, by one process, below
`data.cache_dir`. Its folder is named after the names, sizes and ETags or times of change of all files, so a changed
file gives another index. Each file is read once, several at a time; a build that is killed continues with the files
that are left.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_mole.common.distributed import cores
from llava_mole.common.errors import DataError
from llava_mole.common.files import atomic_path, sha256_of_json, write_errors
from llava_mole.common.log import get_logger
from llava_mole.common.processes import WorkQueue, open_pool
from llava_mole.common.text import count_of
from llava_mole.config import is_remote
from llava_mole.conversation import ROLES, Turn
from llava_mole.data.block_cache import BlockCache
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.samples import RawSample
from llava_mole.data.prepare.sources import messages
from llava_mole.data.records import parse_record
from llava_mole.data.remote import RemoteFile, download
from llava_mole.data.shard_files import ShardFile, find_shards
from llava_mole.data.shard_images import ShardImages, Storage, Stream, block_name
from llava_mole.data.shards import BLOCK, Checksums, Sample
from llava_mole.data.store import PreparedRecords, PreparedRow, StoreWriter, is_prepared
from llava_mole.data.table_shard import arrow_samples, parquet_samples
from llava_mole.data.tar_shard import tar_samples

VERSION = 1
"""Changes when the same files would give another index."""
_CRCS = ".crcs.npy"

logger = get_logger(__name__)


class ShardRecords(PreparedRecords):
    """The records of a source of shards, and the images inside them.

    Args:
        directory: The index.
        source: Name of the source.
        files: The shards that it is the index of.
        storage: Cache, time limits.

    Raises:
        DataError: as `PreparedRecords`.
    """

    def __init__(self, directory: str | os.PathLike[str], source: str, files: list[ShardFile], storage: Storage):
        super().__init__(directory, source)
        self._shard_files, self._storage = files, storage
        streams = [Stream(*values) for values in self.manifest["report"]["streams"]]
        crcs = self.directory.with_name(self.directory.name + _CRCS)
        self.shards = ShardImages(files, streams, crcs, storage)
        """Reads the images."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardRecords, (str(self.directory), self.source, self._shard_files, self._storage)


def open_shards(place: str, source: str, storage: Storage) -> ShardRecords:
    """The records at `place`; builds the index if there is none.

    Args:
        place: See `SourceConfig.annotations`.
        source: Name of the source.
        storage: Where the index is kept.

    Raises:
        DataError: as `find_shards`; or a file is damaged, a sample cannot be used, or two files have other columns.
        StorageError: as `remote.ask`.
        ConfigError: `data.cache_dir` cannot be written, or a package is missing.
    """
    import filelock

    kind, files = find_shards(place, storage.access)
    name = sha256_of_json([VERSION, kind, [asdict(file) for file in files]])[:24]
    directory = storage.cache_dir / "index" / name
    if not is_prepared(directory):
        with write_errors(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory.with_name(f"{name}.lock"))
        with ExitStack() as stack:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                logger.info("data: %s: waiting for another process, which builds the index of %s", source, place)
                lock.acquire()
            except OSError as error:
                with write_errors(directory):
                    raise error
            stack.callback(lock.release)
            if not is_prepared(directory):
                _build(directory, place, source, kind, files, storage)
    return ShardRecords(directory, source, files, storage)


@dataclass(frozen=True)
class _Job:
    """What a process needs to index a file."""

    kind: str
    parts: Path
    source: str
    storage: Storage
    seeds: bool
    """Whether the content of remote files goes into the cache, because all of it fits."""


def _build(directory: Path, place: str, source: str, kind: str, files: list[ShardFile], storage: Storage) -> None:
    size = sum(file.size for file in files)
    logger.info("data: %s: indexing %s, %.2f GB in %s, once", source, place, size / 1e9, count_of(len(files), "file"))
    parts = directory.with_name(f".parts-{directory.name}")
    with write_errors(parts):
        parts.mkdir(exist_ok=True)
    job = _Job(kind, parts, source, storage, seeds=size <= storage.cache_bytes)
    workers = min(cores(), 16, len(files), 1 + size // (64 << 20))
    with ExitStack() as stack:
        pool = stack.enter_context(open_pool(workers)) if workers > 1 else None
        queue: WorkQueue[ShardFile, Path] = WorkQueue(pool, 2 * workers)
        bar = stack.enter_context(tqdm(total=size, desc=f"indexing {source}", unit="B", unit_scale=True, delay=3.0,
                                       disable=None))  # fmt: skip
        done: list[tuple[ShardFile, Path]] = []
        for number, file in enumerate(files):
            done += queue.submit(file, _index_file, file, number, job)
            bar.update(sum(entry.size for entry, _ in done) - bar.n)
        done += queue.drain()
        bar.update(size - bar.n)
    _put_together(directory, place, source, done)
    shutil.rmtree(parts, ignore_errors=True)


def _index_file(file: ShardFile, number: int, job: _Job) -> Path:
    """Write the part of the index for one file, unless an earlier build did, and return it. May run in a process."""
    part = job.parts / f"{number}-{file.key}.jsonl"
    if part.exists():
        return part
    remote = is_remote(file.path)
    path, raw = Path(file.path), Checksums()
    with ExitStack() as stack, write_errors(part):
        if remote:
            path = job.parts / f"{number}-{os.getpid()}{Path(file.path).suffix if job.kind != 'json' else ''}"
            if job.kind == "json":  # its name tells how it is read
                path = path.with_name(f"{path.name}-{file.path.rpartition('/')[2]}")
            stack.callback(path.unlink, missing_ok=True)
            cache = job.storage.cache() if job.seeds and job.kind != "json" else None
            download(
                RemoteFile(file.path, file.size, file.tag), path, job.storage.access, partial(_take, raw, cache, file)
            )
            raw.finish()
        with atomic_path(part) as new, new.open("w", encoding="utf-8") as written:
            columns: dict[str, str] = {}
            ignored: dict[str, int] = {}
            streams: dict[int, Checksums] = {}
            repaired, rows = Defects(), 0
            for sample in _samples(path, number, file.path, job.kind, columns, ignored, streams):
                row = _row(sample, file.path, job.source, repaired, ignored)
                written.write(json.dumps(row, ensure_ascii=True) + "\n")
                rows += 1
            for (what, action), count in repaired.counts.items():
                ignored[f"{what} ({action})"] = count
            end = {
                "rows": rows,
                "columns": sorted(columns),
                "ignored": ignored,
                "streams": [[group, stream.size, stream.crcs] for group, stream in streams.items()],
                "raw": [raw.size, raw.crcs] if remote and job.kind != "json" else None,
            }
            written.write(json.dumps(end) + "\n")
    return part


def _take(raw: Checksums, cache: BlockCache | None, file: ShardFile, data: bytes) -> None:
    """Note the checksums of a piece of a remote file, and keep its blocks. Pieces are multiples of `BLOCK`."""
    first = raw.size // BLOCK
    raw.add(data)
    for start in range(0, len(data), BLOCK) if cache is not None else ():
        cache.put(block_name(file, None, first + start // BLOCK), data[start : start + BLOCK])  # type: ignore[union-attr]


def _samples(
    path: Path,
    number: int,
    name: str,
    kind: str,
    columns: dict[str, str],
    ignored: dict[str, int],
    streams: dict[int, Checksums],
) -> Iterator[Sample]:
    """The samples of a file. Raises DataError, also for what pyarrow finds wrong."""
    import pyarrow as pa

    try:
        if kind == "tar":
            yield from tar_samples(path, number, name, ignored)
        elif kind == "arrow":
            yield from arrow_samples(path, number, name, columns)
        elif kind == "parquet":
            yield from parquet_samples(path, number, name, columns, streams)
        else:
            for value, line in iterate_json(path):
                yield Sample(value, str(line), line)
    # OverflowError: for example a date that Python cannot represent.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: cannot be read: {reason}; is it complete? Write or download it again") from None


def _row(sample: Sample, name: str, source: str, repaired: Defects, ignored: dict[str, int]) -> list[Any]:
    """Id, images, texts of the turns and line of a record. Raises DataError."""
    where = f"{name}:{sample.line}"
    value = sample.value
    if isinstance(value, dict) and not _is_llava(value):
        try:
            made: RawSample = messages.to_sample(value, where, messages.Options(), repaired)
        except SkipRecord as skipped:
            raise DataError(f"{where}: {skipped.kind}: {skipped.detail}") from None
        if any(not isinstance(image, str) for image in made.images):
            raise DataError(f"{where}: holds an image as text (base64); store it as bytes, or as a member of the shard")
        identifier = made.id if "id" in value else sample.key
        return [identifier, list(made.images), [turn.text for turn in made.turns], sample.line]
    record, shortened = parse_record(value, source, where)
    if shortened:
        ignored["first answers"] = ignored.get("first answers", 0) + 1
    return [record.id, list(record.images), [turn.text for turn in record.turns], sample.line]


def _is_llava(value: dict[str, Any]) -> bool:
    """Whether a record has turns of LLaVA's format, or nothing that another format has."""
    turns = value.get("conversations")
    if isinstance(turns, list):
        return all(not isinstance(turn, dict) or "from" in turn for turn in turns)
    return not any(key in value for key in ("messages", *messages.QUESTIONS))


def _put_together(directory: Path, place: str, source: str, done: list[tuple[ShardFile, Path]]) -> None:
    """Write the index from the parts of all files."""
    streams: list[Stream] = []
    crcs = [np.zeros(0, dtype=np.uint32)]
    blocks = 0
    ignored: dict[str, int] = {}
    first: tuple[str, list[str]] | None = None
    with StoreWriter(directory, name=source) as writer:
        for number, (file, part) in enumerate(done):
            end: dict[str, Any] = {}
            with part.open(encoding="utf-8") as lines:
                for text in lines:
                    row = json.loads(text)
                    if isinstance(row, dict):
                        end = row
                        break
                    identifier, images, texts, line = row
                    turns = tuple(Turn(ROLES[n & 1], text) for n, text in enumerate(texts))
                    where = f"{file.path}:{line}"
                    writer.add(PreparedRow(identifier, source, tuple(images), turns, (), None, where))
            if end["rows"] == 0:
                raise DataError(f"{file.path}: holds no sample; remove the file")
            first = first or (file.path, end["columns"])
            _check_columns(first, file.path, end["columns"])
            for kind, count in end["ignored"].items():
                ignored[kind] = ignored.get(kind, 0) + count
            entries = end["streams"] if end["raw"] is None else [[None, *end["raw"]], *end["streams"]]
            for group, size, found in entries:
                streams.append(Stream(number, group, size, blocks))
                crcs.append(np.asarray(found, dtype=np.uint32))
                blocks += len(found)
        if ignored:
            shown = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
            logger.warning("data: %s: not read or changed in %s: %s", source, place, shown)
        with write_errors(directory), atomic_path(directory.with_name(directory.name + _CRCS)) as new:
            with new.open("wb") as file_of_crcs:
                np.save(file_of_crcs, np.concatenate(crcs))
        files = [asdict(file) for file, _ in done]
        writer.finish({"place": place, "files": files, "streams": [list(stream) for stream in streams]})


def _check_columns(first: tuple[str, list[str]], path: str, columns: list[str]) -> None:
    if columns == first[1]:
        return
    lacks, more = sorted(set(first[1]) - set(columns)), sorted(set(columns) - set(first[1]))
    differs = [f"it lacks {', '.join(lacks)}"] if lacks else []
    differs += [f"it also has {', '.join(more)}"] if more else []
    raise DataError(
        f"{path}: has other columns than {first[0]} ({' and '.join(differs)}); make two sources of them, or write them "
        "with the same columns"
    )
