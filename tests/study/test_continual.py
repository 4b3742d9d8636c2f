"""A small study of continual learning: its steps are ordinary runs, what is finished stays, and the report is right.

The cells' commands run in this process, because starting one takes longer than what it does.
"""

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from worlds.tiny_models import make_data, make_world

from llava_mole.cli import main as llava_mole
from llava_mole.common.errors import ConfigError
from llava_mole.common.files import write_json
from llava_mole.config import save_config
from llava_mole.eval.scoring.score import read_score_file
from llava_mole.study.cells import CONFIG, RUN, Cell
from llava_mole.study.continual import Continual, Steps, plan_continual, read_continual
from llava_mole.study.continual_metrics import continual_numbers
from llava_mole.study.continual_results import Matrix, collect_continual, differences, write_continual_report
from llava_mole.study.inputs import Inputs
from llava_mole.study.runner import DONE, is_done, versions

TASKS = ["red", "blue", "green"]
METHODS: dict[str, Any] = {
    "lora": {"label": "LoRA", "method": "lora"},
    "mole": {"method": "mole", "preset": "coupled"},
    "grow": {"method": "mole", "preset": "coupled", "schedule": "grow", "options": {"balance_coef": 0}},
    "replay": {"method": "lora", "replay": 0.5},
    "joint": {"method": "lora", "schedule": "joint"},
}


