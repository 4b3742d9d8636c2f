"""Every metric of the table gives its fields, and refuses a question that lacks what it needs."""

import pytest

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.metrics.table import METRICS, get_metric

LINES = {
    "mme": {"answer": "Yes"},
    "pope_llava": {"answer": "yes"},
    "pope_lmms_eval": {"answer": "yes"},
    "science_qa": {"answer": "A", "choices": 3},
    "key_values": {"values": [["a"]]},
    "vlmevalkit_option": {"answer": "A", "row": {"A": "x", "B": "y"}},
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
        ("vlmevalkit_option", {"answer": "A"}, "'row' must be an object with the text of each option"),
        ("vlmevalkit_option", {"answer": "A", "row": {"A": "nan", "B": ""}}, "'row' must be an object"),
        ("key_values", {"values": [[]]}, "'values' must be a list"),
        ("key_values", {}, "'values' must be a list"),
        ("key_values", {"values": [["a", 5]]}, "'values' must be a list"),
        ("key_values", {"values": [["a"]] * 53}, "'values' has 53 entries; at most 52 can be told apart"),
        ("key_values", {"values": [], "unasked": "2"}, "'unasked' is '2'; it must be a number"),
        ("key_values", {"values": [], "unasked": 10**400}, "'unasked' is 10"),
    ],
)
def test_unfit_questions_are_errors(name: str, line: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        METRICS[name].score("x", line)


def test_unknown_metric() -> None:
    with pytest.raises(ConfigError, match="no metric 'bleu'; there are plain_exact, word_match"):
        get_metric("bleu")
