"""Each official layout becomes question lines that the benchmark's metrics can score; damaged ones are refused."""

import json
from pathlib import Path

import pytest
from worlds.benchmark_layouts import (
    CASES,
    chartqa,
    deepform,
    docvqa,
    due,
    gqa,
    mmbench,
    pope,
    put,
    scienceqa,
    seed,
    textvqa_ocr,
    ureader,
)

from llava_mole import cli
from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.scoring.score import score_benchmark


@pytest.mark.parametrize("case", CASES)
def test_official_layouts(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = case.split(" ")[0]
    write, expected = CASES[case]
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw)
    assert cli.main(["prepare-benchmark", name, "--raw", str(raw), "--out", str(out)]) == 0, capsys.readouterr().err
    benchmark = get_benchmark(name)
    loaded = load_questions(benchmark, files=[str(out / "questions.jsonl")])
    found = [
        (
            question.images[0] if question.images else None,
            question.text,
            question.group,
            line.get("values", line.get("answers", [line["answer"]] if "answer" in line else None)),
        )
        for question, line in zip(loaded.questions, loaded.lines, strict=True)
    ]
    assert found[: len(expected)] == expected
    report = json.loads((out / "prepared.json").read_text())
    assert (report["benchmark"], report["questions"]) == (name, len(found))
    assert str(loaded.image_folder) == report["image_folder"]
    assert all(len(digest) == 64 for digest in report["sources"].values())
    if benchmark.primary and name not in ("mme", "tiny_ehub"):  # the questions can be scored
        if name in ("docvqa", "docvqa_val"):
            pytest.importorskip("rapidfuzz")
        answers = {q.key: {"text": "x"} for q in loaded.questions}
        assert score_benchmark(loaded, answers, resamples=10)["total"] == len(found)


