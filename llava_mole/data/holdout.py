"""Validation samples: records of a source that training never sees.

Which ones is a pure function of the source's size and name, the count and the seed: the first `count` of a seeded
permutation. They are taken out before the plan is made, so the plan's digest changes with them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from llava_mole.common.errors import ConfigError
from llava_mole.data.mixture import random_keys
from llava_mole.data.records import Record
from llava_mole.data.subset import RecordSubset


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
