"""What `llava-mole check-data` finds in every record and image of a source, without stopping at a mistake."""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from llava_mole.analysis.check_tokens import TOO_LONG, TextLimits, TokenCount, count_chunk
from llava_mole.data.converters.base import Dropped
from llava_mole.data.converters.defects import Defects
from llava_mole.data.converters.image_files import ImageFacts, ImageRoot, look
from llava_mole.data.converters.llava import first_folder, to_draft
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.records import Record, parse_record
from llava_mole.data.store import PreparedRecords, is_prepared
from llava_mole.errors import DataError

BAD_RECORD = ("bad-json", "bad-record", "unknown-role", "marker", "marker-again", "turn-order", "empty-answer",
              "bad-text", "image-cut", "masked", "too-long")  # fmt: skip
"""Kinds of findings that training refuses."""
MISSING_IMAGE = ("missing-image", "outside-image", "remote-image")
BAD_IMAGE = ("corrupt-image", "too-large-image")
NOTED_IMAGE = ("huge-image", "cmyk-image", "animated-image", "wrong-extension")
_CHUNK = 256


@dataclass
class SourceFindings:
    """What was found in one source."""

    name: str
    records: int = 0
    """Including those that cannot be used."""
    text_only: int = 0
    images: int = 0
    """Different image files."""
    duplicates: int = 0
    truncated: int = 0
    """Longer than `data.max_length`, and cut, shortened or dropped as `data.max_length_policy` says."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of every usable record before any cut; empty where they were not counted."""

    def share(self, kinds: Iterable[str], of: int) -> float:
        """Findings of some kinds as a share."""
        return sum(self.kinds[kind] for kind in kinds) / of if of else 0.0


class FindingsFile:
    """Lists every finding, one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, source: SourceFindings, kind: str, where: str, detail: str) -> None:
        """Count a finding and list it."""
        source.kinds[kind] += 1
        line = {"source": source.name, "kind": kind, "where": where, "detail": detail[:300]}
        self._file.write(json.dumps(line) + "\n")


def read_all(path: str, source: SourceFindings, findings: FindingsFile) -> Iterator[Record]:
    """Every usable record of an annotation file or prepared set; the others are listed.

    Raises:
        DataError: the file is not there, is no JSON list, or is no prepared set.
    """
    if is_prepared(path):
        records = PreparedRecords(path, source.name)
        for index in range(len(records)):
            source.records += 1
            try:
                yield records[index]
            except DataError as error:
                findings.add(source, "bad-record", f"{path}:{index}", str(error))
        return
    if not Path(path).is_file():
        raise DataError(f"{path}: is neither an annotation file nor a prepared set; check data.sources.{source.name}")

    def skip(line: int, problem: str) -> None:
        source.records += 1
        findings.add(source, "bad-json", f"{path}:{line}", problem)

    for value, line in iterate_json(path, on_error=skip):
        source.records += 1
        where = f"{path}:{line}"
        try:
            record, _ = parse_record(value, source.name, where)
        except DataError as error:
            findings.add(source, _kind_of(value, where), where, str(error).removeprefix(f"{where}: "))
            continue
        yield record


def _kind_of(value: Any, where: str) -> str:
    """Kind of what is wrong with a record that the reader refused."""
    defects = Defects()
    try:
        to_draft(value, where, first_folder, defects)
    except Dropped as dropped:
        return dropped.kind
    return next((kind for kind, _ in defects.counts if kind in BAD_RECORD), "bad-record")


def check_records(
    records: Iterable[Record],
    source: SourceFindings,
    findings: FindingsFile,
    limits: TextLimits | None,
    pool: Executor | None,
) -> dict[str, str]:
    """Look at every record of a source; returns its image paths with the place where each is first named.

    Args:
        records: See `read_all`.
        source: Takes the numbers.
        findings: Takes the list.
        limits: Tokens are counted with these; None counts none.
        pool: Counts tokens; None counts them in this process.
    """
    images: dict[str, str] = {}
    seen: set[bytes] = set()
    lengths: list[int] = []
    waiting: deque[tuple[list[Record], Future[list[TokenCount]] | list[TokenCount]]] = deque()

    def take(chunk: list[Record], counts: list[TokenCount]) -> None:
        for record, count in zip(chunk, counts, strict=True):
            for kind, detail in count.found:
                findings.add(source, kind, record.where, detail)
                source.truncated += kind in TOO_LONG
            if count.tokens:
                lengths.append(count.tokens)

    def hand_over(chunk: list[Record]) -> None:
        if limits is None or not chunk:
            return
        done = pool.submit(count_chunk, chunk, limits) if pool is not None else count_chunk(chunk, limits)
        waiting.append((chunk, done))
        while len(waiting) > 8:
            settle()

    def settle() -> None:
        part, counts = waiting.popleft()
        take(part, counts.result() if isinstance(counts, Future) else counts)

    chunk: list[Record] = []
    for record in tqdm(records, desc=f"records of {source.name}", unit="record", delay=3.0, disable=None):
        digest = hashlib.blake2b(
            repr((record.images, record.turns)).encode("utf-8", "replace"), digest_size=12
        ).digest()
        if digest in seen:
            source.duplicates += 1
            findings.add(source, "duplicate", record.where, f"id {record.id}")
        seen.add(digest)
        source.text_only += not record.images
        for path in record.images:
            images.setdefault(path, record.where)
        chunk.append(record)
        if len(chunk) == _CHUNK:
            hand_over(chunk)
            chunk = []
    hand_over(chunk)
    while waiting:
        settle()
    source.tokens = np.array(lengths, dtype=np.int32)
    source.images = len(images)
    return images


class SeenImage(NamedTuple):
    """An image file that was opened."""

    facts: ImageFacts
    digest: bytes
    """Of the file's content; empty where it could not be read."""


