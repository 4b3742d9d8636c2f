"""`llava-mole score`: what it writes, and what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest
from worlds.benchmark_answers import command, write_answers, write_chart

from llava_mole import cli
from llava_mole.common.locks import locked


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    return write_chart(tmp_path)


def test_command(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(chart)) == 0
    printed = capsys.readouterr().out
    assert "ChartQA test (chartqa): 3 questions, prompt default" in printed
    assert re.search(r"^overall \* +66\.67 \[20\.8, 93\.9\] 2/3 +wilson$", printed, re.M)
    scores = json.loads((chart / "a.score.json").read_text())
    assert (scores["model_id"], scores["answers"]) == (["m"], [str(chart / "a.jsonl")])
    assert cli.main(command(chart)) == 2
    assert "a.score.json exists; give --overwrite" in capsys.readouterr().err
    assert cli.main(command(chart, "--overwrite")) == 0


def test_no_input_is_overwritten(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in chart.iterdir()}
    for output in (chart / "a.jsonl", chart / "q.jsonl"):
        assert cli.main(command(chart, "--output", str(output), "--overwrite")) == 2
        assert f"{output} is an input, or given twice" in capsys.readouterr().err
    own = ["score", f"{chart}/a.jsonl", f"--questions={chart}/q.jsonl", f"--output={chart}/q.jsonl", "--overwrite"]
    assert cli.main(own) == 2
    assert {path.name: path.read_bytes() for path in chart.iterdir()} == before


def test_chunks_are_scored_together(chart: Path) -> None:
    lines = (chart / "a.jsonl").read_text().splitlines(keepends=True)
    (chart / "a.jsonl").write_text("".join(lines[:1]))
    (chart / "b.jsonl").write_text("".join(lines[1:]))
    arguments = command(chart)
    assert cli.main([arguments[0], arguments[1], str(chart / "b.jsonl"), *arguments[2:]]) == 0
    assert json.loads((chart / "a.score.json").read_text())["total"] == 3


def test_the_prompt_is_recognised(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answers(chart, "1", "2", "3", suffix="\nAnswer the question with a single word.")
    assert cli.main(command(chart)) == 0
    assert json.loads((chart / "a.score.json").read_text())["prompt"]["variant"] == "lmms-eval"
    write_answers(chart, "1", "2", "3", suffix=" Be brief.")
    assert cli.main(command(chart, "--overwrite")) == 2
    assert "question 1 was asked as 'Q1? Be brief.', which is not its text" in capsys.readouterr().err


def test_bad_answers_are_refused(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str, benchmark: str = "chartqa") -> str:
        assert cli.main(command(chart, *more, benchmark=benchmark)) == 2
        assert not (chart / "a.score.json").exists()
        return capsys.readouterr().err

    good = (chart / "a.jsonl").read_text()
    (chart / "a.jsonl").write_text(good + '{"question_id": 1, "text": "x"}\n')
    assert "a.jsonl:4: a second answer to question 1" in refused()
    (chart / "a.jsonl").write_text(good + '{"question_id": 1, "te\n')
    assert "a.jsonl:4: not valid JSON" in refused()
    (chart / "a.jsonl").write_text(good + "[1]\n")
    assert "a.jsonl:4: list found" in refused()
    (chart / "a.jsonl").write_text(good + '{"question_id": 5}\n')
    assert "a.jsonl:4: an answer needs 'question_id' and 'text'" in refused()
    (chart / "a.jsonl").write_text("\n".join(good.splitlines()[1:]) + "\n")
    assert "1 of 3 questions of benchmark chartqa have no answer, the first is 1" in refused()
    write_answers(chart, *"abcdef")
    error = refused()
    assert "3 of 6 answers, the first to question '4', are to questions that benchmark chartqa does not have" in error
    assert "no such file; `llava-mole prepare-benchmark gqa" in refused_at(chart, "gqa", capsys)
    (chart / "a.jsonl").unlink()
    assert "a.jsonl: no such file" in refused()


def refused_at(folder: Path, benchmark: str, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = ["score", str(folder / "a.jsonl"), "--benchmark", benchmark, "--data-root", str(folder)]
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


def test_questions_without_what_the_metric_needs(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (chart / "q.jsonl").read_text().replace('"answer": "2"', '"answers": ["2", "3"]')
    (chart / "q.jsonl").write_text(text)
    assert cli.main(command(chart)) == 2
    assert "q.jsonl:2: 2 gold answers; this metric takes one" in capsys.readouterr().err


def test_nothing_is_written_while_another_process_writes(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(chart / "a.score.json.lock", "it"):
        assert cli.main(command(chart)) == 2
    assert f"a.score.json is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert not (chart / "a.score.json").exists()
    assert cli.main(command(chart)) == 0
    assert not list(chart.glob("*.lock"))
    with locked(chart / "report.lock", "it"):
        report = ["report", str(chart / "a.score.json"), "--out", str(chart)]
        assert cli.main(report) == 2
    assert f"the report {chart} is in use by process" in capsys.readouterr().err
    assert not (chart / "report.json").exists()
    assert cli.main(report) == 0
    assert not list(chart.glob("*.lock"))


@pytest.mark.parametrize("name", ["a.score.json", "report.json", "report.md", "benchmarks.png"])
def test_links_and_pipes_are_not_replaced(chart: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    scores = chart / "scores" / "a.score.json"
    assert cli.main(command(chart, "--output", str(scores))) == 0
    run = command(chart) if name == "a.score.json" else ["report", str(scores), "--out", str(chart)]
    os.mkfifo(chart / name)
    assert cli.main([*run, "--overwrite"]) == 2
    assert f"{name} is a pipe and is not replaced; name a file" in capsys.readouterr().err
    (chart / name).unlink()
    (chart / name).symlink_to("missing")
    assert cli.main([*run, "--overwrite"]) == 2
    assert f"{name} is a link to missing and is not replaced" in capsys.readouterr().err
    assert (chart / name).is_symlink()
