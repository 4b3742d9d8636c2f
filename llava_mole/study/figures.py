"""The paper's Figure 1 (bars by domain) and Figure 3 (experts by layer and benchmark), as pictures and as data."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.figures import COLORS, legend_below, new_figure, save_figure, tidy
from llava_mole.common.files import write_json, write_text
from llava_mole.study.definition import Study
from llava_mole.study.results import Results, shares

MOST_LAYERS = 8
"""Figure 3 shows at most so many layers unless the base names them."""


def bars_data(results: Results) -> dict[str, Any]:
    """Column -> arm -> its label, mean, half interval and values by seed, and the paper's numbers beside them."""
    study = results.study
    measured = {}
    for column in results.columns:
        entries = {}
        for arm in study.figure1:
            found = results.estimate(arm, column)
            if found is not None:
                seeds = results.values(arm, column)
                entries[arm] = {"label": study.label(arm), "mean": found.mean, "half": found.half, "by_seed": seeds}
        measured[column] = entries
    paper: dict[str, Any] = {}
    for column in study.published.columns:
        for arm in study.figure1:
            row = study.published.row(study.arms[arm].paper or "")
            if row is not None and isinstance(row.values.get(column), float | int):
                paper.setdefault(column, {})[arm] = {"label": study.label(arm), "mean": row.values[column]}
    return {"domain": {name: study.base.columns[name].domain for name in results.columns}, "measured": measured,
            "paper": paper}  # fmt: skip


def draw_bars(study: Study, data: Mapping[str, Any], path: Path) -> None:
    """Draw the measured numbers with intervals and one dot for each seed, and the paper's numbers under them.

    Sums of percentages, which are above 100, have an axis of their own that starts near the values.
    """
    rows = [("measured", data["measured"])] + ([("paper", data["paper"])] if data["paper"] else [])
    arms = list(study.figure1)
    most = max(len(columns) for _, columns in rows)
    figure = new_figure(max(7.0, min(22.0, 0.9 + most * (0.35 + 0.17 * len(arms)))), 3.1 * len(rows) + 0.5)
    grid = figure.add_gridspec(len(rows), 1)
    styles: dict[str, dict[str, Any]] = {
        arm: {"facecolor": COLORS[n % len(COLORS)], "edgecolor": "white"} for n, arm in enumerate(arms)
    }
    for arm in arms[len(COLORS) :]:
        styles[arm]["hatch"] = "//"
    for place, (title, columns) in enumerate(rows):
        sums = [name for name, entries in columns.items() if any(e["mean"] > 100 for e in entries.values())]
        parts = [part for part in (sums, [name for name in columns if name not in sums]) if part]
        axes = (
            grid[place]
            .subgridspec(1, len(parts), width_ratios=[len(part) + 0.4 for part in parts])
            .subplots(squeeze=False)[0]
        )
        note = "mean over seeds, 95% interval; dots: seeds" if title == "measured" else "one run each"
        for axis, names in zip(axes, parts, strict=True):
            shown = f"{title} ({note})" if axis is axes[-1] else ""
            _draw_group(axis, {name: columns[name] for name in names}, styles, shown, cut=names is sums)
        axes[0].set_ylabel("%")
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(label=study.label(arm), **style) for arm, style in styles.items()]
    legend_below(figure, handles, columns=5)
    save_figure(figure, path)


def _draw_group(axis: Any, columns: Mapping[str, Any], styles: Mapping[str, Any], title: str, *, cut: bool) -> None:
    """Draw some columns on one axis, which starts near the values if it is `cut`, and else ends at 100 at most."""
    width, seen = 0.82 / len(styles), list[float]()
    for place, entries in enumerate(columns.values()):
        for n, (arm, style) in enumerate(styles.items()):
            if arm not in entries:
                continue
            entry, x = entries[arm], place + (n - (len(styles) - 1) / 2) * width
            axis.bar(x, entry["mean"], width * 0.9, linewidth=0.4, **style)
            if entry.get("half") is not None:
                axis.errorbar(x, entry["mean"], entry["half"], color="black", linewidth=0.9, capsize=2)
            values = list(entry.get("by_seed", {}).values())
            axis.plot([x] * len(values), values, ".", color="black", markersize=2.5, alpha=0.6)
            seen += [entry["mean"], *values]
    tidy(axis, title, x="axis cut" if cut else "")
    axis.set_xticks(range(len(columns)), list(columns))
    axis.set_xlim(-0.5, len(columns) - 0.5)
    if cut:
        margin = max(5.0, max(seen) - min(seen))
        axis.set_ylim(max(0.0, min(seen) - margin), max(seen) + 0.3 * margin)
    elif seen:
        axis.set_ylim(0, min(axis.get_ylim()[1], 103.0))  # an interval of few seeds can end beyond 100%


