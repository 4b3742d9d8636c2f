"""Numbers of every record of a sequence: columns where the sequence has them, else a look at each record."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_mole.data.grouping import modality_length
from llava_mole.data.prepared import PreparedRecords
from llava_mole.data.records import Record
from llava_mole.data.subset import RecordSubset


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
