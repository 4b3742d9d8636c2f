"""The rules of the document benchmarks, branch by branch; expected values are worked out from the published text."""

import sys

import pytest

from llava_mole.common.errors import ConfigError
from llava_mole.eval.metrics import anls, exact, key_values, relaxed, wtq


@pytest.mark.parametrize(
    ("prediction", "target", "hit"),
    [
        ("105", "100", True),  # exactly 5%
        ("105.01", "100", False),
        ("95", "100", True),
        ("94.99", "100", False),
        ("-105", "-100", True),
        ("100", "-100", False),
        ("5%", "5%", True),
        ("5%", "0.05", True),  # a percent sign divides by 100
        ("5", "5%", False),
        ("5%%", "0.05", True),  # all of them are cut off
        ("0", "0", True),  # a zero target is compared as text
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("2010", "2015", True),  # years get no special treatment
        ("1,000", "1000", False),  # nor do commas
        ("1,000", "1,000", True),
        ("$5", "5", False),
        ("Norway", "norway", True),
        ("Norway ", "norway", False),  # nothing is stripped
        (" 5", "5", True),  # but a number may have blanks around it
        ("", "5", False),
        ("five", "5", False),
        ("5", "five", False),
        ("[1, 2]", "[1, 2]", True),
    ],
)
def test_relaxed_match(prediction: str, target: str, hit: bool) -> None:
    assert relaxed.relaxed_match(prediction, target) is hit


@pytest.mark.parametrize(
    ("prediction", "target", "hit"),
    [
        ("Yes", "Yes.", True),  # a period goes from the target
        ("Yes.", "Yes.", False),  # and not from the prediction
        ("10\n4", "104", True),
        ("Yes ", "Yes", False),
        ("<Generate Error>", "Yes", False),  # cut out first: an empty prediction, counted and wrong
        ("Error>", "Yes", None),  # left out of the denominator
        ("some Error> here", "Yes", None),
    ],
)
def test_relaxed_in_ureader(prediction: str, target: str, hit: bool | None) -> None:
    assert relaxed.relaxed_ureader(prediction, target) is hit


def test_relaxed_in_lmms_eval_keeps_everything() -> None:
    assert relaxed.relaxed_lmms_eval("Yes", "Yes.") is False
    assert relaxed.relaxed_lmms_eval("Error>", "Error>") is True


def test_anls_at_exactly_one_half() -> None:
    pytest.importorskip("rapidfuzz")
    assert anls.anls_due("abxx", ["abcd"]) == 0.0
    assert anls.anls_lmms_eval("abxx", ["abcd"]) == 0.5
    assert anls.anls_st_vqa("abxx", ["abcd"]) == 0.5
    assert anls.anls_due("abcx", ["abcd"]) == 0.75
    assert anls.anls_st_vqa("axxx", ["abcd"]) == anls.anls_lmms_eval("axxx", ["abcd"]) == 0.0


def test_anls_dialects() -> None:
    pytest.importorskip("rapidfuzz")
    assert anls.anls_due("10\nmay", ["10MAY"]) == 1.0  # newlines deleted, case ignored
    assert anls.anls_due("may ", ["may"]) == 0.75  # nothing is stripped
    assert anls.anls_st_vqa("may ", ["MAY"]) == 1.0
    # lmms-eval cleans the texts but divides by the raw length: distance 1 / 8 raw characters, not 1 / 6.
    assert anls.anls_lmms_eval("  10  may", ["10 jay"]) == pytest.approx(1 - 1 / 9)
    assert anls.anls_due("b", ["a", "b", "c"]) == 1.0  # the best of the golds
    for dialect in (anls.anls_due, anls.anls_lmms_eval, anls.anls_st_vqa):
        assert dialect("", ["May"]) == 0.0
        assert dialect("", [""]) == 1.0
        assert dialect("x", [""]) == 0.0
        assert dialect("x", []) == 0.0


def test_anls_without_rapidfuzz_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_mole\[eval\]'"):
        anls.anls_due("a", ["b"])