def shares_data(results: Results) -> dict[str, Any]:
    """Arm -> seed -> label -> samples, and mean and standard deviation of the shares by layer and expert."""
    return {arm: found for arm in results.study.figure3 if (found := shares(results, arm))}


def draw_shares(study: Study, arm: str, by_label: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw the paper's Figure 3 for one run: a panel for each layer, a group for each label, a bar for each expert."""
    layers = _layers(study, arm, len(next(iter(by_label.values()))["mean"]))
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(max(6.0, 3.1 * columns), 2.6 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    experts = len(next(iter(by_label.values()))["mean"][0])
    width = 0.82 / experts
    for axis, layer in zip(axes, layers, strict=False):
        for k in range(experts):
            centres = [n + (k - (experts - 1) / 2) * width for n in range(len(by_label))]
            heights = [entry["mean"][layer][k] for entry in by_label.values()]
            spread = [entry["std"][layer][k] for entry in by_label.values()]
            # A share lies between 0 and 1, and so do the ends of its bar's deviation.
            below = [min(s, h) for s, h in zip(spread, heights, strict=True)]
            above = [min(s, 1 - h) for s, h in zip(spread, heights, strict=True)]
            style = {"color": COLORS[k % len(COLORS)], "label": f"$E_{{{k}}}$", "error_kw": {"linewidth": 0.9}}
            axis.bar(centres, heights, width * 0.9, yerr=[below, above], capsize=2, **style)
        tidy(axis, f"layer {layer}")
        axis.set_xticks(range(len(by_label)), list(by_label), fontsize=8)
        axis.set_ylim(0, 1.02)
        axis.axhline(1 / experts, color="#666666", linewidth=0.8, linestyle=":")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("share of tokens")
    legend_below(figure, axes[0].get_legend_handles_labels()[0], columns=8)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _layers(study: Study, arm: str, count: int) -> list[int]:
    """The layers to show: those that the base names, else all, or as many as fit, spread evenly."""
    named = [layer for layer in study.bases[arm].layers if layer < count]
    if named or count <= MOST_LAYERS:
        return named or list(range(count))
    return sorted({round(n * (count - 1) / (MOST_LAYERS - 1)) for n in range(MOST_LAYERS)})


def write_bars(results: Results, folder: Path) -> list[Path]:
    """Write Figure 1 as PNG, JSON and CSV. Returns the files; none if nothing is finished."""
    data = bars_data(results)
    if not any(data["measured"].values()):
        return []
    write_json(folder / "figure1.json", data)
    domains = data["domain"] | results.study.published.domains
    lines = [
        [
            kind,
            column,
            domains.get(column, ""),
            arm,
            entry["label"],
            entry["mean"],
            entry.get("half"),
            seed,
            value,
        ]
        for kind in ("measured", "paper")
        for column, entries in data[kind].items()
        for arm, entry in entries.items()
        for seed, value in (entry.get("by_seed") or {"": None}).items()
    ]
    header = ["source", "column", "domain", "arm", "label", "mean", "half_interval", "seed", "value"]
    write_text(folder / "figure1.csv", _csv([header, *lines]))
    draw_bars(results.study, data, folder / "figure1.png")
    return [folder / f"figure1.{ending}" for ending in ("png", "json", "csv")]


def write_shares(results: Results, folder: Path) -> list[Path]:
    """Write Figure 3 as JSON and CSV, and the first seed of each of its arms as PNG. Returns the files."""
    data = shares_data(results)
    if not data:
        return []
    write_json(folder / "figure3.json", data)
    lines = [
        [arm, seed, label, layer, expert, entry["samples"], mean, entry["std"][layer][expert]]
        for arm, by_seed in data.items()
        for seed, by_label in by_seed.items()
        for label, entry in by_label.items()
        for layer, row in enumerate(entry["mean"])
        for expert, mean in enumerate(row)
    ]
    header = ["arm", "seed", "benchmark", "layer", "expert", "samples", "mean_share", "std_over_samples"]
    write_text(folder / "figure3.csv", _csv([header, *lines]))
    files = [folder / "figure3.json", folder / "figure3.csv"]
    for arm, by_seed in data.items():
        seed, by_label = next(iter(by_seed.items()))
        path = folder / f"figure3-{arm}.png"
        title = f"{results.study.label(arm)}, seed {seed}: share of tokens by expert (bars: deviation over samples)"
        draw_shares(results.study, arm, by_label, title, path)
        files.append(path)
    return files


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
