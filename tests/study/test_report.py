"""The report of a study, from result files with known numbers; its statistics against formulas written out."""

import base64
import csv
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from worlds.study_world import write_study

from llava_mole.common.files import sha256_of_json
from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.scoring.score import score_benchmark, write_score_file
from llava_mole.study.cells import Plan, plan_study
from llava_mole.study.cli import main
from llava_mole.study.definition import read_study, variant
from llava_mole.study.inputs import Inputs
from llava_mole.study.results import collect, compare_arms, estimate, paired_t
from llava_mole.study.runner import is_done, versions
from llava_mole.study.tables import main_table

RIGHT = {"red": {0: (6, 0), 1: (4, 1)}, "mix": {0: (3, 3), 1: (4, 2)}, "mole": {0: (5, 6), 1: (5, 4)}}
"""Arm -> seed -> how many of the six red and the six blue questions are answered rightly."""
SHARE = {"red": [[0.75, 0.25], [0.5, 0.5]], "blue": [[0.25, 0.75], [1.0, 0.0]]}


def finish(plan: Plan, folder: Path, arms: Mapping[str, Mapping[int, tuple[int, int]]] = RIGHT) -> None:
    """Write what the cells' commands would have written."""
    loaded = load_questions(get_benchmark(str(folder / "colors_test.yaml")), data_root=Path(data_root(folder)))
    for cell in plan.cells.values():
        cell.folder.mkdir(parents=True, exist_ok=True)
        if cell.kind != "eval":
            (cell.folder / "run").mkdir(exist_ok=True)
            trained = {"projector": 10, "experts": 200, "router": 7} if "mole" in cell.name else {"FFN LoRA": 100}
            summary = {"step": 2, "samples_consumed": 8, "trainable_parameters": trained}
            summary["peak_memory_bytes"] = {"host": 1_500_000_000}
            (cell.folder / "run" / "summary.json").write_text(json.dumps(summary))
            lines = [{"step": n, "tokens": 100 * n, "step_s": 0.5} for n in (1, 2)]
            (cell.folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for (arm, seed), cells in plan.evaluations.items():
        if seed not in arms.get(arm, {}):
            continue
        cell = plan.cells[cells["colors"]]
        left = dict(zip(("red", "blue"), arms[arm][seed], strict=True))
        answers = {}
        for question, line in zip(loaded.questions, loaded.lines, strict=True):
            number = int(question.key.rpartition("-")[2])
            text = line["answer"] if number < left[question.group] else "no"
            answers[question.key] = {"prompt": question.text, "text": text, "model_id": "run"}
        scores: dict[str, Any] = {"answers": [], "model_path": "run", "routing": None}
        if arm == "mole":
            group = {
                name: {"all": {"samples": 6, "sample_mean": share, "sample_std": [[0.1, 0.1], [0.2, 0.2]]}}
                for name, share in SHARE.items()
            }
            (cell.folder / "colors_test.routing.json").write_text(json.dumps({"groups": group}))
            scores["routing"] = str(cell.folder / "colors_test.routing.json")
        write_score_file(cell.outputs[0], score_benchmark(loaded, answers, resamples=100) | scores)
    for cell in plan.cells.values():
        if all(path.is_file() for path in cell.outputs):
            record = {"digest": cell.digest, "seconds": 3.0, "command": list(cell.command), "versions": versions()}
            (cell.folder / "done.json").write_text(json.dumps(record))
            assert is_done(cell)


def data_root(folder: Path) -> str:
    return re.search(r"data_root: (.*)", (folder / "base.yaml").read_text())[1]  # type: ignore[index]


def prepared(
    folder: Path, right: Mapping[str, Mapping[int, tuple[int, int]]] = RIGHT, **more: Any
) -> tuple[Path, Plan]:
    path = write_study(folder, **({"figure3": ["mole"], "compare": [["mole", "mix"]]} | more))
    plan = plan_study(read_study(path), folder / "out", Inputs())
    finish(plan, folder, right)
    return path, plan


def arguments(path: Path) -> list[str]:
    return [str(path), "--cells", str(path.parent / "out")]


@pytest.fixture(scope="module")
def reported(study_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    import shutil

    folder = tmp_path_factory.mktemp("reported")
    for file in study_world.glob("*.yaml"):
        shutil.copy(file, folder)
    path, _ = prepared(folder, paper_table="t", layout=["mixture", "rank", "experts"])
    assert main(["report", *arguments(path)]) == 0
    return folder / "out" / "reports" / "study"


T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105}
"""Student's quantile by degrees of freedom, from printed tables."""


@pytest.mark.parametrize("values", [[50.0, 66.0], [1.0, 2.0, 4.0], [10.0, 11.0, 9.5, 10.25, 12.0]])
def test_intervals_over_seeds_are_students(values: list[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half == pytest.approx(T_975[n - 1] * deviation / math.sqrt(n), rel=1e-8)
    assert estimate(values[:1]).half is None


@pytest.mark.parametrize("differences", [[1.0, 2.0, 4.0], [0.1, -0.2, 0.5, 0.3], [-3.0, -2.5]])
def test_the_t_test_is_the_tail_of_students_density(differences: list[float]) -> None:
    n = len(differences)
    t = abs(np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(n)))
    df = n - 1
    # The density integrated up to t, by Simpson's rule.
    x = np.linspace(0, t, 200_001)
    density = (
        math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2)) * (1 + x**2 / df) ** (-(df + 1) / 2)
    )
    step = x[1] - x[0]
    inside = step / 3 * (density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum())
    assert paired_t(differences) == pytest.approx(1 - 2 * inside, abs=1e-8)


