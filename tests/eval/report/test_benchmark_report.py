"""The comparison of runs on benchmarks: tables, tests, warnings, and every form it is written in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_mole import cli
from llava_mole.common.errors import ConfigError
from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.report.compare import build_benchmarks, read_runs
from llava_mole.eval.report.figure import draw_benchmarks
from llava_mole.eval.report.formats import format_p, to_latex, to_markdown, to_text
from llava_mole.eval.scoring.score import score_benchmark, write_score_file

RIGHT = {"mix": 10, "mole": 18}
COUNT = 20


def write_run(folder: Path, name: str, right: int, *, count: int = COUNT, prompt: str = "") -> Path:
    """Scores of ChartQA (human) and PathVQA (closed): the first `right` of `count` answers are right."""
    for benchmark, line in (
        ("chartqa", {"category": "human", "answer": "yes"}),
        ("pathvqa", {"category": "closed", "answer": "yes"}),
    ):
        path = folder / f"{benchmark}-{count}.jsonl"
        lines = [{"question_id": n, "text": f"Q{n}?", **line} for n in range(count)]
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        loaded = load_questions(get_benchmark(benchmark), files=[str(path)])
        suffix = prompt if benchmark == "chartqa" else ""
        answers = {
            str(n): {"prompt": f"Q{n}?{suffix}", "text": "yes" if n < right else "", "model_id": name}
            for n in range(count)
        }
        scores = score_benchmark(loaded, answers, resamples=100)
        scores |= {"answers": [f"{name}.jsonl"], "model_path": name, "routing": None}
        write_score_file(folder / name / f"{benchmark}.score.json", scores)
    return folder / name


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, right in RIGHT.items():
        write_run(tmp_path, name, right)
    return tmp_path


def build(*arguments: Path | str, **options: str) -> dict:
    return build_benchmarks(read_runs([], [str(argument) for argument in arguments]), resamples=200, **options)


def test_numbers_published_rows_and_tests(runs: Path) -> None:
    report = build(runs / "mix", runs / "mole")
    assert list(report) == ["chartqa", "pathvqa"]
    chart = report["chartqa"]
    assert [run["numbers"]["overall"]["value"] for run in chart["runs"].values()] == [50, 90]
    assert (chart["columns"], chart["compared"]) == (["overall", "human", "augmented"], ["overall"])
    assert {
        "model": "LLaVA-MoLE K=3 [1,1,1]",
        "source": "LLaVA-MoLE, Table 2 #13",
        "values": {"overall": 42.36},
    } in chart["published"]
    assert not [row for row in chart["published"] if "Table 3" in row["source"]]
    # 8 discordant pairs, all better: McNemar p = 2 / 2^8. Nothing was asked of `augmented`, so it is not compared.
    found = {result["number"]: result for result in chart["comparisons"]}
    assert set(found) == {"overall", "human"}
    assert (found["overall"]["better"], found["overall"]["worse"]) == (8, 0)
    assert found["overall"]["p_value"] == pytest.approx(2 / 2**8)
    tests = [row for entry in report.values() for row in entry["comparisons"]]
    assert [row["p_value_holm"] for row in tests] == pytest.approx([4 * 2 / 2**8] * 4)  # over both benchmarks
    assert chart["warnings"] == [
        "mix: 20 questions, the complete set has 2500",
        "mole: 20 questions, the complete set has 2500",
    ]


def test_which_published_rows(runs: Path) -> None:
    assert len(build(runs / "mix", published="all")["chartqa"]["published"]) == 26
    assert build(runs / "mix", published="none")["chartqa"]["published"] == []


def test_different_questions_are_said_and_not_compared(runs: Path) -> None:
    other = write_run(runs, "small", 5, count=10)
    chart = build(runs / "mix", other)["chartqa"]
    assert chart["comparisons"] == []
    assert (
        "mix and small were scored on different question sets (20 and 10 questions): not compared" in chart["warnings"]
    )


def test_different_prompts_are_said(runs: Path) -> None:
    other = write_run(runs, "short", 5, prompt="\nAnswer the question with a single word.")
    chart = build(runs / "mix", other)["chartqa"]
    assert chart["comparisons"]
    assert "mix was asked with prompt default, short with lmms-eval" in " ".join(chart["warnings"])


def test_different_definitions_are_not_compared(runs: Path) -> None:
    path = runs / "mole" / "chartqa.score.json"
    scores = json.loads(path.read_text())
    scores["definition"]["metrics"]["*"].append("vqa_exact")
    path.write_text(json.dumps(scores))
    chart = build(runs / "mix", runs / "mole")["chartqa"]
    assert chart["comparisons"] == []
    assert "mix and mole were scored by different metrics: not compared; score again" in chart["warnings"]


def test_text(runs: Path) -> None:
    text = to_text(build(runs / "mix", runs / "mole"))
    lines = text.split("\n")
    assert re.match(r"model +source +ChartQA test: overall +PathVQA test: open +closed$", lines[1])
    order = [
        lines.index(next(line for line in lines if line.startswith(name)))
        for name in ("LLaVA-Mix [1,2,0]", "LLaVA-Mix [1,2,1]", "mix ", "mole ")
    ]
    assert order == sorted(order)  # row 9 before row 10, ours last
    assert lines[order[2] - 1].startswith("-----")
    assert re.search(r"^mole +measured +90\.00 +- +90\.00$", text, re.M)
    assert "90.00 [69.9, 97.2] 18/20" in text
    assert re.search(r"^mole - mix +overall +\+40\.00 \[.*\] +0\.00781 +0\.031[23] \* +\+8 -0 +mcnemar$", text, re.M)
    assert "warning: mix: 20 questions, the complete set has 2500" in text
    assert "note: mole has 2 empty answers" in text


def test_markdown_and_latex(runs: Path) -> None:
    report = build(runs / "mix", runs / "mole")
    markdown, latex = to_markdown(report), to_latex(report)
    assert "| LLaVA-MoLE K=3 [1,1,1] | LLaVA-MoLE, Table 2 #13 | 42.36 | 30.97 | 91.56 |" in markdown
    assert "| mole - mix | overall |" in markdown
    tables = [part for part in markdown.split("\n\n") if part.startswith("|")]
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.split("\n")}) == 1
    assert r"LLaVA-MoLE K=3 {[}1,1,1] & LLaVA-MoLE, Table 2 \#13 & 42.36 & 30.97 & 91.56 \\" in latex
    assert r"\multicolumn{2}{c}{} & \multicolumn{1}{c}{ChartQA test} & \multicolumn{2}{c}{PathVQA test} \\" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 5
    assert r"percent [95\% interval]" in latex


@pytest.mark.parametrize(
    ("name", "markdown", "latex"),
    [
        ("*a|b", r"\*a\|b", r"{*}a\textbar{}b"),
        ("[x](y)", r"[x]\(y)", "{[}x](y)"),
        ("a\n\tb", "a b", "a b"),
        ("&lt; ~_^", r"\&lt; \~\_^", r"\&lt; \textasciitilde{}\_\textasciicircum{}"),
        (r"$\foo$ 5% {#}", r"\$\\foo\$ 5% {#}", r"\$\textbackslash{}foo\$ 5\% \{\#\}"),
        ("_hidden", r"\_hidden", r"\_hidden"),
    ],
)
def test_odd_names(name: str, markdown: str, latex: str, runs: Path) -> None:
    out = runs / "out"
    assert cli.main(["report", f"{name}={runs / 'mix'}", "--out", str(out), "--published", "none"]) == 0
    assert f"\n| {markdown} | measured | 50.00 |" in (out / "report.md").read_text()
    assert f"\n{latex} & measured & 50.00 &" in (out / "report.tex").read_text()
    assert f"\n{' '.join(name.split())}  measured  50.00" in re.sub("  +", "  ", (out / "report.txt").read_text())


def test_the_picture_shows_odd_names(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("llava_mole.eval.report.figure.save_figure", lambda figure, path: figures.append(figure))
    assert draw_benchmarks(build(f"_a$b$={runs / 'mix'}"), runs / "x.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [r" _a\$b\$"]


def test_p_values() -> None:
    assert [format_p(p) for p in (1.0, 0.04567, 0.00012, 0.000012)] == ["1", "0.0457", "0.00012", "1.2e-05"]


def test_command_writes_every_form(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "report"
    command = ["report", str(runs / "mix"), f"ours={runs / 'mole'}", "--out", str(out), "--published", "none"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "ours - mix" in printed
    assert (out / "report.txt").read_text() in printed
    assert json.loads((out / "report.json").read_text())["benchmarks"]["chartqa"]["primary"] == "overall"
    assert (out / "report.md").read_text().startswith("**Benchmarks")
    assert "\\toprule" in (out / "report.tex").read_text()
    assert cli.main(command) == 2
    assert "report.json exists; give --overwrite" in capsys.readouterr().err
    (out / "accuracy.png").write_bytes(b"of another report")
    assert cli.main([*command, "--overwrite"]) == 0
    assert not (out / "accuracy.png").exists()
    pytest.importorskip("matplotlib")
    assert (out / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_names_whole_paths(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert cli.main(["report", "mix", "mole", "--out", "report"]) == 0
    report = json.loads((runs / "report" / "report.json").read_text())
    score_file = report["benchmarks"]["chartqa"]["runs"]["mole"]["score_file"]
    assert score_file == str((runs / "mole" / "chartqa.score.json").resolve())


def test_without_a_folder_nothing_is_written(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(runs.rglob("*"))
    assert cli.main(["report", str(runs / "mix" / "chartqa.score.json")]) == 0
    assert "chartqa" in capsys.readouterr().out
    assert sorted(runs.rglob("*")) == before


def test_runs_of_different_benchmarks_share_the_table(runs: Path) -> None:
    text = to_text(build(runs / "mix" / "chartqa.score.json", f"other={runs / 'mole' / 'pathvqa.score.json'}"))
    assert re.search(r"^chartqa +measured +50\.00 +- +-$", text, re.M)
    assert re.search(r"^other +measured +- +- +90\.00$", text, re.M)


def test_errors(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: str) -> str:
        assert cli.main(["report", *given]) == 2
        return capsys.readouterr().err

    assert "no run to report" in refused()
    assert "the name 'mix' is given twice" in refused(str(runs / "mix"), str(runs / "mix"))
    (runs / "mix" / "again.score.json").write_text((runs / "mix" / "chartqa.score.json").read_text())
    assert "hold scores of chartqa; name the file" in refused(str(runs / "mix"))
    path = runs / "mole" / "chartqa.score.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in scores.items() if key != "per_question"}))
    assert "no per_question in it" in refused(str(path))
    path.write_text(json.dumps(scores | {"definition": {"data": 1}}))
    assert "its definition is damaged" in refused(str(path))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two runs scored on a tiny world of four questions a domain, with training splits."""
    root = tmp_path / "data"
    for domain in ("general", "document", "biomedicine"):
        folder = root / "tiny" / domain
        folder.mkdir(parents=True)
        lines = [{"question_id": f"{domain}-{n}", "text": "Red?", "image": "a.png", "answer": "yes"} for n in range(4)]
        (folder / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        turns = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "yes" if domain == "general" else "no"}]
        (folder / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    for name, text in (("a", "no"), ("b", "Yes.")):
        (tmp_path / name).mkdir()
        answers = [
            {"question_id": f"{domain}-{n}", "prompt": "Red?", "text": text}
            for domain in ("general", "document", "biomedicine")
            for n in range(4)
        ]
        path = tmp_path / name / "tiny.jsonl"
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        assert cli.main(["score", str(path), "--benchmark", "tiny", "--data-root", str(root)]) == 0
    return tmp_path


def test_the_tiny_world_has_both_comparisons(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tiny / "a"), str(tiny / "b"), "--out", str(tiny / "out")]) == 0
    printed = capsys.readouterr().out
    assert "b - a  mean         +100.00 [+100.00, +100.00]" in printed
    majority = re.search(r"^general +100\.0 .* 4/4 +0\.0 .* 0/4 +100\.0 .* 4/4$", printed, re.M)
    assert majority, printed
    assert "ASSISTANT: Yes.   (right)" in printed
    assert {path.name for path in (tiny / "out").iterdir()} >= {"report.txt", "report.json", "report.md", "report.tex"}
    entry = json.loads((tiny / "out" / "report.json").read_text())["benchmarks"]["tiny"]
    assert set(entry) >= {"runs", "comparisons", "groups", "routing", "examples"}


