"""The answers of every validation are in the run directory; the final table has a number for every source it can."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from worlds.tiny_models import make_world

from llava_mole.config import parse_run_config
from llava_mole.train.display import summary_table
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train
from llava_mole.train.validation import ANSWERS_FILE, AnswerLog, token_f1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two validations."""
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, text_only_every=5)
    validation = ["--data.validation_samples=3", "--train.validate_every=2", "--train.validation_answers=2"]
    given = [str(directory / "config.yaml"), "--train.max_steps=4", "--train.save_every=2", *validation]
    return train(parse_run_config(given))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()]


def test_the_answers_of_every_validation_are_written(finished: Path) -> None:
    written = rows(finished)
    expected = [(step, source) for step in (2, 4) for source in ("blue", "blue", "red", "red")]
    assert sorted((row["step"], row["source"]) for row in written) == expected
    assert [row["step"] for row in written] == [2] * 4 + [4] * 4
    for row in written:
        assert "What color is this?" in row["question"]
        assert row["reference"].startswith("It is ")
        assert row["f1"] == pytest.approx(token_f1(row["answer"], row["reference"]))
        assert Path(row["where"].partition(":")[0]).name == f"{row['source']}.json"
    for entry in read_metrics(finished / "metrics.jsonl"):
        for source, value in entry.get("validation_f1", {}).items():
            own = [row["f1"] for row in written if (row["step"], row["source"]) == (entry["step"], source)]
            assert value == pytest.approx(sum(own) / len(own))


@pytest.fixture(autouse=True)
def logs_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)


def test_a_run_that_goes_on_drops_what_came_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = [{"source": "red", "answer": "a", "reference": "a", "exact": 1.0, "f1": 1.0}] * 2
    first = AnswerLog(tmp_path)
    for step in (2, 4, 6):
        first.add(step, answers)
    with (tmp_path / ANSWERS_FILE).open("a") as file:
        file.write('{"step": 8, "sou')  # a crash
    with caplog.at_level(logging.INFO, "llava_mole"):
        again = AnswerLog(tmp_path)
        again.add(4, answers[:1])
        again.add(6, answers[:1])
    assert [row["step"] for row in rows(tmp_path)] == [2, 2, 4, 6]
    assert f"step 6 answers 1 of 1 held-out questions like the reference; all of them are in {tmp_path}" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AnswerLog(tmp_path / "none").add(2, [])
    assert "training continues" in caplog.text


def test_a_source_that_is_absent_early_has_its_own_first_loss() -> None:
    entries = [
        {"step": n, "loss": 2.0 / n, "source_loss": {"red": 1.0} | ({"blue": 9.0 - n} if n > 5 else {}),
         "step_s": 1.0, "data_wait_s": 0.0, "tokens": 10}
        for n in range(1, 9)
    ]  # fmt: skip
    table = summary_table("finetune", entries, {"red": 8, "blue": 3, "green": 0})
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert "nan" not in table
    assert lines["red"] == ["8", "1.000", "1.000"]
    assert lines["blue"] == ["3", "3.000", "1.000"]  # the first and the last of its three steps
    assert lines["green"] == ["0", "-", "-"]
    assert math.isclose(float(lines["all"][1]), 2.0)
