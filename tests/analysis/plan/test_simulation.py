"""Stragglers: steps whose times are known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from llava_mole.analysis.plan.simulation import Samples, draw_steps, grouped_rows, mean_step, padded_rows, step_time
from llava_mole.data.batching import BatchPlan, assign_step
from llava_mole.model.flops import ModelShape

# Linear cost only: 4 FLOPs a token, 2 more where its one layer is recomputed.
UNIT = ModelShape(1, 1, 1, 1, 0, 0, 1, 1, 0, 0.0, 1, False, 0, False, 1, 1, 0.0)


def samples(*lengths: int) -> Samples:
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return Samples(np.array(lengths, dtype=np.int64), zeros, zeros)


def time(lengths, ranks, *, padded=True, recomputed_layers=0, lock_step=True):
    return step_time(
        UNIT,
        samples(*lengths),
        ranks,
        padded=padded,
        recomputed_layers=recomputed_layers,
        flops_per_s=4.0,
        lock_step=lock_step,
    )


def test_ranks_wait_for_the_longest_sample() -> None:
    step = time([10, 2], [[[0]], [[1]]])
    assert (step.seconds, step.useful, step.padding, step.stragglers) == (10, 6, 0, 4)
    assert step.straggler_efficiency == pytest.approx(0.6)
    assert step.useful_share == pytest.approx(0.6)


def test_padding_and_recomputation_are_told_apart() -> None:
    step = time([10, 2, 6, 6], [[[0, 1]], [[2, 3]]], recomputed_layers=1)
    # rank 0 runs 20 tokens of which 8 are padding, rank 1 12; recomputing adds half of what is run.
    assert step.seconds == 30
    assert (step.useful, step.padding, step.recompute) == (12, 4, 8)
    assert step.stragglers == 6


def test_waiting_after_every_micro_batch_costs_more() -> None:
    ranks = [[[0], [1]], [[2], [3]]]
    assert time([10, 2, 3, 9], ranks).seconds == 19
    assert time([10, 2, 3, 9], ranks, lock_step=False).seconds == 12


def test_packing_leaves_nothing_to_wait_for() -> None:
    lengths = [10, 4, 4, 2]
    ranks = assign_step(lengths, world_size=2, capacity=12, quadratic=1e9)
    step = time(lengths, ranks, padded=False)
    assert step.seconds == pytest.approx(10)
    assert step.straggler_efficiency == pytest.approx(1)
    one_each = time([10, 4, 4, 2], padded_rows(4, 2, 1))
    assert one_each.seconds == 14


def test_a_rank_without_work_waits() -> None:
    step = time([8], [[[0]], [[]]], padded=False)
    assert (step.seconds, step.useful, step.stragglers) == (8, 4, 4)


def test_attention_is_padded_quadratically() -> None:
    shape = replace(UNIT, attention_width=1)
    step = step_time(
        shape, samples(3, 1), [[[0, 1]]], padded=True, recomputed_layers=0, flops_per_s=1.0, lock_step=True
    )
    assert step.useful == 4 * 4 + 6 * (9 + 1)
    assert step.padding == 4 * 2 + 6 * (9 - 1)


def test_rows_are_dealt_like_the_sampler_deals_them() -> None:
    plan = BatchPlan("padded", 12, 3, 2, lambda positions: [], 0, 1.0)
    for rank, rows in enumerate(padded_rows(12, 2, 3)):
        assert rows == plan.micro_batches(0, rank)


def test_grouping_puts_like_lengths_together() -> None:
    lengths = [10, 2, 9, 1]
    rows = grouped_rows(lengths, 2, 2)
    assert sorted(i for rank in rows for row in rank for i in row) == [0, 1, 2, 3]
    # LLaVA evens out totals: the longest with the shortest.
    assert {frozenset(lengths[i] for i in row) for rank in rows for row in rank} == {
        frozenset({10, 1}),
        frozenset({9, 2}),
    }


def test_drawn_steps_follow_the_mixture_and_repeat() -> None:
    pools = [samples(5), samples(7, 9)]
    steps = list(draw_steps(pools, [1.0, 3.0], 1000, 3, seed=1))
    again = list(draw_steps(pools, [1.0, 3.0], 1000, 3, seed=1))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(steps, again, strict=True))
    tokens = np.concatenate([step.tokens for step in steps])
    assert np.mean(tokens == 5) == pytest.approx(0.25, abs=0.04)
    assert np.mean(tokens == 9) == pytest.approx(0.375, abs=0.04)
    mean = mean_step([time(step.tokens, padded_rows(len(step.tokens), 10, 100)) for step in steps])
    assert mean.seconds == pytest.approx(mean.useful + mean.padding + mean.stragglers)
    assert mean.seconds == 900
