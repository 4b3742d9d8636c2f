"""Reads every record of a source and checks its tokens and images, without stopping at a mistake."""

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llava_mole.analysis.check.images import SourceImages
from llava_mole.analysis.check.report import FindingsFile, SourceFindings
from llava_mole.common.errors import DataError
from llava_mole.common.processes import WorkQueue
from llava_mole.common.text import shorten
from llava_mole.conversation import any_of
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.native import ImageGrid
from llava_mole.data.prepare.defects import OVERLONG_RECORD, REFUSED_RECORD, Defects, SkipRecord
from llava_mole.data.prepare.sources.llava import first_folder, to_sample
from llava_mole.data.records import Record, parse_record
from llava_mole.data.store import PreparedRecords, is_prepared
from llava_mole.data.tokenization import LengthPolicy, SpecialTokens

IMAGE_LIKE = re.compile(
    r"(?!<image>)<\|?/?(?:image|img|im_(?:start|end|patch)|video)[\w -]*\|?/?>|\[(?:image|img)[\w -]*\]",
    re.IGNORECASE,
)
_BATCH = 256
"""Records that a worker process tokenizes at a time."""
_AHEAD = 8
"""Unfinished batches at a time."""


def read_all(
    path: str, source: SourceFindings, findings: FindingsFile, opened: Sequence[Record] | None = None
) -> Iterator[Record]:
    """Yield every usable record of an annotation file or prepared set, and list the others.

    Args:
        path: The file, or folder.
        source, findings: Receive the numbers and the list.
        opened: The records, if the source is neither.

    Raises:
        DataError: the file does not exist, is neither a JSON list nor a prepared set, or holds no record.
    """
    if opened is not None or is_prepared(path):
        records = PreparedRecords(path, source.name) if opened is None else opened
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
    """The kind of defect for which `parse_record` refused a record."""
    defects = Defects()
    try:
        to_sample(value, where, first_folder, defects)
    except SkipRecord as skipped:
        return skipped.kind
    return next((kind for kind, _ in defects.counts if kind in REFUSED_RECORD), "bad-record")


@dataclass(frozen=True)
class TextLimits:
    """How records become tokens, as plain values that other processes can receive."""

    language_model: str
    template: str
    image_tokens: int
    max_length: int
    policy: LengthPolicy = "truncate"
    special_tokens: SpecialTokens = "keep"
    grid: ImageGrid | None = None
    """For images in tiles, whose tokens depend on their sizes."""
    place: Any = None
    """`ImagePlace` of the source, for images in tiles."""


class TokenCount(NamedTuple):
    """The tokens of one record."""

    tokens: int
    """Before any cut; 0 if the template cannot render the record."""
    found: tuple[tuple[str, str], ...] = ()
    """(kind, detail) of its findings."""


class _Tools(NamedTuple):
    tokenizer: Any
    template: Any
    texts: dict[str, re.Pattern[str]]
    """By kind of finding: what the text of a turn should not have."""


@lru_cache(maxsize=1)
def _tools(language_model: str, template: str, special_tokens: SpecialTokens) -> _Tools:
    from llava_mole.data.chat_template import control_tokens, markers, resolve_template
    from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer

    tokenizer = HFTextTokenizer(load_tokenizer(language_model), special_tokens)
    resolved = resolve_template(template, tokenizer)
    controls = control_tokens(resolved, tokenizer)
    words = frozenset(markers(resolved).difference(controls))
    return _Tools(
        tokenizer,
        resolved,
        {"special-token": any_of(controls), "chat-marker": any_of(words), "image-like": IMAGE_LIKE},
    )


def count_tokens(records: Sequence[Record], limits: TextLimits) -> list[TokenCount]:
    """Count the tokens of some records. Runs in a worker process.

    Raises:
        WeightsError: the tokenizer does not load.
        ConfigError: the template does not exist.
    """
    tools = _tools(limits.language_model, limits.template, limits.special_tokens)
    counts = [_count(record, limits, tools.tokenizer, tools.template) for record in records]
    return [
        count._replace(found=(*count.found, *_suspicious(record, tools.texts)))
        for record, count in zip(records, counts, strict=True)
    ]


