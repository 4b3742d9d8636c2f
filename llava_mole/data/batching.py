"""Batches: which rank trains which samples of a step, in which rows, and LLaVA's order for `batching: grouped`.

A step covers the same samples on any number of ranks. `packed` spreads them so that all ranks have like amounts of
work, several samples to a row; `padded` and `grouped` deal rows of one sample in order. `grouped` also reorders the
epoch, so that samples with one modality and like lengths share a batch.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.config import check_batch
from llava_mole.data.lengths import image_counts, record_column
from llava_mole.data.mixture import EpochPlan, TrainingPlan
from llava_mole.data.records import Record

Rows = list[list[int]]
"""The rows of one rank: for each row the indices of its samples. A row may be empty."""


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of every step and rank.

    Args:
        batching: `packed` gives every rank samples of like total cost, several to a row. `padded` and `grouped` have
            one sample per row; in step s, micro-batch a of rank r starts at s G + (a world_size + r) micro_batch_size.
        global_batch_size: G, samples of a step.
        micro_batch_size: Samples of a padded micro-batch.
        world_size: Number of ranks.
        lengths: Returns the tokens of the samples at given positions (`packed` only).
        capacity, quadratic: See `assign_step` (`packed` only).

    Raises:
        ConfigError: the batch cannot be divided among the ranks.
    """

    batching: Literal["packed", "padded", "grouped"]
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    lengths: Callable[[Sequence[int]], Sequence[int]]
    capacity: int
    quadratic: float

    def __post_init__(self) -> None:
        check_batch(self.batching, self.global_batch_size, self.micro_batch_size, self.world_size)

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Positions in the plan of each micro-batch of `rank` in optimizer step `step`, from 0.

        Every rank has the same number of micro-batches; a packed one may be empty.
        """
        first = step * self.global_batch_size
        if self.batching != "packed":
            size = self.micro_batch_size
            starts = range(first + rank * size, first + self.global_batch_size, self.world_size * size)
            return [list(range(start, start + size)) for start in starts]
        positions = range(first, first + self.global_batch_size)
        lengths = list(self.lengths(positions))
        ranks = assign_step(lengths, world_size=self.world_size, capacity=self.capacity, quadratic=self.quadratic)
        return [[first + index for index in row] for row in ranks[rank]]


@dataclass(frozen=True)
class StepSampler:
    """Batch sampler for torch's DataLoader: the micro-batches of one rank, from `first_step` up to `end_step`."""

    plan: BatchPlan
    rank: int
    first_step: int
    end_step: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.end_step):
            yield from self.plan.micro_batches(step, self.rank)


def count_steps(num_samples: int, global_batch_size: int) -> tuple[int, int]:
    """Complete optimizer steps in a plan of `num_samples`, and the samples left over, which are not trained.

    Raises:
        ConfigError: there is not even one complete step.
    """
    steps, left_over = divmod(num_samples, global_batch_size)
    if not steps:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is larger than the {num_samples} samples of the run; "
            "lower it, or raise train.epochs or data.mixture"
        )
    return steps, left_over


def sample_cost(length: int, quadratic: float) -> float:
    """Relative cost of a sample of l tokens: `l + l^2 / quadratic`.

    `quadratic` is the length at which attention costs as much as all linear layers (`model.flops`).
    """
    return length + length * length / quadratic


