"""Facts of the tiny world: what the two dials promise; draws are pure and keep the images of the splits apart."""

from collections import Counter
from itertools import combinations

import pytest

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.sources.tiny.facts import MOST_FACTS, WORDS, draw, facts, split_images
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS


@pytest.mark.parametrize("agreed", ["common", "own"])
@pytest.mark.parametrize("convention", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("load", [1, 40, MOST_FACTS])
def test_dials_mean_what_they_say(load: int, convention: float, agreed: str) -> None:
    by_domain = {domain: facts(domain, load, convention, 3, agreed) for domain in DOMAINS}
    assert by_domain == {domain: facts(domain, load, convention, 3, agreed) for domain in DOMAINS}
    for asked in by_domain.values():
        assert len(asked) == load == len({fact.text for fact in asked})
        assert sum(fact.category == "convention" for fact in asked) == int(load * convention)
        assert {fact.answer for fact in asked} <= set(WORDS)
    for left, right in combinations(DOMAINS, 2):
        for one, other in zip(by_domain[left], by_domain[right], strict=True):
            assert one.category == other.category
            if one.category == "convention":
                assert one.text == other.text
                assert one.answer != other.answer
            elif agreed == "common":
                assert one == other
        own = {fact.text for fact in by_domain[left] if fact.category == "fact"}
        if agreed == "own":
            assert not own & {fact.text for fact in by_domain[right]}


def test_a_smaller_load_is_the_start_of_a_larger_one() -> None:
    assert facts("document", 20, 0.5) == facts("document", 90, 0.5)[:20]
    assert facts("document", 20, 0.5) != facts("document", 20, 0.5, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("law", 8, 1.0), "law"), (("general", 0, 1.0), "from 1 to"), (("general", 8, 1.5), "from 0 to 1")],
)
def test_errors_name_what_is_allowed(arguments: tuple[str, int, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        facts(*arguments)


def test_draws_are_even_and_splits_share_no_image() -> None:
    names = [f"{number}.png" for number in range(80)]
    train, validation = split_images(names)
    assert len(validation) == 10
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(names)
    asked = facts("general", 16, 1.0)
    samples = draw(asked, train, 100, "train", 0)
    assert samples == draw(asked, train, 100, "train", 0) != draw(asked, train, 100, "train", 1)
    assert {sample.image for sample in samples} <= set(train)
    assert set(Counter(sample.question.text for sample in samples).values()) == {6, 7}
    assert [s.question for s in draw(asked, train, 100, "validation", 0)] != [s.question for s in samples]
    for wrong in ({"asked": [], "split": "train"}, {"asked": asked, "split": "dev"}):
        with pytest.raises(DataError):
            draw(images=train, count=3, seed=0, **wrong)  # type: ignore[arg-type]
