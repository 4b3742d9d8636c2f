"""Writes the report of a study: tables, tests, figures and data, and one page with all of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.figures import check_matplotlib
from llava_mole.common.files import read_json, write_errors, write_json, write_text
from llava_mole.common.log import get_logger
from llava_mole.eval.report.formats import Table, table_markdown, table_text
from llava_mole.eval.scoring.intervals import LEVEL, RESAMPLES, SEED
from llava_mole.study.cells import Cell
from llava_mole.study.figures import write_bars, write_shares
from llava_mole.study.page import html_page
from llava_mole.study.results import Results, compare_arms, progress
from llava_mole.study.runner import DONE, commands_of
from llava_mole.study.tables import cell_table, comparison_table, cost_table, main_table

logger = get_logger(__name__)

FORMAT = "llava-mole study report 1"
RESULTS = "results.json"


def write_report(results: Results, folder: Path, command: str) -> tuple[str, list[Path]]:
    """Write `index.html`, `report.md`, `results.json`, and Figures 1 and 3 with their data.

    Args:
        folder: A folder that is new, empty, or has an earlier report, which is replaced.
        command: What made the report.

    Returns:
        The tables as text, and the files.

    Raises:
        ConfigError: the folder has other files, or cannot be written.
    """
    check_folder(folder)
    earlier = set(read_json(folder / RESULTS).get("files", ())) if (folder / RESULTS).is_file() else set()
    study = results.study
    comparisons = compare_arms(results)
    tables = [
        ("Results", main_table(results)),
        ("Tests", comparison_table(study, comparisons)),
        ("Cost", cost_table(results)),
        ("Cells", cell_table(results)),
    ]
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    facts = [
        f"Base {study.base.name}, {study.split} questions; {progress(study, results.plan)}.",
        f"Made {time.strftime('%Y-%m-%d %H:%M')} by: {command}",
    ]
    if study.split == "validation" and (chosen := best_arm(results)):
        facts.append(chosen)
    files = _figures(results, folder)
    values = as_values(results, comparisons, command) | {"files": sorted(path.name for path in files)}
    write_json(folder / RESULTS, values)
    for name in earlier - set(values["files"]):  # of an arm that is gone, or that has nothing to show now
        (folder / Path(name).name).unlink(missing_ok=True)
    pictures = [(_heading(path), path) for path in files if path.suffix == ".png"]
    write_text(folder / "report.md", _markdown(study.title, facts, tables, pictures))
    commands = "\n".join(commands_of(list(results.plan.cells.values())))
    made = "\n".join(f"{key}: {value}" for key, value in values["versions"].items())
    folded = [("Commands of all cells", commands), ("Versions of the finished cells", made)]
    write_text(folder / "index.html", html_page(study.title, facts, tables, pictures, folded))
    written = [folder / name for name in ("index.html", "report.md", RESULTS)] + files
    shown = [table for heading, table in tables[:-1] if table.rows]
    return "\n\n".join([*map(table_text, shown), *facts]), written


def check_folder(folder: Path) -> None:
    """Raise ConfigError if the folder has files that no report wrote."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not (folder / RESULTS).is_file() or _format(folder / RESULTS) != FORMAT:
        raise ConfigError(f"{folder} exists and is not a study's report; give another --out, or move it away")


def _format(path: Path) -> Any:
    value = read_json(path)
    return value.get("format") if isinstance(value, dict) else None


def _figures(results: Results, folder: Path) -> list[Path]:
    try:
        check_matplotlib()
    except ConfigError as error:
        logger.warning("no figures: %s", error)
        return []
    return [*write_bars(results, folder), *write_shares(results, folder)]


def _heading(path: Path) -> str:
    name = path.stem
    return "Figure 1: by domain" if name == "figure1" else f"Figure 3: experts of {name.removeprefix('figure3-')}"


def best_arm(results: Results) -> str | None:
    """The arm with the highest mean over the domains, as a sentence; None before all arms are finished.

    A domain with several columns counts once, by the mean of its columns.
    """
    study, found = results.study, dict[str, float]()
    domains: dict[str, list[str]] = {}
    for column in results.columns:
        domains.setdefault(study.base.columns[column].domain, []).append(column)
    for arm in study.arms:
        means = {column: results.estimate(arm, column) for column in results.columns}
        if len(results.runs[arm]) < len(study.seeds[arm]) or None in means.values():
            return None
        by_domain = [sum(means[c].mean for c in own) / len(own) for own in domains.values()]  # type: ignore[union-attr, misc]
        found[arm] = sum(by_domain) / len(by_domain)
    best = max(found, key=lambda arm: found[arm])
    listed = ", ".join(f"{arm} {value:.2f}" for arm, value in sorted(found.items(), key=lambda item: -item[1]))
    unseen = [domain for domain in study.base.domains if domain not in domains]
    over = f"mean over {', '.join(domains)}; no questions of {', '.join(unseen)}" if unseen else "mean over domains"
    return f"Chosen by the validation split ({over}): {best}. All arms: {listed}."


def as_values(results: Results, comparisons: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """The report as plain values: what was compared, every value by seed, tests, costs, commands and versions."""
    study, plan = results.study, results.plan
    records = {}
    for runs in results.runs.values():
        for run in runs.values():
            records[run.cell.name] = read_json(run.cell.folder / DONE)
    arms = {}
    for arm in study.arms:
        estimates = {column: results.estimate(arm, column) for column in results.columns}
        arms[arm] = {
            "label": study.label(arm),
            "paper": study.arms[arm].paper,
            "mixture": study.lambdas(arm),
            "seeds": list(results.runs[arm]),
            "numbers": {
                column: {"mean": found.mean, "half_interval": found.half, "by_seed": results.values(arm, column)}
                for column, found in estimates.items()
                if found is not None
            },
            "cost": {seed: dict(run.cost) for seed, run in results.runs[arm].items()},
            "cells": {seed: plan.runs[arm, seed] for seed in study.seeds[arm]},
        }
    seen = {str(record["versions"]): record["versions"] for record in records.values()}
    return {
        "format": FORMAT,
        "study": study.name,
        "title": study.title,
        "base": study.base.name,
        "split": study.split,
        "settings": dict(study.settings),
        "command": command,
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": next(iter(seen.values()), {}) | ({"mixed": list(seen.values())} if len(seen) > 1 else {}),
        "statistics": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "columns": {name: vars(study.base.columns[name]) for name in results.columns},
        "arms": arms,
        "comparisons": list(comparisons),
        "cells": {cell.name: _cell_values(cell) for cell in plan.cells.values()},
    }


def _cell_values(cell: Cell) -> dict[str, Any]:
    """What identifies a cell and what its record says; the whole identity is in the cell's folder."""
    record = read_json(cell.folder / DONE) if (cell.folder / DONE).is_file() else {}
    kept = {key: record[key] for key in ("started", "seconds", "versions") if key in record}
    return {"digest": cell.digest, "needs": list(cell.needs), "command": list(cell.command), **kept}


def _markdown(
    title: str, facts: Sequence[str], tables: Sequence[tuple[str, Table]], pictures: Sequence[tuple[str, Path]]
) -> str:
    parts = [f"# {title}", *facts]
    for heading, table in tables[:-1]:
        if table.rows:
            parts += [f"## {heading}", table_markdown(table)]
    parts += [f"![{heading}]({path.name})" for heading, path in pictures]
    return "\n\n".join(parts) + "\n"
