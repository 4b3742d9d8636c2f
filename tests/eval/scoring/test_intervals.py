"""Resampling by distinct rows is the ordinary bootstrap; the tests have hand-computed and brute-force values."""

import itertools
import math

import numpy as np
import pytest

from llava_mole.eval.scoring.intervals import (
    bootstrap_sums,
    difference_interval,
    group_sums,
    holm_adjusted,
    mcnemar_exact,
    percentile_interval,
    permutation_p_value,
    wilson_interval,
)


def mean(sums):
    return sums["all"][:, 0] / sums["all"][:, 1]


def column(*values: float) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


def test_bootstrap_is_that_of_drawing_questions() -> None:
    rows = column(*np.random.default_rng(0).random(40).round(1))
    ours = mean(bootstrap_sums({"all": rows}, resamples=4000))
    drawn = np.random.default_rng(1).integers(0, 40, size=(4000, 40))
    plain = rows[drawn, 0].mean(axis=1)
    assert ours.mean() == pytest.approx(rows[:, 0].mean(), abs=0.005)
    assert ours.std() == pytest.approx(plain.std(), rel=0.05)
    assert percentile_interval(ours) == pytest.approx(percentile_interval(plain), abs=0.01)


def test_bootstrap_repeats_and_keeps_group_sizes() -> None:
    groups = {"a": column(0, 1, 1), "b": column(0.5, 0.25)}
    one, two = bootstrap_sums(groups, resamples=50), bootstrap_sums(groups, resamples=50)
    for name, size in (("a", 3), ("b", 2)):
        assert (one[name] == two[name]).all()
        assert (one[name][:, 1] == size).all()
    assert (bootstrap_sums(groups, resamples=50, seed=1)["a"] != one["a"]).any()


def test_bootstrap_of_a_constant_has_no_width() -> None:
    assert percentile_interval(mean(bootstrap_sums({"all": column(1, 1, 1)}, resamples=20))) == (1, 1)


def test_resamples_without_a_value_are_left_out() -> None:
    assert percentile_interval(np.array([math.nan, 1.0, 3.0]), level=1.0) == (1, 3)
    assert all(math.isnan(end) for end in percentile_interval(np.array([math.nan])))


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 2**15),
    ],
)
def test_mcnemar(first: int, second: int, p: float) -> None:
    assert mcnemar_exact(first, second) == pytest.approx(p)


def test_mcnemar_of_thousands_of_pairs_does_not_underflow() -> None:
    # Normal approximation with continuity correction: z = (200 - 1) / sqrt(4000) = 3.1465, p = 0.00165.
    assert mcnemar_exact(1900, 2100) == pytest.approx(0.00165, rel=0.02)


def test_permutation_test_against_all_swaps() -> None:
    first, second = [0.1, 0.4, 0.4, 0.0, 0.3, 0.2], [0.5, 0.4, 0.9, 0.1, 0.2, 0.8]
    differences = np.array(second) - np.array(first)
    observed = abs(differences.sum())
    every = [abs((differences * signs).sum()) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean([value >= observed - 1e-12 for value in every])
    p = permutation_p_value({"all": column(*first)}, {"all": column(*second)}, mean)
    assert p == pytest.approx(exact, abs=0.01)


def test_permutation_test_of_equal_runs_is_one() -> None:
    rows = {"all": column(0.2, 0.7, 1)}
    assert permutation_p_value(rows, rows, mean, resamples=100) == 1


def test_permutation_test_of_zero_one_scores_agrees_with_mcnemar() -> None:
    first = column(*[1] * 20 + [0] * 12 + [1] * 3)
    second = column(*[1] * 20 + [1] * 12 + [0] * 3)
    p = permutation_p_value({"all": first}, {"all": second}, mean)
    assert p == pytest.approx(mcnemar_exact(3, 12), abs=0.01)


def test_holm() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1; none below the one before it.
    assert holm_adjusted([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm_adjusted([0.5, 0.9]) == [1, 1]
    assert holm_adjusted([0.2]) == [0.2]
    assert holm_adjusted([]) == []


def test_paired_difference_is_narrower_than_unpaired() -> None:
    scores = np.random.default_rng(3).random(100).round(2)
    better = np.minimum(scores + 0.05, 1)
    low, high = difference_interval({"all": column(*scores)}, {"all": column(*better)}, mean)
    assert low < (better - scores).mean() < high
    assert high - low < 0.02
    assert low > 0


def test_group_sums() -> None:
    assert group_sums({"a": column(1, 0, 1)})["a"].tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # 8/10 and 1/29: published examples of Wilson's interval; 0/10 and 10/10: z^2 / (n + z^2) = 3.841459 / 13.841459.
    [(8, 10, 0.49016, 0.94332), (1, 29, 0.00611, 0.17176), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (0, 0, 0, 1)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-5)
