"""`llava-mole conflict` and `routing` on runs, checkpoints and configurations; what they refuse; their page."""

import argparse
import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.analysis.conflict.cli import _parser as conflict_parser
from llava_mole.analysis.opening import open_subject
from llava_mole.config import parse_run_config
from llava_mole.serve.overlay.cli import _parser as routing_parser
from llava_mole.train.optim import build_optimizer
from llava_mole.train.plot import draw_run
from llava_mole.train.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "meters.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `mole`, with two checkpoints and conflicts along training, and `lora`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (
        ("mole", ["--train.conflict_every", "2"]),
        ("lora", ["--adapter.method", "lora", "--adapter.preset", "paper"]),
    ):
        out = ["--train.output_dir", str(folder / name), "--train.max_steps", "4", "--train.save_every", "2"]
        train(parse_run_config([str(world / "config.yaml"), *out, *more]))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_conflict_of_two_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(runs)
    arguments = ["conflict", str(runs / "lora"), str(runs / "mole"), "--batches", "2", "--batch-size", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert digests(runs) == before
    printed = capsys.readouterr().out
    for text in ("lora (", "mole (", "blue, red", "experts B", "FFN B", "step on blue, loss of red", "took: gradients"):
        assert text in printed
    data = json.loads((tmp_path / "conflict.json").read_text())
    assert [run["name"] for run in data["runs"]] == ["lora", "mole"]
    for run in data["runs"]:
        assert run["interference"]["step"] == "AdamW with the run's second moments"
        assert len(run["tokens"]["all"]["against"]) == 2
        assert (run["batches"], run["batch_size"], run["held_out"], run["step"]) == (2, 2, False, 4)
    for name in ("cosines", "layers", "interference", "tokens"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("preset", ["by-source", "octavius"])
def test_meters_of_a_packed_run_whose_router_decides_by_sample(
    world: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proof that packed samples do not see each other knows neither images nor prompts."""
    run = tmp_path / "run"
    out = ["--train.output_dir", str(run), "--train.max_steps", "2", "--train.batching", "packed"]
    train(parse_run_config([str(world / "config.yaml"), *out, "--adapter.preset", preset]))
    for meter in ("conflict", "routing"):
        few = ["--batches", "2", "--batch-size", "2"] if meter == "conflict" else ["--samples", "4"]
        assert cli.main([meter, str(run), *few, "--out", str(tmp_path / meter)]) == 0, capsys.readouterr().err
        assert (tmp_path / meter / f"{meter}.json").is_file()
    (measured,) = json.loads((tmp_path / "conflict" / "conflict.json").read_text())["runs"]
    assert measured["name"] == tmp_path.name  # `run` would be the name of every cell of a study


def test_conflict_at_the_start_of_a_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["conflict", str(world / "config.yaml"), "--batches", "2", "--batch-size", "2", "--no-tokens"]
    held_out = ["--data.validation_samples", "5", "--train.validate_every", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path), *held_out]) == 0
    (run,) = json.loads((tmp_path / "conflict.json").read_text())["runs"]
    assert run["held_out"] is True
    assert run["parts"]["experts A"]["cosine"] == [[None, None], [None, None]]  # B is zero
    assert run["parts"]["experts B"]["norm"][0] > 0
    assert run["interference"]["step"] == "AdamW without state"
    assert "tokens" not in run


@pytest.fixture(scope="module")
def full(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which language model and tower train too, with two checkpoints."""
    run = tmp_path_factory.mktemp("full") / "run"
    out = ["--train.output_dir", str(run), "--train.max_steps", "2", "--train.save_every", "1"]
    train(parse_run_config([str(world / "config.yaml"), *out, *FULL]))
    return run


FULL = ["--model.train.language_model", "full", "--model.train.tower", "all", "--train.learning_rate", "2e-3",
        "--train.tower_learning_rate", "1e-3", "--train.tower_layer_decay", "0.5"]  # fmt: skip


def test_all_that_trained_is_measured(world: Path, full: Path, tmp_path: Path) -> None:
    """Of a run as of the configuration that it starts from: tower and language model too, at the rates of training."""
    few = ["--batches", "2", "--batch-size", "2", "--no-tokens"]
    found = {}
    for name, subject in (("run", [str(full)]), ("config", [str(world / "config.yaml"), *FULL])):
        assert cli.main(["conflict", *subject, *few, "--out", str(tmp_path / name)]) == 0
        (found[name],) = json.loads((tmp_path / name / "conflict.json").read_text())["runs"]
    assert set(found["run"]["parts"]) == set(found["config"]["parts"]) > {"vision tower", "language model"}
    for part in ("vision tower", "language model"):
        assert found["run"]["parts"][part]["norm"][0] > 0
    options = argparse.Namespace(model_base=None, vision_tower=None, device="cpu", dtype="float32")
    subject = open_subject(full, [], options)
    optimizer = build_optimizer(dict(subject.parameters), subject.config.train)
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert subject.rates() == {name: rates[id(parameter)] for name, parameter in subject.parameters.items()}
    assert len(set(rates.values())) > 3
    assert found["run"]["interference"]["rates"] == sorted(set(rates.values()))


def test_checkpoints_of_another_base_are_left_out(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every checkpoint of a run that trains its language model has another base."""
    few = ["--samples", "3", "--permutations", "5", "--no-interventions", "--out", str(tmp_path / "routing")]
    assert cli.main(["routing", str(full), *few]) == 0
    assert "checkpoint-1 is left out: its language model or vision tower" in capsys.readouterr().err
    assert json.loads((tmp_path / "routing" / "routing.json").read_text())["drift"] == []
    assert cli.main(["routing", str(full), *few, "--against", str(full / "checkpoint-1")]) == 2
    assert "was trained on another base" in capsys.readouterr().err


def test_optimizer_state_in_pieces_is_not_taken_for_none(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    out = ["--train.output_dir", str(run), "--train.max_steps", "1", "--train.checkpoint_files", "sharded"]
    train(parse_run_config([str(world / "config.yaml"), *out]))
    command = ["conflict", str(run), "--batches", "2", "--batch-size", "2", "--no-tokens", "--out", str(tmp_path / "c")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "holds the optimizer's state in pieces" in said
    assert cli.main([*command, "--no-interference"]) == 0
    advised = re.search(r"result of `llava-mole (.*? --out) DIR`", said)
    assert advised
    assert cli.main([*shlex.split(advised[1]), str(tmp_path / "whole")]) == 0
    assert cli.main(["conflict", str(tmp_path / "whole"), *command[2:]]) == 0
    (measured,) = json.loads((tmp_path / "c" / "conflict.json").read_text())["runs"]
    assert measured["interference"]["step"] == "AdamW with the run's second moments"


def test_other_data_are_measured_whole(world: Path, tmp_path: Path) -> None:
    """What the run held out of its own data says nothing of a test set."""
    run, few = tmp_path / "run", ["--batches", "2", "--batch-size", "6", "--no-tokens", "--no-interference"]
    held_out = ["--data.validation_samples", "3", "--train.validate_every", "1"]
    train(parse_run_config([str(world / "config.yaml"), "--train.output_dir", str(run), "--train.max_steps", "1",
                            *held_out]))  # fmt: skip
    others = [f"--data.sources.{name}.annotations={world / name / name}.json" for name in ("blue", "red")]
    flags = [part for text in others for part in text.split("=")]
    for name, more, origin in (("given", flags, "data given"), ("own", ["--data.image_draft", "true"], "held out")):
        smaller = few if name == "given" else [*few, "--batch-size", "1"]
        assert cli.main(["conflict", str(run), *smaller, "--out", str(tmp_path / name), *more]) == 0
        (measured,) = json.loads((tmp_path / name / "conflict.json").read_text())["runs"]
        assert measured["samples_from"] == origin


def test_routing_of_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(runs)
    arguments = ["routing", str(runs / "mole"), "--samples", "4", "--permutations", "10", "--by-layer"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert digests(runs) == before
    printed = capsys.readouterr().out
    for text in ("drift from mole/checkpoint-2", "force 1", "swap 0 and 1", "ablate 0", "mutual information"):
        assert text in printed
    data = json.loads((tmp_path / "routing.json").read_text())
    assert [drift["name"] for drift in data["drift"]] == ["mole/checkpoint-2"]
    assert 0 <= data["drift"][0]["changed_in_all"] <= 1
    assert data["drift"][0]["kl"][0] > 0
    assert len(data["interventions"]["by layer"]) == 2
    for name in ("load", "information", "similarity", "drift", "interventions"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_checkpoint_does_not_drift_from_itself(runs: Path, tmp_path: Path) -> None:
    checkpoint = str(runs / "mole" / "checkpoint-2")
    arguments = ["routing", checkpoint, "--samples", "3", "--permutations", "5", "--no-interventions"]
    assert cli.main([*arguments, "--against", checkpoint, "--out", str(tmp_path)]) == 0
    (drift,) = json.loads((tmp_path / "routing.json").read_text())["drift"]
    assert drift["changed_in_all"] == 0
    assert drift["kl"] == [0, 0]


def test_conflicts_along_training_are_drawn(runs: Path, tmp_path: Path) -> None:
    assert tmp_path / "conflict.png" in draw_run(runs / "mole", tmp_path)
    assert tmp_path / "conflict.png" not in draw_run(runs / "lora", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conflict", "{runs}/mole", "--batches", "0"], "--batches is 0; it must be at least 1"),
        (["conflict", "{runs}/mole", "--batches", "99"], "has 12 samples to measure on, and 1,584 of each"),
        (["conflict", "{runs}/mole", "--from", "held-out"], "no samples are held out of this run"),
        (["conflict", "{runs}/mole", "--adapter.rank", "4"], "--adapter.rank cannot change a model that is trained"),
        (["conflict", "{runs}/mole", "--data.validation_samples", "2"], "what it did not hold out it has trained on"),
        (["conflict", "{runs}/mole", "--rate-factor", "0"], "--rate-factor is 0.0"),
        (["conflict", "{runs}/none"], "does not exist; give a run directory"),
        (["conflict", "{runs}/mole", "--data.sources.blue.annotations", "nothing.json"], "nothing.json"),
        (["routing", "{runs}/lora"], "has adapter.method 'lora'"),
        (["routing", "{runs}/mole", "--samples", "0"], "--samples is 0"),
        (["routing", "{runs}/mole", "--samples", "3", "--against", "{runs}/lora"], "has another adapter"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert cli.main([text.format(runs=runs) for text in arguments] + ["--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_every_command_and_option_of_the_page_exists() -> None:
    parsers = {"conflict": conflict_parser(), "routing": routing_parser()}
    for command in COMMANDS:
        assert command[0] == "llava-mole"
        if command[1] in parsers:
            _, rest = parsers[command[1]].parse_known_args(command[2:])
            assert all(text.startswith("--data.") or not text.startswith("--") for text in rest), command
    known = "".join(parser.format_help() for parser in parsers.values())
    for option in set(re.findall(r"`(--[a-z][\w.-]+)", PAGE)):
        assert option in known or option.startswith(("--data.", "--train.")), option
