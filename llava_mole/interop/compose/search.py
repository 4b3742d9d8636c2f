"""The search of coefficients without gradients: CMA-ES within bounds, started from the best of given points."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_mole.common.errors import ConfigError

Objective = Callable[[Sequence[float]], float]

BOUND = 1.5
"""Largest absolute value of a coefficient, as in LoraHub."""
STEP = 0.3
"""Initial standard deviation of a coefficient: a fifth of the way from 0 to the bound."""


def require_cma() -> Any:
    """The module `cma`. Raises ConfigError if it is not installed; call it before models are loaded."""
    try:
        import cma
    except ImportError:
        raise ConfigError(
            "compose needs the package cma; install it with `pip install 'llava_mole[compose]'`"
        ) from None
    return cma


def search(
    objective: Objective,
    starts: Sequence[Sequence[float]],
    *,
    evaluations: int,
    seed: int,
    on_evaluation: Callable[[int, float, float], object] = lambda count, value, best: None,
) -> tuple[list[float], float]:
    """The coefficients, each in [-BOUND, BOUND], with the lowest value of the objective that was met.

    The value is at most that of every start. The global generators of numpy and Python are not touched.

    Args:
        objective: to be minimised; a value that is not finite counts as infinitely bad.
        starts: points to evaluate first, of one length of at least 1; the search begins at the best of them.
        evaluations: number of further evaluations of the objective.
        seed: of the random steps; equal seeds give equal results.
        on_evaluation: called after each evaluation with its number from 1 (starts included), its value and the best.

    Raises:
        ConfigError: the package `cma` is not installed, or the objective is finite at no start.
    """
    cma = require_cma()
    best: list[float] = []
    best_value = math.inf
    count = 0

    def evaluate(point: Sequence[float]) -> float:
        nonlocal best, best_value, count
        value = objective(point)
        value = value if math.isfinite(value) else math.inf
        count += 1
        if value < best_value:
            best, best_value = [float(x) for x in point], value
        on_evaluation(count, value, best_value)
        return value

    for start in starts:
        evaluate(start)
    if not best:
        raise ConfigError("the loss is not finite, with or without the LoRAs; use --dtype float32, or check the base")
    dimensions = len(best)
    generator = np.random.default_rng(seed)
    # CMA-ES adapts a covariance matrix, which one number does not have; a second coordinate without effect gives one.
    padding = [0.0] * (dimensions == 1)
    options = {
        "bounds": [-BOUND, BOUND],
        "randn": lambda *shape: generator.standard_normal(shape),
        "seed": math.nan,  # otherwise it seeds numpy's global generator
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy([*best, *padding], STEP, options)
    last = count + evaluations
    while count < last and not strategy.stop():
        points = strategy.ask()
        values = [evaluate(point[:dimensions]) for point in points[: last - count]]
        if len(values) < len(points):
            break  # too few for another update
        strategy.tell(points, values)
    return best, best_value
