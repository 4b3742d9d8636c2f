"""A run that starts from another with fewer experts: what was learned stays to the bit, and the run resumes exactly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_world

from llava_mole.config import parse_run_config
from llava_mole.inference.predictor import Predictor
from llava_mole.train.train import main, train

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=16)
    return directory


def arguments(world: Path, out: Path, experts: int, *more: str) -> list[str]:
    number = ["--adapter.num_experts", str(experts), "--train.max_steps", "4", "--train.save_every", "2"]
    return [str(world / "config.yaml"), "--train.output_dir", str(out), *number, *more]


def grown(world: Path, out: Path, experts: int, source: Path, *more: str) -> Path:
    options = json.dumps({"frozen_experts": experts - 1})
    given = arguments(world, out, experts, "--init-from", str(source), "--adapter.options", options, *more)
    return train(parse_run_config(given))


def tensors(run: Path) -> Tensors:
    found: Tensors = load_file(run / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    return found


@pytest.fixture(scope="module")
def chain(world: Path) -> list[Path]:
    """Runs with one, two and three experts, each from the one before."""
    first = train(parse_run_config(arguments(world, world / "one", 1)))
    second = grown(world, world / "two", 2, first)
    return [first, second, grown(world, world / "three", 3, second)]


def test_experts_of_finished_tasks_stay_to_the_bit(chain: list[Path]) -> None:
    one, two, three = map(tensors, chain)
    assert not [name for name in one if "mole_router" in name]
    experts = [name for name in one if "mole_experts" in name]
    routers = [name for name in two if "mole_router" in name]
    assert experts
    assert routers
    for name in experts:
        assert torch.equal(two[name][:1], one[name]), name
        assert torch.equal(three[name][:2], two[name]), name
        assert three[name].shape[0] == 3
    for name in routers:
        assert torch.equal(three[name][:2], two[name]), name
    assert any(not torch.equal(three[name][2], three[name][0]) for name in experts if name.endswith("_B"))
    assert Predictor.from_pretrained(chain[2], device="cpu").loaded.adapter == "mole"


def test_a_grown_run_resumes_exactly(world: Path, chain: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(chain[2], again)
    shutil.rmtree(again / "checkpoint-4")
    (again / "summary.json").unlink()
    grown(world, again, 3, chain[1], "--train.resume", "auto")
    whole, resumed = tensors(chain[2]), tensors(again)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_experts": 3}, "frozen_experts is 3 of 3: no expert would train"),
        ({"expert_scale": "prob"}, "has another adapter: expert_scale 'straight_through' there, 'prob' here"),
    ],
)
def test_what_cannot_grow_is_refused(
    options: dict[str, object], message: str, world: Path, chain: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--init-from", str(chain[1]), "--adapter.options", json.dumps(options)]
    assert main(arguments(world, world / "bad", 3, *given)) == 2
    assert message in capsys.readouterr().err
    assert not (world / "bad").exists()
