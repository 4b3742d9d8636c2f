"""Token counts of records, their cache inside a prepared data set, and what becomes of samples that are too long.

Counts exclude image positions, so they hold for every vision tower. They are stored as `lengths-<key>.npy`, int32
[rows, 2]: those of a prepared set beside its shards, those of a JSON file in `data.cache_dir`. The key covers the JSON
of the tokenizer, the strings of the template, the version of `tokenization` and the content of the data set.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from llava_mole.common.distributed import cores
from llava_mole.common.errors import DataError
from llava_mole.common.files import atomic_path
from llava_mole.common.log import get_logger
from llava_mole.common.processes import open_pool
from llava_mole.common.text import count_of
from llava_mole.config import ImageModes
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Template, Turn, render
from llava_mole.data.anyres import Size
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.native import ImageGrid
from llava_mole.data.records import Record, RecordSubset
from llava_mole.data.store import PreparedRecords
from llava_mole.data.tokenization import (
    VERSION,
    HFTextTokenizer,
    LengthPolicy,
    TextTokenizer,
    encode,
    encode_record,
    encode_shortened,
    render_record,
)

logger = get_logger(__name__)

Counts = npt.NDArray[np.int32]
"""[n, 2]: the tokens of each record, and the tokens it needs: up to its last image and its first supervised token. Both
exclude image positions."""
NEVER = int(np.iinfo(np.int32).max) // 2
"""Tokens needed by a record without any supervised token."""
SAMPLE = 100
"""Records of a prepared set that are checked before a run; `prepare` has checked all of them."""
_CHUNK = 1024
"""Records in one task of a worker process."""
_ALONE = 8
"""Up to this many chunks run in-process; more use a pool."""
_WORTH_KEEPING = 1000
"""Counts of smaller JSON files are not kept: counting takes less than a second."""


def count_record(record: Record, template: Template, tokenizer: TextTokenizer) -> tuple[int, int]:
    """One row of `Counts`. Raises DataError if the template cannot represent the record."""
    encoded = encode(render_record(record, template), tokenizer, num_image_tokens=1, max_length=None)
    ids, labels = encoded.input_ids, encoded.labels
    image_end = len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if encoded.num_images else 0
    supervised = next((n + 1 for n, label in enumerate(labels) if label != IGNORE_INDEX), None)
    needed = NEVER if supervised is None else max(supervised, image_end) - encoded.num_images
    return len(ids) - encoded.num_images, needed


def count_tokens(
    records: Sequence[Record],
    template: Template,
    tokenizer: TextTokenizer,
    *,
    name: str = "",
    processes: int | None = None,
) -> Counts:
    """`count_record` of every record, in several processes if there are many; see `map_records`."""
    count = partial(count_record, template=template, tokenizer=tokenizer)
    return map_records(records, count, f"counting tokens {name}".strip(), processes=processes)


def map_records(
    records: Sequence[Record],
    function: Callable[[Record], tuple[int, int]],
    title: str,
    *,
    processes: int | None = None,
) -> npt.NDArray[np.int32]:
    """Call `function` for every record, with a progress bar, and return its pairs of numbers as int32 [n, 2].

    Args:
        records: Any sequence.
        function: Returns two numbers for a record.
        title: Label of the bar.
        processes: None uses the CPUs available to this process, or this process alone for a few thousand records.

    Raises:
        DataError: raised by `function`, or a worker process was killed.
    """
    workers = _cpus() if processes is None else processes
    work = partial(_map_chunk, records, function)
    chunks = range(0, len(records), _CHUNK)
    parts: Iterable[npt.NDArray[np.int32]] = map(work, chunks)
    result = np.empty((len(records), 2), dtype=np.int32)
    with ExitStack() as stack:
        if workers > 1 and len(chunks) > _ALONE:
            # Forked workers inherit records and tokenizer; pickling them would take longer than counting.
            pool = stack.enter_context(open_pool(workers, method="fork", initializer=_inherit, arguments=(work,)))
            parts = pool.map(_map_inherited, chunks)
        bar = stack.enter_context(tqdm(total=len(records), desc=title, unit="record", delay=3.0, disable=None))
        try:
            for start, part in zip(chunks, parts, strict=True):
                result[start : start + len(part)] = part
                bar.update(len(part))
        except BrokenExecutor:
            raise DataError(f"{title}: a worker process was killed, most likely because memory ran out") from None
    return result


def _map_chunk(
    records: Sequence[Record], function: Callable[[Record], tuple[int, int]], start: int
) -> npt.NDArray[np.int32]:
    rows = range(start, min(start + _CHUNK, len(records)))
    return np.array([function(records[row]) for row in rows], dtype=np.int32)


_inherited: Callable[[int], npt.NDArray[np.int32]]
"""The work of a forked process."""


def _inherit(work: Callable[[int], npt.NDArray[np.int32]]) -> None:
    global _inherited
    _inherited = work


def _map_inherited(start: int) -> npt.NDArray[np.int32]:
    return _inherited(start)


def _cpus() -> int:
    return min(16, cores())


@dataclass(frozen=True)
class CountPlace:
    """Where the counts of one data set are stored."""

    directory: Path
    digest: str
    """Of the records' content."""

    def file(self, template: Template, tokenizer: TextTokenizer) -> Path | None:
        """The file of the counts with this template and tokenizer; None for a tokenizer without a fingerprint."""
        if not isinstance(tokenizer, HFTextTokenizer):
            return None
        parts = (str(VERSION), tokenizer.fingerprint, repr(template), self.digest)
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return self.directory / f"lengths-{key}.npy"


