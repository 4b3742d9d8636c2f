"""docs/planning.md: its commands run, and what it shows is what they print."""

import json
import re
import shlex
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.analysis.plan.cli import _parser
from llava_mole.analysis.plan.lengths import KNOWN_SOURCES
from llava_mole.data.prepare.sources import MODULES
from llava_mole.model.flops import GPUS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as after cloning: no weights, no runs, and a few records of the tiny world."""
    for name in ("configs", "llava_mole", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    turns = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes"}]
    for domain in ("general", "document", "biomedicine"):
        folder = tmp_path / "playground" / "data" / "tiny" / domain
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(20)]))
    (tmp_path / "playground" / "models").mkdir()
    (tmp_path / "playground" / "models" / "tiny").symlink_to(ROOT / "playground" / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_shown_is_the_one_printed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[0]
    assert command[:2] == ["llava-mole", "plan"]
    assert cli.main(command[1:]) == 0
    shown = re.search(r"```bash\n.*?```\n\n```\n(.*?)```", TEXT, re.S)
    assert shown
    assert capsys.readouterr().out == shown[1]
    assert (checkout / "plans" / "plan.png").is_file()


def test_the_other_commands_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, prepares, source, *_), plan, scale = COMMANDS[1:]
    assert prepares == "prepare"
    assert source in MODULES
    assert cli.main(plan[1:]) == 0
    assert "measured on 20 of 20 records" in capsys.readouterr().out
    assert json.loads((checkout / "plan.json").read_text())["gpu"] == "rtx-4090"
    assert not (checkout / "plan.png").exists()  # nothing is left where nobody asked for it
    assert cli.main(scale[1:]) == 0
    shown = re.search(r"each of them has the same work:\n\n```\n(.*?)```", TEXT, re.S)
    assert shown
    assert shown[1] in capsys.readouterr().out
    assert (checkout / "plans" / "scale.png").is_file()


def test_tables_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"\| `([\w-]+)` \| ([\d,]+) \| \d+ \|", TEXT))
    assert {name: int(count.replace(",", "")) for name, count in rows.items()} == {
        name: source.records for name, source in KNOWN_SOURCES.items()
    }
    assert {"a100-80g", "rtx-4090"} <= set(GPUS)
    options = {option for action in _parser()._actions for option in action.option_strings}
    shown = set(re.findall(r"`(--[a-z-]+)", TEXT.split("## What is exact")[0]))
    assert shown - {"--key"} == options - {"-h", "--help"}
