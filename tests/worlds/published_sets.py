"""Tiny raw copies of the paper's data sets, as published, with the defects that they are known for."""

import base64
import pickle
from pathlib import Path
from typing import Any

from worlds.raw_sets import base64_image, image_bytes, talk, write_image, write_json, write_lines, write_parquet


def write_sharegpt4v_pt(raw: Path) -> None:
    """Nine captions: two of LCS, three of COCO, four of SAM. Two SAM images are missing, one id comes twice."""
    images = [
        "llava/llava_pretrain/images/00000/1.jpg",
        "llava/llava_pretrain/images/00001/2.jpg",
        "coco/train2017/000000000042.jpg",
        "coco/train2017/000000000043.jpg",
        "coco/train2017/000000000044.jpg",
        "sam/images/sa_1.jpg",
        "sam/images/sa_2.jpg",
        "sam/images/sa_3.jpg",
        "sam/images/sa_4.jpg",
    ]
    records = []
    for number, image in enumerate(images):
        if image not in ("sam/images/sa_2.jpg", "sam/images/sa_3.jpg"):
            write_image(raw / image, number)
        request = "Describe this picture.\n<image>" if number % 2 else "<image>\nWhat do you see?"
        identifier = "000000000042" if number in (2, 3) else Path(image).stem
        records.append(
            {"id": identifier, "image": image, "conversations": talk(request, f"It is red, number {number}.")}
        )
    write_json(raw / "share-captioner_coco_lcs_sam_1246k_1107.json", records)


