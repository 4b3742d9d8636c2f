"""Small raw directories in the official layout of every benchmark, and the question lines that they become."""

import base64
import json
from pathlib import Path

from llava_mole.eval.benchmarks.registry import get_benchmark

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
        put(
            raw / subtask / questions / "1.txt",
            "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n",
        )
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
    put(raw / "llava-seed-bench.jsonl", [{"question_id": 9, "image": "i/1", "text": "Which?\nA. x\nB. y" + LETTER}])
    put(
        raw / "SEED-Bench.json",
        {"questions": [{"question_id": "9", "answer": "B", "data_type": "image"}, {"question_id": "v1"}]},
    )


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
