"""LLaVA's order for `batching: grouped`: samples of one modality and of like length share a batch.

The results equal LLaVA's sampler for the same random state. Lengths are LLaVA's: words of all turns, negative for
text-only samples.
"""

import functools
import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.config import check_batch
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


Rows = list[list[int]]
"""The rows of one rank: indices of the samples that share each row. A row may be empty."""


def sample_cost(length: int, quadratic: float) -> float:
    """Relative work of a sample of `length` tokens: `l + l^2 / quadratic`.

    `quadratic` is the length at which attention costs as much as all linear layers (`model.flops`).
    """
    return length + length * length / quadratic


def assign_step(lengths: Sequence[int], *, world_size: int, capacity: int, quadratic: float) -> list[Rows]:
    """Place a step's samples on ranks and rows.

    Args:
        lengths: Tokens of each of the step's samples.
        world_size: Ranks.
        capacity: Most tokens of a row. A longer sample gets a row of its own.
        quadratic: See `sample_cost`.

    Returns:
        For each rank its rows, the costliest first. Every rank has the same number of rows (the smallest with which
        all samples fit), because gradients are reduced row by row; ranks without work for a row have it empty. Indices
        within a row are in ascending order. The result depends on nothing but the arguments.
    """
    costs = [sample_cost(length, quadratic) for length in lengths]
    ranks = spread(range(len(lengths)), costs, world_size)
    num_rows = max(1, *(-(-sum(lengths[i] for i in samples) // capacity) for samples in ranks))
    while True:
        placed = [_fill_rows(samples, lengths, costs, num_rows, capacity) for samples in ranks]
        complete = [rows for rows in placed if rows is not None]
        if len(complete) == world_size:
            return complete
        num_rows += 1


def spread(samples: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Longest processing time first: `samples` over `bins` so that the largest total of `costs` is small."""
    heap = [(0.0, index) for index in range(bins)]
    result: list[list[int]] = [[] for _ in range(bins)]
    for sample in sorted(samples, key=lambda i: (-costs[i], i)):
        total, index = heapq.heappop(heap)
        result[index].append(sample)
        heapq.heappush(heap, (total + costs[sample], index))
    return result


def _fill_rows(
    samples: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int
) -> Rows | None:
    """`samples` over `num_rows` rows of equal cost where capacity allows, else wherever they fit; None if nowhere."""
    rows = _balanced_rows(samples, lengths, costs, num_rows, capacity)
    if rows is None:
        rows = _first_fit(samples, lengths, num_rows, capacity)
    if rows is None:
        return None
    rows.sort(key=lambda row: (-sum(costs[i] for i in row), row))
    return rows


def _balanced_rows(
    samples: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_rows: int, capacity: int
) -> Rows | None:
    rows = [sorted(row) for row in spread(samples, costs, num_rows)]
    return rows if all(len(row) < 2 or sum(lengths[i] for i in row) <= capacity for row in rows) else None


def _first_fit(samples: Sequence[int], lengths: Sequence[int], num_rows: int, capacity: int) -> Rows | None:
    """First-fit decreasing."""
    rows: Rows = [[] for _ in range(num_rows)]
    room = [capacity] * num_rows
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        index = next((k for k in range(num_rows) if lengths[sample] <= room[k] or not rows[k]), None)
        if index is None:
            return None
        rows[index].append(sample)
        room[index] -= lengths[sample]
    return [sorted(row) for row in rows]


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of every step and rank.

    Args:
        batching: `packed`: samples of like total cost on every rank, several in a row. `padded` and `grouped`: rows of
            one sample; micro-batch a of rank r starts at s G + (a world_size + r) micro_batch_size.
        global_batch_size: G.
        micro_batch_size: samples of a padded micro-batch.
        world_size: ranks.
        lengths: tokens of the samples at some positions (`packed` only).
        capacity, quadratic: see `packing.assign_step` (`packed` only).
    """

    batching: Literal["packed", "padded", "grouped"]
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    lengths: Callable[[Sequence[int]], Sequence[int]]
    capacity: int
    quadratic: float

    def __post_init__(self) -> None:
        """Raises ConfigError where the batch cannot be spread over the ranks."""
        check_batch(self.batching, self.global_batch_size, self.micro_batch_size, self.world_size)

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Plan positions of the micro-batches that `rank` runs in optimizer step `step` (from 0).

        Every rank has the same number of them; a packed one may be empty.
        """
        first = step * self.global_batch_size
        if self.batching != "packed":
            size = self.micro_batch_size
            starts = range(first + rank * size, first + self.global_batch_size, self.world_size * size)
            return [list(range(start, start + size)) for start in starts]
        positions = range(first, first + self.global_batch_size)
        ranks = assign_step(
            list(self.lengths(positions)),
            world_size=self.world_size,
            capacity=self.capacity,
            quadratic=self.quadratic,
        )
        return [[first + index for index in row] for row in ranks[rank]]


@dataclass(frozen=True)
class StepSampler:
    """The micro-batches of one rank from one step to another, in order: a batch sampler for torch's DataLoader."""

    plan: BatchPlan
    rank: int
    first_step: int
    end_step: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.end_step):
            yield from self.plan.micro_batches(step, self.rank)


def count_steps(num_samples: int, global_batch_size: int) -> tuple[int, int]:
    """Whole optimizer steps in a plan of `num_samples`, and the samples left over at its end, which are not trained.

    Raises:
        ConfigError: not even one step fits.
    """
    steps, left_over = divmod(num_samples, global_batch_size)
    if not steps:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is larger than the {num_samples} samples of the run; "
            "lower it, or raise train.epochs or data.mixture"
        )
    return steps, left_over
