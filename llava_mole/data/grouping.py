"""LLaVA's order for `batching: grouped`: samples of one modality and of like length share a batch.

The results equal LLaVA's sampler for the same random state. Lengths are LLaVA's: words of all turns, negative for
text-only samples.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_mole.common.errors import DataError
from llava_mole.data.mixture import TrainingPlan
from llava_mole.data.records import Record


def modality_length(record: Record) -> int:
    """Words of all turns, the `<image>` marker included; negative without an image.

    Raises:
        DataError: the record has no word, so no sign either.
    """
    words = sum(len(turn.text.split()) for turn in record.turns)
    if not words:
        raise DataError(f"{record.where}: no turn has a word; batching 'grouped' needs a length for every sample")
    return words if record.images else -words


def grouped_order(
    lengths: Sequence[int],
    batch_size: int,
    num_chunks: int,
    generator: torch.Generator | None = None,
    by_modality: bool = True,
) -> list[int]:
    """Order of all samples of an epoch, one modality a global batch.

    Args:
        lengths: `modality_length` of each sample.
        batch_size: Samples of a micro-batch.
        num_chunks: Micro-batches of an optimizer step over all ranks.
        generator: None takes torch's global random state, as LLaVA's trainer does. Where both modalities occur LLaVA
            always draws the orders within each of them from the global state, and so does this.

        by_modality: False groups by length alone.

    Returns:
        Indices; consecutive runs of `batch_size` are micro-batches. The last batches, of what is left over of both
        modalities, are mixed.

    Raises:
        DataError: a length is 0.
    """
    if 0 in lengths:
        raise DataError(f"sample {list(lengths).index(0)} has length 0; batching 'grouped' needs a length for each")
    if not by_modality or all(n > 0 for n in lengths) or all(n < 0 for n in lengths):
        return _length_grouped(lengths, batch_size, num_chunks, generator)
    size = batch_size * num_chunks
    full: list[list[int]] = []
    left_over: list[int] = []
    for with_image in (True, False):
        indices = [i for i, n in enumerate(lengths) if (n > 0) == with_image]
        order = _length_grouped([abs(lengths[i]) for i in indices], batch_size, num_chunks, None)
        batches = [[indices[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        full += batches[:-1]
        left_over += batches[-1]
    shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    if left_over:
        shuffled.append(sorted(left_over))
    return [i for batch in shuffled for i in batch]


def _length_grouped(
    lengths: Sequence[int], batch_size: int, num_chunks: int, generator: torch.Generator | None
) -> list[int]:
    """A random cut into global batches; in each the samples sorted, then dealt to chunks of like total length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * num_chunks
    result: list[int] = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: -lengths[i])
        for chunk in _even_chunks(batch, lengths, num_chunks):
            result += chunk
    return result


def _even_chunks(batch: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Chunks of equal count and like total length; strided where the count does not divide."""
    if len(batch) % num_chunks:
        return [batch[i::num_chunks] for i in range(num_chunks)]
    per_chunk = len(batch) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in batch:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == per_chunk:
            totals[shortest] = float("inf")
    return chunks


class GroupedPlan:
    """A `TrainingPlan` whose epochs are each put into the grouped order.

    Which samples share a step depends on the global batch size and the seed, not on ranks or micro-batches.

    Args:
        plan: the plan to reorder.
        lengths: `modality_length` of every record, by source.
        global_batch_size, batch_size: samples of a step and of a micro-batch.
        seed: seed of the order.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        lengths: Mapping[str, Sequence[int]],
        global_batch_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._plan = plan
        self._lengths = {name: np.asarray(values, dtype=np.int32) for name, values in lengths.items()}
        self._global_batch_size = global_batch_size
        self._batch_size = batch_size
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, position: int) -> tuple[str, int]:
        epoch, offset = divmod(position, self._plan.samples_per_epoch)
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a plan with {len(self)} samples")
        return self._plan[epoch * self._plan.samples_per_epoch + int(self._order(epoch)[offset])]

    @property
    def names(self) -> tuple[str, ...]:
        """Sources in the order of their indices."""
        return self._plan.names

    @property
    def counts(self) -> dict[str, int]:
        """Samples taken of each source in the whole run."""
        return self._plan.counts

    @property
    def digest(self) -> str:
        """Digest of the first epoch's order of steps."""
        return hashlib.sha256(f"grouped {self._global_batch_size} {self._plan.digest}".encode()).hexdigest()

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        plan = self._plan.epoch_plan(epoch)
        lengths = np.empty(len(plan.source_index), dtype=np.int32)
        for index, name in enumerate(plan.names):
            own = plan.source_index == index
            lengths[own] = self._lengths[name][plan.sample_index[own]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]))
            order = grouped_order(lengths.tolist(), self._batch_size, self._global_batch_size // self._batch_size)
        return np.asarray(order, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)
