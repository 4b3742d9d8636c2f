"""Each official layout becomes question lines that the benchmark's metrics can score; damaged ones are refused."""

import base64
import json
from pathlib import Path

import pytest

from llava_mole import cli
from llava_mole.eval.benchmark_questions import load_questions
from llava_mole.eval.benchmark_score import score_benchmark
from llava_mole.eval.registry import get_benchmark

SHORT = "\nAnswer the question using a single word or phrase."
CLOSED = " Please choose from the following two options: [yes, no]"
LETTER = "\nAnswer with the option's letter from the given choices directly."


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        assert isinstance(value, list)
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def ureader(image: str, question: str, answer: str) -> dict:
    turns = [("user", "<image>"), ("user", question), ("assistant", answer)]
    return {
        "image": [image],
        "prompt": "",
        "text": "",
        "system_instruction": "",
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "task_type": "qa_sft",
    }


def due(name: str, *annotations: tuple[str, list[dict]]) -> dict:
    return {"name": name, "annotations": [{"key": key, "values": values} for key, values in annotations]}


def tiny_ehub(raw: Path) -> None:
    for folder in get_benchmark("tiny_ehub").data.options["folders"].split():
        name = folder.partition("=")[0]
        golds: object = ["Yes", "yeah"] if name == "Visual_Reasoning" else "Yes"
        put(raw / name / "dataset.json", [{"image_path": "/old/place/1.jpg", "question": "Q?", "gt_answers": golds}])


def chartqa(raw: Path) -> None:
    rows = [ureader("ChartQA/test/png/1.png", "How many?", "10"), ureader("ChartQA/test/png/2.png", "Which?", "UK.")]
    put(raw / "test_ChartQA.jsonl", [*rows, ureader("ChartQA/test/png/3.png", "Lost?", "5")])
    put(raw / "test_human.json", [{"imgname": "1.png", "query": "How many? ", "label": "10"}])
    put(raw / "test_augmented.json", [{"imgname": "2.png", "query": "Which?", "label": "UK"}])


def chartqa_official(raw: Path) -> None:
    put(raw / "test_human.json", [{"imgname": "1.png", "query": "How many?", "label": "10"}])
    put(raw / "test_augmented.json", [{"imgname": "2.png", "query": "Which?", "label": "UK"}])


def docvqa(raw: Path) -> None:
    put(raw / "test_DocVQA.jsonl", [ureader("d/1.png", "What date?", "x"), ureader("d/2.png", "Who?", "x")])
    first = due("1", ("What  date", [{"value": "1 May", "value_variants": ["1 May", "May 1"]}]))
    second = due("2", ("Who?", [{"value": "Ann", "value_variants": ["Ann"]}]))
    put(raw / "benchmark_files/DUE/DocVQA/test/document.jsonl", [first, second])


def docvqa_val(raw: Path) -> None:
    put(raw / "val_v1.0.json", {"data": [{"questionId": 7, "question": "Q?", "answers": ["a"], "image": "d/1.png"}]})


def wtq(raw: Path) -> None:
    put(raw / "test_WikiTableQuestions.jsonl", [ureader("w/1.png", "Which two?", "a, b")])
    put(
        raw / "DUE/WikiTableQuestions/test/document.jsonl",
        [due("1", ("Which two?", [{"value": "a"}, {"value": "b"}]))],
    )


def tabfact(raw: Path) -> None:
    put(raw / "test_TabFact.jsonl", [ureader("t/1.png", "Is it?", "True")])


def deepform(raw: Path) -> None:
    rows = [
        ureader("f/doc1.pdf.0.png", "What is the value for the advertiser?", "Acme"),
        ureader("f/doc1.pdf.0.png", "What is the value for the contract_num?", "None"),
    ]
    put(raw / "ureader_json/test_DeepForm.jsonl", rows)
    values = [{"value": "Acme", "value_variants": ["Acme Inc"]}]
    put(raw / "DUE/DeepForm/test/document.jsonl", [due("doc1", ("advertiser", values), ("flight_to", values))])


