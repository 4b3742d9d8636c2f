"""The VQA normalisers and the rules that stand on them, branch by branch, from the published text."""

import pytest

from llava_mole.common.errors import DataError
from llava_mole.eval.metrics import text_vqa
from llava_mole.eval.metrics.exact import word_match
from llava_mole.eval.metrics.normalise import (
    COMMA_LOOKAROUND,
    CONTRACTIONS,
    llava_med_normalise,
    m4c_normalise,
    rewrite_words,
    strip_punctuation,
    vqa_normalise,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red/blue", "red blue"),  # a mark inside a word becomes a blank
        ("red, blue", "red blue"),  # beside a blank it is deleted
        ("red- blue/green", "red bluegreen".replace("bluegreen", "blue green")),  # each mark is judged for itself
        ("a,b/c d", "a b c d"),
        ("1,000 a/b", "1000 ab"),  # a comma between digits deletes every mark
        ("1,000,000", "1000000"),
        ("12,", "12 "),
        ("U.S.A.", "USA"),
        ("3.5 m.", "3.5 m"),  # a period before a digit stays
        ("$5.", "$5"),  # $ and % are no marks
        ("5 %", "5 %"),
        ("it's", "it's"),  # nor is the apostrophe
        (". 5", " 5"),
        ("v.5 x.y", "v.5 xy"),  # the look-behind for digits is written wrongly and never blocks
        ("5.x", "5x"),
    ],
)
def test_punctuation(text: str, expected: str) -> None:
    assert strip_punctuation(text) == expected


def test_at_most_32_periods_are_deleted() -> None:
    assert strip_punctuation("x" + "." * 40) == "x" + "." * 8


def test_the_two_comma_patterns_differ_after_several_commas() -> None:
    assert strip_punctuation("1,,2/3") == "1  2 3"  # VQA: one comma between digits only
    assert strip_punctuation("1,,2/3", COMMA_LOOKAROUND) == "123"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat and a dog", "cat and dog"),
        ("none zero one two ten eleven", "0 0 1 2 10 eleven"),
        ("An apple", "apple"),
        ("dont couldnt've couldn'tve", "don't couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yall'd've y'allll oclock 'ow'sat", "y'all'd've y'all'll o'clock 'ow's'at"),
        ("Im ive", "im ive"),  # the published keys have capitals, so they never match
        ("a", ""),
        ("", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert rewrite_words(text) == expected


def test_contractions_are_the_published_table() -> None:
    # 120 published keys, less four with capitals (Id've, I'dve, Im, Ive) and two that map to themselves.
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["hed"] == "he'd"
    assert "shed" not in CONTRACTIONS
    assert "couldntve" not in CONTRACTIONS


def test_the_three_forms_of_the_normaliser() -> None:
    assert vqa_normalise(" A\nblue\tcar. ") == "blue car"
    assert m4c_normalise("Joe's, 1,000?") == "joe 's 1000"
    assert vqa_normalise("Joe's, 1,000?") == "joe's 1000"
    assert llava_med_normalise("the left, and right") == "left and right"
    assert m4c_normalise("What?") == "what"
    # m4c deletes commas before it looks for them between digits, so other marks become blanks there.
    assert (m4c_normalise("1,000/2"), vqa_normalise("1,000/2")) == ("1000 2", "10002")


@pytest.mark.parametrize(
    ("prediction", "golds", "hit"),
    [
        ("The image shows two dogs.", ["2 dogs"], True),
        ("There are 12 dogs", ["2"], False),  # word boundaries on both sides
        ("a goldfish", ["tench", "goldfish"], True),  # any gold of a list
        ("catalog", ["cat"], False),
        ("it is blue-green", ["green"], True),
        ("", ["yes"], False),
        ("Answer: Yes", ["yes"], True),
        ("CARREFOUR\nexpress", ["carrefour express"], True),
        ("no idea", ["the"], True),  # as published: a gold of articles is in anything that has a word
        ("", ["the"], False),
        ("5%", ["5%"], False),  # as published: no word boundary after a percent sign at the end
    ],
)
def test_word_match(prediction: str, golds: list[str], hit: bool) -> None:
    assert word_match(prediction, golds) is hit


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_text_vqa_soft_score(matches: int, score: float) -> None:
    golds = ["The Nokia"] * matches + ["other"] * (10 - matches)
    assert text_vqa.soft_score("nokia.", golds) == pytest.approx(score)


def test_text_vqa_needs_ten_golds() -> None:
    with pytest.raises(DataError, match="needs 10 gold answers; found 3"):
        text_vqa.soft_score("a", ["a"] * 3)


def test_normalised_exact() -> None:
    assert text_vqa.normalised_exact("Two", ["5", "2"])
    assert not text_vqa.normalised_exact("two dogs", ["2"])


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("Yes.", ["yes"] * 10, 1.0),
        ("yes", ["Yes"] * 10, 0.0),  # golds that agree are not normalised
        ("yes", ["Yes"] * 9 + ["no"], 1.0),
        ("two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("man's", ["man's"] * 3 + ["x"] * 7, 0.0),  # the prediction's 's is set off, the gold's is not
        ("a, b", ["a, b"] * 3 + ["x"] * 7, 0.9),
    ],
)
def test_vqa_v2_of_lmms_eval(prediction: str, golds: list[str], score: float) -> None:
    assert text_vqa.vqa_v2_lmms_eval(prediction, golds) == pytest.approx(score)