def lengths_path(records: PreparedRecords, template: Template, tokenizer: TextTokenizer) -> Path | None:
    """The file for the counts of a prepared set, see `CountPlace.file`."""
    return CountPlace(records.directory, records.digest).file(template, tokenizer)


def read_lengths(path: Path | None, rows: int) -> Counts | None:
    """Stored counts, or None (logged) if they are missing or invalid."""
    if path is None or not path.is_file():
        return None
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: cannot be read (%s); the tokens are counted again", path, " ".join(str(error).split()))
        return None
    if counts.shape != (rows, 2) or counts.dtype != np.int32 or (counts.size and int(counts.min()) < 0):
        logger.warning("%s: does not fit the data set; the tokens are counted again", path)
        return None
    return counts


def stored_counts(
    records: PreparedRecords,
    template: Template,
    tokenizer: TextTokenizer,
    *,
    processes: int | None = None,
    store: bool = True,
) -> Counts:
    """The counts of a prepared set: read if they are stored, otherwise counted and, with `store`, stored.

    If the directory cannot be written, a warning is logged. Raises like `count_tokens`.
    """
    count = partial(count_tokens, records, template, tokenizer, name=records.source, processes=processes)
    return _kept(lengths_path(records, template, tokenizer), len(records), count, store=store)


def _kept(path: Path | None, rows: int, count: Callable[[], Counts], *, store: bool) -> Counts:
    """The counts in the file `path`, or else those that `count` gives, which are then stored there."""
    counts = read_lengths(path, rows)
    if counts is None:
        counts = count()
        if path is not None and store:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, counts)
            except OSError as error:
                logger.warning("%s: cannot be written (%s); the next run counts the tokens again", path, error.strerror)
    return counts


def add_lengths(
    directory: str | os.PathLike[str], hf_tokenizer: Any, template_name: str, *, processes: int | None = None
) -> int:
    """Store the token counts of a prepared data set, so that training runs need not count, and return their sum.

    Args:
        directory: Prepared data set.
        hf_tokenizer: Fast tokenizer of the language model.
        template_name: `data.template` of the training runs.

    Raises:
        ConfigError: the template does not exist.
        DataError: `directory` is not a prepared set, or the template cannot represent a record.
        WeightsError: see `HFTextTokenizer`.
    """
    tokenizer = HFTextTokenizer(hf_tokenizer)
    template = resolve_template(template_name, tokenizer)
    records = PreparedRecords(directory, Path(directory).name)
    return int(stored_counts(records, template, tokenizer, processes=processes)[:, 0].sum())


class SizeReader(Protocol):
    """What tells the sizes of a source's images: `data.sources.ImageReader`."""

    def size(self, path: str, modes: ImageModes) -> Size:
        """Width and height of an image that `modes` makes RGB. Raises DataError."""


@dataclass(frozen=True)
class ImagePlace:
    """Where the images of a source are, and by which rule they become RGB; see `images.decode_rgb`."""

    reader: SizeReader
    modes: ImageModes = "llava"

    def sizes(self, record: Record) -> tuple[Size, ...]:
        """Width and height of each image of a record, from the files' heads. Raises DataError as `image_size`."""
        return tuple([self.reader.size(path, self.modes) for path in record.images])


