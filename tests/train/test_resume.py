"""A run continues its own experiment only, deletes only what it wrote, and runs once at a time."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from worlds.processes import launch_environment
from worlds.tiny_models import make_language_model, make_vision_tower, make_world

from llava_mole.common.errors import CheckpointError, ConfigError, UserError
from llava_mole.common.log import setup_logging
from llava_mole.config import config_to_dict, parse_run_config
from llava_mole.model.checkpoint import MANIFEST, SELF_HASH, _manifest_hash
from llava_mole.train import resume
from llava_mole.train.resume import MAY_CHANGE, changed_keys
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import main, train

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=16)
    return directory


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    steps = ["--train.max_steps", str(STEPS), "--train.save_every", "2"]
    return [str(world / "config.yaml"), "--train.output_dir", str(out), *steps, *more]


def run(world: Path, out: Path, *more: str) -> Path:
    return train(parse_run_config(arguments(world, out, *more)))


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    return run(world, world / "finished")


@pytest.fixture
def halfway(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after half of its steps."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    (out / "summary.json").unlink()
    return out


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, and the target of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# Checkpoints of others


def newer_format(path: Path, finished: Path) -> None:
    shutil.copytree(finished / f"checkpoint-{STEPS}", path)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest[SELF_HASH]
    manifest["format"] = "llava_mole.checkpoint/9"
    manifest[SELF_HASH] = _manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def of_another_tool(path: Path, _: Path) -> None:
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")


def empty(path: Path, _: Path) -> None:
    path.mkdir()


def torn(path: Path, finished: Path) -> None:
    shutil.copytree(finished / f"checkpoint-{STEPS}", path)
    (path / "mm_projector.safetensors").write_bytes(b"")


FOREIGN: dict[str, Callable[[Path, Path], None]] = {
    "another tool": of_another_tool, "newer format": newer_format, "empty": empty, "torn": torn,
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_auto_refuses_checkpoints_it_cannot_use_and_touches_nothing(
    world: Path, finished: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for step in (2, 500, 1000):
        FOREIGN[kind](out / f"checkpoint-{step}", finished)
    before = contents(out)
    with pytest.raises(CheckpointError, match="has checkpoint-1000, checkpoint-500, checkpoint-2, and the warnings"):
        run(world, out, "--train.resume", "auto")
    assert contents(out) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_resumed_run_leaves_foreign_checkpoints_alone(
    world: Path, finished: Path, halfway: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    FOREIGN[kind](halfway / "checkpoint-1000", finished)
    (halfway / "checkpoint-notes").write_text("mine")
    (halfway / "checkpoint-1").symlink_to(finished / "checkpoint-2")
    before = {name: digest for name, digest in contents(halfway).items() if "checkpoint-2" not in name}
    run(world, halfway, "--train.resume", "auto", "--train.keep_checkpoints", "1")
    after = contents(halfway)
    kept = {name for name in before if name.startswith("checkpoint-")}
    assert kept
    assert all(after[name] == before[name] for name in kept)
    assert not (halfway / "checkpoint-2").exists()
    assert (finished / "checkpoint-2" / MANIFEST).exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "which this run did not write: left alone" in line]
    assert len(said) == 1
    assert "checkpoint-1, checkpoint-1000, checkpoint-notes" in said[0]


@pytest.mark.parametrize("kind", ["another tool", "newer format", "file", "link"])
def test_what_is_in_the_way_is_named_before_training(world: Path, finished: Path, halfway: Path, kind: str) -> None:
    path = halfway / f"checkpoint-{STEPS}"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(finished / "nowhere")
    else:
        FOREIGN[kind](path, finished)
    before = contents(halfway)
    with pytest.raises(CheckpointError, match=f"has checkpoint-{STEPS}, which this run did not write and would have"):
        run(world, halfway, "--train.resume", "auto")
    assert contents(halfway) == before


def test_another_run_s_checkpoint_is_not_continued_among_others(world: Path, finished: Path, halfway: Path) -> None:
    with pytest.raises(CheckpointError, match="has checkpoints of its own .* names another run's"):
        run(world, halfway, "--train.resume", str(finished / f"checkpoint-{STEPS}"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_files_that_no_run_wrote_are_not_overwritten(world: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# my own notes\n")
    with pytest.raises(ConfigError, match=rf"has {name}, but no environment\.json: no run wrote it"):
        run(world, tmp_path)
    assert contents(tmp_path) == {name: hashlib.sha256(b"# my own notes\n").hexdigest()}


def test_torn_files_of_a_killed_process_are_removed(world: Path, halfway: Path) -> None:
    (halfway / ".tmp-metrics.jsonl-77").write_text("{")
    (halfway / ".tmp-metrics.jsonl-notes").write_text("mine")
    run(world, halfway, "--train.resume", "auto")
    assert [path.name for path in halfway.iterdir() if path.name.startswith(".")] == [".tmp-metrics.jsonl-notes"]


def test_metrics_without_checkpoints_are_not_overwritten(world: Path, halfway: Path) -> None:
    shutil.rmtree(halfway / "checkpoint-2")
    before = contents(halfway)
    with pytest.raises(CheckpointError, match="has the metrics of a run that came to step 4, and no checkpoint"):
        run(world, halfway)
    with pytest.raises(CheckpointError, match="belongs to another experiment: adapter.rank is 2 there and 1 here"):
        run(world, halfway, "--train.resume", "auto", "--adapter.rank", "1")
    assert contents(halfway) == before
    run(world, halfway, "--train.resume", "auto")
    assert [entry["step"] for entry in read_metrics(halfway / "metrics.jsonl")] == [1, 2, 3, 4]


# Other experiments


CHANGED = {
    "template": ["--data.template", "v1"],
    "rank": ["--adapter.rank", "4"],
    "alpha": ["--adapter.alpha", "16"],
    "top k": ["--adapter.options.top_k", "2"],
    "expert scale": ["--adapter.options.expert_scale", "straight_through"],
    "dropout": ["--adapter.dropout", "0.1"],
    "learning rate": ["--train.learning_rate", "2e-2"],
    "warm-up": ["--train.warmup_steps", "1"],
    "seed": ["--train.seed", "7"],
    "length policy": ["--data.max_length_policy", "drop"],
    "images": ["--data.image_aspect_ratio", "square"],
    "tower layer": ["--model.vision_tower.select_layer", "-1"],
    "steps": ["--train.max_steps", "5"],
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_setting_is_refused(world: Path, halfway: Path, what: str) -> None:
    option, value = CHANGED[what]
    key = option.removeprefix("--")
    before = contents(halfway)
    with pytest.raises(
        CheckpointError, match=f"belongs to another experiment: {key} is .* there and .* here"
    ) as caught:
        run(world, halfway, "--train.resume", "auto", option, value)
    assert f"--train.accept_changed '[{key}]'" in str(caught.value)
    assert contents(halfway) == before


def edit_answers(world: Path) -> None:
    path = world / "red" / "red.json"
    path.write_text(path.read_text().replace("It is red.", "It is RED."))


def reorder_records(world: Path) -> None:
    path = world / "blue" / "blue.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


def other_base(world: Path) -> None:
    make_language_model(world / "language_model", seed=1)


def other_tower(world: Path) -> None:
    shutil.rmtree(world / "vision_tower")
    make_vision_tower(world / "vision_tower", seed=1)


def one_changed_weight(world: Path) -> None:
    path = world / "language_model" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] += 1
    save_file(state, path, metadata={"format": "pt"})


def other_tokenizer(world: Path) -> None:
    path = world / "language_model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


SWAPPED = {
    edit_answers: "data.sources.red", reorder_records: "data.sources.blue", other_base: "model.language_model",
    other_tower: "model.vision_tower", one_changed_weight: "model.language_model", other_tokenizer: "model.tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("swap", SWAPPED, ids=lambda swap: swap.__name__)
def test_changed_contents_are_refused(world: Path, finished: Path, halfway: Path, swap: Callable[[Path], None]) -> None:
    saved = world.with_name("saved")
    shutil.copytree(world, saved)
    try:
        swap(world)
        with pytest.raises(CheckpointError, match=f"was trained on other contents: {SWAPPED[swap]} has digest"):
            run(world, halfway, "--train.resume", "auto")
        with pytest.raises(CheckpointError, match="was trained on other contents"):  # not "complete"
            run(world, finished, "--train.resume", "auto")
    finally:
        shutil.rmtree(world)
        saved.rename(world)


def test_an_accepted_change_resumes(world: Path, halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    accepted = ["--train.accept_changed", "[train.learning_rate]"]
    run(world, halfway, "--train.resume", "auto", "--train.learning_rate", "2e-2", *accepted)
    assert "resuming with train.learning_rate changed from 0.01 to 0.02" in capsys.readouterr().err


def test_what_may_change_may(world: Path, finished: Path, halfway: Path) -> None:
    moved = world.with_name("moved")
    shutil.copytree(world / "red", moved)
    more = ["--train.num_workers", "0", "--tracker.log_every", "2", "--train.keep_checkpoints", "5"]
    more += ["--data.sources.red.annotations", str(moved / "red.json"), "--data.sources.red.image_folder", str(moved)]
    run(world, halfway, "--train.resume", "auto", *more)
    ends = [load_file(d / f"checkpoint-{STEPS}" / "trainer" / "optimizer.safetensors") for d in (halfway, finished)]
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_every_key_is_compared_or_listed(world: Path, finished: Path) -> None:
    """A key added later is compared unless somebody puts it on the list."""
    values = config_to_dict(parse_run_config(arguments(world, world / "x")))
    keys = set(dict(resume._flat(values)))
    for pattern in MAY_CHANGE:
        assert any(resume.fnmatchcase(key, pattern) for key in keys), pattern
    assert changed_keys(finished / f"checkpoint-{STEPS}", values) == {}


def test_a_checkpoint_of_format_1_resumes(world: Path, halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    checkpoint = halfway / "checkpoint-2"
    (checkpoint / "run.json").unlink()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for key in (SELF_HASH, "run", "contents"):
        del manifest[key]
    del manifest["files"]["run.json"]
    manifest["format"] = "llava_mole.checkpoint/1"
    manifest[SELF_HASH] = _manifest_hash(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="adapter.rank is 2 there and 4 here"):
        run(world, halfway, "--train.resume", "auto", "--adapter.rank", "4")
    run(world, halfway, "--train.resume", "auto", "--train.keep_checkpoints", "1")
    assert "of an older version and does not record model.tokenizer" in capsys.readouterr().err
    assert (checkpoint / MANIFEST).exists()  # no run can prove that it wrote it


def test_a_finished_run_called_again_changes_nothing(world: Path, finished: Path) -> None:
    before = contents(finished), {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    run(world, finished, "--train.resume", "auto", "--tracker.log_every", "3")
    assert (contents(finished), {p: p.stat().st_mtime_ns for p in finished.rglob("*")}) == before
    with pytest.raises(CheckpointError, match="another experiment: train.max_steps is 4 there and 6 here"):
        run(world, finished, "--train.resume", "auto", "--train.max_steps", "6")


# Two runs, and places that cannot be used


def test_two_runs_in_one_directory(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = arguments(world, out, "--train.max_steps", "8", "--train.epochs", "4", "--train.save_every", "1")
    command = [sys.executable, "-m", "llava_mole.train.train"]
    first = subprocess.Popen([*command, *slow], stderr=subprocess.PIPE, env=launch_environment(), text=True)
    try:
        while not (out / ".lock").exists():
            assert first.poll() is None
        with pytest.raises(ConfigError, match=f"is in use by process {first.pid} on .*; wait for it or stop it"):
            run(world, out, "--train.resume", "auto")
        with pytest.raises(ConfigError, match="in use"):
            run(world, out, "--train.break_lock", "true", "--train.resume", "auto")
    finally:
        first.kill()
        first.communicate()
    assert (out / ".lock").exists()
    run(world, out, "--train.resume", "auto", *slow[3:])
    assert not (out / ".lock").exists()


UNUSABLE = {
    "a file": (lambda path: path.write_text("x"), "run", "cannot be written"),
    "a file above": (lambda path: path.write_text("x"), "run/deeper", "cannot be written"),
    "a long name": (lambda path: None, "r" * 300, "File name too long"),
    "a broken link": (lambda path: path.symlink_to("nowhere/at/all"), "run", "cannot be written"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_directory_is_found_before_the_model_is_loaded(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, out, message = UNUSABLE[name]
    prepare(tmp_path / "run")
    before = contents(tmp_path)
    monkeypatch.setattr("llava_mole.train.train.build_parts", lambda _: pytest.fail("the model was loaded"))
    assert main(arguments(world, tmp_path / out)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava-mole: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert contents(tmp_path) == before


def test_a_full_disk_is_found_before_the_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("llava_mole.train.train.build_parts", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"run cannot be written: only 1,000 bytes are free"):
        run(world, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_configuration_of_a_checkpoint_is_the_one_that_is_compared(halfway: Path) -> None:
    assert yaml.safe_load((halfway / "checkpoint-2" / "config.yaml").read_text())["train"]["max_steps"] == STEPS
