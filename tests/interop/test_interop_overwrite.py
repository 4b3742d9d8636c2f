"""`--overwrite` takes away what a conversion has written, and neither what it reads nor anything else."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from worlds.foreign_models import make_clip, make_llava, make_llava_lora, projector_state
from worlds.interop_tools import convert, refused


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


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    torch.save({f"model.mm_projector.{k}": v for k, v in projector_state().items()}, tmp_path / "p.bin")
    return tmp_path / "p.bin"


def test_only_a_projector_file_is_replaced(projector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, damaged, ours = (tmp_path / f"{name}.safetensors" for name in ("foreign", "damaged", "ours"))
    save_file({"conv1.weight": torch.ones(2, 2)}, foreign)
    damaged.write_text("notes")
    make_clip(tmp_path / "clip")
    before = snapshot(tmp_path)
    to = (projector, "--to", "projector", "--overwrite", "--out")
    for file in (foreign, damaged):
        refused(capsys, f"{file} is not a projector's file, so no conversion has written it", *to, file)
    refused(capsys, f"--out {projector} holds {projector}, which is read", *to, projector)
    refused(capsys, "holds", *to[:-1], "--out", tmp_path / "clip" / ".." / "p.bin")
    assert convert(*to[:3], "--out", ours) == 0
    stays = ours.read_bytes()
    refused(capsys, "is a file", tmp_path / "clip", "--to", "open-clip", "--overwrite", "--out", ours)
    assert snapshot(tmp_path) == {**before, ours: stays}
    assert convert(*to, ours) == 0


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "tower")
    for again in ((), ("--overwrite",)):
        assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "link", *again) == 0
        assert (tmp_path / "link").is_symlink()
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["tower"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "link", "there"]
