"""`--overwrite` takes away what a conversion has written, and neither what it reads nor anything else."""

import shutil
from pathlib import Path

import pytest
from foreign_models import make_clip, make_llava, make_llava_lora
from interop_tools import convert, refused


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A LLaVA-1.5 brought in, with its language model and tower inside."""
    make_llava(tmp_path / "llava", tower=make_clip(tmp_path / "clip"))
    command = ("--to", "checkpoint", "--vision-tower", tmp_path / "clip")
    assert convert(tmp_path / "llava", *command, "--out", tmp_path / "run") == 0
    return tmp_path / "run"


def test_what_an_import_reads_is_never_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tower = run / "language_model", run / "vision_tower"
    make_llava_lora(tmp_path / "lora", base)
    (tmp_path / "link").symlink_to(run)
    before = snapshot(run)
    for source, options, held in (
        (tmp_path / "lora", ("--model-base", base, "--vision-tower", tmp_path / "clip"), base),
        (tmp_path / "llava", ("--vision-tower", tower), tower),
        (tmp_path / "llava", ("--vision-tower", tmp_path / "link" / "vision_tower"), "link/vision_tower"),
    ):
        command = (source, "--to", "checkpoint", *options, "--out", run, "--overwrite")
        refused(capsys, f"{held}, which is read; give another --out", *command)
        assert snapshot(run) == before


def test_what_an_export_reads_is_never_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    refused(capsys, f"--out {run} holds {run}, which is read", run, "--to", "llava", "--out", run, "--overwrite")
    shutil.copytree(run / "checkpoint-0", tmp_path / "moved")  # its parts are still where config.yaml names them
    for layout, held in (("llava", run / "language_model"), ("open-clip", run / "vision_tower")):
        command = (tmp_path / "moved", "--to", layout, "--out", run, "--overwrite")
        refused(capsys, f"--out {run} holds {held}", *command)
    assert snapshot(run) == before