def _suspicious(record: Record, texts: Mapping[str, re.Pattern[str]]) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each kind of text that may act on the model, or was meant to."""
    for kind, pattern in texts.items():
        found = [
            f"{text!r} in {'an answer' if turn.role == 'assistant' else 'a question'}"
            for turn in record.turns
            for text in pattern.findall(turn.text)
        ]
        if found:
            yield kind, shorten(found)


def _count(record: Record, limits: TextLimits, tokenizer: Any, template: Any) -> TokenCount:
    # The same calls as in `data/lengths.py`: training treats the record in the same way.
    from llava_mole.data.lengths import count_record

    try:
        text, needed = count_record(record, template, tokenizer)
    except DataError as error:
        return TokenCount(0, (("bad-record", str(error).removeprefix(f"{record.where}: ")),))
    each, narrow = _image_tokens(record, limits)
    counted = _count_text(record, limits, tokenizer, template, text, needed, each)
    return counted._replace(found=(*narrow, *counted.found))


def _image_tokens(record: Record, limits: TextLimits) -> tuple[list[int], tuple[tuple[str, str], ...]]:
    """Tokens of each image, and a finding for each that tiles cannot show; the image check finds other problems."""
    if limits.grid is None:
        return [limits.image_tokens] * len(record.images), ()
    each, found = [], []
    for path in record.images:
        size = (limits.grid.tile, limits.grid.tile)
        with suppress(DataError):
            (size,) = limits.place.sizes(replace(record, images=(path,)))
        try:
            each.append(limits.grid.layout(size, path).tokens)
        except DataError as error:
            each.append(limits.grid.layout((limits.grid.tile, limits.grid.tile)).tokens)
            found.append(("narrow-image", str(error)))
    return each, tuple(found)


def _count_text(
    record: Record, limits: TextLimits, tokenizer: Any, template: Any, text: int, needed: int, each: list[int]
) -> TokenCount:
    """What becomes of a record of `text` tokens, `needed` of them, and images of `each` tokens."""
    from llava_mole.data.lengths import NEVER
    from llava_mole.data.tokenization import encode_shortened

    image_tokens = sum(each)
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
        shorter = encode_shortened(record, template, tokenizer, each, most)
        if shorter is None:
            return TokenCount(tokens, (("dropped", length),))
        return TokenCount(tokens, (("shortened", f"{length}, {len(shorter.input_ids)} without its oldest rounds"),))
    cut = ("truncated", length)
    if needed + image_tokens <= most:
        return TokenCount(tokens, (cut,))
    return TokenCount(tokens, (_lost_by_cut(record, limits, tokenizer, template, each), cut))


def _lost_by_cut(record: Record, limits: TextLimits, tokenizer: Any, template: Any, each: list[int]) -> tuple[str, str]:
    """Kind and detail of what training needs but the cut at the end removes."""
    from llava_mole.data.tokenization import encode, render_record

    rendered, most = render_record(record, template), limits.max_length
    try:
        encode(rendered, tokenizer, num_image_tokens=each, max_length=most)
    except DataError:
        return "image-cut", f"an image is beyond data.max_length {most}"
    return "masked", f"no token of an answer before data.max_length {most}"


def check_records(
    records: Iterable[Record],
    source: SourceFindings,
    findings: FindingsFile,
    limits: TextLimits | None,
    images: SourceImages | None,
    pool: Executor | None,
) -> None:
    """Check every record of a source and, at its first mention, each of its images.

    Memory grows by two 64-bit hashes a record (of its content and of its image's name; about 150 bytes in two Python
    sets) and by its length.

    Args:
        records: See `read_all`.
        source, findings: Receive the numbers and the list.
        limits: How tokens are counted; None counts none.
        images: Opens the images; None opens none.
        pool: Counts tokens; None counts them in this process.
    """
    contents: set[int] = set()
    names: set[int] = set()
    lengths = array("i")
    queue: WorkQueue[list[Record], list[TokenCount]] = WorkQueue(pool, _AHEAD)

    def settle(finished: list[tuple[list[Record], list[TokenCount]]]) -> None:
        for batch, counts in finished:
            for record, count in zip(batch, counts, strict=True):
                for kind, detail in count.found:
                    findings.add(source, kind, record.where, detail)
                    source.truncated += kind in OVERLONG_RECORD
                if count.tokens:
                    lengths.append(count.tokens)

    batch: list[Record] = []
    for record in tqdm(records, desc=f"records of {source.name}", unit="record", delay=3.0, disable=None):
        content = hash((record.images, record.turns))
        if content in contents:
            source.duplicates += 1
            findings.add(source, "duplicate", record.where, f"id {record.id}")
        contents.add(content)
        source.text_only += not record.images
        for path in record.images:
            name = hash(path)
            if name not in names:
                names.add(name)
                if images is not None:
                    images.add(path, record.where)
        if limits is not None:
            batch.append(record)
            if len(batch) == _BATCH:
                settle(queue.submit(batch, count_tokens, batch, limits))
                batch = []
    if batch and limits is not None:
        settle(queue.submit(batch, count_tokens, batch, limits))
    settle(queue.drain())
    if images is not None:
        images.finish()
    source.tokens = np.array(lengths, dtype=np.int32)
    source.images = len(names)
