"""A checkpoint is written whole or not at all, and a damaged one is never read."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_mole.common.errors import CheckpointError
from llava_mole.model import checkpoint


def write(directory: Path, text: str = "weights", run: str | None = None, **fields) -> Path:
    def files(temporary: Path) -> None:
        (temporary / "part").mkdir()
        (temporary / "part" / "a.bin").write_text(text)
        (temporary / "b.txt").write_text("b")

    step = directory.name.rpartition("-")[2]
    fields = {"step": int(step) if step.isdecimal() else 1, **fields}
    checkpoint.write_checkpoint(directory, files, fields, run=run)
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
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"step": 2', '"step": 9'))


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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_steps_are_ordered_as_numbers_and_rotated(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path / f"checkpoint-{step}", run="own")
    (tmp_path / "checkpoint-old").mkdir()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-9",
    ]
    checkpoint.rotate_checkpoints(tmp_path / "checkpoint-100", keep=2, run="own")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-old"]


def test_rotation_never_deletes_what_was_just_published(tmp_path: Path) -> None:
    for step in (3, 4, 9):
        write(tmp_path / f"checkpoint-{step}", run="own")
    damage_flipped(tmp_path / "checkpoint-9")  # a run that resumed from 3 passed over it
    checkpoint.rotate_checkpoints(tmp_path / "checkpoint-4", keep=1, run="own")
    assert names(tmp_path) == ["checkpoint-4"]


def test_rotation_deletes_only_what_its_own_run_wrote(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run_dir = tmp_path / "run"
    write(elsewhere / "checkpoint-1", run="own")
    write(run_dir / "checkpoint-10", run="own")
    write(run_dir / "checkpoint-11", run="own")
    write(run_dir / "checkpoint-2", run="another")  # copied here from another run
    write(run_dir / "checkpoint-3")  # imported: no run wrote it
    (run_dir / "checkpoint-4").mkdir()  # of another tool
    (run_dir / "checkpoint-4" / "model.bin").write_text("weights")
    (run_dir / "checkpoint-5").write_text("a file")
    (run_dir / "checkpoint-6").symlink_to(elsewhere / "checkpoint-1")
    shutil.copytree(run_dir / "checkpoint-10", run_dir / "checkpoint-7")  # a backup under another name
    write(run_dir / "checkpoint-99", run="another")
    write(run_dir / "checkpoint-98", format="llava_mole.checkpoint/9")
    before = set(names(run_dir)) - {"checkpoint-10"}
    checkpoint.rotate_checkpoints(run_dir / "checkpoint-11", keep=1, run="own")
    assert set(names(run_dir)) == before
    assert (elsewhere / "checkpoint-1" / "b.txt").exists()


@pytest.mark.parametrize("damage", [damage_manifest, damage_no_manifest, "owner missing", "owner torn"])
def test_one_damage_does_not_make_a_checkpoint_foreign(tmp_path: Path, damage) -> None:
    path = write(tmp_path / "checkpoint-1", run="own")
    if damage == "owner missing":
        (path / checkpoint.OWNER_FILE).unlink()
    elif damage == "owner torn":
        (path / checkpoint.OWNER_FILE).write_text('{"ru')
    else:
        damage(path)
    assert checkpoint.is_owned(path, "own")
    assert not checkpoint.is_owned(path, "another")


@pytest.mark.parametrize("way", ["other run", "no run", "other tool", "file", "link", "broken link"])
def test_a_run_never_replaces_what_it_does_not_own(tmp_path: Path, way: str) -> None:
    path = tmp_path / "checkpoint-1"
    target = tmp_path / "target"
    if way in ("other run", "no run"):
        write(path, "theirs", run="another" if way == "other run" else None)
    elif way == "other tool":
        path.mkdir()
        (path / "model.bin").write_text("theirs")
    elif way == "file":
        path.write_text("theirs")
    else:
        path.symlink_to(target)
        if way == "link":
            write(target, "theirs", run="own")
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match="does not belong to this run; move it away"):
        write(path, "ours", run="own")
    assert names(tmp_path) == before
    assert "ours" not in "".join(p.read_text() for p in path.rglob("*.bin") if p.is_file())
    assert path.is_symlink() == way.endswith("link")


def test_a_run_replaces_its_own(tmp_path: Path) -> None:
    damage_missing(write(tmp_path / "checkpoint-1", "old", run="own"))
    path = write(tmp_path / "checkpoint-1", "new", run="own")
    assert (path / "part" / "a.bin").read_text() == "new"
    assert checkpoint.verify_checkpoint(path)["run"] == "own"


def test_a_copy_under_another_name_is_not_the_newest(tmp_path: Path) -> None:
    newest = write(tmp_path / "checkpoint-8")
    shutil.copytree(write(tmp_path / "checkpoint-4"), tmp_path / "checkpoint-900")
    assert checkpoint.newest_valid_checkpoint(tmp_path) == newest
    assert checkpoint.resolve_checkpoint(tmp_path / "checkpoint-900").name == "checkpoint-900"  # if asked for


def test_format_1_is_still_read(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint-1", format="llava_mole.checkpoint/1")
    assert checkpoint.verify_checkpoint(path)["step"] == 1


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


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    empty, half, theirs = (tmp_path / f".tmp-checkpoint-{n}-1" for n in (1, 2, 3))
    for path in (empty, half, theirs):
        path.mkdir()
    (half / checkpoint.OWNER_FILE).write_text('{"run": "own", "checkpoint": "checkpoint-2"}')
    (half / "half").write_text("x")
    (theirs / "notes.txt").write_text("x")
    (tmp_path / ".gone-checkpoint-4-1").write_text("a file")
    (tmp_path / ".old-checkpoint-5-1").symlink_to(theirs)
    checkpoint.clean_leftovers(tmp_path)
    assert names(tmp_path) == [".gone-checkpoint-4-1", ".old-checkpoint-5-1", theirs.name]
    assert (theirs / "notes.txt").exists()


def test_a_checkpoint_moved_away_for_its_replacement_comes_back(tmp_path: Path) -> None:
    write(tmp_path / ".old-checkpoint-4-123", "only copy")
    checkpoint.clean_leftovers(tmp_path)
    checkpoint.verify_checkpoint(tmp_path / "checkpoint-4")


def test_nothing_is_written_where_twice_the_size_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    with pytest.raises(OSError, match="has 1,999 bytes free; a checkpoint takes about 1,000"):
        checkpoint.write_checkpoint(tmp_path / "checkpoint-1", lambda _: pytest.fail("written"), {}, 1000)
    assert not list(tmp_path.iterdir())
