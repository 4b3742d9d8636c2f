"""The router meters' numbers as text and as figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.analysis.panels import bars, map_panel, matrix_panel, widest
from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy
from llava_mole.common.text import format_table

Result = dict[str, Any]
FACTORS = ("source", "modality", "role", "form")


def layer_names(result: Result) -> list[str]:
    """Short names of the routers: the number of their decoder layer where that tells them apart."""
    numbers = ["" if layer is None else str(layer) for layer in result["layers"]]
    if len(set(numbers)) == len(numbers) and all(numbers):
        return numbers
    return [name.rpartition("layers.")[2] for name in result["routers"]]


def table(result: Result) -> str:
    """All numbers as text."""
    names, whole = layer_names(result), result["routing"]
    blocks = [
        f"{result['name']} ({result['path']}): {result['samples']} samples of each source "
        f"({result['samples_from']}), {whole['tokens']:,} tokens",
        "load of the experts, entropy (nats) and margin of the router\n" + _loads(result, names),
        "mutual information of expert and ...: estimate as a share of the class's entropy (p)\n"
        + _information(result, names),
    ]
    if not result["has_probabilities"]:
        blocks[1] += "\nthis adapter's experts are not chosen by probabilities: entropy and margin say nothing"
    if result["similarity"]:
        blocks.append("likeness of experts: means over pairs and projections\n" + _similarity(result))
    for drift in result["drift"]:
        rows = [["layer", "changed", "KL"]]
        rows += [[n, f"{c:.1%}", f"{k:.4f}"] for n, c, k in zip(names, drift["changed"], drift["kl"], strict=True)]
        blocks.append(f"drift from {drift['name']} ({drift['changed_in_all']:.1%} of choices changed)\n"
                      + format_table(rows, right=(1, 2)))  # fmt: skip
    if "interventions" in result:
        blocks.append(
            "interventions: accuracy of all answers, and change of accuracy (points) and loss, 95% interval over "
            "samples\n" + _interventions(result)
        )
    taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["seconds"].items())
    return "\n\n".join([*blocks, f"took: {taken}"])


def _loads(result: Result, names: Sequence[str]) -> str:
    whole, by_source = result["routing"], result["routing"]["by"]["source"]
    rows = [["layer", "all", *by_source, "entropy", "margin"]]
    for layer, name in enumerate(names):
        loads = [whole["load"][layer], *(own["load"][layer] for own in by_source.values())]
        rows.append(
            [name, *(" ".join(f"{x:.2f}" for x in load) for load in loads), f"{whole['entropy'][layer]:.3f}",
             f"{whole['margin'][layer]:.3f}"]
        )  # fmt: skip
    return format_table(rows, right=(len(rows[0]) - 2, len(rows[0]) - 1))


def _information(result: Result, names: Sequence[str]) -> str:
    found = result["information"]
    rows = [["layer", *found]]
    for layer, name in enumerate(names):
        rows.append([name, *(f"{own['share'][layer]:.1%} ({own['p_value'][layer]:.3f})" for own in found.values())])
    return format_table(rows, right=range(1, len(rows[0])))


def _similarity(result: Result) -> str:
    rows = [["layer", "CKA of updates", "cosine of weights"]]
    for layer in dict.fromkeys(own["layer"] for own in result["similarity"]):
        chosen = [own for own in result["similarity"] if own["layer"] == layer]
        values = [_off_diagonal([own[key] for own in chosen]) for key in ("cka", "weight_cosine")]
        rows.append([str(layer), *("-" if math.isnan(value) else f"{value:.3f}" for value in values)])
    return format_table(rows, right=(1, 2))


def _off_diagonal(matrices: Sequence[Sequence[Sequence[float]]]) -> float:
    found = [
        value
        for matrix in matrices
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i < j and not math.isnan(value)
    ]
    return sum(found) / len(found) if found else math.nan


def _interventions(result: Result) -> str:
    found, sources = result["interventions"], result["sources"]
    rows = [["", "accuracy", "change", "loss", *sources]]
    for name, own in {"intact": found["intact"], **found["all layers"]}.items():
        whole = own["all"]
        rows.append(
            [
                name,
                f"{whole['accuracy']:.1%}",
                _points(whole) if name != "intact" else "",
                f"{whole['loss_change']:+.3f} ±{whole['loss_interval']:.3f}" if name != "intact" else "",
                *(_points(own[s]) if name != "intact" else f"{own[s]['accuracy']:.1%}" for s in sources),
            ]
        )
    return format_table(rows, right=range(1, len(rows[0])))


def _points(own: Result) -> str:
    half = own["accuracy_interval"]
    return f"{100 * own['accuracy_change']:+.1f}" + ("" if math.isnan(half) else f" ±{100 * half:.1f}")


def draw(result: Result, out: Path) -> list[Path]:
    """Draw the figures. Returns the files."""
    files = [
        save_figure(_draw_load(result), out / "load.png"),
        save_figure(_draw_information(result), out / "information.png"),
    ]
    if result["similarity"]:
        files.append(save_figure(_draw_similarity(result), out / "similarity.png"))
    if result["drift"]:
        files.append(save_figure(_draw_drift(result), out / "drift.png"))
    if "interventions" in result:
        files.append(save_figure(_draw_interventions(result), out / "interventions.png"))
    return files


def _draw_load(result: Result) -> Any:
    """The load by layer and expert, of all tokens and of every source, modality and role; entropy and margin."""
    names, by = layer_names(result), result["routing"]["by"]
    shown = {"all": result["routing"], **by["source"], **by["modality"]}
    shown |= {name: own for name, own in by["role"].items() if name != "image"}
    columns = math.ceil((len(shown) + 1) / 2)
    figure = new_figure(2.9 * columns + 1.2, 6.4)
    panels = list(figure.subplots(2, columns).flat)
    experts = [str(k) for k in range(len(result["routing"]["load"][0]))]
    most = max(2 / len(experts), max(max(load) for own in shown.values() for load in own["load"]))
    image = None
    for number, (axes, (name, own)) in enumerate(zip(panels, shown.items(), strict=False)):
        image = map_panel(
            axes, own["load"], names, experts, title=name, limits=(0, min(1.0, most)), x="expert",
            y="layer" if number % columns == 0 else "",
        )  # fmt: skip
    figure.colorbar(image, ax=panels[: len(shown)], label="share of tokens")
    certain = panels[len(shown)]
    places = range(len(names))
    certain.plot(places, result["routing"]["entropy"], "o-", color=COLORS[0], label="entropy (nats)")
    certain.plot(places, result["routing"]["margin"], "s-", color=COLORS[1], label="margin")
    certain.axhline(math.log(len(experts)), color=COLORS[0], linewidth=0.8, linestyle=":")
    certain.set_ylim(bottom=0)
    certain.xaxis.get_major_locator().set_params(integer=True)
    tidy(certain, "certainty", "layer")
    certain.legend(frameon=False, fontsize=9)
    for axes in panels[len(shown) + 1 :]:
        axes.set_axis_off()
    return figure


def _draw_information(result: Result) -> Any:
    names = layer_names(result)
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    places = list(range(len(names)))
    for number, (kind, own) in enumerate(result["information"].items()):
        color = COLORS[number]
        axes.plot(places, own["share"], "o-", color=color, label=kind)
        sure = [(x, y) for x, y, p in zip(places, own["share"], own["p_value"], strict=True) if p > 0.05]
        if sure:
            axes.plot(*zip(*sure, strict=True), "o", color="white", markeredgecolor=color, markersize=6)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(places, names)
    axes.set_ylim(min(-0.02, axes.get_ylim()[0]), max(0.1, axes.get_ylim()[1]))
    tidy(axes, "Mutual information of expert and class, baseline taken out", "layer", "share of H(class)")
    axes.legend(frameon=False, title="hollow: p > 0.05", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_similarity(result: Result) -> Any:
    """Means over projections: CKA above, cosine of weights below, one column a layer (at most eight)."""
    layers = list(dict.fromkeys(own["layer"] for own in result["similarity"]))
    step = math.ceil(len(layers) / 8)
    shown = layers[::step]
    figure = new_figure(2.6 * len(shown) + 1.2, 5.6)
    grid = figure.subplots(2, len(shown), squeeze=False)
    for row, (key, title, limits, colors) in enumerate(
        (("cka", "CKA", (0, 1), "viridis"), ("weight_cosine", "cosine", (-1, 1), "RdBu"))
    ):
        image = None
        for column, layer in enumerate(shown):
            chosen = [own[key] for own in result["similarity"] if own["layer"] == layer]
            count = len(chosen[0])
            mean = [[_mean([m[i][j] for m in chosen]) for j in range(count)] for i in range(count)]
            labels = [str(k) for k in range(count)]
            image = matrix_panel(
                grid[row][column], mean, labels, labels, title=f"{title}, layer {layer}", limits=limits,
                colors=colors, x="expert" if row else "", y="expert" if column == 0 else "",
            )  # fmt: skip
        figure.colorbar(image, ax=list(grid[row]), label="of updates" if row == 0 else "of weights B A")
    return figure


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _draw_drift(result: Result) -> Any:
    names = layer_names(result)
    figure = new_figure(10, 4.0)
    changed, divergence = figure.subplots(1, 2)
    for number, drift in enumerate(result["drift"]):
        color = COLORS[number % len(COLORS)]
        changed.plot(names, [100 * share for share in drift["changed"]], "o-", color=color, label=drift["name"])
        divergence.plot(names, drift["kl"], "o-", color=color, label=drift["name"])
    tidy(changed, f"Tokens whose expert is another in {result['name']}", "layer", "percent")
    tidy(divergence, "KL (before, now)", "layer", "nats")
    for axes in (changed, divergence):
        axes.set_ylim(bottom=0)
    changed.legend(frameon=False)
    return figure


def _draw_interventions(result: Result) -> Any:
    found, sources = result["interventions"], result["sources"]
    names = list(found["all layers"])
    series = [
        (
            source,
            [100 * found["all layers"][name][source]["accuracy_change"] for name in names],
            [100 * found["all layers"][name][source]["accuracy_interval"] for name in names],
        )
        for source in sources
    ]
    by_layer = found.get("by layer")
    figure = new_figure(max(8.0, 1.05 * len(names)), 4.6 if by_layer is None else 8.6)
    panels = [figure.subplots()] if by_layer is None else list(figure.subplots(2, 1))
    intact = ", ".join(f"{source} {found['intact'][source]['accuracy']:.0%}" for source in sources)
    bars(panels[0], names, series, title=f"Change of accuracy (intact: {intact})", y="points")
    if by_layer is not None:
        rows = layer_names(result)
        most = max(len(own) for own in by_layer.values())
        columns = [f"ablate {k}" for k in range(most)]
        values = [
            [own[name]["all"]["loss_change"] if name in own else math.nan for name in columns]
            for own in by_layer.values()
        ]
        limit = widest([values])
        image = map_panel(
            panels[1], values, rows, columns, title="One expert of one layer switched off", limits=(-limit, limit),
            colors="RdBu_r", y="layer",
        )  # fmt: skip
        figure.colorbar(image, ax=panels[1], label="change of the loss")
    return figure
