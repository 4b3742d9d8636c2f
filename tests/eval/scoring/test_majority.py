"""Question files of one's own: accuracies, categories and the majority baseline have hand-computed values."""

import json
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.common.errors import DataError
from llava_mole.common.text import plain
from llava_mole.eval.benchmarks.benchmark import BenchmarkQuestions, own_questions
from llava_mole.eval.scoring.score import check_scorable, score_benchmark


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Yes. ", "yes"), ("yes", "yes"), ("3.5", "3.5"), ("No..", "no."), ("A b .", "a b"), ("", ""), (".", "")],
)
def test_normalisation(text: str, expected: str) -> None:
    assert plain(text) == expected


def write_lines(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_pairs(path: Path, *pairs: tuple[str, str]) -> str:
    turns = [[{"from": "human", "value": asked}, {"from": "gpt", "value": said}] for asked, said in pairs]
    path.write_text(json.dumps([{"id": str(n), "conversations": t} for n, t in enumerate(turns)]))
    return str(path)


GENERAL = [
    {"question_id": 1, "text": "Color?", "answer": "red", "category": "color"},
    {"question_id": 2, "text": "Color?", "answer": "Blue.", "category": "color"},
    {"question_id": 3, "text": "Color?", "answer": "blue", "category": "color"},
    {"question_id": 4, "text": "Round?", "answer": "yes", "category": "shape"},
]
DOCUMENT = [{"question_id": 5, "text": "How many?", "answer": "3"}]


def load(folder: Path, *train_files: str, general: list[dict] = GENERAL) -> BenchmarkQuestions:
    files = [f"general={write_lines(folder / 'q.jsonl', general)}"]
    files += [f"document={write_lines(folder / 'd.jsonl', DOCUMENT)}"] if general is GENERAL else []
    return own_questions(files, image_folder=folder, train_files=train_files)


def score(loaded: BenchmarkQuestions, *texts: str) -> dict:
    asked = zip(loaded.questions, texts, strict=True)
    return score_benchmark(loaded, {q.key: {"prompt": q.text, "text": text} for q, text in asked}, resamples=10)


def test_scores_per_group_and_category(tmp_path: Path) -> None:
    scores = score(load(tmp_path), "RED.", "blue", "green", "", "3")
    general = scores["groups"]["general"]
    assert (general["k"], general["n"], general["value"]) == (2, 4, 50)
    assert (general["low"], general["high"]) == pytest.approx((15.004, 84.996), abs=1e-3)
    assert general["empty_answers"] == 1
    assert {name: (e["k"], e["n"]) for name, e in general["categories"].items()} == {"color": (2, 3), "shape": (0, 1)}
    assert scores["groups"]["document"]["k"] == 1
    numbers = scores["numbers"]
    assert (numbers["overall"]["k"], numbers["overall"]["n"]) == (3, 5)
    assert all(numbers["general"][key] == general[key] for key in ("value", "low", "high", "k", "n"))


def test_a_group_called_like_the_overall_number(tmp_path: Path) -> None:
    lines = [{"question_id": n, "text": "?", "category": c, "answer": "a"} for n, c in enumerate(["overall", "x", "x"])]
    loaded = own_questions([write_lines(tmp_path / "q.jsonl", lines)], image_folder=tmp_path)
    numbers = score(loaded, "a", "b", "b")["numbers"]
    assert {name: (e["k"], e["n"]) for name, e in numbers.items()} == {
        "overall": (1, 1),
        "x": (0, 2),
        "overall (all groups)": (1, 3),
    }


def test_majority_from_the_test_itself(tmp_path: Path) -> None:
    scores = score(load(tmp_path), *"abcde")
    majority = scores["groups"]["general"]["majority"]
    # "Color?" -> blue, right for 2 of 3; "Round?" -> yes, right.
    assert (majority["k"], majority["n"], majority["unseen_questions"]) == (3, 4, 0)
    assert scores["majority_from"] == "test"


def test_majority_from_training_answers(tmp_path: Path) -> None:
    pairs = [(" Color?\n", "Red."), ("Color?", "red"), ("Color?", "blue"), ("Big?", "blue")]
    general = write_pairs(tmp_path / "general.json", *pairs)
    everywhere = write_pairs(tmp_path / "all.json", *[("Count?", "3")] * 3, ("Count?", "4"))
    scores = score(load(tmp_path, f"general={general}", everywhere), *"abcde")
    majority = scores["groups"]["general"]["majority"]
    # "Color?" -> red, right for 1 of 3; "Round?" was never asked: the commonest of all answers is 3, wrong.
    assert (majority["k"], majority["unseen_questions"]) == (1, 1)
    # The group has no file of its own, so the files for every group count; "How many?" -> 3.
    assert scores["groups"]["document"]["majority"]["k"] == 1
    assert scores["majority_from"] == "train"


def test_majority_ties_go_to_the_first_in_the_alphabet(tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "all.json", ("Round?", "yes"), ("Round?", "no"))
    lines = [{"question_id": n, "text": "Round?", "answer": a} for n, a in enumerate(("no", "yes"))]
    assert score(load(tmp_path, train, general=lines), "x", "x")["groups"]["general"]["majority"]["k"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"1": None}, r"1 of 5 questions of benchmark questions have no answer, the first is 1 \(.*q\.jsonl:1\)"),
        ({"77": {"text": "x"}}, r"1 of 6 answers, the first to question '77', are to questions that benchmark"),
        ({"2": {"text": "x", "prompt": "Size?"}}, r"q\.jsonl:2: question 2 was asked as 'Size\?', which is not its"),
    ],
)
def test_answers_of_another_benchmark_are_refused(changed: dict, message: str, tmp_path: Path) -> None:
    loaded = load(tmp_path)
    given = {q.key: {"prompt": q.text, "text": "x"} for q in loaded.questions} | changed
    with pytest.raises(DataError, match=message):
        score_benchmark(loaded, {key: value for key, value in given.items() if value is not None})


