"""The README's commands run, in order, in a copy of the repository; its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

# What keeps a command short here: the whole of it is what the quickstart does.
SHORTENED = {
    "bash scripts/pretrain.sh": ["--train.max_steps", "4"],
    "bash scripts/finetune_mole.sh": ["--train.max_steps", "4"],
    "python -m llava_mole.eval.model_vqa": ["--num-chunks", "40", "--max_new_tokens", "4"],
    "python -m llava_mole.serve.cli": ["--prompt", "What is this?", "--max-new-tokens", "4"],
}


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[str]:
    """The commands of the first bash block, continuation lines joined, comments removed."""
    block = re.search(r"```bash\n(.*?)```", text, re.S)
    assert block
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def run(command: str, cwd: Path) -> str:
    """Run a README command (its short form) and return what it printed."""
    words = shlex.split(command)
    for prefix, more in SHORTENED.items():
        if words[: len(prefix.split())] == prefix.split():
            words += more
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(cwd),
        "GPUS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "VIRTUAL_ENV": str(Path(sys.executable).parent.parent),
    }
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_use_commands_run_in_order(tmp_path: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    used = [command for command in commands(section("Use")) if not command.startswith("source ")]
    assert [c for c in used if c.startswith("bash scripts/finetune_mole.sh configs/tiny/finetune_mole.yaml")]
    printed = {command: run(command, tmp_path) for command in used}
    for run_name in ("pretrain", "mole"):
        assert (tmp_path / "runs" / "mine" / run_name / "checkpoint-4" / "manifest.json").is_file()
    inspected = next(text for command, text in printed.items() if " inspect " in command)
    assert "checkpoint-4" in inspected
    answers = tmp_path / "runs" / "mine" / "mole" / "answers.jsonl"
    assert answers.read_text(encoding="utf-8").count('"answer_id"') >= 10
    made = {path.name for path in tmp_path.iterdir()} - {name.split("/")[0] for name in files}
    assert made <= {"runs", ".cache", "playground"}  # nothing lies around in the working directory


def test_set_up_is_two_commands() -> None:
    assert commands(section("Two commands")) == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not broken


def test_named_paths_exist() -> None:
    named = set(re.findall(r"(?:configs|scripts|docs|tests)/[\w./-]+\.(?:yaml|sh|md|json)", TEXT))
    assert not [name for name in named if not (ROOT / name).exists()]