def write_sharegpt4v_instruct(raw: Path) -> None:
    """Twelve records; `test_prepare_llava` says what becomes of each."""
    write_image(raw / "coco/train2017/1.jpg", 1)
    write_image(raw / "gqa/images/2.jpg", 2)
    write_image(raw / "ocr_vqa/images/3.jpg", 3, kind="GIF", frames=2)
    write_image(raw / "textvqa/train_images/4.jpg", 4)
    whole = (raw / "textvqa/train_images/4.jpg").read_bytes()
    (raw / "textvqa/train_images/4.jpg").write_bytes(whole[: len(whole) // 2])
    write_image(raw / "vg/VG_100K/5.jpg", 5, mode="CMYK")
    write_image(raw / "sam/images/6.jpg", 6)
    ask, say = "<image>\nIs it red?", "yes"
    rows = [
        ("coco/train2017/1.jpg", talk(ask, say, "Is it blue?", "no")),
        ("gqa/images/2.jpg", talk("Is it red?\n<image>", say)),
        ("ocr_vqa/images/3.jpg", talk(ask, say)),
        ("textvqa/train_images/4.jpg", talk(ask, say)),
        ("vg/VG_100K/5.jpg", talk(ask, say)),
        ("web-celebrity/images/Choi_Min-sik.jpg", talk(ask, say)),
        ("sam/images/6.jpg", talk("Is it red?", say)),
        ("sam/images/6.jpg", talk("<image>\n<image>\nIs it red?", say)),
        ("sam/images/6.jpg", talk(ask, say, roles=("human", "bot"))),
        ("sam/images/6.jpg", talk(ask, "")),
        ("coco/train2017/1.jpg", talk(ask, say, "<image>\nAgain?", "no")),
    ]
    records: list[dict[str, Any]] = [
        {"id": str(number), "image": image, "conversations": turns} for number, (image, turns) in enumerate(rows)
    ]
    records.append({"id": "text", "model": "gpt4", "conversations": talk("Two and two?", "four")})
    write_json(raw / "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json", records)


def write_m3it(raw: Path) -> None:
    """Sets with every alias of the keys; broken, empty and many-image rows; one line that is no JSON."""
    data = raw / "data"
    spaced = base64_image(12)
    whole = image_bytes(13)
    write_lines(
        data / "captioning/coco/train.jsonl",
        [
            {
                "instruction": "Describe.",
                "inputs": "",
                "image_base64_str": [base64_image(10)],
                "outputs": "A red card.",
            },
            {"instruction": "Describe.", "inputs": "", "image_base64_str": [base64_image(10)], "outputs": "A card."},
            {"instruction": "Describe.", "inputs": "", "image_base64_str": [base64_image(11)], "outputs": "  "},
            {
                "instruction": "D.",
                "inputs": "x",
                "image_base64_str": [f"{spaced[:40]}\n {spaced[40:]}"],
                "outputs": "1",
            },
            {"instruction": "D.", "inputs": "", "image_base64_str": ["@@@@"], "outputs": "rubbish"},
            {
                "instruction": "D.",
                "inputs": "",
                "image_base64_str": [base64.b64encode(whole[: len(whole) * 2 // 3]).decode()],
                "outputs": "cut",
            },
            '{"instruction": "no JSON',
        ],
    )
    write_lines(
        data / "vqa/vqa-v2/train.jsonl",
        [{"input": f"Question {n}?", "img_str": base64_image(20 + n), "output": f"answer {n}"} for n in range(6)],
    )
    write_lines(
        data / "vqa/vqa-v2/test.jsonl",
        [{"input": "Is it red?", "img_str": base64_image(30), "output": "yes"}] * 2,
    )
    write_json(data / "vqa/vqa-v2/instructions.json", ["Answer.", "Reply in a word.", "Look and answer."])
    write_lines(
        data / "classification/mocheg/mocheg_train.jsonl",
        [
            {
                "instruction": "True?",
                "inputs": "It is red.",
                "image_str": base64_image(40, kind="PNG"),
                "outputs": "True",
            }
        ],
    )
    pair = [base64_image(50), base64_image(51)]
    write_lines(
        data / "reasoning/nlvr/train.jsonl",
        [
            {"instruction": "Alike?", "inputs": "", "image": pair, "outputs": "no"},
            {"instruction": "Alike?", "inputs": "", "image": [], "outputs": "yes"},
            {"instruction": "Alike?", "inputs": "", "image": pair[:1], "outputs": ["no"]},
        ],
    )


def write_m3it_parquet(raw: Path) -> None:
    """The single-image copy: five train rows, one of them empty, and two for validation."""
    rows = [
        {
            "instruction": "Describe.",
            "inputs": "",
            "outputs": f"Card {n}.",
            "image": {"bytes": image_bytes(n), "path": None},
        }
        for n in range(7)
    ]
    rows[4]["outputs"] = ""
    write_parquet(raw / "data/train-00000-of-00001.parquet", rows[:5])
    write_parquet(raw / "data/validation-00000-of-00001.parquet", rows[5:])


def document(image: str | list[str], question: str, answer: str, task: str = "qa_sft") -> dict[str, Any]:
    images = [image] if isinstance(image, str) else image
    turns = [("user", "<image>")] * len(images) + [("user", question), ("assistant", answer)]
    return {
        "image": images,
        "prompt": "",
        "text": "",
        "system_instruction": "",
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "task_type": task,
    }


def write_ureader(raw: Path) -> None:
    """Seven train rows (one without its image, one with two), two validation rows, three test questions."""
    root = raw / "ureader_images"
    due = "DUE_Benchmark"
    for seed, name in enumerate(
        ("ChartQA/train/png/7.png", f"{due}/DocVQA/pngs/a.png", f"{due}/DeepForm/pngs/b.png", "TextVQA/train/c.png",
         f"{due}/TabFact/pngs/d.png", "ChartQA/test/png/8.png", f"{due}/DocVQA/pngs/e.png"),
        60,
    ):  # fmt: skip
        write_image(root / name, seed, kind="PNG")
    write_lines(
        raw / "ureader_json/train.jsonl",
        [
            document("ChartQA/train/png/7.png", "Which bar is tallest?", "Norway"),
            document(f"{due}/DocVQA/pngs/a.png", "Who signs?", "A. Smith"),
            document(f"{due}/DeepForm/pngs/b.png", "What is the flight number?", "None"),
            document(f"{due}/TabFact/pngs/d.png", "Is it so?", "Yes"),
            document(f"{due}/TabFact/pngs/gone.png", "Is it so?", "No"),
            document(["TextVQA/train/c.png", "ChartQA/train/png/7.png"], "Which word?", "red"),
            {**document("TextVQA/train/c.png", "Which word?", "blue"), "system_instruction": ["Be brief."]},
        ],
    )
    write_lines(
        raw / "ureader_json/val.jsonl",
        [
            document("TextVQA/train/c.png", "Which word is it?", "green"),
            {
                **document("TextVQA/train/c.png", "", ""),
                "conversations": [{"from": "system", "value": "<image>"}, {"from": "assistant", "value": "x"}],
            },
        ],
    )
    write_lines(
        raw / "ureader_json/test_ChartQA.jsonl",
        [
            document("ChartQA/test/png/8.png", "How many?", "12"),
            document("ChartQA/test/png/8.png", "Which share?", "0.5"),
        ],
    )
    write_lines(raw / "ureader_json/test_DocVQA.jsonl", [document(f"{due}/DocVQA/pngs/e.png", "Date?", "1 May")])


PATHOLOGY = [
    ("train_0001", "is it a tumor?", "Yes"),
    ("train_0001", "what is shown?", "liver"),
    ("train_0002", "where are the cells?", "in the wall"),
    ("train_0003", "is this normal?", "no"),
]


def write_pathvqa(raw: Path) -> None:
    """The original pickles: four train, one validation, three test questions; one image is CMYK."""
    splits = {
        "train": [{"image": image, "question": question, "answer": answer} for image, question, answer in PATHOLOGY],
        "val": [{"image": "val_0001", "question": "what is it?", "answer": "a vein"}],
        "test": [
            {"image": "test_0001", "question": "what is this?", "answer": "bone"},
            {"image": "test_0001", "question": "is this bone?", "answer": "yes "},
            {"image": "test_0002", "question": "is this skin?", "answer": "NO"},
        ],
    }
    for split, rows in splits.items():
        path = raw / f"pvqa/qas/{split}/{split}_qa.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(rows))
        for seed, image in enumerate(sorted({row["image"] for row in rows})):
            mode = "CMYK" if image == "train_0002" else "L" if image == "train_0003" else "RGB"
            write_image(raw / f"pvqa/images/{split}/{image}.jpg", seed + 80, mode=mode)


def write_pathvqa_parquet(raw: Path) -> None:
    """The hub copy: lower-cased, images as bytes."""
    rows = [
        {"image": {"bytes": image_bytes(90 + n), "path": None}, "question": question, "answer": answer.lower()}
        for n, (_, question, answer) in enumerate(PATHOLOGY)
    ]
    write_parquet(raw / "data/train-00000-of-00001-aa.parquet", rows)
    write_parquet(raw / "data/validation-00000-of-00001-aa.parquet", rows[:1])
    write_parquet(raw / "data/test-00000-of-00001-aa.parquet", rows[1:3])


def write_llava_med(raw: Path) -> None:
    """LLaVA-Med's JSON: the test file misspells `conversations` and names answer types."""
    for n in range(3):
        write_image(raw / f"images/{n}.jpg", 95 + n)
    train = [
        {"id": str(n), "image": f"images/{n}.jpg", "conversations": talk("what is it?\n<image>", "bone")}
        for n in (0, 1)
    ]
    test = [
        {
            "id": "t0",
            "image": "images/2.jpg",
            "answer_type": "OPEN",
            "conversatons": talk("<image>\nwhat is it?", "skin"),
        },
        {"id": "t1", "image": "images/2.jpg", "answer_type": "yes/no", "conversations": talk("<image>\nskin?", "yes")},
        {"id": "t2", "answer_type": "other", "conversations": talk("what?", "skin")},
    ]
    write_json(raw / "train.json", train)
    write_json(raw / "test.json", test)
