"""The commands of pages run in order: your own data from records to export, chat, evaluation."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from worlds.pages import ROOT, Command, blocks, commands, run

SHORTENED = {
    "python scripts/examples/draw_panels.py": ["--train", "16", "--test", "4"],
    "llava-mole prepare tiny": ["--train-per-domain", "40", "--val-per-domain", "20", "--test-per-domain", "20"],
    "llava-mole train": ["--train.max_steps", "2", "--train.num_workers", "0"],
    "llava-mole chat": ["--max-new-tokens", "3"],
    "llava-mole eval": ["--max-new-tokens", "3"],
    "python -m llava_mole.eval.model_vqa": ["--max_new_tokens", "3"],
}
"""What keeps a command short here."""


def of_page(name: str, *beginnings: str) -> list[Command]:
    return [c for c in commands(ROOT / "docs" / name) if not beginnings or c.text.startswith(beginnings)]


def run_here(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, pipe, _ = command.text.rpartition(" | ")
    given = subprocess.run(["bash", "-c", typed], capture_output=True, check=True).stdout if pipe else b""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    more = next((more for start, more in SHORTENED.items() if " ".join(command.words).startswith(start)), [])
    assert run(command, more) == 0, command.text


def link_checkout(folder: Path) -> None:
    """What a clone has, as far as the commands need it."""
    for name in ("configs", "scripts", "playground/models"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / name)


@pytest.mark.slow
def test_own_data_from_records_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    (configuration,) = (text for language, text in blocks(ROOT / "docs" / "own_data.md") if language == "yaml")
    asked = of_page("own_data.md")
    run_here(asked[0], monkeypatch)
    (tmp_path / "my" / "run.yaml").write_text(configuration, encoding="utf-8")
    (record,) = (text for language, text in blocks(ROOT / "docs" / "own_data.md") if language == "json")
    first = json.loads((tmp_path / "my/raw/train.jsonl").read_text().splitlines()[0])
    assert json.loads(record).keys() == first.keys()
    for command in asked[1:]:
        run_here(command, monkeypatch)
        if " check-data " in command.text:
            assert "10 of 10 limits passed" in capsys.readouterr().out
    for made in ("mole/checkpoint-2", "lora/checkpoint-2", "report/report.md", "adapter/adapter_config.json"):
        assert (tmp_path / "my" / made).exists()
    assert list((tmp_path / "my" / "llava-hf").glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "scripts", "playground", "my"}


def test_chat(mole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 16), "red").save("photo.png")
    Path("RUN").symlink_to(mole_run)
    Path("runs/tiny/quickstart").mkdir(parents=True)
    Path("runs/tiny/quickstart/llava_mole").symlink_to(mole_run)
    for command in of_page("chat.md"):
        run_here(command, monkeypatch)


def test_evaluation(mole_run: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mole_run, "RUN")
    for folder in ("my/data/images", "DIR"):
        shutil.copytree(asked.parent, folder)
    Path("my/data/questions").mkdir()
    Path("my/data/report.json").write_text("{}")
    for file in ("my/data/questions/test.jsonl", "Q.jsonl"):
        shutil.copy(asked, file)
    Path("my/raw").mkdir()
    turns = [{"from": "human", "value": "What color is this?"}, {"from": "gpt", "value": "red"}]
    Path("my/raw/train.jsonl").write_text(json.dumps({"id": "0", "conversations": turns}) + "\n")
    for command in of_page("evaluation.md", "llava-mole eval RUN --questions", "python -m llava_mole"):
        run_here(command, monkeypatch)
    for copy in ("runs/mix", "runs/mole", "runs/tiny/quickstart/llava_mix", "runs/tiny/quickstart/llava_mole"):
        shutil.copytree("RUN", copy)
    for copy in ("A", "B"):
        shutil.copy("RUN/eval/questions.score.json", f"{copy}.score.json")
    for command in of_page("evaluation.md", "llava-mole report"):
        shutil.rmtree("report", ignore_errors=True)
        run_here(command, monkeypatch)
        assert Path("report/report.tex").is_file()
