"""Each published scoring rule, branch by branch; the expected values are worked out from the published text."""

import sys

import pytest

from llava_mole.errors import ConfigError, DataError
from llava_mole.eval.metrics import anls, choice, exact, key_values, path_vqa, relaxed, text_vqa, wtq, yes_no
from llava_mole.eval.metrics.normalise import (
    COMMA_LOOKAROUND,
    CONTRACTIONS,
    llava_med_normalise,
    m4c_normalise,
    rewrite_words,
    strip_punctuation,
    vqa_normalise,
)
from llava_mole.eval.metrics.table import METRICS, get_metric
from llava_mole.eval.metrics.word_match import word_match


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


def test_path_vqa_open() -> None:
    assert path_vqa.open_exact("The Liver.", "liver")
    assert not path_vqa.open_exact("in the liver", "liver")
    assert not path_vqa.open_exact("", "the")
    assert path_vqa.open_containment("It is in the liver", "the liver")
    assert not path_vqa.open_containment("delivered", "liver")
    assert not path_vqa.open_containment("anything", "")
    # "exact match score": distinct gold words found / predicted words with repeats = 1 / 3.
    assert path_vqa.llava_med_exact_score("liver liver spleen", "liver liver") == pytest.approx(1 / 3)
    assert path_vqa.llava_med_exact_score("", "liver") == 0


def test_path_vqa_token_overlap() -> None:
    # shared: the prediction's two "liver"; false positive: "spleen"; false negatives: the gold's two "cyst".
    precision, recall, f1 = path_vqa.token_overlap("liver liver spleen", "liver cyst cyst")
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    for prediction, gold in (("", "liver"), ("liver", ""), ("the", "liver"), ("spleen", "liver")):
        assert path_vqa.token_overlap(prediction, gold) == (0, 0, 0)


@pytest.mark.parametrize(
    ("prediction", "gold", "llava_med", "strict"),
    [
        ("Yes", "yes", True, True),
        ("Yes, it is.", "yes", True, True),
        ("No", "yes", False, False),
        ("It is not", "no", True, False),  # "not" holds "no"
        ("unknown", "no", True, False),
        ("yes and no", "no", True, False),
        ("I think yes", "yes", True, False),
        ("", "no", False, False),
        ("maybe", "yes", False, False),
        ("None", "no", False, False),  # "none" becomes 0
    ],
)
def test_path_vqa_closed(prediction: str, gold: str, llava_med: bool, strict: bool) -> None:
    assert path_vqa.closed_llava_med(prediction, gold) is llava_med
    assert path_vqa.closed_strict(prediction, gold) is strict


def test_path_vqa_kinds() -> None:
    assert [path_vqa.is_closed(gold) for gold in ("Yes", " no ", "none", "liver")] == [True, True, False, False]


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
    ("prediction", "llava", "lmms"),
    [
        ("No", "no", "no"),
        ("no.", "no", "other"),
        ("No, there is.", "no", "other"),
        ("There is not", "no", "other"),
        ("Yes. There is no dog", "yes", "other"),  # text before the first period alone
        ("nothing", "yes", "other"),
        ("NO", "yes", "no"),
        ("I cannot tell", "yes", "other"),
        ("yes ", "yes", "yes"),
        ("no\n", "yes", "no"),  # words are separated by blanks alone
        ("", "yes", "other"),  # as published, everything that is no denial is a yes
    ],
)
def test_pope_parses(prediction: str, llava: str, lmms: str) -> None:
    assert yes_no.pope_llava(prediction) == llava
    assert yes_no.pope_lmms_eval(prediction) == lmms


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes.", "yes"),
        (" NO ", "no"),
        ("y", "yes"),
        ("n", "no"),
        ("x", "other"),
        ("yes, it is", "yes"),
        ("no it is not", "no"),
        ("It is yes", "other"),  # beyond the first four characters
        ("know", "no"),
        ("", "other"),
    ],
)
def test_mme_parse(prediction: str, answer: str) -> None:
    assert yes_no.mme_answer(prediction) == answer


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B. blue", "B"),
        ("B.", "FAILED"),
        ("B blue", "FAILED"),
        ("F", "FAILED"),
        ("", "FAILED"),
        ("b", "FAILED"),
        (" B", "FAILED"),
        ("The answer is C.", "C"),
        ("The answer is C", "FAILED"),  # a character must follow
        ("The answer is C. The answer is D.", "FAILED"),  # several letters
        ("The answer is X.", "X"),
        ("A or B", "FAILED"),
    ],
)
def test_science_qa_letter(prediction: str, letter: str) -> None:
    assert choice.science_qa_letter(prediction) == letter


