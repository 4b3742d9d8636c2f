"""`python -m scripts.conflict.report`: tables, phase diagram and data of all finished jobs of one world.

It reads every result below `--out`, takes the world with the most jobs unless `--world` names one, and writes
`conflict.json` and `conflict.png` into `--to`.
"""

import argparse
import functools
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import DataError, command
from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy
from llava_mole.common.files import read_json, write_json
from llava_mole.common.text import HELP_WIDTH
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantiles of Student's t by number of seeds."""
SMALLEST_GAP = 3.0
"""Points between oracle and Mix, in any seed, below which a share of the way says nothing."""

Scores = dict[str, dict[int, float]]
"""Arm -> seed -> mean accuracy of the domains; singles are one arm, `single`, each on its own domain."""


def read_jobs(out: Path, world: str | None, seeds: Sequence[int] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """The digest of a world and its finished jobs of the commonest recipe, of these `seeds` or of all.

    Raises:
        DataError: there are none.
    """
    found = [read_json(path) for path in sorted((out / "jobs").glob("*.json"))]
    found = [job for job in found if seeds is None or job["settings"]["seed"] in seeds]
    worlds = Counter(job["settings"]["world"] for job in found)
    if not worlds or (world is not None and world not in worlds):
        wanted = f"{f' of world {world}' if world else ''}{f' with the seeds {list(seeds)}' if seeds else ''}"
        raise DataError(f"{out}: no finished jobs{wanted}; there are {dict(worlds)}")
    chosen = world or worlds.most_common(1)[0][0]
    found = [job for job in found if job["settings"]["world"] == chosen]
    recipes = Counter(str(job["settings"]["recipe"]) for job in found)
    recipe = recipes.most_common(1)[0][0]
    return chosen, [job for job in found if str(job["settings"]["recipe"]) == recipe]


def cell_name(cell: dict[str, Any]) -> str:
    """A cell in words."""
    own = ", own" if cell["agreed"] == "own" else ""
    return f"c {cell['convention']:g}, n {cell['load']}, r {cell['rank']}{own}"


def by_cell(jobs: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Scores]]:
    """Name of a cell -> the cell and its scores, ordered by rank, load and convention."""
    cells: dict[str, tuple[dict[str, Any], Scores]] = {}
    for job in jobs:
        cell, seed = job["settings"]["cell"], job["settings"]["seed"]
        _, scores = cells.setdefault(cell_name(cell), (cell, defaultdict(dict)))
        for way in {name.partition(" @ ")[1:] for name in job["arms"] if name.startswith("single ")}:
            singles = {d: arm[d] for d in DOMAINS if (arm := job["arms"].get("".join((f"single {d}", *way))))}
            if len(singles) == len(DOMAINS):
                scores["".join(("single", *way))][seed] = statistics.mean(singles.values())
        for name, arm in job["arms"].items():
            if not name.startswith("single "):
                scores[name][seed] = statistics.mean(arm[d] for d in DOMAINS)
    order = sorted(
        cells.items(), key=lambda item: tuple(item[1][0][k] for k in ("rank", "load", "convention", "agreed"))
    )
    return dict(order)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of the 95% interval of Student's t; None for a single value."""
    if len(values) < 2:
        return statistics.mean(values), None
    quantile = STUDENT.get(len(values), 1.96)
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def difference(scores: Scores, left: str, right: str) -> list[float]:
    """`left` - `right` on the seeds that both have."""
    return [scores[left][seed] - scores[right][seed] for seed in sorted(scores[left]) if seed in scores[right]]


def share(scores: Scores, arm: str) -> list[float]:
    """Share of the way from Mix to oracle, by seed; empty where the gap is too small to say."""
    gaps = difference(scores, "oracle", "mix")
    if not gaps or min(gaps) < SMALLEST_GAP:
        return []
    seeds = [s for s in sorted(scores[arm]) if s in scores["mix"] and s in scores["oracle"]]
    return [(scores[arm][s] - scores["mix"][s]) / (scores["oracle"][s] - scores["mix"][s]) for s in seeds]


