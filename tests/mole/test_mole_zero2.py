"""Two ZeRO-2 ranks that use different experts, or different modalities, get the gradients of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
from worlds.processes import fork_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("zero2") / "results.json"
    done = fork_python(Path(__file__).with_name("zero2_worker.py"), out, ranks=2, timeout_s=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


CASES = [
    "disjoint",
    "disjoint_recompute",
    "token",
    "token_masked_recompute",
    "text_only_rank",
    "released_pooled",
    "global_batch",
    "dense",
]


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_one_process(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[case]
    assert found["difference"] < 1e-6
    assert found["largest"] > 1e-3
    assert found["missing"] == []


def test_the_ranks_really_used_disjoint_experts(results: dict[str, dict[str, Any]]) -> None:
    assert results["disjoint"]["used"] == [[0], [2]]


def test_the_load_of_a_step_counts_the_tokens_of_all_ranks(results: dict[str, dict[str, Any]]) -> None:
    loads = results["global_batch"]["loads"]
    assert len(loads) == 2
    assert all(sum(layer[0]) == 24 for layer in loads)
