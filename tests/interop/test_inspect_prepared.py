"""`llava-mole inspect` describes folders of training data."""

import json
from pathlib import Path

import pytest
from worlds.tiny_models import make_data

from llava_mole import cli
from llava_mole.data.prepare.cli import main as prepare


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prepared sources."""
    folder = tmp_path_factory.mktemp("sets")
    for name, samples in (("blue", 5), ("red", 3)):
        raw = folder.parent / f"raw-{name}"
        make_data(raw, name, samples)
        given = ["--raw", f"{raw}/{name}.json", "--image-root", str(raw), "--out", f"{folder}/{name}", "--workers", "1"]
        assert prepare(["llava-json", *given]) == 0
    return folder


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = cli.main(["inspect", str(path)])
    return code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_prepared_source_and_how_to_use_it(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = inspect(sets / "blue", capsys)
    assert code == 0
    assert lines[0] == f"{sets}/blue: a data set that `llava-mole prepare` wrote"
    assert "source llava-json" in lines
    assert next(line for line in lines if line.startswith("training records")).startswith("training records 5, ")
    assert any(line.startswith("train ") and line.endswith(" 5") for line in lines)
    assert f"data.sources.NAME.annotations: {sets}/blue/train" in lines
    assert "data.sources.NAME.follow_links: true" in lines


def test_a_folder_of_several(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = inspect(sets, capsys)
    assert code == 0
    assert lines[0] == f"{sets}: a folder of data sets that `llava-mole prepare` wrote"
    assert any(line.startswith("blue llava-json 5 ") for line in lines)
    assert any(line.startswith("red llava-json 3 ") for line in lines)


def test_a_damaged_set_is_named(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "blue"
    (broken / "train").mkdir(parents=True)
    for file in ("report.json", "train/manifest.json"):
        (broken / file).write_bytes((sets / "blue" / file).read_bytes())
    for path in (broken, tmp_path):
        code, lines = inspect(path, capsys)
        assert code == 2
        assert any("NOT USABLE" in line and ".arrow is missing" in line for line in lines)


def test_the_tiny_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    given = ["tiny", "--out", str(tmp_path / "tiny"), "--train-per-domain", "2", "--test-per-domain", "2"]
    assert prepare(given) == 0
    code, lines = inspect(tmp_path / "tiny", capsys)
    assert code == 0
    assert lines[0] == f"{tmp_path}/tiny: the tiny world's data"
    counts = json.loads((tmp_path / "tiny" / "manifest.json").read_text())["counts"]
    assert any(line.split()[:2] == ["document/train", str(counts["document/train"]["images"])] for line in lines)
    (tmp_path / "tiny" / "captions" / "train.json").write_text("[]")
    code, lines = inspect(tmp_path / "tiny", capsys)
    assert code == 2
    assert lines[-1] == f"write it again: llava-mole prepare tiny --out {tmp_path}/tiny"
