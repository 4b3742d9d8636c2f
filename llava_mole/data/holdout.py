"""Validation samples: records of a source that training never sees.

Which ones is a pure function of the source's size and name, the count and the seed: the first `count` of a seeded
permutation. They are taken out before the plan is made, so the plan's digest changes with them.
"""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

from llava_mole.data.mixture import random_keys
from llava_mole.data.records import Record
from llava_mole.errors import ConfigError


class RecordSubset(Sequence[Record]):
    """Some records of a sequence, by index; nothing is copied."""

    def __init__(self, records: Sequence[Record], indices: np.ndarray) -> None:
        self._records = records
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return RecordSubset(self._records, self._indices[index])
        return self._records[int(self._indices[index])]


def hold_out(
    records: Mapping[str, Sequence[Record]], count: int, seed: int
) -> tuple[dict[str, Sequence[Record]], dict[str, Sequence[Record]]]:
    """Split every source into `(training, validation)`; both keep the order of the file.

    Args:
        records: Records by source.
        count: Validation samples of each source; 0 leaves everything to training.
        seed: Seed of the run.

    Raises:
        ConfigError: a source has no record left for training.
    """
    if not count:
        return dict(records), {}
    training: dict[str, Sequence[Record]] = {}
    validation: dict[str, Sequence[Record]] = {}
    for name, source in records.items():
        if count >= len(source):
            raise ConfigError(
                f"data.validation_samples is {count}, but source {name} has {len(source)} records: none would be left "
                "to train on; lower it"
            )
        order = np.argsort(random_keys(len(source), f"validation/{seed}/{name}"), kind="stable")
        validation[name] = RecordSubset(source, np.sort(order[:count]))
        training[name] = RecordSubset(source, np.sort(order[count:]))
    return training, validation
