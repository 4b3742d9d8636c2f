"""Intervals and paired tests of numbers that are ratios of sums over questions, or sums and means of such ratios.

All resampling works on *distinct rows*: questions with equal fields are interchangeable, so drawing n of n questions
with replacement is one multinomial draw over the distinct rows. The distribution is that of drawing the questions one
by one, and 10,000 resamples of 0/1 scores take only a few numbers each.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 20230719
LEVEL = 0.95
CHUNK = 2_000_000
"""Limit on the counts held in memory at a time."""

Array = NDArray[np.float64]
Sums = Mapping[str, Array]
"""Group -> sums of its fields, `[B, F]`: B resamples, F fields."""
Statistic = Callable[[Sums], Array]
"""Sums -> the number's value in each resample, `[B]`."""


def group_sums(groups: Mapping[str, Array]) -> dict[str, Array]:
    """Return the observed sums, `[1, F]` each, of groups of questions `[n, F]`."""
    return {name: rows.sum(axis=0, keepdims=True) for name, rows in groups.items()}


def bootstrap_sums(
    groups: Mapping[str, Array], *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> dict[str, Array]:
    """Return the sums, `[resamples, F]` each, of resamples of groups of questions `[n, F]`.

    Questions are drawn with replacement within each group; the groups' sizes are part of the benchmark.
    """
    generator = np.random.default_rng(seed)
    return {name: _multinomial_sums(rows, resamples, generator) for name, rows in groups.items()}


def _multinomial_sums(rows: Array, resamples: int, generator: np.random.Generator) -> Array:
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    shares, sizes = counts / len(rows), _chunks(resamples, len(distinct))
    return np.concatenate([generator.multinomial(len(rows), shares, size=size) @ distinct for size in sizes])


def _chunks(resamples: int, distinct: int) -> list[int]:
    """Return how many resamples to draw at a time, with `distinct` counts each."""
    step = max(1, CHUNK // distinct)
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def percentile_interval(values: Array, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile bootstrap interval; resamples without a value (0/0) are left out.

    Efron, "Bootstrap methods: another look at the jackknife" (1979).
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the p-value of the two-sided exact McNemar test.

    It is the probability of a split at least as uneven among the discordant pairs: twice the binomial tail with
    probability 1/2, at most 1, and 1 without discordant pairs. McNemar (1947).

    Args:
        only_first, only_second: Number of questions that only this run answers correctly.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    if not total:
        return 1.0
    # In logarithms: 2**-total underflows for thousands of pairs.
    terms = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    largest = max(terms)
    log_tail = largest + math.log(sum(math.exp(term - largest) for term in terms)) - total * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, which bounds the chance of any false finding.

    The k-th smallest of m is multiplied by m - k + 1, then raised to the one before it and cut at 1. The bound holds
    however the tests depend on each other. Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = np.argsort(p_values, kind="stable")
    multiplied = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.ones(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(multiplied))
    return adjusted.tolist()


def permutation_p_value(
    first: Mapping[str, Array],
    second: Mapping[str, Array],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> float:
    """Return the p-value of a two-sided paired permutation test of a number's difference between two runs.

    Under the hypothesis that the runs are exchangeable, the two scores of each question are swapped at random. The
    p-value is (1 + resamples with a difference at least as large) / (1 + resamples), so never 0.

    Args:
        first, second: Group -> fields of the same questions in the same order, `[n, F]`.
    """
    generator = np.random.default_rng(seed)
    swapped_first, swapped_second = {}, {}
    for name, rows in first.items():
        other = second[name]
        pairs, counts = np.unique(np.concatenate([rows, other], axis=1), axis=0, return_counts=True)
        difference = pairs[:, rows.shape[1] :] - pairs[:, : rows.shape[1]]
        sizes = _chunks(resamples, len(pairs))
        moved = np.concatenate([generator.binomial(counts, 0.5, size=(n, len(pairs))) @ difference for n in sizes])
        swapped_first[name], swapped_second[name] = rows.sum(axis=0) + moved, other.sum(axis=0) - moved
    observed = abs(float(statistic(group_sums(second))[0] - statistic(group_sums(first))[0]))
    differences = np.abs(statistic(swapped_second) - statistic(swapped_first))
    # The same terms summed in another order differ by rounding, which must not decide a tie.
    as_large = int(np.count_nonzero(~(differences < observed - 1e-9 * max(1.0, observed))))
    return (1 + as_large) / (1 + resamples)


def difference_interval(
    first: Mapping[str, Array],
    second: Mapping[str, Array],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `second - first`, both resampled on the same questions."""
    pairs = {name: np.concatenate([rows, second[name]], axis=1) for name, rows in first.items()}
    joint = bootstrap_sums(pairs, resamples=resamples, seed=seed)
    one, two = ({name: np.split(sums, 2, axis=1)[n] for name, sums in joint.items()} for n in (0, 1))
    return percentile_interval(statistic(two) - statistic(one))


Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, both ends in 0..1; (0, 1) without observations.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At 0 and at n correct answers one end is exactly 0 or 1; rounding must not move it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high
