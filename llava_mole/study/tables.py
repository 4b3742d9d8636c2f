"""The tables of a study's report: the numbers beside the paper's, the tests, the costs, and the cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_mole.common.text import format_bytes, format_seconds
from llava_mole.eval.report.compare import SIGNIFICANT
from llava_mole.eval.report.formats import NOTHING, Row, Table, format_p
from llava_mole.study.cells import Plan
from llava_mole.study.definition import PublishedRow, Study
from llava_mole.study.results import Results
from llava_mole.study.runner import state_of


def main_table(results: Results) -> Table:
    """The layout of the paper's Tables 2 to 5: what was trained, what was measured, and the paper's row beside it."""
    study = results.study
    places: list[tuple[str, str | None]] = [(arm, study.arms[arm].paper) for arm in study.arms]
    taken = [reference for _, reference in places if reference is not None]
    shown = study.published.shown
    if shown is not None:  # every row of that table, in its order; then the arms that it does not have
        order = [f"{shown}.{row}" for row in study.published.tables[shown].rows]
        rest = [(arm, reference) for arm, reference in places if reference not in order]
        by_row = [[place for place in places if place[1] == reference] or [("", reference)] for reference in order]
        places = [*(place for row in by_row for place in row), *rest]
    published = {reference: study.published.row(reference) for _, reference in places if reference is not None}
    paper_columns = [c for c in study.published.columns if any(r and c in r.values for r in published.values())]
    rows = []
    for arm, reference in places:
        row = published.get(reference or "")
        measured = [results.estimate(arm, column) if arm else None for column in results.columns]
        seeds = f"{len(results.runs[arm])} of {len(study.seeds[arm])}" if arm else NOTHING
        rows.append(
            [
                (reference or "").partition(".")[2] or NOTHING,
                study.label(arm) if arm else (row.model if row else ""),
                *_settings(study, arm, row),
                seeds,
                *(NOTHING if value is None else value.text for value in measured),
                *(_number(row.values.get(column) if row else None) for column in paper_columns),
            ]
        )
    settings = _setting_names(study)
    header = ["#", "model", *settings, "seeds", *results.columns, *paper_columns]
    spans = [("", 3 + len(settings)), (f"measured ({study.base.name})", len(results.columns))]
    spans += [("paper", len(paper_columns))] if paper_columns else []
    remarks = ["measured: percent, mean over seeds ± 95% interval (Student's t); without ± there is one seed"]
    if taken and paper_columns:
        remarks.append(f"paper: {study.published.source}; its benchmarks and its model, one run each")
    remarks += [f"{study.split} questions", *study.notes, *results.plan.remarks]
    return Table(study.title, header, rows, spans, remarks=remarks)


def _setting_names(study: Study) -> Row:
    names = {"mixture": [f"λ {domain}" for domain in study.base.domains], "rank": ["rank"], "experts": ["experts"]}
    return [name for key in study.layout for name in names[key]]


def _settings(study: Study, arm: str, row: PublishedRow | None) -> Row:
    """The cells between a row's name and its numbers."""
    cells: Row = []
    for key in study.layout:
        if key == "mixture":
            values = list(study.lambdas(arm).values()) if arm else (row.mixture if row else None)
            cells += [f"{v:g}" for v in values] if values else [NOTHING] * len(study.base.domains)
        elif key == "rank":
            cells.append(_rank(study, arm) if arm else str(row.rank if row and row.rank else NOTHING))
        else:
            cells.append(_experts(study, arm) if arm else (row.experts if row and row.experts else NOTHING))
    return cells


def _rank(study: Study, arm: str) -> str:
    rank = study.arms[arm].rank
    if isinstance(rank, dict):
        return ", ".join(f"{kind.replace('_', ' ')} {study.label(other)}" for kind, other in rank.items())
    return str(rank)


def _experts(study: Study, arm: str) -> str:
    settings = study.arms[arm]
    if settings.method != "mole":
        return "no"
    count = sum(value > 0 for value in study.lambdas(arm).values())
    given = settings.options.get("experts_by_layer")
    experts = str(given) if given else {"domains": str(max(2, count))}.get(str(settings.experts), str(settings.experts))
    dense = settings.mode == "dense" or settings.options.get("mode") == "dense"
    return f"dense, {experts}" if dense else experts


def _number(value: object) -> str:
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float | int) else str(value)


