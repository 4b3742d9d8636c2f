"""What a study of continual learning has found: accuracy matrices, their numbers with intervals, and a picture."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mole.common.errors import ConfigError
from llava_mole.common.figures import new_figure, save_figure, tidy
from llava_mole.common.files import read_json, write_errors, write_json, write_text
from llava_mole.common.text import format_seconds, format_table
from llava_mole.eval.report.compare import stored_benchmark
from llava_mole.eval.scoring.aggregate import Units, statistic
from llava_mole.eval.scoring.intervals import RESAMPLES, SEED, Array, percentile_interval
from llava_mole.eval.scoring.score import read_score_file
from llava_mole.study.continual import Continual, Steps
from llava_mole.study.continual_metrics import NUMBERS, Measured, continual_numbers, resample
from llava_mole.study.results import estimate, read_cost
from llava_mole.study.runner import DONE, is_done

NOTHING = "-"


@dataclass(frozen=True)
class Matrix:
    """A method's accuracies in percent, over its finished seeds."""

    seeds: Sequence[int]
    observed: Array
    """`[S, N, T]`: seeds, steps (1 for joint training), tasks."""
    drawn: Array
    """`[B, S, N, T]`: the same in resamples of the questions, drawn once for all methods."""
    cost: Mapping[str, Any]
    """Sums over the steps, means over the seeds: `steps`, `samples`, `seconds`; `trainable` of the last step."""

    def of_seeds(self, seeds: Sequence[int]) -> "Matrix":
        """The same of some of its seeds; its cost stays that of all."""
        index = [list(self.seeds).index(seed) for seed in seeds]
        return Matrix(list(seeds), self.observed[index], self.drawn[:, index], self.cost)

    @property
    def mean(self) -> Array:
        """`[N, T]`: the mean over seeds."""
        return self.observed.mean(axis=0)

    def spread(self, step: int, task: int) -> tuple[float, float]:
        """The 95% interval over questions of one accuracy."""
        return percentile_interval(self.drawn.mean(axis=1)[:, step, task])

    def numbers(self) -> dict[str, tuple[Array, Array]]:
        """Number -> by seed `[S]`, and in resamples of the questions `[B]`; of joint training only `last`."""
        if self.observed.shape[1] == 1:
            return {"last": (self.observed.mean(axis=(1, 2)), self.drawn.mean(axis=(1, 2, 3)))}
        here, there = continual_numbers(self.observed), continual_numbers(self.drawn)
        return {name: (here[name], there[name].mean(axis=-1)) for name in NUMBERS}


def collect_continual(
    continual: Continual, steps: Steps, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Matrix]:
    """Method -> its matrix, over the seeds whose runs and evaluations are all finished; absent if there is none.

    Raises:
        DataError: a score file is damaged.
        ConfigError: a column names a number that its benchmark does not have, or two runs answered other questions.
    """
    chains = {key: runs for key, runs in steps.runs.items() if all(_finished(steps, run) for run in runs)}
    ordered = list(dict.fromkeys(run for runs in chains.values() for run in runs))
    if not ordered:
        return {}
    scores = {run: _read_scores(steps, run) for run in ordered}
    place = {run: n for n, run in enumerate(ordered)}
    by_task = [
        _accuracies(continual, task, [scores[run] for run in ordered], resamples, seed) for task in continual.tasks
    ]
    observed = np.stack([values for values, _ in by_task], axis=-1)  # [runs, T]
    drawn = np.stack([values for _, values in by_task], axis=-1)  # [B, runs, T]
    found: dict[str, Matrix] = {}
    for method in continual.methods:
        seeds = [s for name, s in chains if name == method]
        if seeds:
            index = np.array([[place[run] for run in chains[method, s]] for s in seeds])  # [S, N]
            cost = _cost(steps, [chains[method, s] for s in seeds])
            found[method] = Matrix(seeds, observed[index], drawn[:, index], cost)
    return found


def _finished(steps: Steps, run: str) -> bool:
    cells = [run, *steps.evaluations[run].values()]
    return all(is_done(steps.plan.cells[name]) for name in cells)


def _read_scores(steps: Steps, run: str) -> dict[str, dict[str, Any]]:
    found = {}
    for own, name in steps.evaluations[run].items():
        path = steps.plan.cells[name].outputs[0]
        found[own] = read_score_file(path) | {"score_file": str(path)}
    return found


