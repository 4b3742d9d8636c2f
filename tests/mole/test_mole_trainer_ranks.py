"""transformers' Trainer on two ranks (DistributedDataParallel on gloo) equals a loop by hand over all batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from worlds.processes import fork_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("trainer_worker.py")
    done = fork_python(worker, folder / "results.json", folder / "out", ranks=2, timeout_s=300, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", ["paper", "accumulated", "global load", "recomputed", "label smoothing"])
def test_two_ranks_equal_one_process(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[case]
    assert found["difference"] < 1e-6
    assert found["moved"] > 1e-3
    assert found["ranks agree"]


def test_bfloat16_autocast_on_two_ranks(results: dict[str, dict[str, Any]]) -> None:
    found = results["bfloat16"]
    assert found["difference"] < 0.05
    assert found["moved"] > 1e-3
    assert found["ranks agree"]