def known_sizes(records: Sequence[Record], index: int, place: ImagePlace) -> Sequence[Size]:
    """Width and height of each image of a record: as a prepared set has them, or else from the files' heads.

    Raises:
        DataError: an image cannot be read, or the shard is damaged.
    """
    if isinstance(records, PreparedRecords) and place.modes == "llava" and (stored := records.row(index).image_sizes):
        return stored
    return place.sizes(records[index])


def tiled_tokens(images: int, sizes: Callable[[], Sequence[Size]], grid: ImageGrid) -> tuple[int, int]:
    """The tokens of the images of a record in tiles, and the tiles that the tower encodes.

    An image that cannot be read, or not be shown, counts as one of a single tile: the record will be replaced.

    Args:
        sizes: Gives width and height of each image. May raise DataError.
    """
    try:
        layouts = [grid.layout(size) for size in sizes()]
    except DataError:
        layouts = [grid.layout((grid.tile, grid.tile))] * images
    return sum(layout.tokens for layout in layouts), sum(layout.tiles for layout in layouts)


def count_tiled(
    records: Sequence[Record], grid: ImageGrid, place: ImagePlace, name: str, *, processes: int | None = None
) -> npt.NDArray[np.int32]:
    """`tiled_tokens` of every record, int32 [n, 2].

    The sizes in a prepared set are used where it has them and an image's rotation is ignored (`image_modes` `llava`).
    Else the heads of the files are read, in several processes if there are many.
    """
    inner, rows = (records.records, records.indices) if isinstance(records, RecordSubset) else (records, None)
    if isinstance(inner, PreparedRecords) and place.modes == "llava":
        counts, unknown = _stored_tiled(inner, grid)
        counts, unknown = (counts, unknown) if rows is None else (counts[rows], unknown[rows])
        missing = np.flatnonzero(unknown)
        if len(missing):
            counts[missing] = count_tiled(list(RecordSubset(records, missing)), grid, place, name, processes=processes)
        return counts
    count = partial(_tiled_of, grid=grid, place=place)
    return map_records(records, count, f"reading image sizes {name}".strip(), processes=processes)


def _stored_tiled(records: PreparedRecords, grid: ImageGrid) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """`tiled_tokens` of every record by the sizes in the set, int32 [n, 2], and which records have none there."""
    images, (known, sizes) = records.column("num_images"), records.image_sizes()
    distinct, which = np.unique(sizes, axis=0, return_inverse=True)
    pairs = [tiled_tokens(1, lambda: [(width, height)], grid) for width, height in distinct.tolist()]  # noqa: B023
    each = np.array(pairs, dtype=np.int64).reshape(-1, 2)[which.reshape(-1)]
    sums = np.concatenate([np.zeros((1, 2), dtype=np.int64), each.cumsum(axis=0)])
    ends = known.cumsum()
    counts = (sums[ends] - sums[ends - known]).astype(np.int32)
    return counts, images != known


def _tiled_of(record: Record, grid: ImageGrid, place: ImagePlace) -> tuple[int, int]:
    return tiled_tokens(len(record.images), lambda: place.sizes(record), grid)


