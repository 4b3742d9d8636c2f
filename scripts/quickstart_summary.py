"""The end of quickstart.sh: a table and a sentence from its report, `python scripts/quickstart_summary.py DIR`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_mole.common.files import read_json
from llava_mole.common.text import format_table

BASELINE, OURS, ALONE = "LLaVA-Mix", "LLaVA-MoLE", "LLaVA-Doc"
DOMAIN = "document"
"""The domain that `ALONE` was trained on."""
SEEDS = Path(__file__).parents[1] / "docs" / "images" / "conflict-seeds.json"
"""Results of `llava-mole study configs/studies/conflict.yaml`: the same runs, in one process each, with five seeds."""
ARMS = {ALONE: "single-document", BASELINE: "mix", OURS: "by-source"}


def table(entry: dict[str, Any]) -> str:
    """Accuracy in percent of every run, by domain and on average."""
    rows = [("", *entry["groups"], "mean")]
    for name, run in entry["runs"].items():
        values = [run["numbers"][column]["value"] for column in (*entry["groups"], entry["primary"])]
        rows.append((name, *(f"{value:.1f}" for value in values)))
    return format_table(rows)


def spread(study: dict[str, Any], domains: Iterable[str]) -> str:
    """Mean over seeds and 95% interval of the same runs in the study; a domain that an arm did not answer is empty."""
    rows = [("mean of the study's seeds", *domains)]
    for name, arm in ARMS.items():
        numbers = study["arms"][arm]["numbers"]
        shown = [numbers.get(domain) for domain in domains]
        rows.append((name, *(f"{n['mean']:.1f} ± {n['half_interval']:.1f}" if n else "" for n in shown)))
    return format_table(rows)


def sentence(entry: dict[str, Any]) -> str:
    """What the table shows: does mixing cost accuracy, and is the mixture of experts better than one adapter."""
    mixed = _difference(entry, BASELINE, ALONE, DOMAIN)
    experts = _difference(entry, OURS, BASELINE, entry["primary"])
    total = entry["runs"][OURS]["total"]
    return (
        f"On {total:,} test questions about facts that the domains answer differently: with the other domains mixed "
        f"in, plain LoRA ({BASELINE}) is {mixed} on documents than trained on documents alone ({ALONE}); "
        f"the mixture of LoRA experts ({OURS}) is {experts} than plain LoRA ({BASELINE}) on average."
    )


def _difference(entry: dict[str, Any], one: str, other: str, number: str) -> str:
    """How much better or worse `one` is than `other`, by the report's paired test of these questions."""
    row = next(
        row for row in entry["comparisons"] if {row["first"], row["second"]} == {one, other} and row["number"] == number
    )
    sign = 1 if row["second"] == one else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    verdict = "better" if low > 0 else "worse" if high < 0 else "neither better nor worse"
    return f"{verdict} ({sign * row['difference']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f})"


def main() -> None:
    folder = Path(sys.argv[1])
    (entry,) = read_json(folder / "report.json")["benchmarks"].values()
    print(f"{table(entry)}\n\n{sentence(entry)}\n\n{spread(read_json(SEEDS), list(entry['groups']))}\n")
    print(f"picture: {folder / 'benchmarks.png'}")
    print(f"details, with all intervals and tests: {folder / 'report.txt'}")


if __name__ == "__main__":
    main()
