"""`llava-mole conflict` and `routing` on runs, checkpoints and configurations; what they refuse; their page."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.analysis.conflict.cli import _parser as conflict_parser
from llava_mole.config import parse_run_config
from llava_mole.serve.overlay.cli import _parser as routing_parser
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
