"""What the options of the router are worth on the tiny world: accuracy on its test questions, by setting and seed.

Measured: each setting trains stage 2 of `configs/tiny/finetune_mole.yaml` from the same projector (stage 1 must have
run: `bash scripts/pretrain.sh configs/tiny/pretrain.yaml`) and answers the 2,390 test questions. Runs that are
finished are used again. Small models and few seeds: this ranks options, it proves nothing about 7B models.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import mole_common as common

ROOT = Path(__file__).parents[2]
CONFIG = "configs/tiny/finetune_mole.yaml"
DOMAINS = ("general", "document", "biomedicine")
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "straight_through": {"expert_scale": "straight_through"},
    "straight_through, switch": {"expert_scale": "straight_through", "balance_scale": "switch"},
    "straight_through, switch, global_batch": {
        "expert_scale": "straight_through",
        "balance_scale": "switch",
        "balance_group": "global_batch",
    },
    "prob_times_k, switch, global_batch": {
        "expert_scale": "prob_times_k",
        "balance_scale": "switch",
        "balance_group": "global_batch",
    },
    "global_batch": {"balance_group": "global_batch"},
    "shared expert of rank 8 (best)": {"shared_r": 8},
    "balance_coef 0.1": {"balance_coef": 0.1},
    "oracle (expert = source)": {"router": "oracle", "balance_coef": 0.0},
    "random": {"router": "random", "balance_coef": 0.0},
}


def run(arguments: list[str]) -> None:
    """Run one command from the repository's root; its error goes through."""
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train_and_score(name: str, seed: int, steps: int, data: Path, out: Path) -> dict[str, Any]:
    """One row: accuracy by domain, and the shares of the busiest and the idlest expert over the last 20 steps."""
    run_dir = out / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"
    if not (run_dir / "summary.json").exists():
        options = json.dumps(SETTINGS[name])
        run(
            [
                "llava_mole.train.train",
                CONFIG,
                "--train.output_dir",
                str(run_dir),
                "--train.max_steps",
                str(steps),
                "--train.seed",
                str(seed),
                "--adapter.preset",
                "paper",
                "--adapter.options",
                options,
                "--train.resume",
                "auto",
            ]
        )
    scores = run_dir / "eval" / "answers.score.json"
    if not scores.exists():
        questions = [f"{domain}={data / domain / 'test_questions.jsonl'}" for domain in DOMAINS]
        run(
            [
                "llava_mole.cli",
                "eval",
                str(run_dir),
                "--questions",
                *questions,
                "--image-folder",
                str(data),
                "--answers-file",
                str(run_dir / "eval" / "answers.jsonl"),
                "--conv-mode",
                "vicuna_v1",
                "--max-new-tokens",
                "16",
                "--batch-size",
                "128",
                "--overwrite",
            ]
        )
    numbers = json.loads(scores.read_text(encoding="utf-8"))["numbers"]
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loads = [share for entry in entries[-20:] for layer in entry["expert_load_by_layer"] for share in layer]
    row: dict[str, Any] = {"setting": name, "seed": seed, "steps": steps}
    row |= {domain: numbers[domain]["value"] for domain in DOMAINS}
    row["mean"] = sum(row[domain] for domain in DOMAINS) / len(DOMAINS)
    row["loss"] = sum(entry["loss"] for entry in entries[-20:]) / len(entries[-20:])
    return row | {"least_load": min(loads), "most_load": max(loads)}


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps of stage 2")
    parser.add_argument("--data", type=Path, default=Path("playground/data/tiny"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/ablation"))
    args = parser.parse_args()
    settings, seeds = (list(SETTINGS)[:1], args.seeds[:1]) if args.quick else (args.settings, args.seeds)
    steps = args.steps or (10 if args.quick else 300)
    rows = []
    for seed in seeds:
        for name in settings:
            rows.append(train_and_score(name, seed, steps, args.data, args.out / f"steps{steps}"))
            print(f"{name}, seed {seed}: mean accuracy {rows[-1]['mean']:.1f}", file=sys.stderr, flush=True)
    common.report("Options of the router on the tiny world, accuracy in % (measured)", rows)
    common.save(rows, args.json)


if __name__ == "__main__":
    main()
