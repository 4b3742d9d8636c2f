"""docs/data.md: its prepare commands run as they are, on miniature copies; its tables name what exists."""

import re
import shlex
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.config import load_config, parse_run_config
from llava_mole.data.prepare.sources import MODULES

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_prepare_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_sets.write_sharegpt4v_pt(tmp_path / "raw/sharegpt4v")
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw/sharegpt4v")
    published_sets.write_m3it(tmp_path / "raw/m3it")
    published_sets.write_ureader(tmp_path / "raw/ureader")
    published_sets.write_pathvqa(tmp_path / "raw/pathvqa")
    raw_sets.write_messages(tmp_path / "my/chats")
    raw_sets.write_image(tmp_path / "my/records/a.jpg", 1)
    record = {"image": "a.jpg", "conversations": raw_sets.talk("<image>\nRed?", "yes")}
    raw_sets.write_lines(tmp_path / "my/records/a.jsonl", [record])
    monkeypatch.chdir(tmp_path)
    asked = [command for command in commands() if command[:2] == ["llava-mole", "prepare"]]
    assert len(asked) == 7
    for command in asked:
        assert main([*command[1:], "--workers", "1"]) == 0
    for name in ("finetune_mole", "pretrain"):
        for source, described in load_config(ROOT / "configs" / f"{name}.yaml").data.sources.items():
            done = raw_sets.Prepared(Path(described.annotations).parent)
            assert done.report["source"] == source
            assert done.rows
            assert Path(described.image_folder).is_dir()


def test_the_checked_configuration_is_shipped() -> None:
    (command,) = [command for command in commands() if "check-data" in command]
    parse_run_config([str(ROOT / command[2])])


def test_the_table_of_mixtures_names_every_file() -> None:
    named = set(re.findall(r"\| `([a-z0-9-]+)` \| [0-9.,]+M? \|", TEXT))
    files = {p.stem for p in (ROOT / "configs/mixtures").glob("*.yaml") if "paper's mixture" in p.read_text()}
    assert named == files


def test_every_source_is_named() -> None:
    assert not [name for name in MODULES if f"`{name}`" not in TEXT]
