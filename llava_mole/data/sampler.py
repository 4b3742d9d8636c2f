"""Which positions of the training plan each rank takes in each optimizer step, and in which micro-batches.

Step s covers positions [s G, (s + 1) G) whatever the number of ranks, the micro-batch size and the way of batching;
only who takes which of them changes. So a run may be resumed with another of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llava_mole.common.errors import ConfigError
from llava_mole.config import check_batch
from llava_mole.data.packing import assign_step


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