def assign_step(lengths: Sequence[int], *, world_size: int, capacity: int, quadratic: float) -> list[Rows]:
    """Assign the samples of a step to ranks and rows; a pure function.

    Args:
        lengths: Tokens of each sample of the step.
        world_size: Number of ranks.
        capacity: Most tokens of a row. A longer sample gets a row of its own.
        quadratic: See `sample_cost`.

    Returns:
        The rows of each rank, the most expensive first. Every rank has the same number of rows, the smallest that holds
        all samples, because gradients are reduced row by row; rows of a rank without work are empty. The indices of a
        row ascend.
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
    """Distribute `samples` over `bins` so that the largest total cost is small (longest processing time first)."""
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
    """Rows of like cost if the capacity allows, otherwise the first fit; None if the samples do not fit at all."""
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
    """First-fit decreasing; a sample above the capacity gets an empty row."""
    rows: Rows = [[] for _ in range(num_rows)]
    room = [capacity] * num_rows
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        index = next((k for k in range(num_rows) if lengths[sample] <= room[k] or not rows[k]), None)
        if index is None:
            return None
        rows[index].append(sample)
        room[index] -= lengths[sample]
    return [sorted(row) for row in rows]


def modality_length(record: Record) -> int:
    """LLaVA's length: the words of all turns, with the `<image>` marker; negative without an image.

    Raises:
        DataError: the record has no word.
    """
    words = sum(len(turn.text.split()) for turn in record.turns)
    if not words:
        raise DataError(f"{record.where}: no turn has a word; batching 'grouped' needs a length for every sample")
    return words if record.images else -words


def modality_lengths(records: Sequence[Record]) -> npt.NDArray[Any]:
    """`modality_length` of every record, [n]. Raises DataError for a record without a word."""
    lengths = np.abs(record_column(records, "words", modality_length))
    for index in np.flatnonzero(lengths == 0)[:1]:
        modality_length(records[int(index)])  # raises
    return np.where(image_counts(records) > 0, lengths, -lengths)


def grouped_order(
    lengths: Sequence[int],
    batch_size: int,
    num_chunks: int,
    generator: torch.Generator | None = None,
    by_modality: bool = True,
) -> list[int]:
    """The order of an epoch in which every global batch has one modality, equal to that of LLaVA's sampler.

    Args:
        lengths: `modality_length` of each sample.
        batch_size: Samples of a micro-batch.
        num_chunks: Micro-batches of an optimizer step over all ranks.
        generator: None uses torch's global random state, as LLaVA's trainer does. If both modalities occur, the orders
            within each of them always come from the global state, as in LLaVA.
        by_modality: False groups by length alone.

    Returns:
        Indices of the samples; each run of `batch_size` is a micro-batch. The last global batch mixes the samples left
        over from both modalities.

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
    """Random global batches; the samples of each are sorted by length and dealt to chunks of like total length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * num_chunks
    result: list[int] = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: -lengths[i])
        for chunk in _even_chunks(batch, lengths, num_chunks):
            result += chunk
    return result


def _even_chunks(batch: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Chunks of equal count and like total length; strided if the count is not divisible."""
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


class GroupedPlan(TrainingPlan):
    """A `TrainingPlan` with every epoch in grouped order.

    The samples of a step depend on the global batch size and the seed, not on ranks or micro-batches.

    Args:
        plan: The plan to reorder.
        lengths: `modality_length` of every record, by source.
        global_batch_size, batch_size: Samples of a step and of a micro-batch.
        seed: Seed of the order.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        lengths: Mapping[str, Sequence[int]],
        global_batch_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(plan.sizes, plan.lambdas, plan.seed, plan.epochs, plan.detail)
        self._lengths = {name: np.asarray(values, dtype=np.int32) for name, values in lengths.items()}
        self._global_batch_size = global_batch_size
        self._batch_size = batch_size
        self._order_seed = seed

    @property
    def digest(self) -> str:
        """Digest of the first epoch's steps."""
        return hashlib.sha256(f"grouped {self._global_batch_size} {super().digest}".encode()).hexdigest()

    def _compute(self, epoch: int) -> EpochPlan:
        plan = super()._compute(epoch)
        order = self._order(plan, epoch)
        return replace(plan, source_index=plan.source_index[order], sample_index=plan.sample_index[order])

    def _order(self, plan: EpochPlan, epoch: int) -> npt.NDArray[np.int64]:
        lengths = np.empty(len(plan.source_index), dtype=np.int32)
        for index, name in enumerate(plan.names):
            own = plan.source_index == index
            lengths[own] = self._lengths[name][plan.sample_index[own]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self._order_seed, epoch]).generate_state(1)[0]))
            order = grouped_order(lengths.tolist(), self._batch_size, self._global_batch_size // self._batch_size)
        return np.asarray(order, dtype=np.int64)
