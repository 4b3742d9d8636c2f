"""Every benchmark runs in its quick form and writes rows whose ratios have a baseline."""

import json
from pathlib import Path

import pytest
from worlds.processes import fork_python

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
    script = ROOT / "scripts" / "bench" / f"{name}.py"
    given = ["--quick", "--device", "cpu", "--threads", "1", "--json", out, *COMMANDS[name]]
    done = fork_python(script, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert rows
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert all({"cpu", "torch", "threads"} <= row.keys() for row in rows)
    ratios = {key for row in rows for key in row if key.startswith(("ratio_to_", "speed_ratio_to_"))}
    assert ratios
    assert all(row.get(key, 1.0) > 0 for row in rows for key in ratios)
    assert "cpu " in done.stdout