def _accuracies(
    continual: Continual, task: str, scores: Sequence[Mapping[str, dict[str, Any]]], resamples: int, seed: int
) -> tuple[Array, Array]:
    """A task's accuracy in every run, `[runs]`, and in resamples, `[B, runs]`: the mean over its numbers."""
    parts = []
    for number in continual.numbers(task):
        own, _, name = number.partition(".")
        files = [run[own] for run in scores]
        benchmark = stored_benchmark(files[0])
        units = [Units.from_dict(file["per_question"], file["score_file"]) for file in files]
        numbers = benchmark.expand_numbers(benchmark.groups or list(units[0].rows()))
        if name not in numbers:
            raise ConfigError(
                f"{continual.base.path}: a column has number {number!r}; the benchmark has {', '.join(numbers)}"
            )
        measured = Measured(units, statistic(name, numbers, list(units[0].fields)))
        try:
            # One draw for all numbers of a benchmark, and independent draws for different benchmarks.
            parts.append(resample(measured, resamples=resamples, seed=(seed, zlib.crc32(own.encode()))))
        except ValueError as error:
            raise ConfigError(f"{own}: {error}; evaluate them again on the same question files") from None
    return np.mean([values for values, _ in parts], axis=0), np.mean([drawn for _, drawn in parts], axis=0)


def _cost(steps: Steps, chains: Sequence[Sequence[str]]) -> dict[str, Any]:
    costs = [[read_cost(steps.plan.cells[run], []) for run in runs] for runs in chains]
    sums = {key: float(np.mean([sum(c[key] for c in run) for run in costs])) for key in ("steps", "samples", "seconds")}
    return sums | {"trainable": costs[0][-1]["trainable"]}


