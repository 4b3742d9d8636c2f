"""`llava-mole plot`: pictures from metrics that are long, short, repeated after a resume, or not there."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mole import cli
from llava_mole.common.errors import DataError
from llava_mole.train.plot import layer_loads, named_series, names_in, read_entries, smooth

ALWAYS = {"loss.png", "source_loss.png", "optimization.png", "throughput.png"}


def entry(step: int, experts: int = 3, layers: int = 4, loss: float | None = None) -> dict:
    share = [1 / experts] * experts if experts else []
    found = {
        "step": step,
        "loss": 3 / step if loss is None else loss,
        "learning_rate": {"adapter": 1e-3, "router": 1e-3},
        "grad_norm": 1.0,
        "grad_norm_by_part": {"projector": 0.6, "router": 0.0},
        "source_loss": {"a": 1.0} if step % 2 else {"b": 2.0},
        "tokens": 100,
        "tokens_per_s": 50.0,
        "step_s": 2.0,
        "data_wait_s": 0.1,
    }
    if experts:
        found |= {
            "auxiliary_loss": 0.01,
            "expert_load": share,
            "expert_load_by_source": {"a": share},
            "expert_load_by_layer": [share] * layers,
        }
    return found


def write(run: Path, entries: list[dict]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return run


@pytest.mark.parametrize(("steps", "experts"), [(1, 3), (2, 0), (40, 3), (40, 8)])
def test_pictures_of_runs_of_any_length(
    tmp_path: Path, steps: int, experts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", [entry(n, experts) for n in range(1, steps + 1)])
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "out")]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {p.name for p in printed} == ALWAYS | ({"expert_load.png"} if experts else set())
    for path in printed:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 400
            colors = image.convert("RGB").getcolors(1 << 20)
            assert colors is not None
            assert len(colors) > 20, f"{path} is blank"


def test_pictures_lie_in_the_run_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", [entry(1), entry(2, loss=math.nan)])
    assert cli.main(["plot", str(run)]) == 0
    assert str(run / "plots" / "loss.png") in capsys.readouterr().out


def test_a_repeated_step_counts_once_the_later_one(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [entry(1), entry(2), entry(3, loss=9.0), entry(3, loss=1.0), entry(4)])
    assert [(e["step"], e["loss"]) for e in read_entries(run)][2] == (3, 1.0)
    assert [e["step"] for e in read_entries(run)] == [1, 2, 3, 4]


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty", [])
    for run, message in ((tmp_path / "nowhere", "no metrics.jsonl there"), (empty, "no step is recorded yet")):
        assert cli.main(["plot", str(run)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "lo')  # cut short by a crash
    with pytest.raises(DataError, match="no step is recorded yet"):
        read_entries(empty)


def test_series_leave_out_what_is_absent_or_not_finite() -> None:
    entries = [entry(1), entry(2), entry(3)]
    entries[2]["source_loss"]["a"] = math.inf
    steps, values = named_series(entries, "source_loss", "a")
    assert (steps.tolist(), values.tolist()) == ([1.0], [1.0])
    assert names_in(entries, "source_loss") == ["a", "b"]


def test_smoothing_keeps_constants_and_starts_unbiased() -> None:
    assert smooth(np.full(5, 7.0), 4).tolist() == pytest.approx([7.0] * 5)
    values = np.array([1.0, 0.0, 0.0])
    assert smooth(values, 1).tolist() == [1, 0, 0]
    # keep = 1 - 2 / (3 + 1) = 0.5: weights 1, then 0.5 : 1, then 0.25 : 0.5 : 1
    assert smooth(values, 3).tolist() == pytest.approx([1, 0.5 / 1.5, 0.25 / 1.75])


def test_long_runs_are_thinned_by_averaging() -> None:
    entries = [entry(n) for n in range(1, 101)]
    entries[0]["expert_load_by_layer"] = [[1.0, 0.0, 0.0]] * 4
    steps, loads = layer_loads(entries, columns=50)
    assert (len(steps), loads.shape) == (50, (50, 4, 3))
    assert steps[0] == 1.5
    assert loads[0, 0].tolist() == pytest.approx([(1 + 1 / 3) / 2, 1 / 6, 1 / 6])
