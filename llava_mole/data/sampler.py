"""Which positions of the training plan each rank takes in each optimizer step."""

from llava_mole.config import accumulation_steps
from llava_mole.errors import ConfigError


def batch_positions(
    step: int, *, global_batch_size: int, rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """Plan positions of the micro-batches that `rank` runs in optimizer step `step` (from 0).

    Step s covers positions [s * G, (s + 1) * G) whatever the number of ranks and the micro-batch size; only who takes
    which of them changes. Micro-batch a of rank r starts at s * G + (a * world_size + r) * micro_batch_size.

    Returns:
        One list of `micro_batch_size` positions for each accumulation step.

    Raises:
        ConfigError: G is not a multiple of micro_batch_size * world_size.
    """
    accumulation = accumulation_steps(global_batch_size, micro_batch_size, world_size)
    first = step * global_batch_size + rank * micro_batch_size
    starts = (first + index * world_size * micro_batch_size for index in range(accumulation))
    return [list(range(start, start + micro_batch_size)) for start in starts]


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