def pathvqa(raw: Path) -> None:
    lines = [
        {"question_id": 1, "image": "a.jpg", "text": "Where?", "answer": "liver", "answer_type": "OPEN"},
        {
            "question_id": 2,
            "image": "a.jpg",
            "text": f"<image>\nIs it?{CLOSED}",
            "answer": "Yes",
            "answer_type": "CLOSED",
        },
    ]
    put(raw / "questions/test.jsonl", lines)


def pathvqa_llava_med(raw: Path) -> None:
    turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": "no"}]
    closed = [
        {"from": "human", "value": "<image>\nIs it? Please choose from the following two options: [yes, no]"},
        {"from": "gpt", "value": "yes"},
    ]
    put(
        raw / "test.json",
        [
            {"id": "a", "image": "a.jpg", "conversatons": turns, "answer_type": "CLOSED"},
            {"id": "b", "image": "b.jpg", "conversations": closed, "answer_type": "CLOSED"},
        ],
    )


def textvqa(raw: Path) -> None:
    item = {"question_id": 34602, "image_id": "003a", "question": "What Brand?", "answers": ["nokia"] * 10}
    put(raw / "TextVQA_0.5.1_val.json", {"data": [item]})


def textvqa_ocr(raw: Path) -> None:
    textvqa(raw)
    text = f"what brand?\nReference OCR token: NOKIA, 5{SHORT}"
    put(raw / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "003a", "image": "003a.jpg", "text": text}])


def pope(raw: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": "1.jpg", "text": "Is there?", "label": ("yes", "no")[n % 2]} for n in range(2)
        ]
        put(raw / f"coco/coco_pope_{split}.json", lines)


def mme(raw: Path) -> None:
    for n, subtask in enumerate(get_benchmark("mme").data.options["subtasks"].split()):
        questions, images = ("questions_answers_YN", "images") if n % 2 else (".", ".")
        put(raw / subtask / questions / "1.txt", "Is it red?\tYes\nIs it blue?\tNo\n")
        put(raw / subtask / images / "1.jpg", "")


def gqa(raw: Path) -> None:
    put(raw / "testdev_balanced_questions.json", {"20": {"question": "Which side?", "imageId": "n1", "answer": "left"}})


