"""Placement of a step's samples: complete, within capacity, balanced, the same number of rows on every rank."""

import numpy as np
import pytest

from llava_mole.data.batching import assign_step, sample_cost, spread


def _paper_like(count: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.2, 4096, rng.integers(600, 1100, count))
    return [int(n) for n in lengths]


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_placed_once_in_rows_that_hold_it(world_size: int, seed: int) -> None:
    lengths = _paper_like(64, seed)
    ranks = assign_step(lengths, world_size=world_size, capacity=4096, quadratic=33_000)
    assert len(ranks) == world_size
    assert len({len(rows) for rows in ranks}) == 1
    assert sorted(i for rows in ranks for row in rows for i in row) == list(range(64))
    assert all(sum(lengths[i] for i in row) <= 4096 for rows in ranks for row in rows)


def test_hand_made_case() -> None:
    # Costs are lengths: 7 | 5 4 | 3 3 2 by LPT on two ranks gives 7 3 2 and 5 4 3.
    ranks = assign_step([7, 5, 4, 3, 3, 2], world_size=2, capacity=12, quadratic=1e12)
    assert ranks == [[[0, 3, 5]], [[1, 2, 4]]]


def test_a_rank_without_samples_gets_empty_rows() -> None:
    assert assign_step([5], world_size=3, capacity=10, quadratic=1e9) == [[[0]], [[]], [[]]]


def test_a_sample_beyond_the_capacity_has_a_row_of_its_own() -> None:
    ranks = assign_step([20, 3, 3], world_size=1, capacity=8, quadratic=1e9)
    assert [0] in ranks[0]
    assert sorted(i for row in ranks[0] for i in row) == [0, 1, 2]


def test_rows_are_as_few_as_first_fit_finds() -> None:
    # Balanced rows would overflow: 6+5 | 5+4 of 10. First fit needs three rows: 6+4 | 5+5.
    ranks = assign_step([6, 5, 5, 4], world_size=1, capacity=10, quadratic=1e9)
    assert sorted(map(sorted, ranks[0])) == [[0, 3], [1, 2]]


def test_cost_balance_beats_counting_samples() -> None:
    worst_balanced, worst_counted = [], []
    for seed in range(20):
        lengths = _paper_like(64, seed)
        costs = [sample_cost(n, 33_000) for n in lengths]
        balanced = spread(range(64), costs, 16)
        worst_balanced.append(max(sum(costs[i] for i in part) for part in balanced))
        worst_counted.append(max(sum(costs[4 * r : 4 * r + 4]) for r in range(16)))
    assert np.mean(worst_balanced) < 0.75 * np.mean(worst_counted)


def test_attention_makes_long_samples_dearer() -> None:
    assert sample_cost(1000, 1e4) == pytest.approx(1100)
    assert sample_cost(4000, 1e4) > 4 * sample_cost(1000, 1e4)
