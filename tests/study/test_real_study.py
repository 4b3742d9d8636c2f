"""A study of real trainings and evaluations on miniature models, whose every opened file is recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from worlds.processes import launch_environment
from worlds.study_world import make_study_world, write_study

RECORD = """
import os, sys
_file = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        os.write(_file, (arguments[0] + "\\n").encode("utf-8", "replace"))
sys.addaudithook(_hook)
"""
"""A `sitecustomize` that appends the name of every file that a process opens; its children import it too."""


def study(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_mole.cli", "study", *arguments]
    return subprocess.run(
        command, cwd=folder, env=launch_environment(**environment), capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_choice_by_validation_reads_no_test_file_and_repeats_to_the_digit(tmp_path: Path) -> None:
    """One MoLE run on two sources, twice: the second time in another folder."""
    world = make_study_world(tmp_path / "world", fake=False)
    arms = {"mole": {"method": "mole", "options": {"router": "oracle", "balance_coef": 0.0}, "experts": "sources"}}
    write_study(world, arms=arms, seeds=[3], figure3=["mole"])
    base = yaml.safe_load((world / "base.yaml").read_text())
    base |= {"set": {"train.max_steps": 2}, "set_stage1": {"train.max_steps": 1}}
    (world / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (tmp_path / "site").mkdir()
    opened = tmp_path / "opened"
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORD.format(path=str(opened)))
    found = []
    for name in ("one", "two"):
        arguments = [str(world / "study.yaml"), "--split", "validation", "--cells", str(tmp_path / name)]
        done = study(tmp_path, *arguments, PYTHONPATH=str(tmp_path / "site"))
        logs = "\n".join(path.read_text() for path in tmp_path.rglob("log.txt"))
        assert done.returncode == 0, done.stderr + logs
        reported = study(tmp_path, "report", *arguments, PYTHONPATH=str(tmp_path / "site"))
        assert reported.returncode == 0, reported.stderr
        assert "Chosen by the validation split (mean over domains): mole." in reported.stdout
        (score,) = (tmp_path / name).rglob("*.score.json")
        (metrics,) = (tmp_path / name).rglob("finetune*/run/metrics.jsonl")
        losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
        found.append((json.loads(score.read_text())["numbers"], losses))
        (summary,) = (tmp_path / name).rglob("finetune*/run/summary.json")
        values = json.loads(summary.read_text())
        assert set(values["trainable_parameters"]) == {"projector", "experts", "attention LoRA"}
        assert values["peak_memory_bytes"]["host"] > 1e8
        report = tmp_path / name / "reports" / "study-validation"
        shares = json.loads((report / "figure3.json").read_text())["mole"]["3"]
        assert [shares[group]["mean"][0] for group in ("red", "blue")] == [[0, 1], [1, 0]]  # the oracle's experts
    assert found[0] == found[1]
    names = opened.read_text().splitlines()
    assert any(line.endswith("red_val.jsonl") for line in names)  # the record works, in the commands too
    assert any(line.endswith("red.json") for line in names)
    assert not [line for line in names if str(world) in line and "_test" in os.path.basename(line)]