def comparison_table(study: Study, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The paired differences, with both tests."""
    lines = []
    for row in rows:
        cells = [f"{study.label(row['second'])} - {study.label(row['first'])}", row["column"], str(len(row["seeds"]))]
        cells.append(f"{row['difference']:+.2f}")
        for kind in ("over_seeds", "over_questions"):
            cells += _test(row[kind])
        lines.append(cells)
    header = ["arms", "number", "seeds", "difference"] + ["95% interval", "p", "p (Holm)"] * 2
    spans = [("", 4), ("over seeds", 3), ("over questions", 3)]
    remarks = [
        "over seeds: paired t-test and Student's interval of the differences; it needs at least two seeds that differ",
        "over questions: the scores of every question averaged over the seeds; permutation test (one seed: McNemar's "
        "for right and wrong answers) and bootstrap interval",
        f"Holm: p adjusted for all tests of the same kind in this table, * < {SIGNIFICANT}",
    ]
    return Table("Paired differences in percentage points", header, lines, spans, remarks=remarks)


def _test(found: Mapping[str, Any]) -> Row:
    interval = NOTHING if found["low"] is None else f"[{found['low']:+.2f}, {found['high']:+.2f}]"
    if found["p_value"] is None:
        return [interval, NOTHING, NOTHING]
    adjusted = found["p_value_holm"]
    return [interval, format_p(found["p_value"]), format_p(adjusted) + (" *" if adjusted < SIGNIFICANT else "")]


def cost_table(results: Results) -> Table:
    """What the arms cost: parameters, steps, samples, tokens, time and memory, as means over seeds."""
    study, rows = results.study, list[Row]()
    for arm, runs in results.runs.items():
        if not runs:
            continue
        costs = [run.cost for run in runs.values()]
        trainable = costs[0]["trainable"] or {}
        adapter = sum(count for part, count in trainable.items() if part != "projector")
        mean = {key: float(np.mean([c[key] for c in costs])) for key in ("steps", "samples", "tokens", "seconds")}
        memory = [c["memory"] for c in costs if c["memory"]]
        config = next(iter(runs.values())).cell.config
        assert config is not None
        rows.append(
            [
                study.label(arm),
                NOTHING if config.adapter.method == "none" else str(config.adapter.rank),
                f"{adapter:,}" if trainable else NOTHING,
                f"{trainable.get('router', 0):,}" if trainable else NOTHING,
                f"{trainable.get('projector', 0):,}" if trainable else NOTHING,
                f"{mean['steps']:,.0f}",
                f"{mean['samples']:,.0f}",
                f"{mean['tokens']:,.0f}",
                format_seconds(mean["seconds"]),
                format_bytes(max(memory)) if memory else NOTHING,
                format_seconds(float(np.mean([c["evaluation_s"] for c in costs]))),
            ]
        )
    header = ["arm", "rank", "adapter", "of it router", "projector", "steps", "samples", "tokens"]
    header += ["training", "peak memory", "evaluation"]
    remarks = [
        "adapter, router, projector: trained parameters. training: seconds of the steps, without loading and saving",
        "peak memory: of the GPU, or of the process on a CPU. Times depend on the machine and on what else it did",
    ]
    return Table("Cost of a run, mean over seeds", header, rows, remarks=remarks)


def status_table(study: Study, plan: Plan) -> Table:
    """One row for each arm, with the state of the run and evaluations of every seed."""
    rows = []
    for arm in study.arms:
        for seed in study.seeds[arm]:
            run = plan.cells[plan.runs[arm, seed]]
            own = [run, *(plan.cells[name] for name in plan.evaluations[arm, seed].values())]
            states = [state_of(cell) for cell in own]
            detail = next((text for state, text in states if state in ("failed", "running")), "")
            done = sum(state == "done" for state, _ in states[1:])
            rows.append([arm, str(seed), states[0][0], f"{done} of {len(states) - 1}", detail or run.name])
    return Table(study.title, ["arm", "seed", "training", "evaluated", "cell"], rows)


def cell_table(results: Results) -> Table:
    """Which cell each arm and seed is."""
    rows = []
    for (arm, seed), name in results.plan.runs.items():
        evaluations = ", ".join(n.rpartition("/")[2] for n in results.plan.evaluations[arm, seed].values())
        state = "done" if seed in results.runs[arm] else "not finished"
        rows.append([arm, str(seed), name, evaluations, state])
    return Table("Cells", ["arm", "seed", "run", "evaluations", "state"], rows)