def show(values: Sequence[float], digits: int = 1) -> str:
    """`mean +- half width`, or a dash."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def tables(cells: dict[str, tuple[dict[str, Any], Scores]]) -> str:
    """Markdown: accuracy of every arm of several cells, then conflict, healing and share by cell."""
    counted = Counter(arm for _, scores in cells.values() for arm in scores)
    arms = [arm for arm, count in counted.items() if count > 1 or len(cells) == 1]
    moles = [arm for arm in arms if arm not in ("single", "mix", "mix, rank K r", "oracle", "random")]
    lines = ["| cell | seeds | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    for name, (_, scores) in cells.items():
        seeds = max(len(found) for found in scores.values())
        row = [f"{statistics.mean(scores[a].values()):.1f}" if scores.get(a) else "-" for a in arms]
        lines.append(f"| {name} | {seeds} | " + " | ".join(row) + " |")
    lines += ["", "| cell | conflict: single - Mix | oracle - Mix | " + " | ".join(f"{m} - Mix" for m in moles) + " |"]
    lines.append("|---" * (len(moles) + 3) + "|")
    for name, (_, scores) in cells.items():
        row = [
            show(difference(scores, left, "mix")) if scores.get(left) else "-" for left in ("single", "oracle", *moles)
        ]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "| cell | " + " | ".join(f"{m} - rank K r" for m in moles) + " |", "|---" * (len(moles) + 1) + "|"]
    for name, (_, scores) in cells.items():
        row = [show(difference(scores, m, "mix, rank K r")) if scores.get(m) else "-" for m in moles]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "| cell | " + " | ".join(f"share: {m}" for m in moles) + " |", "|---" * (len(moles) + 1) + "|"]
    for name, (_, scores) in cells.items():
        row = [show(share(scores, m), 2) if scores.get(m) else "-" for m in moles]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def router_table(cells: dict[str, tuple[dict[str, Any], Scores]], name: str) -> str:
    """Markdown: all arms of the cell `name`, best first."""
    scores: Scores = defaultdict(dict, {arm: found for arm, found in cells[name][1].items() if found})
    columns = ("accuracy", "- Mix", "- rank K r", "share of the way from Mix to oracle")
    lines = [f"{name}:", "", "| arm | " + " | ".join(columns) + " |", "|---" * 5 + "|"]
    for arm in sorted(scores, key=lambda arm: -statistics.mean(scores[arm].values())):
        differences = [
            show(difference(scores, arm, other)) if scores.get(other) else "-" for other in ("mix", "mix, rank K r")
        ]
        part = "-" if arm in ("single", "mix", "oracle") else show(share(scores, arm), 2)
        lines.append(f"| {arm} | {' | '.join([show(list(scores[arm].values())), *differences, part])} |")
    return "\n".join(lines)


def draw(cells: dict[str, tuple[dict[str, Any], Scores]], healers: Sequence[str], path: Path) -> Path:
    """The phase diagram: a row of panels for each rank; conflict, and healing by each method, over c and load."""
    grid = [(cell, scores) for cell, scores in cells.values() if cell["agreed"] == "common"]
    ranks, loads, conventions = (sorted({cell[key] for cell, _ in grid}) for key in ("rank", "load", "convention"))
    panels = [("conflict: single - Mix", "single", "mix"), *((f"{h} - Mix", h, "mix") for h in healers)]
    panels += [(f"{h} - rank K r", h, "mix, rank K r") for h in healers if h.startswith("image")]
    figure = new_figure(2.6 * len(panels) + 0.8, 2.4 * len(ranks) + 0.6)
    axes = figure.subplots(len(ranks), len(panels), squeeze=False)
    found = {(c["rank"], c["load"], c["convention"]): s for c, s in grid}
    image = None
    for line, rank in enumerate(ranks):
        for column, (title, left, right) in enumerate(panels):
            ax = axes[line][column]
            values = [[_mean(found.get((rank, n, c)), left, right) for c in conventions] for n in loads]
            image = ax.imshow(values, cmap="RdBu_r", vmin=-30, vmax=30, origin="lower", aspect="auto")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    text = "not run" if value != value else f"{value:+.1f}"
                    ax.text(
                        x,
                        y,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="black" if abs(value) < 20 or value != value else "white",
                    )
            ax.set_xticks(range(len(conventions)), [f"{c:g}" for c in conventions])
            ax.set_yticks(range(len(loads)), [str(n) for n in loads])
            ax.set_xlabel("convention c" if line == len(ranks) - 1 else "")
            ax.set_ylabel(f"rank {rank}\nload n" if column == 0 else "")
            if line == 0:
                ax.set_title(title, fontsize=9, fontweight="bold")
    figure.colorbar(image, ax=axes, shrink=0.8, label="points of accuracy")
    return save_figure(figure, path)


def _mean(scores: Scores | None, left: str, right: str) -> float:
    values = difference(scores, left, right) if scores and scores.get(left) and scores.get(right) else []
    return statistics.mean(values) if values else float("nan")


def draw_meters(jobs: Sequence[dict[str, Any]], cell: str, arms: Sequence[str], path: Path) -> Path:
    """What the routers of `arms` learn along training in one cell: mean over layers and seeds of each meter."""
    keys = (
        ("information_image", "information about the source, image"),
        ("information_last", "the same, answering position"),
        ("load", "share of the busiest expert"),
        ("margin", "margin of the two best"),
    )
    figure = new_figure(3.2 * len(keys), 3.4)
    lines: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        if cell_name(job["settings"]["cell"]) == cell:
            for name, arm in job["arms"].items():
                for meter in arm.get("meters", []):
                    lines[name][meter["step"]].append(meter)
    for place, (key, title) in enumerate(keys):
        ax = figure.add_subplot(1, len(keys), place + 1)
        for number, name in enumerate(name for name in arms if name in lines):
            steps = lines[name]
            means = [statistics.mean(statistics.mean(m[key]) for m in steps[s]) for s in sorted(steps)]
            ax.plot(sorted(steps), means, color=COLORS[number % len(COLORS)], label=name)
        tidy(ax, title, "step")
        ax.title.set_fontsize(9)
        if place == len(keys) - 1:
            ax.legend(fontsize=6)
    return save_figure(figure, path)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.conflict.report",
        formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH),
        description=__doc__,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/conflict"), help="folder of results (%(default)s)")
    parser.add_argument(
        "--to", type=Path, default=Path("docs/images"), help="folder for figures and data (%(default)s)"
    )
    parser.add_argument("--world", help="digest of the world; default: the one with the most jobs")
    parser.add_argument(
        "--cell",
        help="the cell in which routers are compared, e.g. 'c 1, n 64, r 1'; default: the one with the most arms",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="read the jobs of these seeds only; default: of all")
    parser.add_argument(
        "--healers", nargs="+", default=["paper", "image", "image, source", "oracle"], help="methods in the diagram"
    )
    parser.add_argument(
        "--routers",
        nargs="+",
        default=["paper", "coupled", "lead", "image", "source", "image, source", "paper, source"],
        help="arms in the figure of routers",
    )
    given = parser.parse_args(arguments)
    world, jobs = read_jobs(given.out, given.world, given.seeds)
    cells = by_cell(jobs)
    if given.cell is not None and given.cell not in cells:
        raise DataError(f"--cell {given.cell!r}: not among the finished cells: {'; '.join(cells)}")
    compared = given.cell or max(cells, key=lambda name: len(cells[name][1]))
    print(f"world {world}, {len(jobs)} jobs\n\n{tables(cells)}\n\n{router_table(cells, compared)}")
    healers = [h for h in given.healers if any(scores.get(h) for _, scores in cells.values())]
    given.to.mkdir(parents=True, exist_ok=True)
    if healers:
        print(f"\n{draw(cells, healers, given.to / 'conflict.png')}")
    print(draw_meters(jobs, compared, given.routers, given.to / "conflict-routers.png"))
    data = [{"cell": cell, "scores": {a: s for a, s in scores.items()}} for cell, scores in cells.values()]
    meta = {"world": world, "recipe": jobs[0]["settings"]["recipe"], "versions": jobs[0]["versions"]}
    write_json(
        given.to / "conflict.json",
        {**meta, "unit": "mean validation accuracy of the three domains in %, by seed", "cells": data},
        indent=1,
    )
    print(given.to / "conflict.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