def test_there_is_no_t_test_without_variation() -> None:
    assert paired_t([3.0]) is None
    assert paired_t([3.0, 3.0]) is None
    # Two of 66 questions more, with each of two seeds: equal differences that rounding makes unequal.
    rounded = [100 * 5 / 66 - 100 * 3 / 66, 100 * 43 / 66 - 100 * 41 / 66]
    assert rounded[0] != rounded[1]
    assert paired_t(rounded) is None
    assert paired_t([1e-3, 2e-3]) is not None


def naive_holm(p_values: list[float]) -> list[float]:
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = largest
    return adjusted


def test_differences_over_seeds_and_over_questions(folder: Path) -> None:
    path, plan = prepared(folder, compare=[["mole", "mix"], ["mix", "red"], ["mole", "red"]])
    rows = compare_arms(collect(read_study(path), plan))
    assert len(rows) == 3 * 2
    red = next(row for row in rows if (row["second"], row["first"], row["column"]) == ("mole", "mix", "red"))
    assert red["by_seed"] == pytest.approx([100 * 2 / 6, 100 * 1 / 6])
    assert red["difference"] == pytest.approx(25.0)
    half = T_975[1] * np.std(red["by_seed"], ddof=1) / math.sqrt(2)
    assert red["over_seeds"]["low"] == pytest.approx(25.0 - half)
    # Over questions: the exact paired permutation test of the scores averaged over both seeds. Questions 0 to 2 are
    # right in all runs, 3 in both of MoLE's and one of Mix's, 4 in both of MoLE's and none of Mix's, 5 in none.
    difference = [0, 0, 0, 0.5, 1.0, 0]
    sums = [
        abs(sum(s * d for s, d in zip(signs, difference, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = sum(value >= 1.5 - 1e-9 for value in sums) / len(sums)
    assert red["over_questions"]["test"] == "permutation"
    assert red["over_questions"]["p_value"] == pytest.approx(exact, abs=0.02)
    for kind in ("over_seeds", "over_questions"):
        tested = [row[kind] for row in rows if row[kind]["p_value"] is not None]
        assert [t["p_value_holm"] for t in tested] == pytest.approx(naive_holm([t["p_value"] for t in tested]))


def test_one_seed_has_mcnemars_test(folder: Path) -> None:
    one = {arm: {0: seeds[0]} for arm, seeds in RIGHT.items()}
    path, plan = prepared(folder, one, compare=[["mole", "mix"]])
    red, blue = compare_arms(collect(read_study(path), plan))
    assert red["over_seeds"]["p_value"] is None
    assert (red["over_questions"]["test"], red["over_questions"]["p_value"]) == ("mcnemar", pytest.approx(0.5))
    assert blue["over_questions"]["p_value"] == pytest.approx(0.25)


def half(values: list[float]) -> str:
    return f"{T_975[1] * float(np.std(values, ddof=1)) / math.sqrt(2):.1f}"


def test_the_table_has_the_papers_rows_beside_ours(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header = rows[0]
    settings = ["λ red", "λ blue", "rank", "experts", "seeds"]
    assert header == ["#", "model", *settings, "measured (small): red", "blue", "paper: Red", "Blue"]
    assert rows[2] == ["0", "Other", "-", "-", "-", "-", "-", "-", "-", "12.5", "-"]
    hits = [50.0, 400 / 6]
    assert rows[3][:7] == ["1", "Mix", "1", "1", "1x", "no", "2 of 2"]
    assert rows[3][7:] == [f"{sum(hits) / 2:.1f} ± {half(hits)}", f"41.7 ± {half([50.0, 200 / 6])}", "40", "50.25"]
    assert rows[4][:6] == ["2", "MoLE", "1", "1", "1x", "2"]
    assert rows[4][7:] == ["83.3 ± 0.0", f"83.3 ± {half([100.0, 400 / 6])}", "45", "OOM"]
    assert rows[5][:4] == ["-", "red", "1", "0"]
    assert "two-sided" not in text


def test_costs_are_those_of_the_runs(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| MoLE | 2 |"))
    assert [c.strip() for c in row.strip("|").split("|")] == [
        "MoLE", "2", "207", "7", "10", "2", "8", "300", "1s", "1.5 GB", "3s"
    ]  # fmt: skip


def test_data_files_hold_the_same_numbers(reported: Path) -> None:
    values = json.loads((reported / "results.json").read_text())
    assert values["arms"]["mole"]["numbers"]["blue"]["by_seed"] == {"0": 100.0, "1": pytest.approx(400 / 6)}
    assert values["versions"]["llava_mole"]
    cells = values["cells"].values()
    assert all(cell["command"] and len(cell["digest"]) == 64 for cell in cells)
    assert all(cell["versions"]["python"] for cell in cells)
    assert "llava-mole study report" in values["command"]
    with (reported / "figure1.csv").open() as file:
        bars = list(csv.DictReader(file))
    (row,) = [b for b in bars if (b["column"], b["arm"], b["seed"]) == ("blue", "mole", "0")]
    assert (row["domain"], float(row["value"])) == ("blue", 100.0)
    assert {b["arm"] for b in bars if b["source"] == "paper"} == {"mix", "mole"}


def test_figure_3_has_the_shares_and_their_deviation(reported: Path) -> None:
    by_label = json.loads((reported / "figure3.json").read_text())["mole"]["0"]
    assert by_label["red"]["mean"] == SHARE["red"]
    assert by_label["red"]["std"] == [pytest.approx([0.1, 0.1]), pytest.approx([0.2, 0.2])]
    both = by_label["both"]
    assert both["samples"] == 12
    assert both["mean"] == [pytest.approx([0.5, 0.5]), pytest.approx([0.75, 0.25])]
    # The deviation over all twelve samples: 5 s^2 within each group, and 6 (0.25)^2 between them, twice.
    assert both["std"][0][0] == pytest.approx(math.sqrt((2 * 5 * 0.01 + 12 * 0.0625) / 11))
    with (reported / "figure3.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 3 * 2 * 2  # seeds, labels, layers, experts


def test_the_page_needs_nothing_else(reported: Path) -> None:
    page = (reported / "index.html").read_text()
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.startswith("data:image/png;base64,")
        assert base64.b64decode(picture.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.findall(r"(?:href|src|url\()\s*=?\s*[\"']?(?:https?:|//|\.|/)", page)
    assert "<script" not in page
    assert "<link" not in page
    assert "83.3 ± 0.0" in page
    assert "llava_mole.train.train" in page  # the commands
    for name in ("figure1.png", "figure3-mole.png"):
        assert Image.open(reported / name).width > 500


def test_a_report_of_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = prepared(folder, {"mix": {0: (3, 3)}})
    assert main(["report", *arguments(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Mix +1 +1 +no +1 of 2 +50.0 +50.0", printed)
    assert re.search(r"MoLE +1 +1 +2 +0 of 2 +- +-", printed)
    assert main(["report", *arguments(path)]) == 0  # replaces its own files


def test_a_report_of_nothing(folder: Path) -> None:
    path, _ = prepared(folder, {})
    assert main(["report", *arguments(path)]) == 0
    assert not list((folder / "out" / "reports" / "study").glob("*.png"))


def test_other_files_are_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = prepared(folder, {})
    (folder / "mine").mkdir()
    (folder / "mine" / "report.md").write_text("mine")
    assert main(["report", *arguments(path), "--out", str(folder / "mine")]) == 2
    assert "exists and is not a study's report" in capsys.readouterr().err
    assert (folder / "mine" / "report.md").read_text() == "mine"


def test_arms_with_the_same_row_of_the_paper_stand_beside_it_together(folder: Path) -> None:
    arms = {"a": {"label": "One", "paper": "t.1"}, "b": {"label": "Two", "paper": "t.1", "rank": "2x"}}
    right = {"a": {0: (3, 3)}, "b": {0: (4, 5)}}
    path, plan = prepared(folder, right, arms=arms, compare=[], figure3=[], paper_table="t")
    rows = main_table(collect(read_study(path), plan)).rows
    assert [(row[0], row[1]) for row in rows] == [("0", "Other"), ("1", "One"), ("1", "Two"), ("2", "MoLE")]


def test_a_report_is_not_replaced_while_inputs_are_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The finished cells that need them would not be recognised."""
    path, _ = prepared(folder)
    assert main(["report", *arguments(path)]) == 0
    report = folder / "out" / "reports" / "study" / "report.md"
    before = report.read_text()
    text = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(text.replace("data_root: ", "data_root: /nowhere"))
    capsys.readouterr()
    assert main(["report", *arguments(path)]) == 2
    said = capsys.readouterr().err
    assert "missing: " in said
    assert "1 input of the study is missing now" in said
    assert report.read_text() == before
    assert main(["report", *arguments(path), "--out", str(folder / "other")]) == 0
    assert "missing: " in capsys.readouterr().err


def test_a_report_of_other_questions_or_settings_has_a_place_of_its_own(folder: Path) -> None:
    path, _ = prepared(folder)
    study = read_study(path)
    assert variant(study) == "study"
    assert variant(read_study(path, split="validation")) == "study-validation"
    assert variant(read_study(path, settings={"train.max_steps": 20})) == "study-train.max_steps=20"
    many = {f"train.key_{n}": "x" * n for n in range(9)}
    assert re.fullmatch(r"study-set-[0-9a-f]{10}", variant(read_study(path, settings=many)))
    assert main(["report", *arguments(path)]) == 0
    assert main(["report", *arguments(path), "--split", "validation"]) == 0
    assert {p.name for p in (folder / "out" / "reports").iterdir()} == {"study", "study-validation"}


def test_figures_of_the_report_before_are_gone(folder: Path) -> None:
    """Those of an arm that is no longer shown; other files stay."""
    path, _ = prepared(folder)
    assert main(["report", *arguments(path)]) == 0
    report = folder / "out" / "reports" / "study"
    assert (report / "figure3-mole.png").is_file()
    (report / "mine.txt").write_text("mine")
    write_study(folder, figure3=[], compare=[["mole", "mix"]])
    assert main(["report", *arguments(path)]) == 0
    assert not list(report.glob("figure3*"))
    assert (report / "mine.txt").is_file()
    assert (report / "figure1.png").is_file()


def test_names_from_files_are_escaped(folder: Path) -> None:
    path, _ = prepared(folder, {"x": {0: (3, 3)}}, arms={"x": {"label": "<b>A & |B|</b>"}}, compare=[], figure3=[])
    assert main(["report", *arguments(path)]) == 0
    page = (folder / "out" / "reports" / "study" / "index.html").read_text()
    assert "&lt;b&gt;A &amp; |B|&lt;/b&gt;" in page
    assert "<b>" not in page


def test_validation_names_the_best_arm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of the validation questions has the same shape here, so the same scores serve."""
    text = (folder / "base.yaml").read_text()
    (folder / "base.yaml").write_text(text.replace("colors: colors_val.yaml", "colors: colors_test.yaml"))
    path, _ = prepared(folder, split="validation")
    assert main(["report", *arguments(path)]) == 0
    assert "Chosen by the validation split (mean over domains): mole. All arms: mole 83.33" in capsys.readouterr().out


def test_the_choice_names_domains_without_validation_questions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["benchmarks"] = {"test": {"colors": "colors_test.yaml", "more": "colors_val.yaml"},
                          "validation": {"colors": "colors_test.yaml"}}  # fmt: skip
    base["columns"]["blue"]["number"] = "more.blue"
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path, _ = prepared(folder, split="validation")
    assert main(["report", *arguments(path)]) == 0
    assert "(mean over red; no questions of blue): " in capsys.readouterr().out


def test_digests_are_those_of_the_identity(folder: Path) -> None:
    _, plan = prepared(folder, {})
    for cell in plan.cells.values():
        assert cell.digest == sha256_of_json(json.loads(json.dumps(cell.identity)))
        assert cell.folder.name.endswith(cell.digest[:10])
