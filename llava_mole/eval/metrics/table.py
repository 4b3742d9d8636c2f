"""Every metric by name: what it reads from a question, and the fields it gives each answer.

A metric turns one prediction and its question into fields, which are summed over questions. Every published number, be
it an accuracy or a corpus F1, is a ratio of such sums (`scoring/aggregate.py`). The field `n` counts the question in
the denominator; a metric that leaves a question out returns None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.metrics import anls, choice, exact, key_values, path_vqa, relaxed, text_vqa, wtq, yes_no

Fields = dict[str, float]
QuestionLine = Mapping[str, Any]
"""A line of a question file: `answer` (a text) or `answers` (a list), and whatever else the metric needs."""


def golds(line: QuestionLine) -> list[str]:
    """Return the gold answers of a question: `answers`, or the one `answer`.

    Raises:
        DataError: both are missing, or they are not texts.
    """
    value = line.get("answers", [line["answer"]] if "answer" in line else None)
    if not isinstance(value, list) or not value or not all(isinstance(gold, str) for gold in value):
        raise DataError("no 'answer' (a text) or 'answers' (a list of texts, at least one) to score against")
    return value


def gold(line: QuestionLine) -> str:
    """Return the only gold answer. Raises DataError if there is not exactly one."""
    found = golds(line)
    if len(found) != 1:
        raise DataError(f"{len(found)} gold answers; this metric takes one")
    return found[0]


@dataclass(frozen=True)
class Metric:
    """One scoring rule."""

    fields: tuple[str, ...]
    score: Callable[[str, QuestionLine], Fields | None]
    binary: tuple[str, ...] = ()
    """The fields that are 0 or 1 for each question; their shares have Wilson's interval."""
    unit_key: str | None = None
    """Question key whose equal values form one unit (MME: the image). None: each question is a unit."""
    combine: Callable[[Sequence[Fields]], Fields] | None = None
    """Computes further fields of a unit from those of its questions."""


def _one(function: Callable[[str, str], bool | None]) -> Metric:
    """Make a metric of a 0/1 rule on one gold answer."""

    def score(prediction: str, line: QuestionLine) -> Fields | None:
        hit = function(prediction, gold(line))
        return None if hit is None else {"hit": float(hit)}

    return Metric(("hit",), score, binary=("hit",))


def _any(function: Callable[[str, Sequence[str]], bool]) -> Metric:
    """Make a metric of a 0/1 rule on the list of gold answers."""
    return Metric(("hit",), lambda prediction, line: {"hit": float(function(prediction, golds(line)))}, binary=("hit",))


def _graded(function: Callable[[str, Sequence[str]], float]) -> Metric:
    """Make a metric of a score in 0..1 on the list of gold answers."""
    return Metric(("score",), lambda prediction, line: {"score": function(prediction, golds(line))})


