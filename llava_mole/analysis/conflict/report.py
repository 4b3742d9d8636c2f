"""The conflict meter's numbers as text and as figures, for one run or for several beside each other."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.analysis.panels import bars, map_panel, matrix_panel, widest
from llava_mole.common.figures import new_figure, save_figure
from llava_mole.common.text import format_table

Result = dict[str, Any]


def number(value: float, interval: float = math.nan, digits: int = 3) -> str:
    """A number with its interval as text; `-` for one that does not exist."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if math.isnan(interval) else f" ±{interval:.{digits}f}")


def pairs_of(sources: Sequence[Any]) -> list[tuple[int, int]]:
    """The pairs of different sources, as positions."""
    return list(itertools.combinations(range(len(sources)), 2))


def table(result: Result) -> str:
    """Everything about one run."""
    sources, whole = result["sources"], result["all"]
    header = (
        f"{result['name']} ({result['path']}): {result['batches']} x {result['batch_size']} samples of each source "
        f"({result['samples_from']})"
    )
    blocks = [
        header,
        "cosine of gradients, 95% interval over batches; diagonal: two batches of one source\n"
        + _matrix(sources, whole["cosine"], whole["interval"]),
        "cosine without noise (- where noise hides the gradient)\n" + _matrix(sources, whole["noise_free"]),
        _parts(result),
    ]
    if result["layers"]:
        blocks.append(_layers(result))
    if "interference" in result:
        found = result["interference"]
        blocks.append(
            f"interference: change of the loss of the column after a step on the row ({found['step']})\n"
            + _matrix(sources, found["change"], found["interval"], digits=4)
        )
    if result.get("tokens"):
        found = result["tokens"]["all"]
        blocks.append(
            "tokens inside experts: share of the row's tokens against the mean gradient of the column's\n"
            + _matrix(sources, found["against"], found["interval"])
        )
    taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["seconds"].items())
    return "\n\n".join([*blocks, f"took: {taken}"])


def _matrix(
    sources: Sequence[str],
    values: Sequence[Sequence[float]],
    intervals: Sequence[Sequence[float]] | None = None,
    digits: int = 3,
) -> str:
    rows = [["", *sources]]
    for i, name in enumerate(sources):
        errors = [math.nan] * len(sources) if intervals is None else intervals[i]
        rows.append([name, *(number(v, e, digits) for v, e in zip(values[i], errors, strict=True))])
    return format_table(rows, right=range(1, len(sources) + 1))


def _parts(result: Result) -> str:
    sources = result["sources"]
    pairs = pairs_of(sources)
    head = ["part", *(f"{sources[i]}, {sources[j]}" for i, j in pairs), "conflicts", "clear", "norms by source"]
    rows = [head]
    for part, own in {**result["parts"], "all": result["all"]}.items():
        cosines = [number(own["cosine"][i][j], own["interval"][i][j], 2) for i, j in pairs]
        norms = " ".join(f"{norm:.2g}" for norm in own["norm"])
        rows.append([part, *cosines, share(own), clear_share(own), norms])
    return "by part: cosine of each pair, share of pairs below 0 (clear: with their interval), norms\n" + format_table(
        rows, right=range(1, len(pairs) + 3)
    )


def share(own: Result) -> str:
    """The share of conflicting pairs as text."""
    return "-" if math.isnan(own["conflict_share"]) else f"{own['conflict_share']:.0%} of {own['compared_pairs']:,}"


def clear_share(own: Result) -> str:
    """The share of clear conflicts as text."""
    return f"{own['clear_conflicts'] / own['judged_pairs']:.0%}" if own["judged_pairs"] else "-"


def _layers(result: Result) -> str:
    sources = result["sources"]
    pairs = pairs_of(sources)
    rows = [["layer", *(f"{sources[i]}, {sources[j]}" for i, j in pairs), "conflicts", "clear"]]
    for layer, own in result["layers"].items():
        cosines = [number(own["cosine"][i][j], own["interval"][i][j], 2) for i, j in pairs]
        rows.append([layer, *cosines, share(own), clear_share(own)])
    return "by layer\n" + format_table(rows, right=range(1, len(rows[0])))


def comparison(results: Sequence[Result]) -> str:
    """Several runs beside each other."""
    sources = results[0]["sources"]
    rows = [["", *(result["name"] for result in results)]]
    for i, j in pairs_of(sources):
        cells = (number(r["all"]["cosine"][i][j], r["all"]["interval"][i][j]) for r in results)
        rows.append([f"cosine {sources[i]}, {sources[j]}", *cells])
    rows.append(["conflicting pairs", *(share(r["all"]) for r in results)])
    for part in parts_in(results):
        rows.append([f"  {part}", *(share(r["parts"][part]) if part in r["parts"] else "" for r in results)])
    if all("interference" in r for r in results):
        for i, j in itertools.permutations(range(len(sources)), 2):
            cells = (number(r["interference"]["change"][i][j], r["interference"]["interval"][i][j], 4) for r in results)
            rows.append([f"step on {sources[i]}, loss of {sources[j]}", *cells])
    return format_table(rows, right=range(1, len(rows[0])))


def parts_in(results: Sequence[Result]) -> list[str]:
    """The parts of all runs, in order."""
    return list(dict.fromkeys(part for result in results for part in result["parts"]))


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """Draw the figures, the runs beside each other. Returns the files."""
    files = [save_figure(_draw_cosines(results), out / "cosines.png")]
    if any(result["layers"] for result in results):
        files.append(save_figure(_draw_layers(results), out / "layers.png"))
    if any("interference" in result for result in results):
        files.append(save_figure(_draw_interference(results), out / "interference.png"))
    if any(result.get("tokens") for result in results):
        files.append(save_figure(_draw_tokens(results), out / "tokens.png"))
    return files


