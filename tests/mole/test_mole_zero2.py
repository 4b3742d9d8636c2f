"""Two ZeRO-2 ranks that use different experts, or different modalities, get the gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("zero2") / "results.json"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    worker = Path(__file__).with_name("zero2_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(worker), str(out)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
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
