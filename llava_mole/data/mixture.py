"""The order of samples: the plan of an epoch over a weighted mixture of sources, and samples held out for validation.

Lambda is the sampling frequency of a source (LLaVA-MoLE paper, section 4.3): with 2 each of its samples is seen twice
per epoch. The plan is a pure function of sizes, lambdas, seed and epoch, so every rank computes the same one, and a run
resumes from the number of samples it has consumed.

Permutations sort raw words of NumPy's Philox counter generator with a stable sort. The stream of this generator is
fixed, so a plan does not depend on the version of NumPy.
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
from llava_mole.common.text import count_of
from llava_mole.config import check_lambdas
from llava_mole.data.records import Record, RecordSubset

MOST_SAMPLES = 1 << 31
"""Most samples of an epoch: its plan is held in memory."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The n samples of one epoch in order."""

    source_index: npt.NDArray[np.int16]
    """[n], index of the source in `names`."""
    sample_index: npt.NDArray[np.int64]
    """[n], index of the record in its source."""
    names: tuple[str, ...]
    counts: dict[str, int]
    """Samples from each source."""
    digest: str
    """SHA-256 (hex) of names, sizes and order; equal on all ranks and in a resumed run."""


def plan_epoch(sizes: Mapping[str, int], lambdas: Mapping[str, float], seed: int, epoch: int) -> EpochPlan:
    """The plan of epoch number `epoch`, from 0.

    A source with n samples contributes floor(lambda) full passes and a slice of round(fraction * n) samples. The
    slices of successive epochs walk through one permutation of the source, so no sample is repeated in them before
    all others have been used. The samples of all sources are then shuffled together.

    Args:
        sizes: Samples of each source, by name; the order of the names defines the source indices.
        lambdas: Sampling frequency by name; 1 for a source without an entry.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Raises:
        ConfigError: a lambda is below 0, not finite or without a source, or the mixture has no samples.
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
    """Samples from each source in one epoch. Raises ConfigError like `plan_epoch`."""
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
        raise ConfigError(f"data.mixture takes more than {MOST_SAMPLES:,} samples per epoch; lower a lambda")
    return counts


def random_keys(count: int, purpose: str) -> npt.NDArray[np.uint64]:
    """`count` random words that depend only on `purpose`; sorting by them gives a permutation."""
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


class TrainingPlan:
    """The plans of successive epochs, each computed when it is first needed.

    `plan[i]` is `(source name, sample index)` of the i-th sample of the run. At most two epochs are kept in memory (10
    bytes per sample), and none is pickled into data loader workers.

    Args:
        sizes, lambdas, seed: See `plan_epoch`.
        epochs: Number of epochs.
        detail: Anything else that determines the samples; it becomes part of the digest.

    Raises:
        ConfigError: as `plan_epoch`, or `epochs` is below 1.
    """

    def __init__(
        self, sizes: Mapping[str, int], lambdas: Mapping[str, float], seed: int, epochs: int, detail: str = ""
    ) -> None:
        if epochs < 1:
            raise ConfigError(f"train.epochs is {epochs}; it must be at least 1")
        self.sizes, self.lambdas = dict(sizes), dict(lambdas)
        self.seed, self.epochs, self.detail = seed, epochs, detail
        self._epoch_counts = mixture_counts(sizes, lambdas)
        self.samples_per_epoch = sum(self._epoch_counts.values())
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._compute)

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
        return tuple(self.sizes)

    @property
    def counts(self) -> dict[str, int]:
        """Samples from each source in the whole run."""
        return {name: self.epochs * count for name, count in self._epoch_counts.items()}

    @property
    def digest(self) -> str:
        """Digest of the first epoch. It does not depend on `epochs`, so a resumed run may have more of them."""
        own = self.epoch_plan(0).digest
        return hashlib.sha256(f"{own} {self.detail}".encode()).hexdigest() if self.detail else own

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        return self._epoch_plan(epoch)

    def _compute(self, epoch: int) -> EpochPlan:
        return plan_epoch(self.sizes, self.lambdas, self.seed, epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._compute)


def hold_out(
    records: Mapping[str, Sequence[Record]], count: int, seed: int
) -> tuple[dict[str, Sequence[Record]], dict[str, Sequence[Record]]]:
    """Split every source into training and validation records, each in the order of the source.

    Args:
        records: Records by source.
        count: Validation samples per source; 0 holds out none.
        seed: Seed of the run.

    Returns:
        The training and the validation records by source; the latter is empty for a count of 0.

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
                f"data.validation_samples is {count}, but source {name} has {count_of(len(source), 'record')}: none "
                "would be left to train on; lower it"
            )
        order = np.argsort(random_keys(len(source), f"validation/{seed}/{name}"), kind="stable")
        validation[name] = RecordSubset(source, np.sort(order[:count]))
        training[name] = RecordSubset(source, np.sort(order[count:]))
    return training, validation
