"""The report on question files of one's own: numbers, verdicts, expert shares, examples and where everything lies."""

import json
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.eval.report.compare import build_benchmarks, read_runs
from llava_mole.eval.report.groups import add_groups, compare, expert_shares
from llava_mole.eval.scoring.aggregate import share_entry

GROUPS = ("general", "document")
RIGHT = {"stage1": (40, 30), "lora": (80, 45), "mole": (90, 20)}
MAJORITY = {"general": 60, "document": 40}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three scored runs over the same 2 x 100 questions, the last one with experts."""
    questions = {
        group: [
            {
                "question_id": f"{group}-{n}",
                "image": f"{n}.png",
                "text": "Color?",
                "answer": "red" if n < most else f"{n}",
            }
            for n in range(100)
        ]
        for group, most in MAJORITY.items()
    }
    for group, lines in questions.items():
        (tmp_path / f"{group}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "conversations": TURNS}]))
    for name, right in RIGHT.items():
        folder = tmp_path / name
        folder.mkdir()
        answers = []
        for k, (group, lines) in zip(right, questions.items(), strict=True):
            first = int(group == "document")  # its first question is answered wrongly
            hits = range(first, first + k)
            texts = [f"{line['answer'].capitalize()}." if n in hits else "blue" for n, line in enumerate(lines)]
            answers += [{"question_id": q["question_id"], "text": t} for q, t in zip(lines, texts, strict=True)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        command = ["score", str(folder / "answers.jsonl"), "--train-file", str(tmp_path / "train.json"), "--questions"]
        assert cli.main([*command, *(f"{group}={tmp_path}/{group}.jsonl" for group in GROUPS)]) == 0
        change(folder, model_path=f"runs/{name}", image_folder="images")
    routing = {"groups": {"general": share([[0.5, 0.5], [0.9, 0.1]]), "document": share([[0.4, 0.6], [0.2, 0.8]])}}
    (tmp_path / "mole" / "routing.json").write_text(json.dumps(routing))
    change(tmp_path / "mole", routing=str(tmp_path / "mole" / "routing.json"))
    return tmp_path


TURNS = [{"from": "human", "value": "Color?"}, {"from": "gpt", "value": "red"}]


def change(run: Path, **values: object) -> None:
    path = run / "answers.score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def share(layers: list[list[float]]) -> dict:
    return {"all": {"tokens": 10, "share": layers}}


def arguments(runs: Path) -> list[str]:
    return [f"{name}={runs / name}" for name in RIGHT]


def test_verdicts_need_intervals_that_do_not_overlap() -> None:
    # 95% Wilson intervals of n = 100: 50 -> [40.4, 59.6], 60 -> [50.2, 69.1], 70 -> [60.4, 78.1]
    fifty, sixty, seventy = (share_entry(k, 100) for k in (50, 60, 70))
    assert compare(seventy, fifty) == "above"
    assert compare(sixty, fifty) == "within"
    assert compare(fifty, sixty) == "within"
    assert compare(fifty, seventy) == "below"


def test_report_numbers(runs: Path) -> None:
    scored = read_runs(arguments(runs), [])
    benchmarks = build_benchmarks(scored, resamples=10)
    add_groups(benchmarks, scored)
    report = benchmarks["questions"]
    general, document = report["groups"]["general"], report["groups"]["document"]
    assert [entry["k"] for entry in general["runs"].values()] == [40, 80, 90]
    assert general["majority"]["k"] == 60
    assert general["verdicts"] == {
        "lora": {"stage1": "above", "commonest answer": "above"},
        "mole": {"stage1": "above", "commonest answer": "above"},
    }
    assert document["verdicts"] == {
        "lora": {"stage1": "within", "commonest answer": "within"},
        "mole": {"stage1": "within", "commonest answer": "below"},
    }
    examples = report["examples"]
    assert examples["general"] == {
        "image": "images/0.png",
        "question": "Color?",
        "answer": "Red.",
        "reference": "red",
        "correct": True,
    }
    assert (examples["document"]["answer"], examples["document"]["correct"]) == ("blue", False)
    assert report["runs"]["lora"]["model_path"] == "runs/lora"


def test_expert_shares(runs: Path) -> None:
    shares = expert_shares(json.loads((runs / "mole" / "routing.json").read_text()))
    assert shares["mean"]["general"]["all"] == pytest.approx([0.7, 0.3])
    assert shares["mean"]["document"]["all"] == pytest.approx([0.3, 0.7])
    assert shares["largest_spread"] == {"layer": 1, "expert": 0, "shares": {"general": 0.9, "document": 0.2}}


@pytest.mark.parametrize("damaged", [{}, {"groups": {}}, {"groups": {"a": {"all": {"share": []}}}}, {"groups": [1]}, 5])
def test_damaged_routing_statistics_are_named(damaged: object, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        "layer 1, expert 0: general 90.0%, document 20.0%",
        "ASSISTANT: Red.   (right)",
        "ASSISTANT: blue   (wrong, it is 'red')",
        "runs/mole",
    ):
        assert expected in printed, expected
    assert (out / "report.txt").read_text() in printed
    report = json.loads((out / "report.json").read_text())["benchmarks"]["questions"]
    assert report["groups"]["general"]["runs"]["mole"]["k"] == 90
    pytest.importorskip("matplotlib")
    assert (out / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["report", "--runs", *arguments(runs), "--out", str(runs / "report")]) == 0
    assert "benchmarks.png" not in capsys.readouterr().out
    assert sorted(p.name for p in (runs / "report").iterdir()) == [
        *("report.json", "report.md", "report.tex", "report.txt")
    ]


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
    assert "bad.json: not a score file of format 2 (found None); score the answers again" in refused(
        f"a={runs}/bad.json"
    )
    good = json.loads((runs / "lora" / "answers.score.json").read_text())
    (runs / "bad.json").write_text(json.dumps(good | {"format": 1}))
    assert "bad.json: not a score file of format 2 (found 1)" in refused(f"a={runs}/bad.json")
    (runs / "bad.json").write_text(json.dumps({"format": 2}))
    assert "bad.json: no benchmark, numbers, " in refused(f"a={runs}/bad.json")
    for wrong in ({}, {"general": good["groups"]["general"] | {"majority": None}}, {"general": 5}):
        (runs / "bad.json").write_text(json.dumps(good | {"groups": wrong}))
        assert " is damaged (" in refused(f"a={runs}/bad.json")
    (runs / "bad.json").write_text("[")
    assert "bad.json is not valid JSON" in refused(f"a={runs}/bad.json")


def test_runs_on_other_questions_are_not_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "score",
        str(runs / "lora" / "answers.jsonl"),
        "--questions",
        f"general={runs}/general.jsonl",
        "--overwrite",
    ]
    lines = (runs / "lora" / "answers.jsonl").read_text().splitlines(keepends=True)
    (runs / "lora" / "answers.jsonl").write_text("".join(lines[:100]))
    assert cli.main(command) == 0
    assert cli.main(["report", "--runs", *arguments(runs)]) == 0
    printed = capsys.readouterr().out
    assert "warning: stage1 and lora were scored on different question sets (200 and 100 questions)" in printed
    assert "commonest answer from" not in printed


def test_routing_statistics_of_older_versions_are_read() -> None:
    assert expert_shares({"domains": {"a": share([[0.25, 0.75]])}})["mean"] == {"a": {"all": [0.25, 0.75]}}
