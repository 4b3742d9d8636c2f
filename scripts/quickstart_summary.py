"""The end of quickstart.sh: a table and a sentence from its report, `python scripts/quickstart_summary.py DIR`."""

import sys
from pathlib import Path
from typing import Any

from llava_mole.common.files import read_json
from llava_mole.common.text import format_table

BASELINE, OURS, BEFORE = "LLaVA-Mix", "LLaVA-MoLE", "stage1"


def table(entry: dict[str, Any]) -> str:
    """Accuracy in percent of every run and of the commonest answers, by domain and on average."""
    domains = list(entry["groups"])
    majority = [entry["groups"][domain]["majority"]["value"] for domain in domains]
    rows = [("", *domains, "mean"), ("commonest answer", *_shown([*majority, sum(majority) / len(majority)]))]
    for name, run in entry["runs"].items():
        values = [run["numbers"][column]["value"] for column in (*domains, entry["primary"])]
        rows.append((name, *_shown(values)))
    return format_table(rows)


def _shown(values: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]


def sentence(entry: dict[str, Any]) -> str:
    """What the table shows, with the test of the difference between the two adapters."""
    primary = entry["primary"]
    value = {name: run["numbers"][primary]["value"] for name, run in entry["runs"].items()}
    row = next(
        row
        for row in entry["comparisons"]
        if {row["first"], row["second"]} == {BASELINE, OURS} and row["number"] == primary
    )
    sign = 1 if row["second"] == OURS else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    verdict = (
        f"is {'above' if low > 0 else 'below'} plain LoRA"
        if low > 0 or high < 0
        else "and plain LoRA are not told apart"
    )
    total = entry["runs"][OURS]["total"]
    return (
        f"On {total:,} test questions, stage 2 raises the mean accuracy from {value[BEFORE]:.1f}% to "
        f"{value[BASELINE]:.1f}% with plain LoRA ({BASELINE}) and to {value[OURS]:.1f}% with a mixture of LoRA experts "
        f"({OURS}); the mixture {verdict} by this run: {sign * row['difference']:+.1f} points, 95% interval {low:+.1f} "
        f"to {high:+.1f}."
    )


def main() -> None:
    folder = Path(sys.argv[1])
    (entry,) = read_json(folder / "report.json")["benchmarks"].values()
    print(f"{table(entry)}\n\n{sentence(entry)}\n\npicture: {folder / 'benchmarks.png'}")
    print(f"details, with all intervals and tests: {folder / 'report.txt'}")


if __name__ == "__main__":
    main()