def look_and_hash(files: list[tuple[str, str]]) -> list[SeenImage]:
    """Decode files, given as (absolute name, name in messages), and hash their content. Runs in a worker process."""
    seen = []
    for file, name in files:
        try:
            data = Path(file).read_bytes()
        except OSError:
            data = b""
        seen.append(SeenImage(look(data, name, decode=True)[0], hash_of(data) if data else b""))
    return seen


def hash_of(data: bytes) -> bytes:
    """What says that two image files have the same content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def check_images(
    images: dict[str, str],
    folder: str,
    source: SourceFindings,
    findings: FindingsFile,
    done: dict[str, bytes],
    pool: Executor | None,
    huge_pixels: int,
) -> None:
    """Decode every image of a source once; images that another source has shown already are not opened again.

    Args:
        images: Path -> where it is first named.
        folder: The source's image folder.
        source: Takes the numbers.
        findings: Takes the list.
        done: Absolute name -> hash of the content, of all files opened so far; grows.
        pool: Decodes; None decodes in this process.
        huge_pixels: Larger images are listed.
    """
    root = ImageRoot(Path(folder))
    bar = tqdm(total=len(images), desc=f"images of {source.name}", unit="image", delay=3.0, disable=None)
    waiting: deque[tuple[list[tuple[str, str]], Future[list[SeenImage]] | list[SeenImage]]] = deque()

    def settle() -> None:
        files, results = waiting.popleft()
        for (file, name), seen in zip(files, results.result() if isinstance(results, Future) else results, strict=True):
            done[file] = seen.digest
            bar.update()
            where, facts = images[name], seen.facts
            if facts.problem is not None:
                findings.add(source, facts.problem.kind, where, facts.problem.detail)
            for note in facts.notes:
                findings.add(source, note.kind, where, note.detail)
            if facts.size is not None and facts.size[0] * facts.size[1] > huge_pixels and facts.problem is None:
                findings.add(source, "huge-image", where, f"{name}: {facts.size[0]} x {facts.size[1]}")

    def hand_over(files: list[tuple[str, str]]) -> None:
        if files:
            waiting.append((files, pool.submit(look_and_hash, files) if pool is not None else look_and_hash(files)))
        while len(waiting) > 8:
            settle()

    files: list[tuple[str, str]] = []
    for path, where in images.items():
        problem = root.problem(path)
        file = os.path.join(root.folder, path)
        if problem is not None:
            findings.add(source, problem.kind, where, problem.detail)
        if problem is not None or file in done:
            bar.update()
            continue
        files.append((file, path))
        if len(files) == 64:
            hand_over(files)
            files = []
    hand_over(files)
    while waiting:
        settle()
    bar.close()