def scienceqa(raw: Path) -> None:
    text = "Context: A map.\nWhich?\nA. x\nB. y"
    put(
        raw / "llava_test_CQM-A.json",
        [
            {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": f"<image>\n{text}"}]},
            {"id": "5", "conversations": [{"from": "human", "value": text + LETTER}]},
        ],
    )
    put(raw / "problems.json", {key: {"answer": 1, "choices": ["x", "y"]} for key in ("4", "5")})


def seed(raw: Path) -> None:
    put(raw / "llava-seed-bench.jsonl", [{"question_id": "9", "image": "i/1", "text": "Which?\nA. x\nB. y" + LETTER}])
    put(raw / "SEED-Bench.json", {"questions": [{"question_id": "9", "answer": "B", "data_type": "image"}]})


def mmbench(raw: Path) -> None:
    image = base64.b64encode(b"jpeg").decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
    row = f"241\tWhich?\tA hint\tx\ty\tnan\t\tB\tcat\t{image}\tsrc\tl2\tnan\tdev"
    put(raw / "mmbench_dev_20230712.tsv", f"{head}\n{row}\n")


def mmvet(raw: Path) -> None:
    put(raw / "llava-mm-vet.jsonl", [{"question_id": 0, "image": "v0.png", "text": "What?", "category": "default"}])


def vqav2(raw: Path) -> None:
    put(
        raw / "llava_vqav2_mscoco_test-dev2015.jsonl",
        [{"question_id": 1, "image": "1.jpg", "text": "What?" + SHORT, "category": "default"}],
    )


def vizwiz(raw: Path) -> None:
    suffix = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    put(raw / "llava_test.jsonl", [{"question_id": 0, "image": "v.jpg", "text": "What?" + suffix}])


CASES = {
    "tiny_ehub": (tiny_ehub, [("Visual_Reasoning/1.jpg", "Q?", "VR", ["Yes", "yeah"])]),
    "chartqa": (
        chartqa,
        [
            ("ChartQA/test/png/1.png", "How many?", "human", ["10"]),
            ("ChartQA/test/png/2.png", "Which?", "augmented", ["UK."]),
            ("ChartQA/test/png/3.png", "Lost?", "unknown", ["5"]),
        ],
    ),
    "chartqa (official)": (chartqa_official, [("1.png", "How many?", "human", ["10"])]),
    "docvqa": (docvqa, [("d/1.png", "What date?", "all", ["1 May", "May 1"]), ("d/2.png", "Who?", "all", ["Ann"])]),
    "docvqa_val": (docvqa_val, [("d/1.png", "Q?", "all", ["a"])]),
    "wtq": (wtq, [("w/1.png", "Which two?", "all", ["a", "b"])]),
    "tabfact": (tabfact, [("t/1.png", "Is it?", "all", ["True"])]),
    "deepform": (
        deepform,
        [
            ("f/doc1.pdf.0.png", "What is the value for the advertiser?", "all", [["Acme", "Acme Inc"]]),
            ("f/doc1.pdf.0.png", "What is the value for the contract_num?", "all", []),
        ],
    ),
    "pathvqa": (pathvqa, [("a.jpg", "Where?", "open", ["liver"]), ("a.jpg", "Is it?", "closed", ["Yes"])]),
    "pathvqa (LLaVA-Med)": (
        pathvqa_llava_med,
        [("a.jpg", "Is it?", "closed", ["no"]), ("b.jpg", "Is it?", "closed", ["yes"])],
    ),
    "textvqa": (textvqa, [("003a.jpg", "What Brand?", "all", ["nokia"] * 10)]),
    "textvqa_ocr": (textvqa_ocr, [("003a.jpg", "What Brand?\nReference OCR token: NOKIA, 5", "all", ["nokia"] * 10)]),
    "pope": (pope, [("1.jpg", "Is there?", "random", ["yes"]), ("1.jpg", "Is there?", "random", ["no"])]),
    "mme": (
        mme,
        [
            ("existence/1.jpg", "Is it red?", "existence", ["Yes"]),
            ("existence/1.jpg", "Is it blue?", "existence", ["No"]),
            ("count/images/1.jpg", "Is it red?", "count", ["Yes"]),
        ],
    ),
    "gqa": (gqa, [("n1.jpg", "Which side?", "all", ["left"])]),
    "scienceqa": (
        scienceqa,
        [
            ("4/image.png", "Context: A map.\nWhich?\nA. x\nB. y", "image", ["B"]),
            (None, "Context: A map.\nWhich?\nA. x\nB. y", "text", ["B"]),
        ],
    ),
    "seed": (seed, [("i/1", "Which?\nA. x\nB. y", "image", ["B"])]),
    "mmbench": (mmbench, [("241.jpg", "A hint\nWhich?\nA. x\nB. y", "all", ["B"])]),
    "mmvet": (mmvet, [("v0.png", "What?", "all", None)]),
    "vqav2": (vqav2, [("1.jpg", "What?", "all", None)]),
    "vizwiz": (vizwiz, [("v.jpg", "What?", "all", None)]),
}


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
            question.image,
            question.text,
            question.domain,
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
    assert "note: 1 values of the references are asked by no question; the recall wants them" in capsys.readouterr().out


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
    assert "cannot be read as JSON" in given("gqa")
    put(raw / "testdev_balanced_questions.json", {})
    assert "no questions in it" in given("gqa")
    assert "Visual_Reasoning/dataset.json: no such file" in given("tiny_ehub")
    put(raw / "test_TabFact.jsonl", [{"image": ["a.png"], "conversations": []}])
    assert "test_TabFact.jsonl:1: 'conversations' needs" in given("tabfact")
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
