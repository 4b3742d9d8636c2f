"""Plots of a run: losses, learning rate and gradients, throughput, expert load."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_mole.common.errors import DataError, command
from llava_mole.common.figures import COLORS, add_legend, new_figure, save_figure, tidy
from llava_mole.train.tracker import CONFLICT_FILE, METRICS_FILE, read_metrics

Entries = Sequence[dict[str, Any]]
Values = npt.NDArray[np.float64]
PALE = "pale: single steps"
MAP_EXPERTS = 4
"""Up to this many experts get a map of layers over time each; more share one map of the end of the run."""


def read_entries(run: Path) -> list[dict[str, Any]]:
    """The entries of a run as `read_metrics` returns them. Raises DataError if there are none."""
    path = run / METRICS_FILE
    if not run.is_dir() or not path.is_file():
        raise DataError(f"{run}: no {METRICS_FILE} there; give the directory of a run (train.output_dir)")
    entries = read_metrics(path)
    if not entries:
        raise DataError(f"{path}: no step is recorded yet; draw it after the first optimizer step")
    return entries


def series(entries: Entries, value: Callable[[dict[str, Any]], float | None]) -> tuple[Values, Values]:
    """Steps and values of the entries that have a finite value, both float64 [n]."""
    found = [(entry["step"], value(entry)) for entry in entries]
    pairs = [(step, number) for step, number in found if number is not None and math.isfinite(number)]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def named_series(entries: Entries, key: str, name: str) -> tuple[Values, Values]:
    """The series of `entry[key][name]`."""
    return series(entries, lambda entry: entry.get(key, {}).get(name))


def smooth(values: Values, span: float) -> Values:
    """Exponential moving average over about `span` values, without bias at the start."""
    keep = 1.0 - 2.0 / (max(span, 1.0) + 1.0)
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        result[index] = total / weight
    return result


def names_in(entries: Entries, key: str) -> list[str]:
    """Keys of the dictionaries under `key`, in the order of their first appearance."""
    return list(dict.fromkeys(name for entry in entries for name in entry.get(key, {})))


def layer_loads(entries: Entries, columns: int = 300) -> tuple[Values, Values]:
    """Expert load by layer over time, averaged into at most `columns` C: steps [C] and shares [C, layers, K]."""
    chosen = [entry for entry in entries if entry.get("expert_load_by_layer")]
    steps = np.array([entry["step"] for entry in chosen], dtype=np.float64)
    loads = np.array([entry["expert_load_by_layer"] for entry in chosen], dtype=np.float64)
    if len(chosen) <= columns:
        return steps, loads
    parts = np.array_split(np.arange(len(chosen)), columns)
    return np.array([steps[part].mean() for part in parts]), np.stack([loads[part].mean(axis=0) for part in parts])


def draw_run(run: Path, out: Path) -> list[Path]:
    """Draw everything a run has recorded. Returns the files, `<out>/<name>.png`.

    Raises:
        DataError: nothing is recorded.
        ConfigError: matplotlib is not installed.
    """
    entries = read_entries(run)
    plots: dict[str, Callable[[Entries], Any]] = {
        "loss": _loss, "source_loss": _source_loss, "optimization": _optimization, "throughput": _throughput,
    }  # fmt: skip
    if any(entry.get("expert_load_by_layer") for entry in entries):
        plots["expert_load"] = _expert_load
    conflict = read_metrics(run / CONFLICT_FILE)
    if conflict:
        plots["conflict"] = lambda _: _conflict(conflict)
    return [save_figure(draw(entries), out / f"{name}.png") for name, draw in plots.items()]


def _loss(entries: Entries) -> Any:
    auxiliary = series(entries, lambda e: e.get("auxiliary_loss"))
    has_auxiliary = bool((auxiliary[1] != 0).any())
    figure = new_figure(12 if has_auxiliary else 8, 4.4)
    axes, *others = figure.subplots(1, 2, width_ratios=(2, 1)) if has_auxiliary else [figure.subplots()]
    steps, losses = series(entries, lambda e: e["loss"])
    _curve(axes, steps, losses, COLORS[0], "training loss")
    steps, losses = series(entries, _mean_validation)
    if len(steps):
        axes.plot(steps, losses, "o-", color=COLORS[4], markersize=4, label="validation, mean of sources")
    tidy(axes, "Loss", "optimizer step", "loss")
    add_legend(axes, PALE)
    for axes in others:
        _curve(axes, *auxiliary, COLORS[7], "auxiliary")
        tidy(axes, "Auxiliary loss, coefficients included", "optimizer step")
        add_legend(axes, PALE)
    return figure


def _source_loss(entries: Entries) -> Any:
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    for index, name in enumerate(names_in(entries, "source_loss")):
        color = COLORS[index % len(COLORS)]
        _curve(axes, *named_series(entries, "source_loss", name), color, name)
        steps, losses = named_series(entries, "validation_loss", name)
        if len(steps):
            axes.plot(steps, losses, "o--", color=color, markersize=4, linewidth=1, label=f"{name}, validation")
    tidy(axes, "Loss by source", "optimizer step", "mean loss of a sample")
    add_legend(axes, PALE, ncols=2 if names_in(entries, "validation_loss") else 1)
    return figure


def _optimization(entries: Entries) -> Any:
    figure = new_figure(11, 4.2)
    rates, norms = figure.subplots(1, 2)
    for index, name in enumerate(names_in(entries, "learning_rate")):
        steps, values = named_series(entries, "learning_rate", name)
        style = ("-", "--", ":")[index % 3]  # keeps groups with the same rate visible
        rates.plot(steps, values, style, color=COLORS[index % len(COLORS)], label=name, linewidth=2)
    tidy(rates, "Learning rate", "optimizer step", "")
    rates.set_ylim(bottom=0)
    add_legend(rates, PALE)
    _curve(norms, *series(entries, lambda e: e["grad_norm"]), COLORS[7], "all")
    for index, name in enumerate(names_in(entries, "grad_norm_by_part")):
        _curve(norms, *named_series(entries, "grad_norm_by_part", name), COLORS[index % len(COLORS)], name)
    tidy(norms, "Gradient norm before clipping", "optimizer step", "")
    norms.set_yscale("log")
    largest = max((norms.dataLim.y1, 1e-8))
    norms.set_ylim(bottom=max(norms.get_ylim()[0], 1e-5 * largest))  # a router's norm starts close to 0
    add_legend(norms, PALE)
    return figure


def _throughput(entries: Entries) -> Any:
    figure = new_figure(11, 4.2)
    rate, shares = figure.subplots(1, 2)
    _curve(rate, *series(entries, lambda e: e["tokens_per_s"]), COLORS[0], "tokens per second, all ranks")
    tidy(rate, "Throughput", "optimizer step", "tokens per second")
    rate.set_ylim(bottom=0)
    add_legend(rate, PALE)
    waiting = series(entries, lambda e: 100 * e["data_wait_s"] / e["step_s"])
    _curve(shares, *waiting, COLORS[1], "waiting for data, share of the step")
    used = series(entries, lambda e: None if "mfu" not in e else 100 * e["mfu"])
    if len(used[0]):
        _curve(shares, *used, COLORS[2], "MFU, share of the peak")
    tidy(shares, "Use of the hardware", "optimizer step", "percent")
    shares.set_ylim(bottom=0)
    add_legend(shares, PALE)
    return figure


def _expert_load(entries: Entries) -> Any:
    steps, loads = layer_loads(entries)
    experts = loads.shape[2]
    maps = experts if experts <= MAP_EXPERTS else 1
    figure = new_figure(4.4 + 2.9 * maps, 4.4)
    first, *panels = figure.subplots(1, 1 + maps, width_ratios=[1.3] + [1.0] * maps)
    _draw_load_by_source(first, entries)
    for index, axes in enumerate(panels):
        if maps == experts:
            shares, extent = loads[:, :, index].T, _extent(steps, loads.shape[1])
            title, x = f"Expert {index}", "optimizer step"
        else:
            end = loads[-max(1, len(loads) // 10) :].mean(axis=0)
            shares, extent, title, x = end, (-0.5, experts - 0.5, loads.shape[1] - 0.5, -0.5), "At the end", "expert"
        image = axes.imshow(
            shares, aspect="auto", extent=extent, vmin=0, vmax=max(1 / experts, float(loads.max())), cmap="viridis",
            interpolation="nearest",
        )  # fmt: skip
        tidy(axes, title, x, "layer" if not index else "")
        axes.grid(visible=False)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=panels, label="share of the layer's tokens")
    return figure


def _conflict(entries: Entries) -> Any:
    """Cosine of every pair of sources with its interval, and share of conflicting pairs by part, over time."""
    figure = new_figure(12, 4.4)
    cosines, shares = figure.subplots(1, 2)
    sources = entries[-1]["sources"]
    for number, (i, j) in enumerate(itertools.combinations(range(len(sources)), 2)):
        color, label = COLORS[number % len(COLORS)], f"{sources[i]}, {sources[j]}"
        steps, values = series(entries, lambda e, i=i, j=j: e["all"]["cosine"][i][j])  # type: ignore[misc]
        _, half = series(entries, lambda e, i=i, j=j: _half_interval(e, i, j))  # type: ignore[misc]
        cosines.plot(steps, values, "o-", color=color, markersize=4, label=label)
        if len(half) == len(values):
            cosines.fill_between(steps, values - half, values + half, color=color, alpha=0.15, linewidth=0)
    cosines.axhline(0, color="#333333", linewidth=0.8)
    tidy(cosines, "Cosine of gradients, all parts", "optimizer step")
    for number, part in enumerate(names_in(entries, "parts")):
        steps, values = series(entries, lambda e, p=part: 100 * e["parts"][p]["conflict_share"])  # type: ignore[misc]
        if len(steps):
            shares.plot(steps, values, "o-", color=COLORS[number % len(COLORS)], markersize=4, label=part)
    shares.axhline(50, color="#333333", linewidth=0.8)
    tidy(shares, "Pairs with a cosine below 0 (unrelated gradients: half)", "optimizer step", "percent")
    for axes in (cosines, shares):
        axes.legend(frameon=False, fontsize=9)
    return figure


def _half_interval(entry: dict[str, Any], i: int, j: int) -> float | None:
    value = entry["all"]["interval"][i][j]
    return None if value is None else float(value)


def _draw_load_by_source(axes: Any, entries: Entries) -> None:
    """Stacked bars: the share of each source's tokens that each expert gets, in the last tenth of the run."""
    end = [e for e in entries if e.get("expert_load")][-max(1, len(entries) // 10) :]
    names = names_in(end, "expert_load_by_source")
    rows = [np.mean([e["expert_load"] for e in end], axis=0)]
    for name in names:
        found = [e["expert_load_by_source"][name] for e in end if name in e["expert_load_by_source"]]
        rows.append(np.mean(found, axis=0))
    left = np.zeros(len(rows))
    for expert in range(len(rows[0])):
        widths = np.array([row[expert] for row in rows])
        color = COLORS[expert % len(COLORS)]
        axes.barh(range(len(rows)), widths, left=left, color=color, height=0.6, label=str(expert))
        for row, width in enumerate(widths):
            if width > 0.09:
                text = f"{width:.2f}"
                axes.text(left[row] + width / 2, row, text, ha="center", va="center", color="white", fontsize=9)
        left += widths
    axes.set_yticks(range(len(rows)), ["all", *names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    tidy(axes, "Expert load by source, end of run", "share of tokens")
    axes.grid(visible=False)
    columns = min(8, len(rows[0]))
    add_legend(axes, title="expert", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def _extent(steps: Any, layers: int) -> tuple[float, float, float, float]:
    first, last = float(steps[0]), float(steps[-1])
    return first, last if last > first else first + 1, layers - 0.5, -0.5


def _curve(axes: Any, steps: Any, values: Any, color: str, label: str) -> None:
    """A smoothed line over the pale raw one, or points if they are too few for a line."""
    if len(values) < 3:
        axes.plot(steps, values, "o", color=color, label=label)
        return
    span = max(1.0, len(values) / 30)
    if span > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, span), color=color, label=label, linewidth=1.6)


def _mean_validation(entry: dict[str, Any]) -> float | None:
    losses = entry.get("validation_loss")
    return sum(losses.values()) / len(losses) if losses else None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Plot a run, finished or not, and print the paths of the files."""
    parser = argparse.ArgumentParser(prog="llava-mole plot", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory (train.output_dir)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the plots (default: RUN/plots)")
    arguments = parser.parse_args(argv)
    for path in draw_run(arguments.run, arguments.out or arguments.run / "plots"):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
