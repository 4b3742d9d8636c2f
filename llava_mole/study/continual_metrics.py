"""Numbers of continual learning, from accuracies a[i, j]: after training on tasks 1 to i, on the test set of task j.

The definitions, quoted in docs/continual.md:

    last        (1/T) sum_j a[T, j]                                  Lopez-Paz and Ranzato (2017), ACC; MCITlib, MFN
    learned     (1/T) sum_j a[j, j]                                  MCITlib, MFT
    average     (1/T) sum_i (1/i) sum_{j <= i} a[i, j]               CoIN and MCITlib, MAA
    backward    1/(T-1) sum_{j < T} (a[T, j] - a[j, j])              Lopez-Paz and Ranzato (2017), BWT
    forgetting  1/(T-1) sum_{j < T} (max_{l < T} a[l, j] - a[T, j])  Chaudhry et al. (2018), F_T
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_mole.eval.scoring.aggregate import Units
from llava_mole.eval.scoring.intervals import (
    RESAMPLES,
    SEED,
    Array,
    Statistic,
    bootstrap_sums,
    group_sums,
)

NUMBERS = {
    "last": "mean accuracy after the last task",
    "average": "mean over steps of the mean accuracy on the tasks so far",
    "learned": "mean accuracy on each task directly after it",
    "backward": "backward transfer: last minus learned, without the last task",
    "forgetting": "best earlier accuracy minus last, without the last task",
}
"""Number -> what it is, in the order of the tables."""


def continual_numbers(a: Array) -> dict[str, Array]:
    """The numbers of `NUMBERS`, each `[...]`, from accuracies `[..., T, T]`; NaN for transfer and forgetting if T is 1.

    Raises:
        ValueError: the last two axes are not square.
    """
    tasks = a.shape[-1]
    if a.shape[-2] != tasks or tasks == 0:
        raise ValueError(f"accuracies are {a.shape}; the last two axes are tasks, [..., T, T]")
    diagonal = np.diagonal(a, axis1=-2, axis2=-1)
    last = a[..., -1, :]
    so_far = np.stack([a[..., i, : i + 1].mean(axis=-1) for i in range(tasks)], axis=-1)
    none = np.full(a.shape[:-2], math.nan)
    return {
        "last": last.mean(axis=-1),
        "average": so_far.mean(axis=-1),
        "learned": diagonal.mean(axis=-1),
        "backward": (last - diagonal)[..., :-1].mean(axis=-1) if tasks > 1 else none,
        "forgetting": (a[..., :-1, :-1].max(axis=-2) - last[..., :-1]).mean(axis=-1) if tasks > 1 else none,
    }


@dataclass(frozen=True)
class Measured:
    """Several models' answers to the questions of one number of a benchmark."""

    units: Sequence[Units]
    """One for each model; all of them have the same questions."""
    statistic: Statistic
    """The number in percent, of the sums of one model's fields."""


def resample(
    measured: Measured, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> tuple[Array, Array]:
    """The number of every model, `[M]`, and in resamples of the questions, `[B, M]`.

    One draw of questions serves all models, so differences between them are paired.

    Raises:
        ValueError: the models answered different questions.
    """
    first = measured.units[0]
    if any((u.ids, u.groups) != (first.ids, first.groups) for u in measured.units):
        raise ValueError("the models answered different questions")
    tables = [u.rows() for u in measured.units]
    joint = {group: np.concatenate([table[group] for table in tables], axis=1) for group in tables[0]}
    count = len(tables)
    observed = _numbers(group_sums(joint), measured.statistic, count)[0]
    return observed, _numbers(bootstrap_sums(joint, resamples=resamples, seed=seed), measured.statistic, count)


def _numbers(sums: Mapping[str, NDArray[np.float64]], statistic: Statistic, models: int) -> Array:
    """`[B, M]` from sums `[B, M F]`."""
    split = {group: np.split(values, models, axis=1) for group, values in sums.items()}
    return np.stack([statistic({group: parts[m] for group, parts in split.items()}) for m in range(models)], axis=1)