def to_json(
    continual: Continual, matrices: Mapping[str, Matrix], command: str, run_versions: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Everything that the report shows, as plain values; `run_versions` are the different ones of the finished runs."""
    first = next(iter(matrices), None)
    return {
        "title": continual.study.title,
        "command": command,
        "versions": run_versions,
        "notes": list(continual.study.notes),
        "tasks": list(continual.tasks),
        "split": continual.study.split,
        "numbers": NUMBERS,
        "methods": {
            name: {
                "label": continual.study.label(name),
                "schedule": continual.methods[name].schedule,
                "seeds": list(matrix.seeds),
                "matrix": matrix.mean.tolist(),
                "matrix_by_seed": matrix.observed.tolist(),
                "intervals": [
                    [list(matrix.spread(i, j)) for j in range(len(continual.tasks))] for i in range(len(matrix.mean))
                ],
                "numbers": {key: _entry(*values) for key, values in matrix.numbers().items()},
                "minus_first": {} if name == first else differences(matrices[str(first)], matrix),
                "cost": matrix.cost,
            }
            for name, matrix in matrices.items()
        },
    }


def _entry(by_seed: Array, drawn: Array) -> dict[str, Any]:
    low, high = percentile_interval(drawn)
    over_seeds = estimate(by_seed.tolist())
    return {"value": over_seeds.mean, "low": low, "high": high, "by_seed": by_seed.tolist(), "half": over_seeds.half}


def differences(first: Matrix, second: Matrix) -> dict[str, dict[str, Any]]:
    """Number -> `second - first` over the seeds that both have, with its interval over questions.

    The differences are paired: one draw of questions served both. Empty if the methods have no seed in common.
    """
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    if not seeds:
        return {}
    one, two = first.of_seeds(seeds).numbers(), second.of_seeds(seeds).numbers()
    found = {}
    for key in two:
        if key in one:
            low, high = percentile_interval(two[key][1] - one[key][1])
            value = float(two[key][0].mean() - one[key][0].mean())
            found[key] = {"value": value, "low": low, "high": high, "seeds": seeds}
    return found


def report_text(values: Mapping[str, Any], open_steps: int) -> str:
    """The report as text: a matrix for every method, the numbers, and the differences to the first method."""
    tasks, parts = values["tasks"], [values["title"], "=" * len(values["title"]), ""]
    for method in values["methods"].values():
        names = tasks if len(method["matrix"]) > 1 else ["all tasks"]
        rows = [["after", *tasks]]
        for name, means, spans in zip(names, method["matrix"], method["intervals"], strict=True):
            cells = [f"{m:.1f} [{low:.1f}, {high:.1f}]" for m, (low, high) in zip(means, spans, strict=True)]
            rows.append([name, *cells])
        seeds = ", ".join(map(str, method["seeds"]))
        parts += [f"{method['label']} (seed {seeds}): accuracy in percent [95% interval over questions]"]
        parts += [format_table(rows), ""]
    rows = [["method", "seeds", *NUMBERS, "steps", "time"]]
    for method in values["methods"].values():
        cells = [_number(method["numbers"].get(key)) for key in NUMBERS]
        cost = method["cost"]
        rows.append(
            [method["label"], str(len(method["seeds"])), *cells, f"{cost['steps']:g}", format_seconds(cost["seconds"])]
        )
    parts += ["numbers: percent [95% interval over questions], ± 95% interval over seeds (Student's t)"]
    parts += [format_table(rows), *(f"  {key}: {text}" for key, text in NUMBERS.items()), ""]
    rest = [method for method in values["methods"].values() if method["minus_first"]]
    if rest:
        first = next(iter(values["methods"].values()))["label"]
        rows = [["method", "seeds", *NUMBERS]]
        for method in rest:
            shown = [method["minus_first"].get(key) for key in NUMBERS]
            shared = next(len(d["seeds"]) for d in shown if d is not None)
            cells = [NOTHING if d is None else f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]" for d in shown]
            rows.append([method["label"], str(shared), *cells])
        parts += [f"differences to {first}, over the seeds of both, paired over questions", format_table(rows), ""]
    parts += [f"{values['split']} questions", *values["notes"]]
    parts += [f"{open_steps} runs are not finished yet"] if open_steps else []
    return "\n".join(parts)


def _number(entry: Mapping[str, Any] | None) -> str:
    if entry is None or not np.isfinite(entry["value"]):
        return NOTHING
    text = f"{entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"
    return text if entry["half"] is None else f"{text} ± {entry['half']:.1f}"


def draw_matrices(values: Mapping[str, Any], path: Path) -> Path:
    """Draw every method's matrix as a coloured table, one scale for all. Raises ConfigError without matplotlib."""
    tasks, methods = values["tasks"], list(values["methods"].values())
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    side = 0.9 + 0.62 * len(tasks)
    figure = new_figure(columns * (side + 0.9) + 0.9, rows * (side + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, axis in enumerate(axes.flat):
        if place >= len(methods):
            axis.set_axis_off()
            continue
        method = methods[place]
        matrix = np.array(method["matrix"])
        image = axis.imshow(matrix, vmin=0, vmax=100, cmap="viridis", aspect="auto" if len(matrix) == 1 else "equal")
        for i, j in np.ndindex(*matrix.shape):
            bold = "bold" if len(matrix) > 1 and i == j else "normal"
            color = "black" if matrix[i, j] > 60 else "white"
            axis.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", color=color, fontweight=bold, fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(matrix)), tasks if len(matrix) > 1 else ["all"], fontsize=8)
        tidy(axis, method["label"], y="after training on" if place % columns == 0 else "")
        axis.grid(visible=False)
    figure.suptitle(f"{values['title']}: accuracy in percent on each task's {values['split']} questions", fontsize=11)
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.7, label="%")
    return save_figure(figure, path)


def write_continual_report(continual: Continual, steps: Steps, folder: Path, command: str) -> tuple[str, list[Path]]:
    """Write `report.txt`, `continual.json` and `matrices.png`. Returns the text and the files.

    Raises:
        ConfigError: no method is finished yet, a file cannot be written, or matplotlib is missing.
    """
    matrices = collect_continual(continual, steps)
    open_steps = sum(not _finished(steps, run) for run in steps.evaluations)
    if not matrices:
        raise ConfigError(
            f"{continual.study.path}: no method is finished yet ({open_steps} of {len(steps.evaluations)} runs are "
            "open); `llava-mole continual status` shows them"
        )
    records = [read_json(steps.plan.cells[run].folder / DONE) for run in steps.evaluations if _finished(steps, run)]
    versions = list({str(record["versions"]): record["versions"] for record in records}.values())
    values = to_json(continual, matrices, command, versions)
    text = report_text(values, open_steps)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.txt", text + "\n")
    write_json(folder / "continual.json", _finite(values))
    picture = draw_matrices(values, folder / "matrices.png")
    return text, [folder / "report.txt", folder / "continual.json", picture]


def _finite(value: Any) -> Any:
    """`value` with None in place of numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