def test_exact_rules() -> None:
    assert exact.gqa_exact("Left..", "left")
    assert not exact.gqa_exact("left ", "left")
    assert not exact.gqa_exact("", "left")
    assert exact.exact_ureader("True", "True") is True
    assert exact.exact_ureader("true", "True") is False  # capitals count
    assert exact.exact_ureader("True.", "True.") is False  # the period goes from the gold alone
    assert exact.exact_ureader("Error>", "True") is None
    assert exact.plain_exact(" Yes. ", "yes")
    assert not exact.plain_exact(" ", "")


@pytest.mark.parametrize(
    ("prediction", "values", "found"),
    [
        ("ACME", [["Acme", "Acme Inc"]], 0b1),
        ("acme\n inc", [["Acme", "Acme Inc"]], 0b1),
        ("other", [["Acme"]], 0),
        ("None", [["Acme"]], None),  # no pair predicted
        ("None", [], None),
        ("none", [], 0),  # only the exact word is dropped
        ("", [["Acme"]], 0),  # an empty prediction is a wrong pair
        ("a", [["b"], ["a"], ["A", "b"]], 0b110),
    ],
)
def test_key_value_matches(prediction: str, values: list[list[str]], found: int | None) -> None:
    assert key_values.matches(prediction, values) == found


@pytest.mark.parametrize(
    ("found", "matched"),
    [([], 0), ([0b1], 1), ([0b1, 0b1], 1), ([0b1, 0, 0b10], 2), ([0b11, 0b1], 1), ([0b11, 0b10], 2), ([1 << 51], 1)],
)
def test_a_key_value_is_matched_once(found: list[int], matched: int) -> None:
    assert key_values.take(found) == matched  # [0b11, 0b1]: the first takes the value that the second needs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Zürich.", "zurich"),
        ("“New  York”", "new york"),
        ("1990\u201391", "1990-91"),
        ("Total[1][a]", "total"),
        ("[1]", ""),
        ("Smith (captain) (retired)†", "smith"),
        ("(only)", "(only)"),
        ('"a" and "b"', '"a" and "b"'),
        ("", ""),
    ],
)
def test_wtq_normalise(text: str, expected: str) -> None:
    assert wtq.wtq_normalise(text) == expected


@pytest.mark.parametrize(
    ("predicted", "targets", "hit"),
    [
        (["3"], ["3.0"], True),
        (["3.0000001"], ["3"], True),
        (["3.00001"], ["3"], False),
        (["2.9999999"], ["3"], False),  # as published: cut off, not rounded
        (["2.9999999"], ["2"], True),
        (["2001-5-3"], ["2001-05-03"], True),
        (["2001-xx-xx"], ["2001"], True),  # only the year is known: a number
        (["xx-5-3"], ["xx-5-4"], False),
        (["2001-13-1"], ["2001-13-01"], False),  # no month 13: texts
        (["the cat"], ["The Cat"], True),
        (["1,000"], ["1000"], False),  # no number for Python
        (["inf"], ["INF"], True),  # not finite: texts
        (["a", "b"], ["b", "a"], True),
        (["a, b"], ["a", "b"], False),  # one joined text never matches two values
        (["a", "a"], ["a"], True),  # duplicates count once
        (["a"], ["a", "A"], True),
        ([""], ["a"], False),
        (["x-y-z"], ["x-y-z"], True),
        (["Strasse"], ["straße"], True),  # upper case first, as in the DUE evaluator
        (["KADIKÖY ISTANBUL"], ["Kad\u0131k\u00f6y \u0130stanbul"], True),  # the Turkish letters without and with a dot
        (["ﬁnal"], ["FINAL"], True),
        (["ΟΔΟΣ"], ["οδοσ"], True),  # both forms of the small sigma
        (["\u017ft"], ["st"], True),
        (["1E3"], ["1e3"], True),
    ],
)
def test_wtq_denotations(predicted: list[str], targets: list[str], hit: bool) -> None:
    assert wtq.denotation_match(predicted, targets) is hit


def test_wtq_single_prediction() -> None:
    assert wtq.denotation_accuracy("New\n York", ["new york"])
    assert not wtq.denotation_accuracy("a", ["a", "b"])
