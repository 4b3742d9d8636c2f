"""The search for conflict: killed and continued to the same digits, blind to the test split, reported with gaps."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava_mole.common.errors import DataError
from llava_mole.config import load_config
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS
from llava_mole.model.builder import build_parts
from scripts.conflict import grid, loop, report, run, score
from scripts.conflict.world import World, load_world

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/tiny/finetune_mole.yaml"
RECIPE = loop.Recipe(steps=4, batch=6, validation=8)
opened: list[str] = []
"""Paths that this process has opened while `watching` is set."""
watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
        opened.append(os.fspath(arguments[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 12 train and 4 test images a domain, and a projector."""
    out = tmp_path_factory.mktemp("conflict")
    for place, domain in enumerate(DOMAINS):
        for split, count in (("train", 12), ("test", 4)):
            names = []
            (out / domain / "images" / split).mkdir(parents=True)
            for number in range(count):
                names.append(f"{domain}/images/{split}/{number}.png")
                colour = tuple(40 * place + number * 3 + shift for shift in (0, 60, 90))
                Image.new("RGB", (64, 64), colour).save(out / names[-1])
            (out / domain / f"{split}.json").write_text(json.dumps([{"image": name} for name in names]))
    (out / "manifest.json").write_text("{}")
    os.chdir(ROOT)
    model, _, _ = build_parts(load_config(CONFIG).model)
    save_file(
        {f"mm_projector.{key}": value.float().contiguous() for key, value in model.projector.state_dict().items()},
        out / "projector.safetensors",
    )
    return out


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    """The splits that the search may see, loaded while every opened file is noted."""
    global watching
    sys.addaudithook(_audit)
    watching = True
    found = load_world(CONFIG, folder / "projector.safetensors", folder, folder / "cache", image_positions=1)
    job = next(grid.GRIDS["centre"]([5]))
    run.run_job(found, grid.Job(loop.Cell(1.0, 4, 1), 5, {"mix": job.arms["mix"]}), RECIPE, folder / "watched")
    watching = False
    return found


def test_the_search_opens_no_test_file(world: World, folder: Path) -> None:
    within = [path for path in opened if str(folder) in path]
    assert any(path.endswith("train.json") for path in within)
    assert any("images/train" in path for path in within)
    assert not [path for path in within if "test" in Path(path).relative_to(folder).as_posix()]
    for domain in DOMAINS:
        assert not set(world.names["train", domain]) & set(world.names["validation", domain])


def test_a_killed_run_continues_to_the_same_digits(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {name: loop.ARMS[name] for name in ("single general", "lead", "image", "random")}
    jobs = [grid.Job(loop.Cell(1.0, 4, 1), seed, arms) for seed in (1, 2)]
    whole = [json.loads(run.run_job(world, job, RECIPE, folder / "whole").read_text()) for job in jobs]
    broken, real = folder / "broken", run.train

    def dies(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    run.run_job(world, jobs[0], RECIPE, broken)
    monkeypatch.setattr(run, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        run.run_job(world, jobs[1], RECIPE, broken)
    assert len(list((broken / "jobs").glob("*.json"))) == 1
    run.run_job(world, jobs[0], RECIPE, broken)  # has its result: nothing is trained
    monkeypatch.setattr(run, "train", real)
    for job, expected in zip(jobs, whole, strict=True):
        found = json.loads(run.run_job(world, job, RECIPE, broken).read_text())
        assert found["arms"] == expected["arms"]
    assert len({json.dumps(job["arms"]) for job in whole}) == len(jobs)


def test_test_images_are_a_step_of_its_own(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {name: loop.ARMS[name] for name in ("single general", "mix", "oracle")}
    monkeypatch.setitem(
        grid.GRIDS, "core", lambda seeds: iter([grid.Job(loop.Cell(1.0, 4, 1), s, arms) for s in seeds])
    )
    monkeypatch.setattr(score, "Recipe", lambda: RECIPE)
    monkeypatch.setattr(score, "SAMPLES", 8)
    out, stage1 = folder / "scored", str(folder / "projector.safetensors")
    options = ["--config", str(CONFIG), "--stage1", stage1, "--data", str(folder), "--out", str(out), "--seeds", "1"]
    assert score.main(options) == 2  # nothing has been run
    for job in grid.GRIDS["core"]([1]):
        run.run_job(world, job, RECIPE, out)
    assert score.main(options) == 0
    assert score.main(options) == 0
    assert len((out / "scored.jsonl").read_text().splitlines()) == 2
    rows = json.loads((out / "test.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == list(arms)


def test_report_shows_what_was_not_run(world: World, folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    wanted = (*(f"single {domain}" for domain in DOMAINS), "mix", "oracle", "lead")
    arms = {name: loop.ARMS[name] for name in wanted}
    for cell, seeds in ((loop.Cell(1.0, 4, 1), (1, 2)), (loop.Cell(0.0, 8, 2), (1,))):
        for seed in seeds:
            run.run_job(world, grid.Job(cell, seed, arms), RECIPE, tmp_path / "runs")
    assert report.main(["--out", str(tmp_path / "runs"), "--to", str(tmp_path / "to")]) == 0
    text = capsys.readouterr().out
    assert "c 1, n 4, r 1" in text
    assert "single - Mix" in text
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        "conflict.json",
        "conflict.png",
        "conflict-routers.png",
    }
    assert report.main(["--out", str(tmp_path / "runs"), "--to", str(tmp_path / "to"), "--world", "other"]) == 2


def test_every_arm_of_every_grid_can_be_built(world: World) -> None:
    for name, jobs in grid.GRIDS.items():
        found = list(jobs([1]))
        assert found, name
        for job in found:
            for single in (True, False):
                if arms := loop.arms_of(job.arms, single):
                    loop.build_stack(world, job.cell, job.seed, arms)


def test_interval_is_students() -> None:
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert report.interval([1.0]) == (1.0, None)


def test_a_word_of_two_tokens_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.conflict.world.WORDS", ("circumstances",))
    with pytest.raises(DataError, match="pieces"):
        load_world(CONFIG, folder / "projector.safetensors", folder, folder / "cache", image_positions=1)


def test_adapters_of_one_stack_do_not_influence_one_another(world: World) -> None:
    cell, short = loop.Cell(1.0, 4, 1), loop.Recipe(steps=6, batch=6, validation=16)
    alone, _ = loop.train(world, cell, 1, {"lead": loop.ARMS["lead"]}, short)
    beside, stacks = loop.train(world, cell, 1, {n: loop.ARMS[n] for n in ("mix", "lead", "best")}, short)
    assert alone["arms"]["lead"]["loss"] == pytest.approx(beside["arms"]["lead"]["loss"], rel=1e-4)
    assert torch.isfinite(stacks["mixed"]["router"]).all()