def test_what_the_user_should_know_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chartqa(tmp_path / "chart")
    deepform(tmp_path / "form")
    assert cli.main(["prepare-benchmark", "chartqa", "--raw", str(tmp_path / "chart"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "3 questions (human 1, augmented 1, unknown 1)" in printed
    assert "note: the complete ChartQA test has 2500 questions" in printed
    assert "note: 1 of 3 questions have no known split" in printed
    out = str(tmp_path / "f")
    assert cli.main(["prepare-benchmark", "deepform", "--raw", str(tmp_path / "form"), "--out", out]) == 0
    assert "note: no question asks for 1 value of the references; the recall counts them" in capsys.readouterr().out


def test_golds_follow_the_question_not_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"Number {n}?" for n in range(20)]
    asked = [names[1], names[0], *names[2:19], "Reworded?"]
    put(tmp_path / "test_DocVQA.jsonl", [ureader("d/1.png", question, "x") for question in asked])
    values = [(name, [{"value": name, "value_variants": [name]}]) for name in names]
    put(tmp_path / "DUE/DocVQA/test/document.jsonl", [due("1", *values[:5]), due("2", *values[5:])])
    command = ["prepare-benchmark", "docvqa", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    pytest.importorskip("rapidfuzz")
    assert cli.main(command) == 0
    assert "note: 1 of 20 questions differ from the references'" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == asked
    assert [line["answers"] for line in lines] == [[name] for name in (*asked[:19], names[19])]


def test_seed_has_the_ids_of_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed(tmp_path)
    assert cli.main(["prepare-benchmark", "seed", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "note: 1 of 2 questions of" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/questions.jsonl").read_text())["question_id"] == "9"


def test_ocr_hints_are_not_left_out_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    textvqa_ocr(tmp_path)
    put(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [])
    command = ["textvqa_ocr", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "llava_textvqa_val_v051_ocr.jsonl has no question 'What Brand?' about image 003a" in refused(
        capsys, *command
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["prepare-benchmark", *arguments]) == 2
    return capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gqa(tmp_path / "raw")
    command = ["gqa", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert cli.main(["prepare-benchmark", *command]) == 0
    assert "questions.jsonl exists; give --overwrite to replace it" in refused(capsys, *command)
    assert cli.main(["prepare-benchmark", *command, "--overwrite"]) == 0


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()

    def given(name: str) -> str:
        return refused(capsys, name, "--raw", str(raw), "--out", str(tmp_path / "out"))

    assert "benchmark tiny needs no conversion" in given("tiny")
    assert "no such directory; gqa needs testdev_balanced" in refused(capsys, "gqa", "--raw", str(tmp_path / "no"))
    assert "none of testdev_balanced_questions.json" in given("gqa")
    put(raw / "testdev_balanced_questions.json", {"20": {"question": "?"}})
    assert "testdev_balanced_questions.json: 20: no 'imageId' in it; found question" in given("gqa")
    put(raw / "testdev_balanced_questions.json", "{")
    assert "testdev_balanced_questions.json is not valid JSON" in given("gqa")
    put(raw / "testdev_balanced_questions.json", {})
    assert "no questions in it" in given("gqa")
    assert "Visual_Reasoning/dataset.json: no such file" in given("tiny_ehub")
    put(raw / "test_TabFact.jsonl", [{"image": ["a.png"], "conversations": []}])
    assert "test_TabFact.jsonl:1: 'conversations' needs" in given("tabfact")
    (raw / "test_TabFact.jsonl").write_text('\n\n{"conversations": []}')
    assert "test_TabFact.jsonl:3: no 'image' in it; found conversations" in given("tabfact")
    put(raw / "existence" / "1.txt", "Is it?\tYes\n")
    assert "no image 1.* for it" in given("mme")
    put(raw / "existence" / "1.jpg", "")
    put(raw / "existence" / "1.txt", "Is it? Yes\n")
    assert "1.txt:1: no tab between question and answer" in given("mme")
    assert not (tmp_path / "out").exists()


def test_key_values_of_the_whole_corpus(tmp_path: Path) -> None:
    """Every value is wanted: of fields asked twice once, of fields and documents that no question names, too."""
    asked = [("doc1", "advertiser"), ("doc1", "advertiser"), ("doc2", "flight_to")]
    rows = [ureader(f"f/{name}.pdf.0.png", f"What is the value for the {key}?", "Acme") for name, key in asked]
    put(tmp_path / "ureader_json/test_DeepForm.jsonl", rows)
    acme, day = [{"value": "Acme"}], [{"value": "1/2"}, {"value": "3/4"}]
    unasked = due("doc4", ("advertiser", acme), ("advertiser", acme))
    named = [due("doc1", ("advertiser", acme), ("flight_from", day)), due("doc2", ("flight_to", day))]
    put(tmp_path / "DUE/DeepForm/test/document.jsonl", [*named, due("doc3"), unasked])
    out = tmp_path / "out"
    assert cli.main(["prepare-benchmark", "deepform", "--raw", str(tmp_path), "--out", str(out)]) == 0
    loaded = load_questions(get_benchmark("deepform"), files=[str(out / "questions.jsonl")])
    assert [line["field"] for line in loaded.lines] == [f"{name}/{key}" for name, key in asked]
    assert sum(line.get("unasked", 0) for line in loaded.lines) == 4
    answers = {q.key: {"text": text} for q, text in zip(loaded.questions, ("Acme", "acme", "3/4"), strict=True)}
    f1 = score_benchmark(loaded, answers, resamples=10)["numbers"]["f1"]
    assert (f1["k"], f1["n"]) == (2 * 2, 3 + 7)  # two of three predictions match, seven values are wanted


def test_references_of_another_set_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docvqa(tmp_path)
    command = ["docvqa", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    path = tmp_path / "benchmark_files/DUE/DocVQA/test/document.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    assert "only 0 of 2 questions are those of" in refused(capsys, *command)
    put(path, [due("1", ("What date?", [])), json.loads(lines[1])])
    assert "test_DocVQA.jsonl:1: the reference 'What date?' needs a list of 'values', at least one" in refused(
        capsys, *command
    )
    path.write_text(lines[0])
    assert "has 2 questions," in refused(capsys, *command)
    deepform(tmp_path)
    put(tmp_path / "DUE/DeepForm/test/document.jsonl", [due("other")])
    (tmp_path / "benchmark_files").rename(tmp_path / "elsewhere")
    assert "document 'doc1' is not in" in refused(
        capsys, "deepform", "--raw", str(tmp_path), "--out", str(tmp_path / "o")
    )


def test_a_failed_overwrite_keeps_the_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gqa(tmp_path)
    command = ["gqa", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["prepare-benchmark", *command]) == 0
    good = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    item = {"question": "Which side?", "imageId": "n1", "answer": "left"}
    for wrong, message in (({"question": 5}, "'text'"), ({"answer": 5}, "out/questions.jsonl:1: 'answer' must be")):
        put(tmp_path / "testdev_balanced_questions.json", {"20": item | wrong})
        assert message in refused(capsys, *command, "--overwrite")
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == good
    pope(tmp_path)
    path = tmp_path / "coco/coco_pope_random.json"
    path.write_text(path.read_text().replace('"yes"', '"maybe"'))
    command = ["pope", "--raw", str(tmp_path), "--out", str(tmp_path / "pope")]
    assert "pope/questions.jsonl:1: the gold answer is 'maybe'; it must be yes or no" in refused(capsys, *command)
    assert not (tmp_path / "pope").exists()


@pytest.mark.parametrize(
    ("case", "file", "change", "message"),
    [
        (
            "docvqa",
            "benchmark_files/DUE/DocVQA/test/document.jsonl",
            (0, "annotations"),
            "'annotations' must be a list",
        ),
        ("docvqa", "benchmark_files/DUE/DocVQA/test/document.jsonl", (0, "annotations", 0), "no 'key' in it; found 5"),
        ("deepform", "DUE/DeepForm/test/document.jsonl", (0, "annotations", 0, "values"), "'values' must be a list"),
        (
            "deepform",
            "DUE/DeepForm/test/document.jsonl",
            (0, "annotations", 0, "values", 0, "value_variants"),
            "'value_variants' must be a list; found 5",
        ),
        (
            "deepform",
            "DUE/DeepForm/test/document.jsonl",
            (0, "annotations", 0, "values", 0),
            "no 'value' in it; found 5",
        ),
        ("scienceqa", "llava_test_CQM-A.json", (0, "conversations"), "item 0: 'conversations' must be a list"),
    ],
)
def test_values_of_another_type_are_named(
    case: str, file: str, change: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES[case][0](tmp_path)
    lines = file.endswith(".jsonl")
    text = (tmp_path / file).read_text()
    whole = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    inner = whole
    for key in change[:-1]:
        inner = inner[key]
    inner[change[-1]] = 5
    put(tmp_path / file, whole)
    assert message in refused(capsys, case, "--raw", str(tmp_path), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("case", "file", "content", "message"),
    [
        ("gqa", "testdev_balanced_questions.json", b"[" * 100_000, "is not valid JSON: maximum recursion"),
        ("tabfact", "test_TabFact.jsonl", b"[" * 100_000, ":1: not valid JSON (maximum recursion"),
        ("mme", "existence/1.txt", b"\xff", "existence/1.txt: cannot be read as UTF-8 text"),
        ("mmbench", "mmbench_dev_20230712.tsv", b"index\xff", "cannot be read as TSV"),
        ("mmbench", "mmbench_dev_20230712.tsv", b"index\timage\n1\n", "row 1 does not have the columns"),
        ("mmbench", "mmbench_dev_20230712.tsv", b"index\timage\n1\t2\t3\n", "row 1 does not have the columns"),
    ],
)
def test_files_of_another_kind_are_named(
    case: str, file: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES[case][0](tmp_path)
    (tmp_path / file).write_bytes(content)
    assert message in refused(capsys, case, "--raw", str(tmp_path), "--out", str(tmp_path / "out"))


def test_mmbench_options_end_at_the_first_missing_one(tmp_path: Path) -> None:
    mmbench(tmp_path / "raw")
    path = tmp_path / "raw" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tx\ty\tnan\t\t", "\tx\tnan\tz\tw\t"))
    command = ["mmbench", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert cli.main(["prepare-benchmark", *command]) == 0
    assert json.loads((tmp_path / "out/questions.jsonl").read_text())["text"] == "A hint\nWhich?\nA. x"


def test_mmbench_writes_below_its_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmbench(tmp_path / "raw")
    path = tmp_path / "raw" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("241", "../../stolen"))
    command = ["mmbench", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert "row 1: index '../../stolen' must be of letters, digits" in refused(capsys, *command)
    assert [found.name for found in tmp_path.rglob("*.jpg*")] == []


def test_science_qa_answer_beyond_the_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scienceqa(tmp_path)
    command = ["scienceqa", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    for answer in (2, -1, "B"):
        put(tmp_path / "problems.json", {key: {"answer": answer, "choices": ["x", "y"]} for key in ("4", "5")})
        assert f"item 0: answer {answer!r} of " in refused(capsys, *command)
