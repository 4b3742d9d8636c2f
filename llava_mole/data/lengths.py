"""Token counts of records: counted once for a tokenizer and template, kept inside a prepared data set.

Image positions are not counted, so the counts hold for every vision tower. They are a cache beside the shards:
`lengths-<key>.npy`, int32 [rows, 2], `key` from the tokenizer's own JSON, the template's strings, the version of
`tokenization` and the data set.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_mole.common.errors import DataError
from llava_mole.common.files import sync
from llava_mole.common.log import get_logger
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Template, Turn, render
from llava_mole.data.batching import modality_length
from llava_mole.data.chat_template import resolve_template
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
"""[n, 2]: tokens of each record, and the tokens up to its last image and its first supervised token, whichever is
later: fewer than those make it useless. Image positions are not included in either."""
NEVER = int(np.iinfo(np.int32).max) // 2
"""Second column of a record without any supervised token."""
_CHUNK = 1024
_ALONE = 8
"""So many chunks are worked off in this process; more by several."""


def count_record(record: Record, template: Template, tokenizer: TextTokenizer) -> tuple[int, int]:
    """One row of `Counts`. Raises DataError where the template cannot hold the record."""
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
    """`count_record` for every record, in several processes where there are many; arguments as for `map_records`."""
    count = partial(count_record, template=template, tokenizer=tokenizer)
    return map_records(records, count, f"counting tokens {name}".strip(), processes=processes)


def map_records(
    records: Sequence[Record],
    function: Callable[[Record], tuple[int, int]],
    title: str,
    *,
    processes: int | None = None,
) -> npt.NDArray[np.int32]:
    """Two numbers for every record, int32 [n, 2], with a progress bar.

    Args:
        records: Any sequence; it is pickled to the processes, as is `function`.
        function: Gives the numbers of a record.
        title: Shown beside the bar.
        processes: None takes the CPUs this process may use, and this process alone for a few thousand records.

    Raises:
        DataError: what `function` raised.
    """
    work = _Work(records, function)
    workers = _cpus() if processes is None else processes
    chunks: Iterable[tuple[int, npt.NDArray[np.int32] | str]] = map(work.__getitem__, range(len(work)))
    if workers > 1 and len(work) > _ALONE:
        # A loader gives each process the work once, keeps results in order, and notices a process that dies.
        chunks = DataLoader(work, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=_as_it_is)  # type: ignore[arg-type]
    result = np.empty((len(records), 2), dtype=np.int32)
    with tqdm(total=len(records), desc=title, unit="record", delay=3.0, disable=None) as bar:
        for start, part in chunks:
            if isinstance(part, str):
                raise DataError(part)
            result[start : start + len(part)] = part
            bar.update(len(part))
    return result


class _Work:
    """Chunk number n of the work; an error is its message, since it has to travel between processes."""

    def __init__(self, records: Sequence[Record], function: Callable[[Record], tuple[int, int]]) -> None:
        self._records, self._function = records, function

    def __len__(self) -> int:
        return -(-len(self._records) // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[int, npt.NDArray[np.int32] | str]:
        start = chunk * _CHUNK
        rows = range(start, min(start + _CHUNK, len(self._records)))
        try:
            pairs = [self._function(self._records[row]) for row in rows]
        except DataError as error:
            return start, str(error)
        return start, np.array(pairs, dtype=np.int32).reshape(-1, 2)


def _as_it_is(part: Any) -> Any:
    """A loader's default would make tensors of arrays."""
    return part


def _cpus() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def lengths_path(records: PreparedRecords, template: Template, tokenizer: TextTokenizer) -> Path | None:
    """Where the counts of a prepared set lie; None for a tokenizer without an identity."""
    if not isinstance(tokenizer, HFTextTokenizer):
        return None
    parts = (str(VERSION), tokenizer.fingerprint, repr(template), records.digest)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return records.directory / f"lengths-{key}.npy"


def read_lengths(path: Path | None, rows: int) -> Counts | None:
    """Counts that were stored; None where there are none that can be used, which is said."""
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
    records: PreparedRecords, template: Template, tokenizer: TextTokenizer, *, processes: int | None = None
) -> Counts:
    """The counts of a whole prepared set: read where they are stored, else counted and stored.

    A directory that cannot be written is reported, and the counts are used all the same. Raises as `count_tokens`.
    """
    path = lengths_path(records, template, tokenizer)
    counts = read_lengths(path, len(records))
    if counts is None:
        counts = count_tokens(records, template, tokenizer, name=records.source, processes=processes)
        if path is not None:
            _store(path, counts)
    return counts


