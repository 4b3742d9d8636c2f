"""Full fine-tuning on two ranks beside one process: `finetune.sh` under every strategy, and a table of differences.

    python scripts/bench/sharded_equality.py [--steps N] [--config CONFIG] [--strategies NAME ...] [--json FILE]

CONFIG, by default the tiny world's, is trained with the same seed by one process and by two CPU ranks under each
strategy. The table has the largest differences of any step's loss and gradient norm, and of any element of the float32
masters and Adam's moments after the last step. Exit code 1 if one is above its limit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mole_common import report, save

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"loss": 1e-4, "grad_norm": 1e-3, "master": 1e-4, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}
"""Losses, masters and moments absolute, gradient norms relative: sums in another order, in float32."""


def train(config: str, run: Path, ranks: int, strategy: str, steps: int) -> float:
    """Run `finetune.sh`; returns the seconds. Ends the program if the run fails."""
    options = {"train.output_dir": str(run), "train.max_steps": str(steps), "train.distributed": strategy}
    options["projector_weights"] = "null"  # a random projector: nothing has to be trained before
    if strategy in ("zero2", "zero3"):
        options["train.deepspeed_config"] = f"scripts/{strategy}.json"
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "GPUS_PER_NODE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    command = ["bash", "scripts/finetune.sh", config, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def differences(run: Path, other: Path, steps: int) -> dict[str, float]:
    """Largest difference of two runs by kind, and how many numbers were compared."""
    from llava_mole.train.tracker import read_metrics
    from llava_mole.train.trainer_state import TrainerState

    pairs = list(zip(*(read_metrics(path / "metrics.jsonl") for path in (run, other)), strict=True))
    found = {
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "grad_norm": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
    }
    ours, theirs = (TrainerState(path / f"checkpoint-{steps}") for path in (run, other))
    if ours.shapes != theirs.shapes:
        raise SystemExit(f"{run.name} and {other.name} trained other parameters")
    for key in theirs:
        kind = key.partition("/")[0]
        found[kind] = max(found.get(kind, 0.0), float((ours[key] - theirs[key]).abs().max()))
    return found


def main() -> int:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--config", default="configs/tiny/finetune.yaml")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "one-process"
        seconds = train(options.config, single, 1, "ddp", options.steps)
        rows: list[dict[str, Any]] = [{"strategy": "one process", "ranks": 1, "seconds": seconds}]
        for strategy in options.strategies:
            run = Path(folder) / strategy
            seconds = train(options.config, run, 2, strategy, options.steps)
            found = differences(run, single, options.steps)
            equal = all(found[key] <= limit for key, limit in LIMITS.items())
            rows.append({"strategy": strategy, "ranks": 2, "seconds": seconds, **found, "equal": equal})
    report(f"{options.config}, {options.steps} steps: largest difference from one process (measured)", rows)
    save(rows, options.json)
    return int(not all(row.get("equal", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
