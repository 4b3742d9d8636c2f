"""Every benchmark runs in its quick form and writes rows whose ratios have a baseline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "mole_layer": ["--repeats", "1"],
    "mole_memory": ["--dropout", "0"],
    "mole_decode": ["--repeats", "1", "--tokens", "1"],
    "batching": ["--steps", "2"],
    "train_step": ["--repeats", "1"],
    "eval_speed": ["--new-tokens", "4"],
    "data_scale": ["--records", "20000", "--repeats", "1"],
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", COMMANDS)
def test_quick_form(name: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench" / f"{name}.py"), "--quick", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--threads", "1", "--json", str(out), *COMMANDS[name]],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert rows
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert all({"cpu", "torch", "threads"} <= row.keys() for row in rows)
    ratios = {key for row in rows for key in row if key.startswith(("ratio_to_", "speed_ratio_to_"))}
    assert ratios
    assert all(row.get(key, 1.0) > 0 for row in rows for key in ratios)
    assert "cpu " in done.stdout