def test_missing_references_and_training_pairs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl:1: no 'answer' \(a text\) or 'answers'.* to score against"):
        check_scorable(load(tmp_path, general=[{"question_id": 1, "text": "Color?"}]))
    train = write_pairs(tmp_path / "t.json", ("Color?", "red"))
    with pytest.raises(DataError, match=r"--train-file gives nothing for group 'document' \(groups given: general\)"):
        check_scorable(load(tmp_path, f"general={train}"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"question_id": n, "text": "Color?", "answer": a} for n, a in enumerate(["red", "red", "blue"])]
    write_lines(tmp_path / "q.jsonl", lines)
    write_lines(tmp_path / "a.jsonl", [{"question_id": n, "prompt": "Color?", "text": "red"} for n in range(3)])
    write_pairs(tmp_path / "train.json", ("Color?", "blue"))
    command = ["score", f"{tmp_path}/a.jsonl", "--questions", f"general={tmp_path}/q.jsonl"]
    command += ["--train-file", f"general={tmp_path}/train.json", "--output", f"{tmp_path}/s.json"]
    assert cli.main(command) == 0
    assert "general * 66.67 [20.8, 93.9] 2/3 wilson 33.33 [6.1, 79.2] 1/3" in " ".join(capsys.readouterr().out.split())
    group = json.loads((tmp_path / "s.json").read_text())["groups"]["general"]
    assert (group["k"], group["majority"]["k"]) == (2, 1)
    assert cli.main(command) == 2
    assert "s.json exists; give --overwrite" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    command = ["score", "a.jsonl", "--questions", "general=q.jsonl", "--output", "s.json", "--overwrite"]
    assert cli.main(command) == 0  # the paths in the file are absolute, for a reader in another directory
    stored = json.loads((tmp_path / "s.json").read_text())
    assert (stored["questions"], stored["answers"]) == ([f"general={tmp_path}/q.jsonl"], [f"{tmp_path}/a.jsonl"])

    assert cli.main([*command, "--train-file", "general=nowhere.json"]) == 2
    assert "--train-file general=nowhere.json: no such file nowhere.json" in capsys.readouterr().err
    assert cli.main(["score", "a.jsonl"]) == 2
    assert "give --benchmark NAME, or --questions FILE..." in capsys.readouterr().err
    assert cli.main([*command, "--benchmark", "chartqa", "--train-file", "train.json"]) == 2
    assert "--train-file belongs to --questions without --benchmark" in capsys.readouterr().err