def make_study_files(folder: Path) -> Path:
    """Models, three tasks with questions, a base and a study. Returns the study's file."""
    config = yaml.safe_load(make_world(folder, samples=8).read_text())
    green = make_data(folder / "green", "green", 8, seed=5)
    config["data"]["sources"]["green"] = {"annotations": str(green), "image_folder": str(folder / "green")}
    config["data"]["mixture"]["green"] = 1
    config["projector_weights"] = str(folder / "projector.safetensors")
    config["train"] |= {"max_steps": 2, "save_every": 100}
    (folder / "stage2.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    make_projector(folder)
    questions = []
    for n, task in enumerate(TASKS):
        Image.new("RGB", (16, 16), (200 - 90 * n, 10, 90 * n)).save(folder / f"{task}.png")
        lines = [
            {
                "question_id": f"{task}-{i}",
                "image": f"{task}.png",
                "text": f"What color is {i}?",
                "answer": "It is red.",
            }
            for i in range(3)
        ]
        (folder / f"{task}_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        questions.append(f"{task}={task}_test.jsonl")
    benchmark = {
        "name": "colors", "title": "Colours", "data": {"folder": ".", "questions": questions, "source": "made up"},
        "prompt": {"max_new_tokens": 3}, "groups": TASKS, "metrics": {"*": ["plain_exact"]},
        "numbers": {"{group}": {"value": "plain_exact.hit"}, "mean": {"mean": TASKS}}, "primary": "mean",
        "columns": ["mean", *TASKS],
    }  # fmt: skip
    (folder / "colors.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    base = {
        "name": "colors", "stage2": "stage2.yaml", "projector": "projector.safetensors", "rank": 2, "seeds": [0],
        "domains": {task: [task] for task in TASKS}, "benchmarks": {"test": {"colors": "colors.yaml"}},
        "columns": {task: {"domain": task, "number": f"colors.{task}"} for task in TASKS},
        "data_root": str(folder), "evaluate": ["--device", "cpu"],
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    return write_study(folder)


def make_projector(folder: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    tensors = {f"mm_projector.{key}": torch.randn(shape) * 0.2 for key, shape in shapes.items()}
    save_file(tensors, folder / "projector.safetensors")


def write_study(folder: Path, name: str = "study", **changes: object) -> Path:
    values = {"title": "Colours in turn", "base": "base.yaml", "methods": METHODS, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def plan(path: Path) -> tuple[Continual, Steps]:
    continual = read_continual(path)
    steps = plan_continual(continual, path.parent / "out", Inputs())
    assert not steps.plan.missing()
    return continual, steps


def run_cells(cells: Iterable[Cell]) -> list[str]:
    """Run the cells that are not finished, as `runner` does, in this process. Returns their names."""
    ran = []
    for cell in cells:
        if is_done(cell):
            continue
        cell.folder.mkdir(parents=True, exist_ok=True)
        if cell.config is not None:
            save_config(cell.config, cell.folder / CONFIG)
        module, *arguments = cell.command[cell.command.index("-m") + 1 :]
        assert importlib.import_module(module).main(arguments) == 0, cell.name
        write_json(cell.folder / DONE, {"digest": cell.digest, "seconds": 1.0, "versions": versions()})
        ran.append(cell.name)
    return ran


def stamps(cells: Iterable[Cell]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for cell in cells for path in cell.folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study_files(tmp_path_factory.mktemp("continual"))


@pytest.fixture(scope="module")
def finished(study: Path) -> tuple[Continual, Steps]:
    """All cells, run in two goes: the first ends between two steps of the second method."""
    continual, steps = plan(study)
    with pytest.raises(ConfigError, match=r"no method is finished yet \(12 of 12 runs are open\)"):
        write_continual_report(continual, steps, study.parent / "report", "")
    assert not (study.parent / "report").exists()
    cells = list(steps.plan.cells.values())
    first = run_cells(cells[:9])
    before = stamps(cells[:9])
    continual, steps = plan(study)  # a new process would know as much
    rest = run_cells(steps.plan.cells.values())
    assert len(first) == 9
    assert not set(first) & set(rest), "a finished step runs once"
    assert len(first) + len(rest) == len(cells)
    after = stamps(cells[:9])
    assert {path: after[path] for path in before} == before
    return continual, steps


def adapter(steps: Steps, run: str) -> dict[str, torch.Tensor]:
    (checkpoint,) = (steps.plan.cells[run].folder / RUN).glob("checkpoint-*")
    found: dict[str, torch.Tensor] = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    return found


def test_every_method_is_a_chain_of_ordinary_runs(finished: tuple[Continual, Steps]) -> None:
    continual, steps = finished
    configs = {key: [steps.plan.cells[run].config for run in runs] for key, runs in steps.runs.items()}
    for (method, _), chain in configs.items():
        assert [list(c.data.sources) for c in chain if c] == {
            "replay": [["red"], ["red", "blue"], ["red", "blue", "green"]],
            "joint": [TASKS],
        }.get(method, [["red"], ["blue"], ["green"]])
        assert chain[0] is not None
        assert chain[0].init_from is None
        folders = [steps.plan.cells[run].folder for run in steps.runs[method, 0]]
        assert [c.init_from for c in chain[1:] if c] == [str(folder / RUN) for folder in folders[:-1]]
    replay = configs["replay", 0][2]
    assert replay is not None
    assert replay.data.mixture == {"red": 0.5, "blue": 0.5, "green": 1.0}
    joint = configs["joint", 0][0]
    assert joint is not None
    assert joint.train.max_steps == 6, "as many steps as the three tasks together"
    grown = [(c.adapter.num_experts, c.adapter.options.get("frozen_experts")) for c in configs["grow", 0] if c]
    assert grown == [(1, None), (2, 1), (3, 2)]
    assert steps.runs["lora", 0][0] == steps.runs["replay", 0][0], "the same first step is run once"
    assert continual.steps("joint") == ["red+blue+green"]


def test_experts_of_finished_tasks_stay_to_the_bit(finished: tuple[Continual, Steps]) -> None:
    _, steps = finished
    one, two, three = (adapter(steps, run) for run in steps.runs["grow", 0])
    experts = [name for name in one if "mole_experts" in name]
    assert experts
    for name in experts:
        assert torch.equal(two[name][:1], one[name]), name
        assert torch.equal(three[name][:2], two[name]), name
    changed = [name for name in experts if not torch.equal(three[name][2], two[name][0])]
    assert changed, "the new expert has trained"


def test_matrices_are_those_of_the_score_files(finished: tuple[Continual, Steps]) -> None:
    continual, steps = finished
    matrices = collect_continual(continual, steps, resamples=200)
    assert list(matrices) == list(METHODS)
    for method, matrix in matrices.items():
        runs = steps.runs[method, 0]
        wanted = []
        for run in runs:
            (cell,) = (steps.plan.cells[name] for name in steps.evaluations[run].values())
            numbers = read_score_file(cell.outputs[0])["numbers"]
            wanted.append([numbers[task]["value"] for task in TASKS])
        np.testing.assert_allclose(matrix.mean, wanted)
        assert matrix.observed.shape == (1, len(runs), 3)
        for i, j in np.ndindex(*matrix.mean.shape):
            low, high = matrix.spread(i, j)
            assert low <= matrix.mean[i, j] <= high
        numbers = matrix.numbers()
        if method == "joint":
            assert list(numbers) == ["last"]
        else:
            assert {k: v[0][0] for k, v in numbers.items()} == pytest.approx(
                {k: float(v) for k, v in continual_numbers(np.array(wanted)).items()}
            )
        assert matrix.cost["steps"] == 6


def test_status_and_report(finished: tuple[Continual, Steps], study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    where = ["--cells", str(study.parent / "out")]
    assert llava_mole(["continual", "status", str(study), *where]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" done ") >= 13
    assert "24 of 24 cells finished" in printed
    assert llava_mole(["continual", "report", str(study), *where]) == 0
    printed = capsys.readouterr().out
    for text in (
        "LoRA (seed 0): accuracy in percent",
        "forgetting",
        "differences to LoRA, over the seeds of both, paired over questions",
    ):
        assert text in printed
    folder = study.parent / "out" / "reports" / "study"
    values = json.loads((folder / "continual.json").read_text())
    assert values["tasks"] == TASKS
    assert set(values["methods"]) == set(METHODS)
    assert Image.open(folder / "matrices.png").size > (400, 300)
    assert (folder / "report.txt").read_text().strip() in printed


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one task": (lambda v: v.update(tasks=["red"]), r"tasks are \['red'\]; give at least two different domains of red"),
    "unknown task": (lambda v: v.update(tasks=["red", "pink"]), "give at least two different domains"),
    "schedule": (
        lambda v: v["methods"]["lora"].update(schedule="random"),
        "schedule is 'random'; there are sequential",
    ),
    "grow without experts": (
        lambda v: v["methods"]["lora"].update(schedule="grow"),
        "schedule 'grow' needs method mole",
    ),
    "grow with a number": (lambda v: v["methods"]["grow"].update(experts=3), "sets the number of experts itself"),
    "mixture": (lambda v: v["methods"]["lora"].update(mixture=[1, 0, 1]), "mixture, base and paper have no meaning"),
    "replay": (lambda v: v["methods"]["replay"].update(replay=-1.0), "replay is -1.0; it is a lambda"),
    "joint replay": (lambda v: v["methods"]["joint"].update(replay=0.1), "0 for schedule 'joint'"),
    "no adapter": (lambda v: v["methods"]["lora"].update(method="none"), "has no adapter to hand on"),
    "no method": (lambda v: v.update(methods={}), "methods is empty"),
    "split": (lambda v: v.update(split="validation"), "split is 'validation'"),
    "option": (
        lambda v: v.update(methods={"grow": {**METHODS["grow"], "options": {"shared_a": True}}}),
        "method 'grow', step 2: .*shared_a",
    ),
    "options of lora": (
        lambda v: v["methods"]["lora"].update(preset="by-source"),
        "method 'lora': preset, gate, mode and options need",
    ),
    "experts": (lambda v: v["methods"]["mole"].update(experts="foo"), "method 'mole': experts is 'foo'"),
    "rank of nothing": (
        lambda v: v["methods"]["lora"].update(rank={"parameters_of": "nobody"}),
        "name of another method of this study",
    ),
    "steps": (lambda v: v["methods"]["lora"].update(steps="2"), "method 'lora': steps is '2'"),
    "sources unseen": (
        lambda v: v["methods"]["mole"].update(preset="by-source"),
        "method 'mole': the adapter learns its router from a sample's source.* use replay above 0, or schedule: joint",
    ),
    "sources needed": (
        lambda v: v["methods"]["mole"].update(
            preset="paper", replay=0.5, options={"router": "oracle", "balance_coef": 0.0}
        ),
        "method 'mole': the adapter routes by the number of a sample's source.*all be number 0; use schedule: joint",
    ),
    "unknown key": (lambda v: v["methods"]["lora"].update(reply=0.1), "reply"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(study: Path, name: str) -> None:
    change, message = MISTAKES[name]
    values = json.loads(json.dumps({"methods": METHODS}))
    change(values)
    with pytest.raises(ConfigError, match=message):
        plan(write_study(study.parent, "mistake", **values))


def test_experts_are_counted_over_the_tasks(study: Path) -> None:
    """Not over the domains of the base; and with replay a source keeps its number."""
    methods = {"mole": METHODS["mole"], "kept": {"method": "mole", "preset": "by-source", "replay": 0.5}}
    continual, steps = plan(write_study(study.parent, "two", methods=methods, tasks=["green", "red"]))
    for name in methods:
        configs = [steps.plan.cells[run].config for run in steps.runs[name, 0]]
        assert [c.adapter.num_experts for c in configs if c is not None] == [2, 2]
    (first, second) = (steps.plan.cells[run].config for run in steps.runs["kept", 0])
    assert first is not None
    assert second is not None
    assert list(first.data.sources) == ["green"]
    assert list(second.data.sources) == ["green", "red"]
    assert continual.methods["kept"].replay == 0.5


def test_differences_are_over_the_seeds_of_both() -> None:
    generator = np.random.default_rng(0)
    observed, drawn = generator.random((3, 2, 2)), generator.random((50, 3, 2, 2))
    first = Matrix([0, 1, 2], observed, drawn, {})
    second = Matrix([2], observed[2:] + 0.25, drawn[:, 2:] + 0.25, {})
    found = differences(first, second)
    assert found["last"]["seeds"] == [2]
    for number in ("last", "average", "learned"):
        assert [found[number][key] for key in ("value", "low", "high")] == pytest.approx([0.25] * 3)
    assert differences(first, Matrix([7], observed[:1], drawn[:, :1], {})) == {}


def test_shipped_studies_are_read() -> None:
    files = sorted((Path(__file__).parents[2] / "configs/studies/continual").glob("*.yaml"))
    assert files
    for path in files:
        assert read_continual(path).methods