def test_tiny_runs_on_other_questions_have_no_common_domains(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny / "data" / "tiny" / "general" / "test_questions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    answers = (tiny / "b" / "tiny.jsonl").read_text().splitlines(keepends=True)
    (tiny / "b" / "tiny.jsonl").write_text("".join(answers[:2] + answers[4:]))
    command = ["score", str(tiny / "b" / "tiny.jsonl"), "--benchmark", "tiny", "--data-root", str(tiny / "data")]
    assert cli.main([*command, "--overwrite"]) == 0
    assert cli.main(["report", str(tiny / "a"), str(tiny / "b")]) == 0
    printed = capsys.readouterr().out
    assert "warning: a and b were scored on different question sets (12 and 10 questions): not compared" in printed
    assert "commonest answer from" not in printed.split("Benchmarks, in percent")[1]


def test_a_run_directory_holds_its_scores_in_eval(runs: Path) -> None:
    (runs / "run").mkdir()
    (runs / "mole").rename(runs / "run" / "eval")
    assert list(read_runs([], [str(runs / "run")])) == ["run"]
    assert list(read_runs([], [str(runs / "run" / "eval")])) == ["run"]
    assert set(read_runs([f"a={runs / 'run'}"], [])["a"]) == {"chartqa", "pathvqa"}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("benchmark",), 5, "benchmark is damaged (5)"),
        (("numbers",), {}, "its definition shows overall, human, augmented, for which it has no number"),
        (("numbers", "overall"), 5, "number 'overall' is damaged (5)"),
        (("numbers", "overall", "low"), None, "number 'overall' is damaged"),
        (("numbers", "overall", "value"), float("nan"), "number 'overall' is damaged"),
        (("numbers", "overall", "n"), "x", "number 'overall' is damaged"),
        (("prompt",), {}, "prompt is damaged ({})"),
        (("definition", "columns"), 5, "its definition is damaged"),
        (("definition", "metrics"), {"*": ["gone"]}, "its definition is damaged (no metric 'gone'"),
        (("definition", "numbers", "overall", "value"), "gone.hit", "its definition is damaged"),
    ],
)
def test_damaged_scores_are_named(
    keys: tuple[str, ...], value: object, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "mole" / "chartqa.score.json"
    scores = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(scores))
    assert cli.main(["report", str(runs / "mix"), str(runs / "mole")]) == 2
    assert f"chartqa.score.json: {message}" in capsys.readouterr().err


def test_null_definition_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "mole" / "chartqa.score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"definition": None}))
    assert cli.main(["report", str(runs / "mix"), str(runs / "mole")]) == 2
    assert "chartqa.score.json: its definition is damaged" in capsys.readouterr().err


def test_every_pair_is_compared_or_those_with_one_reference(runs: Path) -> None:
    third = write_run(runs, "third", 12)
    pairs = [(c["first"], c["second"]) for c in build(runs / "mix", runs / "mole", third)["pathvqa"]["comparisons"]]
    assert sorted(set(pairs)) == [("mix", "mole"), ("mix", "third"), ("mole", "third")]
    report = build(runs / "mix", runs / "mole", third, reference="mole")["pathvqa"]
    assert {(c["first"], c["second"]) for c in report["comparisons"]} == {("mole", "mix"), ("mole", "third")}
    with pytest.raises(ConfigError, match="--reference 'none': no such run; there are mix, mole"):
        build(runs / "mix", runs / "mole", reference="none")
