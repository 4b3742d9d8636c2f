"""Accuracies, intervals and the majority baseline have hand-computed values."""

import json
from pathlib import Path

import pytest

from llava_mole.common.errors import DataError
from llava_mole.common.text import plain
from llava_mole.eval.questions import Question
from llava_mole.eval.scoring.intervals import wilson_interval
from llava_mole.eval.scoring.score import main, score_answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Yes. ", "yes"), ("yes", "yes"), ("3.5", "3.5"), ("No..", "no."), ("A b .", "a b"), ("", ""), (".", "")],
)
def test_normalisation(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # 8/10 and 1/29: published examples of Wilson's interval; 0/10 and 10/10: z^2 / (n + z^2) = 3.841459 / 13.841459.
    [(8, 10, 0.49016, 0.94332), (1, 29, 0.00611, 0.17176), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (0, 0, 0, 1)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-5)


def question(number: int, text: str, answer: str | None, domain: str = "general", category: str = "c") -> Question:
    return Question(number, text, None, domain, category, answer, f"q.jsonl:{number}")


def answers(questions: list[Question], *texts: str) -> dict[str, dict[str, str]]:
    return {q.key: {"prompt": q.text, "text": text} for q, text in zip(questions, texts, strict=True)}


QUESTIONS = [
    question(1, "Color?", "red", category="color"),
    question(2, "Color?", "Blue.", category="color"),
    question(3, "Color?", "blue", category="color"),
    question(4, "Round?", "yes", category="shape"),
    question(5, "How many?", "3", domain="document"),
]


def test_scores_per_domain_and_category() -> None:
    scores = score_answers(QUESTIONS, answers(QUESTIONS, "RED.", "blue", "green", "", "3"))
    general = scores["domains"]["general"]
    assert (general["correct"], general["total"], general["accuracy"]) == (2, 4, 0.5)
    assert (general["low"], general["high"]) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    assert general["empty_answers"] == 1
    assert {name: (e["correct"], e["total"]) for name, e in general["categories"].items()} == {
        "color": (2, 3),
        "shape": (0, 1),
    }
    assert scores["domains"]["document"]["correct"] == 1
    assert (scores["overall"]["correct"], scores["overall"]["total"]) == (3, 5)


def test_majority_from_the_test_itself() -> None:
    majority = score_answers(QUESTIONS, answers(QUESTIONS, *"abcde"))["domains"]["general"]["majority"]
    # "Color?" -> blue, right for 2 of 3; "Round?" -> yes, right.
    assert (majority["correct"], majority["total"], majority["unseen_questions"]) == (3, 4, 0)


def test_majority_from_training_answers() -> None:
    pairs = {
        "general": [("<image>\nColor?", "Red."), ("Color?", "red"), ("Color?", "blue"), ("Big?", "blue")],
        "all": [("Count?", "3"), ("Count?", "3"), ("Count?", "3"), ("Count?", "4")],
    }
    scores = score_answers(QUESTIONS, answers(QUESTIONS, *"abcde"), pairs)
    general = scores["domains"]["general"]["majority"]
    # "Color?" -> red, right for 1 of 3; "Round?" was never asked: the commonest of all answers is 3, wrong.
    assert (general["correct"], general["unseen_questions"]) == (1, 1)
    # The domain has no file of its own, so the files for every domain count; "How many?" -> 3.
    assert scores["domains"]["document"]["majority"]["correct"] == 1
    assert scores["majority_from"] == "train"


def test_majority_ties_go_to_the_first_in_the_alphabet() -> None:
    pairs = {"all": [("Round?", "yes"), ("Round?", "no")]}
    questions = [question(1, "Round?", "no"), question(2, "Round?", "yes")]
    assert (
        score_answers(questions, answers(questions, "x", "x"), pairs)["domains"]["general"]["majority"]["correct"] == 1
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"1": None}, r"q\.jsonl:1: question 1 has no answer in the answers file"),
        ({"77": {"text": "x"}}, r"answer to question '77', which the question files do not have"),
        ({"2": {"text": "x", "prompt": "Size?"}}, r"q\.jsonl:2: the answer to question 2 was given to another text"),
    ],
)
def test_answers_of_another_benchmark_are_refused(changed: dict, message: str) -> None:
    given = {key: value for key, value in (answers(QUESTIONS, *"abcde") | changed).items() if value is not None}
    with pytest.raises(DataError, match=message):
        score_answers(QUESTIONS, given)


def test_missing_references_and_training_pairs_are_named() -> None:
    unanswered = [question(1, "Color?", None)]
    with pytest.raises(DataError, match=r"q\.jsonl:1: no 'answer' to score against"):
        score_answers(unanswered, answers(unanswered, "x"))
    with pytest.raises(DataError, match=r"--train-file gives nothing for domain 'document' \(domains given: general\)"):
        score_answers(QUESTIONS, answers(QUESTIONS, *"abcde"), {"general": [("Color?", "red")]})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"question_id": n, "text": "Color?", "answer": a} for n, a in enumerate(["red", "red", "blue"])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [{"question_id": n, "prompt": "Color?", "text": "red"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    turns = [{"from": "human", "value": "Color?"}, {"from": "gpt", "value": "blue"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    command = ["--questions", f"general={tmp_path}/q.jsonl", "--answers", f"{tmp_path}/a.jsonl"]
    command += ["--train-file", f"general={tmp_path}/train.json", "--output", f"{tmp_path}/s.json"]
    assert main(command) == 0
    assert "general  66.7 [20.8, 93.9] 2/3" in capsys.readouterr().out
    domain = json.loads((tmp_path / "s.json").read_text())["domains"]["general"]
    assert (domain["correct"], domain["majority"]["correct"]) == (2, 1)
    assert main(command) == 2
    assert "s.json exists; give --overwrite" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    command = ["--questions", "general=q.jsonl", "--answers", "a.jsonl", "--output", "s.json", "--overwrite"]
    assert main(command) == 0  # the paths in the file are whole, for a reader in another directory
    stored = json.loads((tmp_path / "s.json").read_text())
    assert (stored["questions"], stored["answers"]) == ([f"general={tmp_path}/q.jsonl"], [f"{tmp_path}/a.jsonl"])

    assert main([*command[:4], "--train-file", "general=nowhere.json"]) == 2
    assert "--train-file general=nowhere.json: no such file nowhere.json" in capsys.readouterr().err
