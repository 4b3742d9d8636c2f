"""M3IT: aliases of the keys, drawn instructions, base64 images, and what is wrong with some rows."""

import hashlib
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.data.images import load_image
from llava_mole.data.prepare.sources.m3it import read_instructions


def test_counts_and_defects_of_the_raw_lines(tmp_path: Path) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    assert done.counts == {"train/coco": 3, "train/vqa-v2": 6, "train/mocheg": 1, "test/vqa-v2": 2}
    assert done.defects == {
        "empty-answer dropped": 1,
        "base64-spaces repaired": 1,
        "base64 dropped": 1,
        "corrupt-image dropped": 1,
        "bad-json dropped": 1,
        "several-images dropped": 1,
        "no-image dropped": 1,
        "bad-record dropped": 1,
    }
    coco = "data/captioning/coco/train.jsonl"
    assert {(where, kind) for where, kind in done.listed if "coco" in where} == {
        (f"{coco}:3", "empty-answer"),
        (f"{coco}:4", "base64-spaces"),
        (f"{coco}:5", "base64"),
        (f"{coco}:6", "corrupt-image"),
        (f"{coco}:7", "bad-json"),
    }


def test_texts_and_images(tmp_path: Path) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    by_source = {row.source: row for row in done.rows}
    mocheg = by_source["mocheg"]
    assert [turn.text for turn in mocheg.turns] == ["<image>\nTrue?\nIt is red.", "True"]
    digest = hashlib.sha1(raw_sets.image_bytes(40, kind="PNG")).hexdigest()
    assert mocheg.images == (f"mocheg/{digest}.png",)
    assert mocheg.image_sizes == (raw_sets.SIZE,)
    coco = [row for row in done.rows if row.source == "coco"]
    assert coco[0].images == coco[1].images, "an image that several rows share is written once"
    assert len(list((done.out / "images" / "coco").iterdir())) == 2
    for row in done.rows:
        assert load_image(row.images[0], done.out / "images").size == raw_sets.SIZE


def test_instructions_are_drawn_with_the_seed(tmp_path: Path) -> None:
    published_sets.write_m3it(tmp_path / "raw")

    def questions(name: str, seed: str) -> list[str]:
        done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / name, "--seed", seed)
        return [row.turns[0].text for row in done.rows if row.source == "vqa-v2"]

    first = questions("a", "0")
    assert first == questions("b", "0")
    assert first != questions("c", "1")
    for number, text in enumerate(first):
        marker, instruction, inputs = text.split("\n")
        assert (marker, inputs) == ("<image>", f"Question {number}?")
        assert instruction in ("Answer.", "Reply in a word.", "Look and answer.")


def test_test_rows_become_questions(tmp_path: Path) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    asked = done.questions("test_vqa-v2")
    assert [q["question_id"] for q in asked] == ["vqa-v2-1", "vqa-v2-2"]
    assert {q["answer"] for q in asked} == {"yes"}
    assert asked[0]["text"].endswith("\nIs it red?")
    assert (done.out / "images" / asked[0]["image"]).is_file()


@pytest.mark.parametrize(("policy", "images"), [("first", 1), ("keep", 2)])
def test_rows_with_several_images(tmp_path: Path, policy: str, images: int) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out", "--multi-image", policy)
    (row,) = [row for row in done.rows if row.source == "nlvr"]
    assert len(row.images) == images
    assert row.turns[0].text == "<image>\n" * images + "Alike?"
    assert done.defects[f"several-images {'repaired' if policy == 'first' else 'kept'}"] == 1


def test_an_unknown_key_stops_and_can_be_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "D.", "inputs": "", "image": [raw_sets.base64_image(1)], "outputs": "x", "answer_text": "y"}
    raw_sets.write_lines(tmp_path / "raw/data/vqa/new/train.jsonl", [row])
    arguments = ["prepare", "m3it", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "data/vqa/new/train.jsonl:1: unknown key 'answer_text'" in error
    assert "--ignore-keys answer_text" in error
    assert main([*arguments, "--ignore-keys", "answer_text"]) == 0


@pytest.mark.parametrize(
    "content", ['\ufeff["A?", "B?"]', '[{"instruction": "A?"}, "B?"]', '{"en": ["A?"], "zh": "B?"}']
)
def test_forms_of_instructions(tmp_path: Path, content: str) -> None:
    (tmp_path / "instructions.json").write_text(content, encoding="utf-8")
    assert read_instructions(tmp_path / "instructions.json") == ["A?", "B?"]


def test_a_row_without_any_instruction_is_left_out(tmp_path: Path) -> None:
    rows = [{"image": raw_sets.base64_image(n), "inputs": text, "outputs": "x"} for n, text in enumerate(("", "Red?"))]
    raw_sets.write_lines(tmp_path / "raw/data/vqa/new/train.jsonl", rows)
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    assert done.defects == {"no-instruction dropped": 1}
    assert [turn.text for turn in done.rows[0].turns] == ["<image>\nRed?", "x"]


def test_the_parquet_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_m3it_parquet(tmp_path / "raw")
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out", "--train-splits", "train,val")
    assert done.counts == {"train/m3it": 6}
    assert done.defects == {"empty-answer dropped": 1}
    assert [row.turns[1].text for row in done.rows] == [f"Card {n}." for n in (0, 1, 2, 3, 5, 6)]
    assert "1,238,638" in capsys.readouterr().out, "its published count, not the raw files'"


def test_images_in_records_cannot_stay_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_m3it(tmp_path / "raw")
    assert (
        main(["prepare", "m3it", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "o"), "--images", "keep"]) == 2
    )
    assert "must be unpacked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "defects"),
    [
        ("skip", {"several-images dropped": 2, "no-image dropped": 3}),
        ("first", {"several-images repaired": 1, "no-image dropped": 4}),
        ("keep", {"several-images kept": 1, "no-image dropped": 4}),
    ],
)
def test_an_empty_image_among_several(tmp_path: Path, policy: str, defects: dict[str, int]) -> None:
    one, two = raw_sets.base64_image(1), raw_sets.base64_image(2)
    lists = [[one], [one, two], ["", two], ["", ""], [], [None]]
    rows = [{"instruction": "D.", "inputs": "", "image": images, "outputs": "x"} for images in lists]
    raw_sets.write_lines(tmp_path / "raw/data/vqa/new/train.jsonl", rows)
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out", "--multi-image", policy)
    assert done.defects == defects
