"""The epoch plan takes exact counts, differs by epoch and seed, and is the same in every process."""

import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.data.mixture import EpochPlan, TrainingPlan, mixture_counts, plan_epoch


def taken(plan: EpochPlan, name: str) -> Counter[int]:
    """How often each sample of a source occurs."""
    mask = plan.source_index == plan.names.index(name)
    return Counter(plan.sample_index[mask].tolist())


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [(0, 10, 0), (0.5, 10, 5), (1, 10, 10), (1.25, 8, 10), (2, 10, 20), (0.5, 5, 3), (0.1, 4, 0), (1.1, 10, 11)],
)
def test_exact_counts(value: float, size: int, expected: int) -> None:
    plan = plan_epoch({"a": size, "b": 3}, {"a": value}, seed=1, epoch=0)
    assert plan.counts == {"a": expected, "b": 3}
    assert sum(taken(plan, "a").values()) == expected
    assert taken(plan, "b") == Counter({0: 1, 1: 1, 2: 1})
    assert len(plan.source_index) == len(plan.sample_index) == expected + 3
    # Every sample once for each full pass, and at most once more for the fraction.
    repeats = [taken(plan, "a")[index] for index in range(size)]
    assert set(repeats) <= {int(value), int(value) + 1}
    assert max(taken(plan, "a"), default=0) < size


def test_arrays_are_small() -> None:
    plan = plan_epoch({"a": 100}, {}, 0, 0)
    assert plan.source_index.dtype == np.int16
    assert plan.sample_index.dtype == np.int64


def test_fraction_takes_other_samples_each_epoch_and_all_in_turn() -> None:
    slices = [set(taken(plan_epoch({"a": 40}, {"a": 0.25}, 3, epoch), "a")) for epoch in range(5)]
    assert all(len(part) == 10 for part in slices)
    assert set.union(*slices[:4]) == set(range(40))
    assert slices[4] == slices[0]
    assert slices[0] != set(range(10))


def test_fraction_that_does_not_divide_stays_balanced() -> None:
    total: Counter[int] = Counter()
    for epoch in range(7):
        total += taken(plan_epoch({"a": 10}, {"a": 1.3}, 0, epoch), "a")
    assert sum(total.values()) == 7 * 13
    assert set(total.values()) <= {9, 10}


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = [plan_epoch({"a": 50, "b": 50}, {}, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    digests = {plan.digest for plan in orders}
    assert len(digests) == 4
    assert all(taken(plan, "a") == Counter(range(50)) for plan in orders)


def test_sources_are_mixed_through_the_epoch() -> None:
    plan = plan_epoch({"a": 500, "b": 500}, {}, 0, 0)
    halves = [plan.source_index[:500].mean(), plan.source_index[500:].mean()]
    assert all(0.4 < share < 0.6 for share in halves)


def test_another_source_does_not_change_the_slice_of_a_source() -> None:
    alone = taken(plan_epoch({"a": 40}, {"a": 0.25}, 3, 0), "a")
    assert taken(plan_epoch({"z": 5, "a": 40}, {"a": 0.25}, 3, 0), "a") == alone


def test_same_digest_in_another_process_and_for_ever() -> None:
    code = (
        "from llava_mole.data.mixture import plan_epoch; print(plan_epoch({'g': 9, 'd': 7}, {'g': 1.5}, 42, 2).digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    plan = plan_epoch({"g": 9, "d": 7}, {"g": 1.5}, 42, 2)
    assert other.stdout.strip() == plan.digest
    # Written down: a change would silently reorder runs that are resumed.
    assert plan.digest == "06670361e9c4ef70189d8bd05308ea4acb2e5ac396a64c62e5df6c8b705a6e46"


def test_digest_depends_on_names_and_sizes() -> None:
    digests = {plan_epoch(sizes, {}, 0, 0).digest for sizes in ({"a": 3, "b": 3}, {"a": 3, "c": 3}, {"b": 3, "a": 3})}
    assert len(digests) == 3


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf")])
def test_impossible_lambda_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\.a is .*lambda must be"):
        plan_epoch({"a": 3}, {"a": value}, 0, 0)


@pytest.mark.parametrize(("sizes", "lambdas"), [({}, {}), ({"a": 3}, {"a": 0}), ({"a": 0}, {}), ({"a": 3}, {"a": 0.1})])
def test_empty_mixture_is_refused(sizes: dict[str, int], lambdas: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture is empty"):
        mixture_counts(sizes, lambdas)


@pytest.mark.parametrize("value", [1e9, 1.7e308])
def test_an_epoch_that_no_memory_holds_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture takes more than 2,147,483,648 samples per epoch"):
        plan_epoch({"a": 3, "b": 1}, {"a": value}, 0, 0)


def test_lambda_of_an_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\.b: no such source; there are a"):
        plan_epoch({"a": 3}, {"b": 1}, 0, 0)


def test_training_plan_is_the_epochs_one_after_the_other() -> None:
    plan = TrainingPlan({"a": 6, "b": 4}, {"a": 1.5}, seed=5, epochs=3)
    assert len(plan) == 3 * 13
    assert plan.counts == {"a": 27, "b": 12}
    assert plan.names == ("a", "b")
    for epoch in range(3):
        expected = plan_epoch({"a": 6, "b": 4}, {"a": 1.5}, 5, epoch)
        pairs = [(expected.names[s], int(i)) for s, i in zip(expected.source_index, expected.sample_index, strict=True)]
        assert [plan[epoch * 13 + offset] for offset in range(13)] == pairs
    assert plan.digest == TrainingPlan({"a": 6, "b": 4}, {"a": 1.5}, seed=5, epochs=9).digest
    for position in (-1, 39):
        with pytest.raises(IndexError):
            plan[position]


def test_training_plan_pickles_small_and_equal() -> None:
    plan = TrainingPlan({"a": 20_000}, {}, seed=0, epochs=2)
    first = plan[12_345]
    data = pickle.dumps(plan)
    assert len(data) < 2_000
    assert pickle.loads(data)[12_345] == first


def test_training_plan_builds_an_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: object) -> EpochPlan:
        calls.append(args)
        return plan_epoch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("llava_mole.data.mixture.plan_epoch", counting)
    plan = TrainingPlan({"a": 10}, {}, 0, 2)
    assert not calls
    for position in range(20):
        plan[position]
    assert len(calls) == 2


def test_plan_without_epochs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs is 0"):
        TrainingPlan({"a": 3}, {}, 0, 0)
