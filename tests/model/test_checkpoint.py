"""A checkpoint is written whole or not at all, and a damaged one is never read."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_mole.common.errors import CheckpointError
from llava_mole.model import checkpoint


def write(directory: Path, text: str = "weights", **fields) -> Path:
    def files(temporary: Path) -> None:
        (temporary / "part").mkdir()
        (temporary / "part" / "a.bin").write_text(text)
        (temporary / "b.txt").write_text("b")

    checkpoint.write_checkpoint(directory, files, {"step": 1, **fields})
    return directory


def test_written_checkpoint_verifies(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint-1", stage="finetune")
    manifest = checkpoint.verify_checkpoint(path)
    assert manifest["stage"] == "finetune"
    assert sorted(manifest["files"]) == ["b.txt", "part/a.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_failed_write_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint-1", "old")

    def full_disk(temporary: Path) -> None:
        (temporary / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_checkpoint(path, full_disk, {})
    assert (path / "part" / "a.bin").read_text() == "old"
    checkpoint.verify_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rewriting_replaces(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1", "old")
    path = write(tmp_path / "checkpoint-1", "new")
    assert (path / "part" / "a.bin").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def damage_missing(path: Path) -> None:
    (path / "b.txt").unlink()


def damage_truncated(path: Path) -> None:
    (path / "part" / "a.bin").write_text("weig")


def damage_flipped(path: Path) -> None:
    (path / "part" / "a.bin").write_text("Weights")


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_manifest_value(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"step": 1', '"step": 9'))


def damage_manifest_key(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"files"', '"fimes"'))


DAMAGES = {
    damage_missing: "b.txt is missing",
    damage_truncated: "a.bin has 4 bytes, 7 were written",
    damage_flipped: "a.bin differs from what was written",
    damage_manifest: "manifest.json is damaged",
    damage_no_manifest: "has no manifest.json",
    damage_manifest_value: "differs from what was written",
    damage_manifest_key: "manifest.json is damaged",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_and_passed_over(tmp_path: Path, damage) -> None:
    older = write(tmp_path / "checkpoint-1")
    path = write(tmp_path / "checkpoint-2")
    damage(path)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        checkpoint.verify_checkpoint(path)
    assert checkpoint.newest_valid_checkpoint(tmp_path) == older
    assert checkpoint.resolve_checkpoint(tmp_path) == older


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint-1", format="other/9")
    with pytest.raises(CheckpointError, match="format 'other/9'"):
        checkpoint.read_manifest(path)


def test_resolve_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.resolve_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoint.resolve_checkpoint(tmp_path)
    damage_missing(write(tmp_path / "checkpoint-1"))
    with pytest.raises(CheckpointError, match="none of them verifies"):
        checkpoint.resolve_checkpoint(tmp_path)


def test_steps_are_ordered_as_numbers_and_rotated(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-old").mkdir()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-9",
    ]
    checkpoint.rotate_checkpoints(tmp_path / "checkpoint-100", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-old"]


def test_rotation_never_deletes_what_was_just_published(tmp_path: Path) -> None:
    for step in (3, 4, 9):
        write(tmp_path / f"checkpoint-{step}")
    damage_flipped(tmp_path / "checkpoint-9")  # a run that resumed from 3 passed over it
    checkpoint.rotate_checkpoints(tmp_path / "checkpoint-4", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    good = write(tmp_path / "checkpoint-4")
    for name in (".tmp-checkpoint-8-123", ".gone-checkpoint-2-77", ".old-checkpoint-4-9"):
        write(tmp_path / name)
        damage_missing(tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    checkpoint.clean_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "checkpoint-4"]
    checkpoint.verify_checkpoint(good)
    checkpoint.clean_leftovers(tmp_path / "none")


def test_a_checkpoint_moved_away_for_its_replacement_comes_back(tmp_path: Path) -> None:
    write(tmp_path / ".old-checkpoint-4-123", "only copy")
    checkpoint.clean_leftovers(tmp_path)
    checkpoint.verify_checkpoint(tmp_path / "checkpoint-4")


def test_nothing_is_written_where_twice_the_size_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    with pytest.raises(OSError, match="has 1,999 bytes free; a checkpoint takes about 1,000"):
        checkpoint.write_checkpoint(tmp_path / "checkpoint-1", lambda _: pytest.fail("written"), {}, 1000)
    assert not list(tmp_path.iterdir())
