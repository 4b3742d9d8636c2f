"""A step trains the same samples whatever the ranks and the way of batching; every sample of a step is taken once."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.data.batching import BatchPlan, StepSampler, count_steps


def _plan(batching: Any, global_batch_size: int, world_size: int, micro: int = 1, capacity: int = 20) -> BatchPlan:
    def lengths(positions: Sequence[int]) -> list[int]:
        return [1 + (7 * position) % 20 for position in positions]

    return BatchPlan(batching, global_batch_size, micro, world_size, lengths, capacity, quadratic=100.0)


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_step_covers_its_positions_once(batching: str, world_size: int, micro: int) -> None:
    plan = _plan(batching, 12, world_size, micro)
    for step in (0, 1, 7):
        batches = [plan.micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(own) for own in batches}) == 1
        if batching != "packed":
            assert all(len(own) == 12 // (world_size * micro) for own in batches)
            assert all(len(batch) == micro for own in batches for batch in own)
        positions = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(batches)))
        assert positions == list(range(12 * step, 12 * (step + 1)))


def test_padded_micro_batches_of_all_ranks_follow_each_other() -> None:
    plan = _plan("padded", 8, 2, 2)
    assert plan.micro_batches(1, 0) == [[8, 9], [12, 13]]
    assert plan.micro_batches(1, 1) == [[10, 11], [14, 15]]


def test_packed_rows_hold_their_samples() -> None:
    plan = _plan("packed", 12, 2)
    for step in range(5):
        for rank in range(2):
            assert all(sum(plan.lengths(row)) <= 20 for row in plan.micro_batches(step, rank))


def test_the_sampler_yields_the_steps_asked_for() -> None:
    plan = _plan("packed", 12, 2)
    expected = [row for step in (2, 3) for row in plan.micro_batches(step, 1)]
    assert list(StepSampler(plan, 1, 2, 4)) == expected


def test_sizes_that_do_not_divide_are_refused_unless_packed() -> None:
    with pytest.raises(ConfigError, match=r"10 is not a multiple of train\.micro_batch_size 2 x 3 ranks = 6"):
        _plan("padded", 10, 3, 2)
    assert sum(map(len, _plan("packed", 10, 3, 2).micro_batches(0, 0))) > 0
    with pytest.raises(ConfigError, match="10 is smaller than the 16 ranks"):
        _plan("packed", 10, 16)


def test_incomplete_last_step_is_counted() -> None:
    assert count_steps(40, 12) == (3, 4)
    assert count_steps(36, 12) == (3, 0)
    with pytest.raises(ConfigError, match="12 is larger than the 11 samples"):
        count_steps(11, 12)