def add_lengths(
    directory: str | os.PathLike[str], hf_tokenizer: Any, template_name: str, *, processes: int | None = None
) -> int:
    """Store the token counts of a prepared data set, so that no training run has to count; returns the tokens.

    Args:
        directory: Prepared data set.
        hf_tokenizer: Fast tokenizer of the language model.
        template_name: `data.template` of the runs to come.

    Raises:
        ConfigError: no such template.
        DataError: no prepared set, or the template cannot hold a record.
        WeightsError: see `HFTextTokenizer`.
    """
    tokenizer = HFTextTokenizer(hf_tokenizer)
    template = resolve_template(template_name, tokenizer)
    records = PreparedRecords(directory, Path(directory).name)
    return int(stored_counts(records, template, tokenizer, processes=processes)[:, 0].sum())


def _store(path: Path, counts: Counts) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, counts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next run counts the tokens again", path, error.strerror)
        temporary.unlink(missing_ok=True)


def most_tokens(records: PreparedRecords, template: Template, num_image_tokens: int) -> npt.NDArray[np.int64]:
    """An upper bound of the tokens of every record, from columns alone, int64 [n].

    A token covers at least one byte of the text, but for the leading space of each piece, so bytes bound the tokens. A
    normaliser that lengthens rare characters could pass the bound.
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
    # An empty question is replaced by `user_empty`, which may be longer than what it replaces.
    return sizes[0] + len(template.user_empty.encode()), each + len(template.user_empty.encode())


def image_counts(records: Sequence[Record]) -> npt.NDArray[Any]:
    """Images of every record, [n]."""
    return _column(records, "num_images", lambda record: len(record.images))


def modality_lengths(records: Sequence[Record]) -> npt.NDArray[Any]:
    """`grouping.modality_length` of every record, [n]. Raises DataError for a record without a word."""
    lengths = _column(records, "words", modality_length)
    for index in np.flatnonzero(lengths == 0)[:1]:
        modality_length(records[int(index)])
    return np.where(image_counts(records) > 0, np.abs(lengths), -np.abs(lengths))


def _column(records: Sequence[Record], name: str, of_record: Callable[[Record], int]) -> npt.NDArray[Any]:
    if isinstance(records, RecordSubset):
        return _column(records.records, name, of_record)[records.indices]
    if isinstance(records, PreparedRecords):
        return records.column(name)
    return np.fromiter(map(of_record, records), dtype=np.int64, count=len(records))


SAMPLE = 100
"""Records of a prepared set that are looked at before a run; all of them were when it was prepared."""


@dataclass(frozen=True)
class Limits:
    """How the records of a run become tokens."""

    template: Template
    tokenizer: TextTokenizer
    num_image_tokens: int
    max_length: int
    policy: LengthPolicy = "truncate"


@dataclass(frozen=True)
class Fitted:
    """The outcome for one source of n records, of which m are left."""

    kept: npt.NDArray[np.int64] | None
    """[m], indices of the records that are left; None for all of them."""
    lengths: npt.NDArray[np.int32] | None
    """[m], tokens of each after all cuts; None where nobody needs them."""
    cut: int = 0
    """Records cut at the end (`truncate`)."""
    shortened: int = 0
    """Records without some of their oldest rounds (`truncate_history`)."""
    dropped: int = 0
    """Records left out (`drop`, `truncate_history`); with `drop` also those without any answer in this template."""

    def select(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records that are left of those that were fitted."""
        return records if self.kept is None else RecordSubset(records, self.kept)