def most_tokens(records: PreparedRecords, template: Template, num_image_tokens: int) -> npt.NDArray[np.int64]:
    """An upper bound of the tokens of every record, int64 [n], computed from columns alone.

    A token covers at least one byte of the text, except for the leading space of each piece, so bytes bound the tokens.
    A normalizer that expands rare characters could exceed the bound.
    """
    images, turns = (records.column(key).astype(np.int64) for key in ("num_images", "num_turns"))
    fixed, each = _overhead(template)
    return fixed + each * ((turns + 1) // 2) + records.column("text_bytes") + 2 + images * (num_image_tokens + 1)


def _overhead(template: Template) -> tuple[int, int]:
    """Bytes that a template adds to a conversation, and to each of its rounds."""
    if template.caption:
        return len(template.answer_end.encode()), 0
    sizes = []
    for rounds in (1, 2, 3):
        turns = [Turn("user", "x"), Turn("assistant", "x")] * rounds
        sizes.append(len(render(template, turns).text.encode()) - 2 * rounds)
    each = max(sizes[1] - sizes[0], sizes[2] - sizes[1])
    # `user_empty` replaces an empty question and may be longer than the strings around a question.
    return sizes[0] + len(template.user_empty.encode()), each + len(template.user_empty.encode())


def record_column(records: Sequence[Record], name: str, of_record: Callable[[Record], int]) -> npt.NDArray[Any]:
    """A number for every record, [n]: column `name` of a prepared set, or else `of_record` of each record."""
    if isinstance(records, RecordSubset):
        return record_column(records.records, name, of_record)[records.indices]
    if isinstance(records, PreparedRecords):
        return records.column(name)
    return np.fromiter(map(of_record, records), dtype=np.int64, count=len(records))


def image_counts(records: Sequence[Record]) -> npt.NDArray[Any]:
    """Images of every record, [n]."""
    return record_column(records, "num_images", lambda record: len(record.images))


@dataclass(frozen=True)
class Limits:
    """How the records of a run become tokens, and how many tokens they may have."""

    template: Template
    tokenizer: TextTokenizer
    num_image_tokens: int
    max_length: int
    policy: LengthPolicy = "truncate"
    grid: ImageGrid | None = None
    """For images in tiles or of native shape, whose tokens depend on their sizes."""

    @property
    def most_image_tokens(self) -> int:
        """Most tokens of an image."""
        return self.num_image_tokens if self.grid is None else self.grid.most

    def image_tokens(self, sizes: Sequence[Size]) -> list[int]:
        """Tokens of each image of a sample, from width and height. Raises DataError as `Grid.layout`."""
        if self.grid is None:
            return [self.num_image_tokens] * len(sizes)
        return [self.grid.layout(size).tokens for size in sizes]


@dataclass(frozen=True)
class Fitted:
    """The result of `fit_source` for n records, of which m remain."""

    kept: npt.NDArray[np.int64] | None
    """[m], indices of the remaining records; None for all."""
    lengths: npt.NDArray[np.int32] | None
    """[m], tokens of each record after truncation or shortening; None if they were not requested."""
    cut: int = 0
    """Records truncated at the end (`truncate`)."""
    shortened: int = 0
    """Records that lost some of their oldest rounds (`truncate_history`)."""
    dropped: int = 0
    """Records removed (`drop`, `truncate_history`); with `drop` also those without an answer in this template."""

    def select(self, records: Sequence[Record]) -> Sequence[Record]:
        """The remaining records."""
        return records if self.kept is None else RecordSubset(records, self.kept)


def sample_of(size: int) -> npt.NDArray[np.int64]:
    """Up to `SAMPLE` indices below `size`, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(SAMPLE, size)).astype(np.int64))


def fit_source(
    records: Sequence[Record],
    limits: Limits,
    name: str,
    *,
    all_lengths: bool,
    store: bool = True,
    place: ImagePlace | None = None,
    count_place: CountPlace | None = None,
) -> Fitted:
    """Apply the length policy to all records of a source.

    Args:
        records: The records.
        limits: Template, tokenizer, longest sample and policy.
        name: Name of the source, for messages.
        all_lengths: Whether to count the tokens of every record, or only of those that may be too long.
        store: Whether to store counts for the next run.
        place: Where the images are; needed for images in tiles.
        count_place: Where the counts of a JSON file are stored; a prepared set has a place of its own.

    Raises:
        DataError: the template cannot represent a record; a record is too long (policy `error`); truncation removes
            the answer or the image of a record (`truncate`); the answers of a record render to nothing (all policies
            but `drop`); or no record remains. The message starts with `file:line` if one record is to blame.
    """
    which, counts = _counted(records, limits, all_lengths, store, count_place)
    counted = records if which is None else RecordSubset(records, which)
    if limits.grid is None:
        image_tokens = image_counts(counted).astype(np.int64) * limits.num_image_tokens
    else:
        assert place is not None
        image_tokens = count_tiled(counted, limits.grid, place, name)[:, 0].astype(np.int64)
    totals = counts.astype(np.int64) + image_tokens[:, None]
    silent = counts[:, 1] >= NEVER

    def encode_one(record: Record, max_length: int | None) -> None:
        tokens = _image_tokens(record, limits, place)
        encode_record(record, limits.template, limits.tokenizer, tokens, max_length)

    if limits.policy != "drop" or (len(silent) == len(records) and silent.all()):
        for n in np.flatnonzero(silent)[:1]:
            encode_one(records[int(n if which is None else which[n])], max_length=None)  # raises
    too_long = np.flatnonzero((totals[:, 0] > limits.max_length) | silent)
    rows = too_long if which is None else which[too_long]
    if limits.policy == "error" and len(rows):
        raise _too_long(records[int(rows[0])], int(totals[too_long[0], 0]), len(rows), len(records), limits, name)
    lengths = totals[:, 0].astype(np.int32) if all_lengths else None
    if limits.policy == "truncate":
        for row in rows[totals[too_long, 1] > limits.max_length]:
            encode_one(records[int(row)], max_length=limits.max_length)  # raises
        return Fitted(None, None if lengths is None else np.minimum(lengths, limits.max_length), cut=len(rows))
    shortened = 0
    if limits.policy == "truncate_history" and len(rows):
        shorten = partial(_shortened_length, limits=limits, place=place)
        sizes = map_records(RecordSubset(records, rows), shorten, f"shortening {name}")[:, 0]
        fits = sizes > 0
        shortened = int(fits.sum())
        if lengths is not None:
            lengths[rows[fits]] = sizes[fits]
        rows = rows[~fits]
    if len(rows) == len(records):
        raise DataError(
            f"source {name}: none of its records ({len(records)}) fits into data.max_length {limits.max_length}; raise "
            "it"
        )
    kept = np.delete(np.arange(len(records)), rows) if len(rows) else None
    if lengths is not None and kept is not None:
        lengths = lengths[kept]
    return Fitted(kept, lengths, shortened=shortened, dropped=len(rows))


def _counted(
    records: Sequence[Record], limits: Limits, all_lengths: bool, store: bool, count_place: CountPlace | None
) -> tuple[npt.NDArray[np.int64] | None, Counts]:
    """Counts of all records (with None), or of the records at the indices that may be too long or lack an answer."""
    template, tokenizer = limits.template, limits.tokenizer
    if isinstance(records, PreparedRecords):
        known = read_lengths(lengths_path(records, template, tokenizer), len(records))
        if known is not None:
            return None, known
        _check_sample(records, template)
        if all_lengths:
            return None, stored_counts(records, template, tokenizer, store=store)
        which = np.union1d(
            np.flatnonzero(most_tokens(records, template, limits.most_image_tokens) > limits.max_length),
            [n for n in records.rows_without_answer() if not render_record(records[int(n)], template).answer_spans],
        ).astype(np.int64)
    elif all_lengths:
        path = count_place.file(template, tokenizer) if count_place and len(records) >= _WORTH_KEEPING else None
        return None, _kept(path, len(records), partial(count_tokens, records, template, tokenizer), store=store)
    else:
        which = np.array([n for n, record in enumerate(records) if _may_not_fit(record, limits)], dtype=np.int64)
    return which, count_tokens(RecordSubset(records, which), template, tokenizer)


def _check_sample(records: PreparedRecords, template: Template) -> None:
    """Raise DataError if the template cannot represent one of a sample of records, or one with the wrong shape."""
    tried = sample_of(len(records))
    if template.caption:
        wrong = (records.column("num_turns") != 2) | (records.column("num_images") != 1)
        tried = np.append(np.flatnonzero(wrong)[:1], tried)
    for index in tried:
        render_record(records[int(index)], template)


def _may_not_fit(record: Record, limits: Limits) -> bool:
    """Whether the bound of the tokens by bytes (see `most_tokens`) exceeds the limit, or no answer is supervised."""
    rendered = render_record(record, limits.template)
    images = len(record.images)
    most = 1 + len(rendered.text.encode()) + (images + 1) + images * limits.most_image_tokens
    return most > limits.max_length or not rendered.answer_spans


def _image_tokens(record: Record, limits: Limits, place: ImagePlace | None) -> list[int]:
    """Tokens of each image of a record; of one that cannot be read or shown, those of a single tile."""
    if limits.grid is None:
        return [limits.num_image_tokens] * len(record.images)
    assert place is not None
    try:
        return limits.image_tokens(place.sizes(record))
    except DataError:
        return limits.image_tokens([(limits.grid.tile, limits.grid.tile)] * len(record.images))


def _shortened_length(record: Record, limits: Limits, place: ImagePlace | None) -> tuple[int, int]:
    tokens = _image_tokens(record, limits, place)
    encoded = encode_shortened(record, limits.template, limits.tokenizer, tokens, limits.max_length)
    return (0, 0) if encoded is None else (len(encoded.input_ids), 0)


def _too_long(record: Record, tokens: int, count: int, size: int, limits: Limits, name: str) -> DataError:
    return DataError(
        f"{record.where}: {tokens} tokens, more than data.max_length {limits.max_length} ({count} of the "
        f"{count_of(size, 'record')} of source {name} {'is' if count == 1 else 'are'} longer); raise it, or choose "
        "another data.max_length_policy (drop, truncate_history, truncate)"
    )
