"""The closing report: numbers, verdicts, expert shares, examples and where everything lies."""

import json
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.eval.report.cli import build_report, compare, expert_shares
from llava_mole.eval.report.compare import read_runs
from llava_mole.eval.scoring.score import accuracy

DOMAINS = ("general", "document")
RIGHT = {"stage1": (40, 30), "lora": (80, 45), "mole": (90, 20)}
MAJORITY = (60, 40)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three scored runs over the same 2 x 100 questions, the last one with experts."""
    lines = [
        {"question_id": f"{domain}-{n}", "image": f"{n}.png", "text": "Color?", "answer": "red"}
        for domain in DOMAINS
        for n in range(2)
    ]
    for domain in DOMAINS:
        own = [line for line in lines if str(line["question_id"]).startswith(domain)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    for name, right in RIGHT.items():
        folder = tmp_path / name
        folder.mkdir()
        texts = ["Red.", "green", "blue", "red"]
        answers = [{"question_id": q["question_id"], "text": t} for q, t in zip(lines, texts, strict=True)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        scores = {
            "model_path": f"runs/{name}",
            "questions": [f"{domain}={tmp_path}/{domain}.jsonl" for domain in DOMAINS],
            "image_folder": "images",
            "answers": str(folder / "answers.jsonl"),
            "routing": str(folder / "routing.json") if name == "mole" else None,
            "majority_from": "train",
            "domains": {
                domain: accuracy(right[i], 100) | {"majority": accuracy(MAJORITY[i], 100)}
                for i, domain in enumerate(DOMAINS)
            },
        }
        (folder / "answers.score.json").write_text(json.dumps(scores))
    routing = {"domains": {"general": share([[0.5, 0.5], [0.9, 0.1]]), "document": share([[0.4, 0.6], [0.2, 0.8]])}}
    (tmp_path / "mole" / "routing.json").write_text(json.dumps(routing))
    return tmp_path


def share(layers: list[list[float]]) -> dict:
    return {"all": {"tokens": 10, "share": layers}}


def arguments(runs: Path) -> list[str]:
    return [f"{name}={runs / name}" for name in RIGHT]


def test_verdicts_need_intervals_that_do_not_overlap() -> None:
    # 95% Wilson intervals of n = 100: 50 -> [40.4, 59.6], 60 -> [50.2, 69.1], 70 -> [60.4, 78.1]
    fifty, sixty, seventy = (accuracy(k, 100) for k in (50, 60, 70))
    assert compare(seventy, fifty) == "above"
    assert compare(sixty, fifty) == "within"
    assert compare(fifty, sixty) == "within"
    assert compare(fifty, seventy) == "below"


def test_report_numbers(runs: Path) -> None:
    scored = {name: run.domains for name, run in read_runs(arguments(runs), []).items()}
    report = build_report({name: scores for name, scores in scored.items() if scores is not None})
    general, document = report["domains"]["general"], report["domains"]["document"]
    assert [entry["correct"] for entry in general["runs"].values()] == [40, 80, 90]
    assert general["majority"]["correct"] == 60
    assert general["comparisons"] == {
        "lora": {"stage1": "above", "commonest answer": "above"},
        "mole": {"stage1": "above", "commonest answer": "above"},
    }
    assert document["comparisons"] == {
        "lora": {"stage1": "within", "commonest answer": "within"},
        "mole": {"stage1": "within", "commonest answer": "below"},
    }
    assert report["chat"]["run"] == "mole"
    examples = report["chat"]["examples"]
    assert examples["general"] == {
        "image": "images/0.png",
        "question": "Color?",
        "answer": "Red.",
        "reference": "red",
        "correct": True,
    }
    assert (examples["document"]["answer"], examples["document"]["correct"]) == ("blue", False)
    assert report["files"]["lora"]["model_path"] == "runs/lora"


def test_expert_shares(runs: Path) -> None:
    shares = expert_shares(json.loads((runs / "mole" / "routing.json").read_text()))
    assert shares["mean"]["general"]["all"] == pytest.approx([0.7, 0.3])
    assert shares["mean"]["document"]["all"] == pytest.approx([0.3, 0.7])
    assert shares["largest_spread"] == {"layer": 1, "expert": 0, "shares": {"general": 0.9, "document": 0.2}}


@pytest.mark.parametrize("damaged", [{}, {"domains": {}}, {"domains": {"a": {"all": {"share": []}}}}, {"domains": [1]}])
def test_damaged_routing_statistics_are_named(damaged: dict, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "mole" / "routing.json").write_text(json.dumps(damaged))
    assert cli.main(["report", "--runs", *arguments(runs), "--out", str(runs / "report")]) == 2
    assert "mole/routing.json: these routing statistics are damaged" in capsys.readouterr().err
    assert not (runs / "report").exists()


def test_command_prints_and_writes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "report"
    assert cli.main(["report", "--runs", *arguments(runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "general   60.0 [50.2, 69.1] 60/100  40.0 [30.9, 49.8] 40/100  80.0 [71.1, 86.7] 80/100",
        "general   lora  stage1            yes, by more than the intervals",
        "document  mole  commonest answer  no, below it",
        "document  lora  stage1            not shown: the intervals overlap",
        "general   all     70.0%     30.0%",
        "layer 2, expert 1: general 90.0%, document 20.0%",
        "ASSISTANT: Red.   (right)",
        "ASSISTANT: blue   (wrong, it is 'red')",
        "runs/mole",
    ):
        assert expected in printed, expected
    assert (out / "report.txt").read_text() in printed
    assert json.loads((out / "report.json").read_text())["domains"]["general"]["runs"]["mole"]["correct"] == 90
    pytest.importorskip("matplotlib")
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["report", "--runs", *arguments(runs), "--out", str(runs / "report")]) == 0
    assert "accuracy.png" not in capsys.readouterr().out
    assert sorted(p.name for p in (runs / "report").iterdir()) == ["report.json", "report.txt"]


def test_one_run_is_enough(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--runs", arguments(runs)[2], "--out", str(runs / "report")]) == 0
    assert "One run: nothing to compare." in capsys.readouterr().out


def test_errors(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: str) -> str:
        assert cli.main(["report", "--runs", *given, "--out", str(runs / "report")]) == 2
        assert not (runs / "report").exists()
        return capsys.readouterr().err

    first = arguments(runs)[0]
    assert "give NAME=PATH" in refused("stage1")
    assert "does not exist; `llava-mole eval` writes it" in refused("a=no/such.score.json")
    assert "the name 'stage1' is given twice" in refused(first, first)
    assert "0 files *.score.json in" in refused(f"a={runs}")
    (runs / "bad.json").write_text("{}")
    assert "bad.json: no domains, model_path" in refused(f"a={runs / 'bad.json'}")
    good = json.loads((runs / "lora" / "answers.score.json").read_text())
    for wrong in ({}, {"general": good["domains"]["general"] | {"majority": None}}, {"general": 5}):
        (runs / "bad.json").write_text(json.dumps(good | {"domains": wrong}))
        assert " is damaged (" in refused(f"a={runs / 'bad.json'}")
    (runs / "bad.json").write_text("[")
    assert "bad.json: cannot be read as JSON" in refused(f"a={runs / 'bad.json'}")
    scores = json.loads((runs / "lora" / "answers.score.json").read_text())
    del scores["domains"]["document"]
    (runs / "lora" / "answers.score.json").write_text(json.dumps(scores))
    assert "runs stage1 and lora were scored on different questions" in refused(*arguments(runs))