def sample_of(size: int) -> npt.NDArray[np.int64]:
    """Up to `SAMPLE` indices, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(SAMPLE, size)).astype(np.int64))


def fit_source(records: Sequence[Record], limits: Limits, name: str, *, all_lengths: bool) -> Fitted:
    """Apply the policy to the records of source `name`.

    Args:
        records: All of them.
        limits: Template, tokenizer, longest sample and policy.
        name: Of the source, for messages.
        all_lengths: Count the tokens of every record, else only of those that may be too long.

    Raises:
        DataError: a record that the template cannot hold; with policy `error` one that is too long; with `truncate` one
            that the cut leaves without an answer or without its image; with all but `drop` one whose answers the
            template renders to nothing; nothing is left. The message starts with `file:line` where there is one record
            to blame.
    """
    which, counts = _counted(records, limits, all_lengths)
    images = image_counts(records if which is None else RecordSubset(records, which)).astype(np.int64)
    totals = counts.astype(np.int64) + images[:, None] * limits.num_image_tokens
    silent = counts[:, 1] >= NEVER
    if limits.policy != "drop" or (len(silent) == len(records) and silent.all()):
        for n in np.flatnonzero(silent)[:1]:
            record = records[int(n if which is None else which[n])]
            encode_record(record, limits.template, limits.tokenizer, limits.num_image_tokens, None)
    too_long = np.flatnonzero((totals[:, 0] > limits.max_length) | silent)
    rows = too_long if which is None else which[too_long]
    lengths = totals[:, 0].copy() if all_lengths else None
    if limits.policy == "error" and len(rows):
        raise _too_long(records[int(rows[0])], int(totals[too_long[0], 0]), len(rows), len(records), limits, name)
    if limits.policy in ("error", "truncate"):
        for n, row in zip(too_long, rows, strict=True):
            if totals[n, 1] > limits.max_length:
                record = records[int(row)]
                encode_record(record, limits.template, limits.tokenizer, limits.num_image_tokens, limits.max_length)
        if lengths is not None:
            lengths = np.minimum(lengths, limits.max_length)
        return Fitted(None, _as_int32(lengths), cut=len(rows))
    shortened = 0
    gone = rows
    if limits.policy == "truncate_history" and len(rows):
        sizes = map_records(
            RecordSubset(records, rows), partial(_shortened_length, limits=limits), f"shortening {name}"
        )
        fits = sizes[:, 0] > 0
        gone, shortened = rows[~fits], int(fits.sum())
        if lengths is not None:
            lengths[rows[fits]] = sizes[fits, 0]
    if len(gone) == len(records):
        raise DataError(
            f"source {name}: none of its {len(records)} records fits into data.max_length {limits.max_length}; raise it"
        )
    kept = np.delete(np.arange(len(records)), gone) if len(gone) else None
    if lengths is not None and kept is not None:
        lengths = lengths[kept]
    return Fitted(kept, _as_int32(lengths), shortened=shortened, dropped=len(gone))


def _counted(
    records: Sequence[Record], limits: Limits, all_lengths: bool
) -> tuple[npt.NDArray[np.int64] | None, Counts]:
    """Counts of all records (first part None), or of those alone that may be too long or lack an answer."""
    template, tokenizer = limits.template, limits.tokenizer
    if isinstance(records, PreparedRecords):
        known = read_lengths(lengths_path(records, template, tokenizer), len(records))
        if known is not None:
            return None, known
        _check_sample(records, template)
        if all_lengths:
            return None, stored_counts(records, template, tokenizer)
        long = np.flatnonzero(most_tokens(records, template, limits.num_image_tokens) > limits.max_length)
        quiet = [
            row for row in records.rows_without_answer() if not render_record(records[int(row)], template).answer_spans
        ]
        which = np.union1d(long, np.array(quiet, dtype=np.int64))
    elif all_lengths:
        return None, count_tokens(records, template, tokenizer)
    else:
        which = np.array([n for n, record in enumerate(records) if _may_not_fit(record, limits)], dtype=np.int64)
    return which, count_tokens(RecordSubset(records, which), template, tokenizer)


def _check_sample(records: PreparedRecords, template: Template) -> None:
    """Raise DataError for a record that the template cannot hold: a few are tried, and those of the wrong shape."""
    tried = sample_of(len(records))
    if template.caption:
        wrong = (records.column("num_turns") != 2) | (records.column("num_images") != 1)
        tried = np.append(np.flatnonzero(wrong)[:1], tried)
    for index in tried:
        render_record(records[int(index)], template)


def _may_not_fit(record: Record, limits: Limits) -> bool:
    """Whether a bound of the tokens, by bytes, is above the limit (see `lengths.most_tokens`), or no answer is seen."""
    rendered = render_record(record, limits.template)
    size = len(rendered.text.encode())
    images = len(record.images)
    most = 1 + size + (images + 1) + images * limits.num_image_tokens
    return most > limits.max_length or not rendered.answer_spans


def _shortened_length(record: Record, limits: Limits) -> tuple[int, int]:
    encoded = encode_shortened(record, limits.template, limits.tokenizer, limits.num_image_tokens, limits.max_length)
    return (0, 0) if encoded is None else (len(encoded.input_ids), 0)


def _too_long(record: Record, tokens: int, count: int, size: int, limits: Limits, name: str) -> DataError:
    more = f" ({count} of the {size} records of source {name} are longer)"
    return DataError(
        f"{record.where}: {tokens} tokens, more than data.max_length {limits.max_length}{more}; raise it, or choose "
        "what becomes of them with data.max_length_policy (drop, truncate_history, truncate)"
    )


def _as_int32(lengths: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int32] | None:
    return None if lengths is None else lengths.astype(np.int32)