def test_science_qa_letter_beyond_the_choices_is_wrong() -> None:
    assert choice.science_qa_correct("C", "C", 3)
    assert not choice.science_qa_correct("C", "C", 2)
    assert not choice.science_qa_correct("FAILED", "A", 5)
    assert not choice.science_qa_correct("", "A", 5)


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("B", True), ("b.", True), ("(B) blue", True), ("B: x", True), ("Bus", False), ("A", False), ("", False)],
)
def test_leading_letter(prediction: str, hit: bool) -> None:
    assert choice.leading_letter(prediction, "B") is hit
    assert choice.exact_letter(prediction, "B") is (prediction == "B")


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
    ],
)
def test_wtq_denotations(predicted: list[str], targets: list[str], hit: bool) -> None:
    assert wtq.denotation_match(predicted, targets) is hit


def test_wtq_single_prediction() -> None:
    assert wtq.denotation_accuracy("New\n York", ["new york"])
    assert not wtq.denotation_accuracy("a", ["a", "b"])


# --- the table ---

LINES = {
    "mme": {"answer": "Yes"},
    "pope_llava": {"answer": "yes"},
    "pope_lmms_eval": {"answer": "yes"},
    "science_qa": {"answer": "A", "choices": 3},
    "key_values": {"values": [["a"]]},
    "text_vqa": {"answers": ["nokia"] * 10},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_its_fields_and_no_hit_for_an_empty_answer(name: str) -> None:
    metric = METRICS[name]
    line = LINES.get(name, {"answer": "yes"})
    if name.startswith("anls"):
        pytest.importorskip("rapidfuzz")
    fields = metric.score("", line)
    assert fields is not None
    combined = metric.combine([fields]) if metric.combine else {}
    assert set(fields) | set(combined) == set(metric.fields)
    right = {"hit", "score", "exact", "containment", "recall", "f1", "llava_med", "strict", "matched"} & set(fields)
    assert right
    if name == "pope_llava":  # the published parse takes everything that is no denial for a yes
        assert fields == {"hit": 1, "said_yes": 1, "is_yes": 1, "both_yes": 1}
    else:
        assert all(fields[field] == 0 for field in right)


def test_pope_fields_of_undecided_answers() -> None:
    line = {"answer": "yes"}
    assert METRICS["pope_lmms_eval"].score("maybe", line) == {"hit": 0, "said_yes": 0, "is_yes": 0, "both_yes": 0}
    assert METRICS["pope_lmms_eval"].score("no", line) == {"hit": 0, "said_yes": 0, "is_yes": 1, "both_yes": 0}
    assert METRICS["pope_llava"].score("no", {"answer": "no"}) == {"hit": 1, "said_yes": 0, "is_yes": 0, "both_yes": 0}


def test_mme_pairs() -> None:
    combine = METRICS["mme"].combine
    assert combine is not None
    assert combine([{"hit": 1.0}, {"hit": 1.0}]) == {"both": 1, "images": 1}
    assert combine([{"hit": 1.0}, {"hit": 0.0}]) == {"both": 0, "images": 1}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("word_match", {}, "no 'answer'"),
        ("word_match", {"answers": []}, "no 'answer'"),
        ("word_match", {"answers": [1]}, "no 'answer'"),
        ("gqa_exact", {"answers": ["a", "b"]}, "2 gold answers; this metric takes one"),
        ("mme", {"answer": "maybe"}, "'maybe'; it must be yes or no"),
        ("science_qa", {"answer": "A"}, "'choices' must be the number"),
        ("key_values", {"values": [[]]}, "'values' must be a list"),
        ("key_values", {}, "'values' must be a list"),
        ("key_values", {"values": [["a"]] * 53}, "'values' has 53 entries; at most 52 can be told apart"),
        ("key_values", {"values": [], "unasked": "2"}, "'unasked' is '2'; it must be a number"),
    ],
)
def test_unfit_questions_are_errors(name: str, line: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        METRICS[name].score("x", line)


def test_unknown_metric() -> None:
    with pytest.raises(ConfigError, match="no metric 'bleu'; there are plain_exact, word_match"):
        get_metric("bleu")
