"""A step trains the same samples whatever the ranks; every sample of a step is taken once."""

import itertools

import pytest

from llava_mole.data.sampler import batch_positions, count_steps
from llava_mole.errors import ConfigError


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_step_covers_its_positions_once(world_size: int, micro: int) -> None:
    for step in (0, 1, 7):
        batches = [
            batch_positions(step, global_batch_size=12, rank=rank, world_size=world_size, micro_batch_size=micro)
            for rank in range(world_size)
        ]
        assert all(len(own) == 12 // (world_size * micro) for own in batches)
        assert all(len(batch) == micro for own in batches for batch in own)
        positions = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(batches)))
        assert positions == list(range(12 * step, 12 * (step + 1)))


def test_micro_batches_of_all_ranks_follow_each_other() -> None:
    first = batch_positions(1, global_batch_size=8, rank=0, world_size=2, micro_batch_size=2)
    second = batch_positions(1, global_batch_size=8, rank=1, world_size=2, micro_batch_size=2)
    assert first == [[8, 9], [12, 13]]
    assert second == [[10, 11], [14, 15]]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"10 is not a multiple of train\.micro_batch_size 2 x 3 ranks = 6"):
        batch_positions(0, global_batch_size=10, rank=0, world_size=3, micro_batch_size=2)


def test_incomplete_last_step_is_counted() -> None:
    assert count_steps(40, 12) == (3, 4)
    assert count_steps(36, 12) == (3, 0)
    with pytest.raises(ConfigError, match="12 is larger than the 11 samples"):
        count_steps(11, 12)