def _draw_cosines(results: Sequence[Result]) -> Any:
    sources, count = results[0]["sources"], len(results)
    pairs = pairs_of(sources)
    parts = [p for p in parts_in(results) if any(r["parts"][p]["compared_pairs"] for r in results if p in r["parts"])]
    most = min(1.0, max(0.2, widest([result["all"]["cosine"] for result in results])))
    figure = new_figure(max(8.0, 4.6 * count + 0.6), 8.2)
    grid = figure.add_gridspec(2, count)
    image = None
    panels = [figure.add_subplot(grid[0, n]) for n in range(count)]
    for axes, result in zip(panels, results, strict=True):
        whole = result["all"]
        image = matrix_panel(
            axes, whole["cosine"], sources, sources, title=result["name"], limits=(-most, most),
            intervals=whole["interval"],
        )  # fmt: skip
    figure.colorbar(image, ax=panels, label="cosine of gradients (diagonal: two batches)")
    below = figure.add_subplot(grid[1, :])
    series = []
    for result in results:
        for i, j in pairs:
            own = [result["parts"].get(part) for part in parts]
            heights = [math.nan if p is None else p["cosine"][i][j] for p in own]
            errors = [math.nan if p is None else p["interval"][i][j] for p in own]
            name = f"{sources[i]}, {sources[j]}" if count == 1 else f"{result['name']}: {sources[i]}, {sources[j]}"
            series.append((name, heights, errors))
    bars(below, parts, series, title="By part, with 95% intervals over batches", y="cosine of gradients")
    return figure


def _draw_layers(results: Sequence[Result]) -> Any:
    """Two maps a run: mean cosine over pairs of sources, and share of conflicting pairs, by layer and part."""
    parts = parts_in(results)
    layers = sorted({int(layer) for result in results for layer in result["layers"]})
    figure = new_figure(max(7.0, (1.6 + 0.85 * len(parts)) * len(results)), 3.2 + 0.34 * min(len(layers) * 2, 40))
    grid = figure.subplots(2, len(results), squeeze=False)
    images: list[Any] = [None, None]
    for column, result in enumerate(results):
        cells = {(own["layer"], own["part"]): own for own in result["layers_and_parts"]}
        kinds = ("mean cosine of pairs", (-1, 1), "RdBu"), ("share of conflicting pairs", (0, 1), "RdBu_r")
        for row, (title, limits, colors) in enumerate(kinds):
            shown = [part for part in parts if any((layer, part) in cells for layer in layers)]
            values = [
                [
                    (_mean_cosine, _share)[row](cells[layer, part]) if (layer, part) in cells else math.nan
                    for part in shown
                ]
                for layer in layers
            ]
            images[row] = map_panel(
                grid[row][column], values, [str(n) for n in layers], shown, title=f"{result['name']}: {title}",
                limits=limits, colors=colors, y="layer" if column == 0 else "",
            )  # fmt: skip
            grid[row][column].tick_params(axis="x", labelrotation=20)
    for row, label in enumerate(("cosine", "share")):
        figure.colorbar(images[row], ax=list(grid[row]), label=label)
    return figure


def _mean_cosine(own: Result) -> float:
    return _mean([own["cosine"][i][j] for i, j in pairs_of(own["cosine"])])


def _share(own: Result) -> float:
    return own["conflict_share"]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _draw_interference(results: Sequence[Result]) -> Any:
    shown = [result for result in results if "interference" in result]
    figure = new_figure(4.8 * len(shown) + 0.8, 4.4)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    most = widest([result["interference"]["change"] for result in shown])
    image = None
    for axes, result in zip(panels, shown, strict=True):
        found = result["interference"]
        image = matrix_panel(
            axes, found["change"], result["sources"], result["sources"], title=result["name"], limits=(-most, most),
            colors="RdBu_r", intervals=found["interval"], digits=3 if most > 0.02 else 5, x="change of the loss of",
            y="step on",
        )  # fmt: skip
    figure.colorbar(image, ax=list(panels), label="change of the loss (above 0: harm)")
    return figure


def _draw_tokens(results: Sequence[Result]) -> Any:
    """For each run the matrix over all experts, and below it every expert's share against other sources by layer."""
    shown = [result for result in results if result.get("tokens")]
    figure = new_figure(4.8 * len(shown) + 0.8, 7.6)
    grid = figure.subplots(2, len(shown), squeeze=False)
    images: list[Any] = [None, None]
    for column, result in enumerate(shown):
        sources, found = result["sources"], result["tokens"]
        images[0] = matrix_panel(
            grid[0][column], found["all"]["against"], sources, sources, title=result["name"], limits=(0, 1),
            colors="RdBu_r", intervals=found["all"]["interval"], x="against the mean gradient of", y="tokens of",
        )  # fmt: skip
        layers = sorted({own["layer"] for own in found["experts"]})
        experts = sorted({own["expert"] for own in found["experts"]})
        cells = {(own["layer"], own["expert"]): own["against"] for own in found["experts"]}
        others = list(itertools.permutations(range(len(sources)), 2))
        values = [
            [_mean([cells[n, k][i][j] for i, j in others]) if (n, k) in cells else math.nan for k in experts]
            for n in layers
        ]
        images[1] = map_panel(
            grid[1][column], values, [str(n) for n in layers], [f"expert {k}" for k in experts],
            title="against other sources, by layer", limits=(0, 1), colors="RdBu_r", y="layer",
        )  # fmt: skip
    for row in range(2):
        figure.colorbar(images[row], ax=list(grid[row]), label="share of tokens")
    return figure
