"""Which sample comes when: the plan of an epoch over a weighted mixture of datasets.

Lambda is the sampling frequency of a source (LLaVA-MoLE paper, section 4.3): 2 means that each of its samples is seen
twice an epoch. The plan is computed, not drawn: it is a pure function of (sizes, lambdas, seed, epoch), so every rank
derives the same one and a run resumes from the number of samples consumed.

Random keys are raw words of NumPy's Philox counter generator, whose stream is fixed, sorted by a stable sort; so a
plan does not change with the version of NumPy.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import ConfigError
from llava_mole.config import check_lambdas
from llava_mole.data.records import Record, RecordSubset

MOST_SAMPLES = 1 << 31
"""Samples of an epoch, whose plan is in memory."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The samples of one epoch in order; n samples from len(names) sources."""

    source_index: npt.NDArray[np.int16]
    """[n], position in `names`."""
    sample_index: npt.NDArray[np.int64]
    """[n], position in that source."""
    names: tuple[str, ...]
    counts: dict[str, int]
    """Samples taken of each source."""
    digest: str
    """SHA-256 (hex) of names and order; equal on all ranks and in a resumed run."""


def plan_epoch(sizes: Mapping[str, int], lambdas: Mapping[str, float], seed: int, epoch: int) -> EpochPlan:
    """Plan epoch number `epoch` (from 0).

    Of a source with n samples, floor(lambda) full passes are taken and a slice of round(fraction * n) samples. The
    slices of successive epochs follow each other through one permutation of the source, so that no sample is left out
    or doubled before all have had their turn. Everything is then shuffled together.

    Args:
        sizes: Samples in each source, by name; the order of the names gives the source indices.
        lambdas: Sampling frequency by name; a source without an entry has 1.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Raises:
        ConfigError: lambda below 0 or not finite, a lambda without its source, or a mixture without samples.
    """
    counts = mixture_counts(sizes, lambdas)
    sources, samples = [], []
    for index, (name, count) in enumerate(counts.items()):
        size = sizes[name]
        full_passes = math.floor(lambdas.get(name, 1.0))
        rest = count - full_passes * size
        part = [np.tile(np.arange(size, dtype=np.int64), full_passes)]
        if rest:
            permutation = np.argsort(random_keys(size, f"slice/{seed}/{name}"), kind="stable")
            part.append(permutation[np.arange(epoch * rest, (epoch + 1) * rest) % size])
        samples += part
        sources.append(np.full(count, index, dtype=np.int16))
    order = np.argsort(random_keys(sum(counts.values()), f"order/{seed}/{epoch}"), kind="stable")
    source_index = np.concatenate(sources)[order]
    sample_index = np.concatenate(samples).astype(np.int64)[order]
    digest = hashlib.sha256("\n".join(f"{name}={size}" for name, size in sizes.items()).encode())
    digest.update(source_index.astype("<i2").tobytes())
    digest.update(sample_index.astype("<i8").tobytes())
    return EpochPlan(source_index, sample_index, tuple(sizes), counts, digest.hexdigest())


def mixture_counts(sizes: Mapping[str, int], lambdas: Mapping[str, float]) -> dict[str, int]:
    """Samples of each source in one epoch. Raises ConfigError as `plan_epoch` does."""
    check_lambdas(sizes, lambdas)
    counts = {}
    for name, size in sizes.items():
        full_passes = math.floor(lambdas.get(name, 1.0))
        fraction = lambdas.get(name, 1.0) - full_passes
        counts[name] = full_passes * size + math.floor(fraction * size + 0.5)
    total = sum(counts.values())
    if not total:
        raise ConfigError("data.mixture is empty: lambda times the number of records is below 1; raise a lambda")
    if total > MOST_SAMPLES:
        raise ConfigError(f"data.mixture takes more than {MOST_SAMPLES:,} samples an epoch; lower a lambda")
    return counts


def random_keys(count: int, purpose: str) -> npt.NDArray[np.uint64]:
    """`count` random words that depend on `purpose` alone; sorting by them gives a permutation."""
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


class TrainingPlan:
    """The plans of `epochs` epochs, one after the other, each built when it is first needed.

    `plan[i]` is `(source name, sample index)` of the i-th sample of the run. At most two epochs are kept in memory (10
    bytes a sample), and none is pickled into data loader workers. `detail`, what else decides which samples these are,
    goes into the digest.
    """

    def __init__(
        self, sizes: Mapping[str, int], lambdas: Mapping[str, float], seed: int, epochs: int, detail: str = ""
    ) -> None:
        if epochs < 1:
            raise ConfigError(f"train.epochs is {epochs}; it must be at least 1")
        self._sizes = dict(sizes)
        self._lambdas = dict(lambdas)
        self._seed = seed
        self._detail = detail
        self.epochs = epochs
        self._epoch_counts = mixture_counts(sizes, lambdas)
        self.samples_per_epoch = sum(self._epoch_counts.values())
        self._epoch_plan = self._cached()

    def __len__(self) -> int:
        return self.epochs * self.samples_per_epoch

    def __getitem__(self, position: int) -> tuple[str, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a plan with {len(self)} samples")
        plan = self.epoch_plan(position // self.samples_per_epoch)
        offset = position % self.samples_per_epoch
        return plan.names[plan.source_index[offset]], int(plan.sample_index[offset])

    @property
    def names(self) -> tuple[str, ...]:
        """Sources in the order of their indices."""
        return tuple(self._sizes)

    @property
    def counts(self) -> dict[str, int]:
        """Samples taken of each source in the whole run."""
        return {name: self.epochs * count for name, count in self._epoch_counts.items()}

    @property
    def digest(self) -> str:
        """Digest of the first epoch. It does not depend on `epochs`, so a run may be resumed to last longer."""
        own = self.epoch_plan(0).digest
        return hashlib.sha256(f"{own} {self._detail}".encode()).hexdigest() if self._detail else own

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        return self._epoch_plan(epoch)

    def _cached(self) -> Any:
        return functools.lru_cache(maxsize=2)(functools.partial(plan_epoch, self._sizes, self._lambdas, self._seed))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch_plan = self._cached()


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
