"""Validation samples are disjoint from training, a pure function of the seed, and change the plan's digest."""

from collections.abc import Sequence

import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.conversation import Turn
from llava_mole.data.mixture import TrainingPlan, hold_out
from llava_mole.data.records import Record


def records(name: str, count: int) -> list[Record]:
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    return [Record(f"{name}-{n}", (), turns, name, f"{name}:{n}") for n in range(count)]


def ids(source: Sequence[Record]) -> list[str]:
    return [record.id for record in source]


def test_nothing_is_lost_or_shared() -> None:
    sources = {"a": records("a", 50), "b": records("b", 9)}
    training, validation = hold_out(sources, 7, seed=1)
    for name, source in sources.items():
        assert len(validation[name]) == 7
        assert not set(ids(training[name])) & set(ids(validation[name]))
        assert sorted(ids(training[name]) + ids(validation[name])) == sorted(ids(source))
        assert ids(training[name]) == [r.id for r in source if r.id not in set(ids(validation[name]))]
    assert ids(training["a"][2:4]) == ids(training["a"])[2:4]


def test_it_depends_on_the_seed_alone() -> None:
    sources = {"a": records("a", 50)}
    first, again, other = (hold_out(sources, 7, seed)[1]["a"] for seed in (1, 1, 2))
    assert ids(first) == ids(again)
    assert ids(first) != ids(other)
    longer = hold_out(sources, 8, 1)[1]["a"]
    assert set(ids(first)) < set(ids(longer))


def test_zero_changes_nothing() -> None:
    sources = {"a": records("a", 5)}
    training, validation = hold_out(sources, 0, 1)
    assert training == sources
    assert validation == {}


def test_the_plan_has_another_digest() -> None:
    sources = {"a": records("a", 50)}
    digests = set()
    for count in (0, 1, 2):
        training, _ = hold_out(sources, count, 1)
        digests.add(TrainingPlan({"a": len(training["a"])}, {}, 1, 1).digest)
    assert len(digests) == 3


def test_a_source_must_keep_something() -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_samples is 5, but source a has 5 records"):
        hold_out({"a": records("a", 5)}, 5, 1)