def _path_vqa_open(prediction: str, line: QuestionLine) -> Fields:
    wanted = gold(line)
    precision, recall, f1 = path_vqa.token_overlap(prediction, wanted)
    return {
        "exact": float(path_vqa.open_exact(prediction, wanted)),
        "containment": float(path_vqa.open_containment(prediction, wanted)),
        "exact_match_score": path_vqa.llava_med_exact_score(prediction, wanted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }


def _path_vqa_closed(prediction: str, line: QuestionLine) -> Fields:
    wanted = gold(line)
    return {
        "llava_med": float(path_vqa.closed_llava_med(prediction, wanted)),
        "strict": float(path_vqa.closed_strict(prediction, wanted)),
    }


def _yes_no_gold(line: QuestionLine) -> str:
    wanted = gold(line).strip().lower().removesuffix(".")
    if wanted not in ("yes", "no"):
        raise DataError(f"the gold answer is {gold(line)!r}; it must be yes or no")
    return wanted


def _pope(parse: Callable[[str], str], *, undecided_missed: bool) -> Metric:
    """Make POPE's metric. Its recall counts a yes answered neither yes nor no as missed only if `undecided_missed`."""

    def score(prediction: str, line: QuestionLine) -> Fields:
        said, wanted = parse(prediction), _yes_no_gold(line)
        return {
            "hit": float(said == wanted),
            "said_yes": float(said == "yes"),
            "is_yes": float(wanted == "yes" and (undecided_missed or said in ("yes", "no"))),
            "both_yes": float(said == wanted == "yes"),
        }

    fields = ("hit", "said_yes", "is_yes", "both_yes")
    return Metric(fields, score, binary=fields)


def _mme(prediction: str, line: QuestionLine) -> Fields:
    return {"hit": float(yes_no.mme_answer(prediction) == _yes_no_gold(line))}


def _mme_image(questions: Sequence[Fields]) -> Fields:
    """Return `both` (1 if all questions of the image are right) and `images` (1)."""
    return {"both": float(all(fields["hit"] for fields in questions)), "images": 1.0}


def _science_qa(prediction: str, line: QuestionLine) -> Fields:
    count = line.get("choices")
    if not isinstance(count, int):
        raise DataError(f"'choices' must be the number of choices; found {count!r}")
    return {
        "hit": float(choice.science_qa_correct(prediction, gold(line), count)),
        "unparsed": float(choice.science_qa_letter(prediction) == choice.FAILED),
    }


def _vlmevalkit_option(prediction: str, line: QuestionLine) -> Fields:
    row = line.get("row")
    if not isinstance(row, dict) or not (choices := [c for c in ascii_uppercase if _is_given(row.get(c))]):
        raise DataError("'row' must be an object with the text of each option under its letter, as MMBench's are")
    letter = choice.vlmevalkit_option(prediction, choices)
    return {"hit": float(letter == gold(line)), "unparsed": float(letter is None)}


def _is_given(cell: Any) -> bool:
    return isinstance(cell, str) and cell.lower() not in ("", "nan", "none")


def _key_values(prediction: str, line: QuestionLine) -> Fields:
    values = line.get("values")
    if not isinstance(values, list) or not all(
        isinstance(v, list) and v and all(isinstance(text, str) for text in v) for v in values
    ):
        raise DataError("'values' must be a list with the accepted spellings, a list of texts, of each value")
    unasked = line.get("unasked", 0)
    if not isinstance(unasked, int) or not 0 <= unasked < 2**53:
        raise DataError(f"'unasked' is {unasked!r}; it must be a number of values")
    if len(values) > key_values.MOST_VALUES:
        raise DataError(f"'values' has {len(values)} entries; at most {key_values.MOST_VALUES} can be told apart")
    found = key_values.matches(prediction, values)
    return {
        "matched": float(bool(found)),
        "predicted": float(found is not None),
        "wanted": float(len(values) + unasked),
        "which": float(found or 0),
        "unasked": float(unasked),
    }


def _key_values_field(questions: Sequence[Fields]) -> Fields:
    """Count one field of one document: however often it is asked for, its values are wanted once."""
    values = questions[0]["wanted"] - questions[0]["unasked"]
    return {
        "matched": float(key_values.take([int(fields["which"]) for fields in questions])),
        "wanted": values + sum(fields["unasked"] for fields in questions),
    }


METRICS: Mapping[str, Metric] = {
    "plain_exact": _one(exact.plain_exact),
    "word_match": _any(exact.word_match),
    "relaxed_ureader": _one(relaxed.relaxed_ureader),
    "relaxed_lmms_eval": _one(relaxed.relaxed_lmms_eval),
    "anls_due": _graded(anls.anls_due),
    "anls_lmms_eval": _graded(anls.anls_lmms_eval),
    "anls_st_vqa": _graded(anls.anls_st_vqa),
    "path_vqa_open": Metric(
        ("exact", "containment", "exact_match_score", "precision", "recall", "f1"),
        _path_vqa_open,
        binary=("exact", "containment"),
    ),
    "path_vqa_closed": Metric(("llava_med", "strict"), _path_vqa_closed, binary=("llava_med", "strict")),
    "text_vqa": _graded(text_vqa.soft_score),
    "vqa_v2_lmms_eval": _graded(text_vqa.vqa_v2_lmms_eval),
    "vqa_exact": _any(text_vqa.normalised_exact),
    "pope_llava": _pope(yes_no.pope_llava, undecided_missed=True),
    # lmms-eval counts a missed yes only if the answer is exactly "no"; others are in neither part of its recall.
    "pope_lmms_eval": _pope(yes_no.pope_lmms_eval, undecided_missed=False),
    "mme": Metric(("hit", "both", "images"), _mme, unit_key="image", combine=_mme_image),
    "science_qa": Metric(("hit", "unparsed"), _science_qa, binary=("hit", "unparsed")),
    "science_qa_lmms_eval": _one(choice.science_qa_lmms_eval),
    "vlmevalkit_option": Metric(("hit", "unparsed"), _vlmevalkit_option, binary=("hit", "unparsed")),
    "exact_letter": _one(choice.exact_letter),
    "leading_letter": _one(choice.leading_letter),
    "gqa_exact": _one(exact.gqa_exact),
    "exact_ureader": _one(exact.exact_ureader),
    "key_values": Metric(
        ("matched", "predicted", "wanted", "which", "unasked"), _key_values, unit_key="field", combine=_key_values_field
    ),
    "wtq": _any(wtq.denotation_accuracy),
}


def get_metric(name: str) -> Metric:
    """Return the metric called `name`. Raises ConfigError if it is unknown."""
    if name not in METRICS:
        raise ConfigError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
