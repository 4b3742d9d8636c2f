"""Stands in for the commands of a study's cells: MODULE ARGUMENTS. It takes no time for imports.

A training has STEPS steps, saves each of them, stops at SIGTERM with exit code 75 and continues where it stopped.
Every start, step and end is a line in the file JOURNAL. FAIL names a part of a cell whose command fails.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

STEPS, STEP_S = int(os.environ.get("STEPS", "3")), float(os.environ.get("STEP_S", "0"))


def note(cell: str, event: str) -> None:
    with open(os.environ["JOURNAL"], "a", encoding="utf-8") as file:
        file.write(f"{cell} {event} {os.getpid()}\n")


def stop(number: int, frame: object) -> None:
    sys.exit(75)


def train(config: Path) -> None:
    run = Path(yaml.safe_load(config.read_text())["train"]["output_dir"])
    run.mkdir(exist_ok=True)
    done = int((run / "step").read_text()) if (run / "step").is_file() else 0
    note(config.parent.name, f"start {done}")
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        note(config.parent.name, f"gpus {os.environ['CUDA_VISIBLE_DEVICES']}")
    for step in range(done, STEPS):
        time.sleep(STEP_S)
        (run / "step").write_text(str(step + 1))
        note(config.parent.name, f"step {step + 1}")
    (run / "summary.json").write_text(json.dumps({"step": STEPS}))
    note(config.parent.name, "end")


def evaluate(arguments: list[str]) -> None:
    out, name = Path(arguments[arguments.index("--out") + 1]), Path(arguments[arguments.index("--benchmarks") + 1]).stem
    cell = f"{out.parent.parent.name}/{out.name}"
    note(cell, "start 0")
    time.sleep(STEP_S)
    (out / f"{name}.score.json").write_text("{}")
    note(cell, "end")


signal.signal(signal.SIGTERM, stop)
module, *rest = sys.argv[1:]
if os.environ.get("FAIL") and os.environ["FAIL"] in " ".join(rest):
    print("something\r went wrong", file=sys.stderr)
    sys.exit(3)
train(Path(rest[0])) if module.endswith("train") else evaluate(rest)
