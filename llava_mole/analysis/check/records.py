"""What `llava-mole check-data` finds in every record and image of a source, without stopping at a mistake."""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llava_mole.analysis.check.images import SourceImages
from llava_mole.analysis.check.report import BAD_RECORD, FindingsFile, Keys, SourceFindings, key_of_text
from llava_mole.common.errors import DataError
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.prepare.drafts import Defects, Dropped
from llava_mole.data.prepare.sources.llava import first_folder, to_draft
from llava_mole.data.records import Record, parse_record
from llava_mole.data.store import PreparedRecords, is_prepared
from llava_mole.data.tokenization import LengthPolicy

TOO_LONG = ("truncated", "shortened", "dropped")
"""Kinds of findings about records that are longer than `data.max_length`, and that the policy lets pass."""


@dataclass(frozen=True)
class TextLimits:
    """How records become tokens, in plain values that travel to other processes."""

    language_model: str
    template: str
    image_tokens: int
    max_length: int
    policy: LengthPolicy = "truncate"


class TokenCount(NamedTuple):
    """One record as tokens."""

    tokens: int
    """Before any cut; 0 where the template cannot hold the record."""
    found: tuple[tuple[str, str], ...] = ()
    """(kind, detail) of what there is to say about it."""


@lru_cache(maxsize=1)
def _tools(language_model: str, template: str) -> tuple[Any, Any]:
    from llava_mole.data.chat_template import resolve_template
    from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer

    tokenizer = HFTextTokenizer(load_tokenizer(language_model))
    return tokenizer, resolve_template(template, tokenizer)


def count_chunk(records: Sequence[Record], limits: TextLimits) -> list[TokenCount]:
    """Tokens of some records. Runs in a worker process.

    Raises:
        WeightsError, ConfigError: no tokenizer, or no such template.
    """
    tokenizer, template = _tools(limits.language_model, limits.template)
    return [_count(record, limits, tokenizer, template) for record in records]


def _count(record: Record, limits: TextLimits, tokenizer: Any, template: Any) -> TokenCount:
    # The same calls as in `fitting.fit_source`, so that both say the same about a record.
    from llava_mole.data.lengths import NEVER, count_record
    from llava_mole.data.tokenization import encode_shortened

    try:
        text, needed = count_record(record, template, tokenizer)
    except DataError as error:
        return TokenCount(0, (("bad-record", str(error).removeprefix(f"{record.where}: ")),))
    image_tokens = len(record.images) * limits.image_tokens
    tokens, most = text + image_tokens, limits.max_length
    length = f"{tokens} tokens"
    unanswered = ("masked", f"no token of an answer in {length}")
    if tokens <= most:
        return TokenCount(tokens, (unanswered,) if needed >= NEVER else ())
    if limits.policy == "error":
        return TokenCount(tokens, (("too-long", length),))
    if limits.policy == "drop":
        return TokenCount(tokens, (("dropped", length),))
    if needed >= NEVER:
        return TokenCount(tokens, (unanswered,))
    if limits.policy == "truncate_history":
        shorter = encode_shortened(record, template, tokenizer, limits.image_tokens, most)
        if shorter is None:
            return TokenCount(tokens, (("dropped", length),))
        return TokenCount(tokens, (("shortened", f"{length}, {len(shorter.input_ids)} without its oldest rounds"),))
    cut = ("truncated", length)
    if needed + image_tokens <= most:
        return TokenCount(tokens, (cut,))
    return TokenCount(tokens, (_lost_by_cut(record, limits, tokenizer, template), cut))


def _lost_by_cut(record: Record, limits: TextLimits, tokenizer: Any, template: Any) -> tuple[str, str]:
    """Kind and detail of what the cut at the end takes away that training cannot do without."""
    from llava_mole.data.tokenization import encode, render_record

    rendered, most = render_record(record, template), limits.max_length
    try:
        encode(rendered, tokenizer, num_image_tokens=limits.image_tokens, max_length=most)
    except DataError:
        return "image-cut", f"an image is behind data.max_length {most}"
    return "masked", f"no token of an answer before data.max_length {most}"


_CHUNK = 256
_AHEAD = 8
"""Chunks that are handed over before the oldest one's result is taken."""


def read_all(path: str, source: SourceFindings, findings: FindingsFile) -> Iterator[Record]:
    """Every usable record of an annotation file or prepared set; the others are listed.

    Raises:
        DataError: the file is not there, is no JSON list or prepared set, or holds no record at all.
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
    if not source.records:
        raise DataError(f"{path}: holds no record; training would not start with it")


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
    images: SourceImages | None,
    pool: Executor | None,
) -> None:
    """Look at every record of a source and, the first time it is named, at each of its images.

    Memory grows by some 30 bytes a record: 8 bytes of hash in half-full tables for its text and its image, and its
    length.

    Args:
        records: See `read_all`.
        source: Takes the numbers.
        findings: Takes the list.
        limits: Tokens are counted with these; None counts none.
        images: Looks at images; None opens none.
        pool: Counts tokens; None counts them in this process.
    """
    texts, names = Keys(), Keys()
    lengths = array("i")
    waiting: deque[tuple[list[Record], Future[list[TokenCount]] | list[TokenCount]]] = deque()

    def settle() -> None:
        part, counts = waiting.popleft()
        done = counts.result() if isinstance(counts, Future) else counts
        for record, count in zip(part, done, strict=True):
            for kind, detail in count.found:
                findings.add(source, kind, record.where, detail)
                source.truncated += kind in TOO_LONG
            if count.tokens:
                lengths.append(count.tokens)

    def hand_over(chunk: list[Record]) -> None:
        if limits is not None and chunk:
            done = pool.submit(count_chunk, chunk, limits) if pool is not None else count_chunk(chunk, limits)
            waiting.append((chunk, done))
        while len(waiting) > _AHEAD:
            settle()

    chunk: list[Record] = []
    for record in tqdm(records, desc=f"records of {source.name}", unit="record", delay=3.0, disable=None):
        if not texts.add(key_of_text(repr((record.images, record.turns)))):
            source.duplicates += 1
            findings.add(source, "duplicate", record.where, f"id {record.id}")
        source.text_only += not record.images
        for path in record.images:
            if names.add(key_of_text(path)) and images is not None:
                images.add(path, record.where)
        chunk.append(record)
        if len(chunk) == _CHUNK:
            hand_over(chunk)
            chunk = []
    hand_over(chunk)
    while waiting:
        settle()
    if images is not None:
        images.finish()
    source.tokens = np.array(lengths, dtype=np.int32)
    source.images = len(names)
