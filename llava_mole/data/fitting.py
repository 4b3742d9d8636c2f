"""What becomes of records longer than `data.max_length`: decided for all of a source before the plan is made.

The plan works on the records that are left, so every rank and every resumed run take the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError
from llava_mole.conversation import Template
from llava_mole.data.columns import image_counts
from llava_mole.data.encoding import LengthPolicy, encode_record, encode_shortened, render_record
from llava_mole.data.lengths import (
    NEVER,
    Counts,
    count_tokens,
    lengths_path,
    map_records,
    most_tokens,
    read_lengths,
    stored_counts,
)
from llava_mole.data.prepared import PreparedRecords
from llava_mole.data.records import Record
from llava_mole.data.subset import RecordSubset
from llava_mole.data.tokenization import TextTokenizer

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
        quiet = [row for row in records.quiet_rows() if not render_record(records[int(row)], template).answer_spans]
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
