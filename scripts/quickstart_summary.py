"""The end of quickstart.sh: a table and a sentence from its report, `python scripts/quickstart_summary.py DIR`."""

import sys
from pathlib import Path
from typing import Any

from llava_mole.common.files import read_json
from llava_mole.common.text import format_table

BASELINE, OURS, BEFORE, ALONE = "LLaVA-Mix", "LLaVA-MoLE", "stage1", "LLaVA-Doc"
DOMAIN = "document"
"""The domain that `ALONE` was trained on."""


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
    """What the table shows: does mixing cost accuracy, and is the mixture of experts better than one adapter."""
    mixed = _difference(entry, BASELINE, ALONE, DOMAIN)
    experts = _difference(entry, OURS, BASELINE, entry["primary"])
    total = entry["runs"][OURS]["total"]
    return (
        f"On {total:,} test questions: with the other domains mixed in, plain LoRA ({BASELINE}) is {mixed} "
        f"on documents than trained on documents alone ({ALONE}); the mixture of LoRA experts "
        f"({OURS}) is {experts} than plain LoRA ({BASELINE}) on average."
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
    print(f"{table(entry)}\n\n{sentence(entry)}\n\npicture: {folder / 'benchmarks.png'}")
    print(f"details, with all intervals and tests: {folder / 'report.txt'}")


if __name__ == "__main__":
    main()
