"""The numbers of continual learning against sums written out by hand, and the bootstrap against one of single draws."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from llava_mole.eval.scoring.aggregate import Units
from llava_mole.study import continual_results
from llava_mole.study.continual_metrics import Measured, continual_numbers, resample


def test_three_tasks_by_hand() -> None:
    a = np.array([[90.0, 20.0, 10.0], [60.0, 80.0, 30.0], [50.0, 85.0, 70.0]])
    found = continual_numbers(a)
    assert found["last"] == pytest.approx((50 + 85 + 70) / 3)
    assert found["average"] == pytest.approx((90 + (60 + 80) / 2 + (50 + 85 + 70) / 3) / 3)
    assert found["learned"] == pytest.approx((90 + 80 + 70) / 3)
    assert found["backward"] == pytest.approx(((50 - 90) + (85 - 80)) / 2)
    assert found["forgetting"] == pytest.approx(((90 - 50) + (80 - 85)) / 2)


def test_forgetting_is_measured_from_the_best_earlier_accuracy() -> None:
    """Task 1 was best after task 2, task 2 before it was trained on: Chaudhry's maximum is over all earlier steps."""
    a = np.array([[50.0, 70.0, 0.0], [65.0, 60.0, 0.0], [40.0, 55.0, 90.0]])
    found = continual_numbers(a)
    assert found["forgetting"] == pytest.approx(((65 - 40) + (70 - 55)) / 2)
    assert found["backward"] == pytest.approx(((40 - 50) + (55 - 60)) / 2)


def test_two_tasks_where_the_second_helps_the_first() -> None:
    found = continual_numbers(np.array([[70.0, 5.0], [75.0, 60.0]]))
    assert found["backward"] == pytest.approx(5.0)
    assert found["forgetting"] == pytest.approx(-5.0)


def test_one_task_has_nothing_to_forget() -> None:
    found = continual_numbers(np.array([[80.0]]))
    assert found["last"] == found["average"] == found["learned"] == 80.0
    assert math.isnan(found["backward"])
    assert math.isnan(found["forgetting"])


def test_leading_axes_are_kept_and_other_shapes_refused() -> None:
    generator = np.random.default_rng(0)
    many = generator.uniform(0, 100, (4, 2, 3, 3))
    found = continual_numbers(many)
    for index in np.ndindex(4, 2):
        alone = continual_numbers(many[index])
        assert all(found[name][index] == pytest.approx(alone[name]) for name in alone)
    with pytest.raises(ValueError, match=r"accuracies are \(2, 3\)"):
        continual_numbers(np.zeros((2, 3)))


def hits(*columns: list[int]) -> list[Units]:
    count = len(columns[0])
    ids = tuple(f"q{n}" for n in range(count))
    ones = np.ones(count)
    return [Units(ids, ("g",) * count, {"m.hit": np.array(c, float), "m.n": ones}) for c in columns]


def share(sums: dict) -> np.ndarray:
    total = np.sum(list(sums.values()), axis=0)
    return 100 * total[:, 0] / total[:, 1]


def test_the_models_share_one_draw_of_questions() -> None:
    generator = np.random.default_rng(3)
    one, other = (generator.integers(0, 2, 60).tolist() for _ in range(2))
    observed, drawn = resample(Measured(hits(one, one, other), share), resamples=4000)
    assert observed.tolist() == [100 * sum(one) / 60] * 2 + [100 * sum(other) / 60]
    assert (drawn[:, 0] == drawn[:, 1]).all(), "equal answers stay equal in every resample"
    picks = generator.integers(0, 60, (4000, 60))  # the same, one question at a time
    naive = 100 * (np.array(other)[picks] - np.array(one)[picks]).mean(axis=1)
    paired = drawn[:, 2] - drawn[:, 0]
    assert paired.mean() == pytest.approx(naive.mean(), abs=0.5)
    assert paired.std() == pytest.approx(naive.std(), rel=0.08)


def test_different_questions_are_refused() -> None:
    one, other = hits([1, 0, 1])[0], hits([1, 0])[0]
    with pytest.raises(ValueError, match="different questions"):
        resample(Measured([one, other], share))


@pytest.mark.parametrize("models", [1, 4, 5])
def test_benchmarks_are_resampled_independently(models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two benchmarks of one study: the mean of both has the variance of independent means, whatever their sizes."""
    generator = np.random.default_rng(1)
    answers = {own: [generator.integers(0, 2, 200).tolist() for _ in range(models)] for own in ("one", "two")}
    units = {own: hits(*columns) for own, columns in answers.items()}
    drawn = {}

    class Task:
        base = None

        def numbers(self, task: str) -> list[str]:
            return [f"{task}.hit"]

    monkeypatch.setattr(continual_results, "stored_benchmark", lambda file: Benchmark())
    monkeypatch.setattr(continual_results, "statistic", lambda *_: share)
    monkeypatch.setattr(continual_results.Units, "from_dict", lambda unit, _: unit)
    for own in answers:
        files = [{own: {"per_question": unit, "score_file": ""}} for unit in units[own]]
        _, drawn[own] = continual_results._accuracies(Task(), own, files, 4000, 0)  # type: ignore[arg-type]
    for m in range(models):
        assert abs(np.corrcoef(drawn["one"][:, m], drawn["two"][:, m])[0, 1]) < 0.08


class Benchmark:
    """Stands for the definition that a score file holds."""

    groups = ("g",)

    def expand_numbers(self, groups: Sequence[str]) -> dict[str, None]:
        return {"hit": None}
