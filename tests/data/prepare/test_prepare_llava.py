"""ShareGPT4V's and LLaVA's own files become prepared sets with exact counts; every defect is dealt with."""

import json
from pathlib import Path

import pytest
from PIL import Image
from worlds import published_sets, raw_sets

from llava_mole.conversation import Turn
from llava_mole.data.images import load_image
from llava_mole.data.store import read_records


def test_captions_with_missing_images_and_an_id_twice(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_pt(tmp_path / "raw")
    done = raw_sets.prepare("sharegpt4v-pt", tmp_path / "raw", tmp_path / "out")
    assert done.counts == {"train/llava": 2, "train/coco": 3, "train/sam": 2}
    assert {r["sub_source"]: r["dropped_for_images"] for r in done.report["records"]} == {
        "llava": 0,
        "coco": 0,
        "sam": 2,
    }
    assert done.defects == {"missing-image dropped": 2, "id-again kept": 1}
    file = "share-captioner_coco_lcs_sam_1246k_1107.json"
    assert done.listed == [(f"{file}:5", "id-again"), (f"{file}:8", "missing-image"), (f"{file}:9", "missing-image")]
    row = done.rows[1]
    assert (row.id, row.source, row.where) == ("2", "llava", f"{file}:3")
    assert row.images == ("llava/llava_pretrain/images/00001/2.jpg",)
    assert row.turns == (Turn("user", "<image>\nDescribe this picture."), Turn("assistant", "It is red, number 1."))


def test_the_image_folder_is_a_link_where_images_stay_in_place(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_pt(tmp_path / "raw")
    done = raw_sets.prepare("sharegpt4v-pt", tmp_path / "raw", tmp_path / "deep" / "out")
    assert (done.out / "images").is_symlink()
    records = read_records(done.out / "train", "pt")
    for record in records:
        assert load_image(record.images[0], done.out / "images").size == raw_sets.SIZE


def test_a_missing_image_can_be_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_mole.cli import main

    published_sets.write_sharegpt4v_pt(tmp_path / "raw")
    arguments = ["prepare", "sharegpt4v-pt", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--missing-images", "error"]) == 2
    error = capsys.readouterr().err
    assert "1107.json:8: image 'sam/images/sa_2.jpg' is not a file below" in error
    assert not (tmp_path / "out").exists()


INSTRUCT = {
    "marker dropped": 2,  # no marker for the image; a second marker in a later turn
    "marker-again repaired": 1,
    "animated-image kept": 1,
    "wrong-extension kept": 1,
    "cmyk-image kept": 1,
    "corrupt-image dropped": 1,
    "missing-image dropped": 1,
    "unknown-role dropped": 1,
    "empty-answer dropped": 1,
    "ignored-keys kept": 1,
}


def test_every_defect_of_the_instructions(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    done = raw_sets.prepare("sharegpt4v-instruct", tmp_path / "raw", tmp_path / "out", "--check-images", "decode")
    assert done.defects == INSTRUCT
    assert [row.id for row in done.rows] == ["0", "1", "2", "4", "7", "text"]
    assert len(done.rows[0].turns) == 4
    assert done.rows[4].turns[0].text == "<image>\nIs it red?"
    assert (done.rows[5].images, done.rows[5].source) == ((), "text")
    assert done.report["ignored_keys"] == {"model": 1}
    assert done.rows[0].image_sizes == (raw_sets.SIZE,)


def test_without_decoding_only_missing_images_are_found(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    exist = raw_sets.prepare("sharegpt4v-instruct", tmp_path / "raw", tmp_path / "exist")
    found_by_decoding = ("animated-image kept", "wrong-extension kept", "cmyk-image kept", "corrupt-image dropped")
    assert exist.defects == {kind: n for kind, n in INSTRUCT.items() if kind not in found_by_decoding}
    assert exist.rows[0].image_sizes == ()
    trusting = raw_sets.prepare("sharegpt4v-instruct", tmp_path / "raw", tmp_path / "none", "--check-images", "none")
    assert "missing-image dropped" not in trusting.defects
    assert len(trusting.rows) == len(exist.rows) + 1


def test_images_can_be_copied_once_under_their_hash(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    done = raw_sets.prepare("sharegpt4v-instruct", tmp_path / "raw", tmp_path / "out", "--images", "unpack")
    files = sorted(p.relative_to(done.out / "images").as_posix() for p in (done.out / "images").rglob("*.*"))
    assert sorted({row.images[0] for row in done.rows if row.images}) == files
    gif = next(name for name in files if name.startswith("ocr_vqa/"))
    assert gif.endswith(".gif"), "the extension is that of the content"
    for row in done.rows:
        for image in row.images:
            load_image(image, done.out / "images")


@pytest.mark.parametrize(
    ("source", "file", "image", "sub_source"),
    [
        ("mix665k", "llava_v1_5_mix665k.json", "gqa/images/1.jpg", "gqa"),
        ("pretrain-558k", "blip_laion_cc_sbu_558k.json", "00453/004539375.jpg", "lcs"),
    ],
)
def test_other_files_of_llava(tmp_path: Path, source: str, file: str, image: str, sub_source: str) -> None:
    raw_sets.write_image(tmp_path / "images" / image, 1)
    record = {"id": 7, "image": image, "conversations": raw_sets.talk("<image>\nWhat?", "A card.")}
    raw_sets.write_json(tmp_path / "raw" / file, [record])
    done = raw_sets.prepare(source, tmp_path / "raw", tmp_path / "out", "--image-root", str(tmp_path / "images"))
    assert done.counts == {f"train/{sub_source}": 1}
    assert done.rows[0].id == "7"


def test_own_data_json_jsonl_several_images_and_a_test_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for n in range(2):
        raw_sets.write_image(raw / f"photos/{n}.png", n, kind="PNG")
    one = {"id": "a", "image": "photos/0.png", "conversations": raw_sets.talk("Red? <image>", "yes")}
    two = {
        "id": "b",
        "image": ["photos/0.png", "photos/1.png"],
        "conversations": raw_sets.talk("First <image>, then <image>?", "yes"),
    }
    raw_sets.write_json(raw / "a.json", [one])
    raw_sets.write_lines(raw / "sub" / "b.jsonl", [two, "", one | {"id": "c"}])
    raw_sets.write_lines(
        raw / "my_test.jsonl", [one | {"conversations": raw_sets.talk("<image>\nRed?", "no", "Why?", "So.")}]
    )
    done = raw_sets.prepare("llava-json", raw, tmp_path / "out")
    assert [(row.id, row.where) for row in done.rows] == [
        ("a", "a.json:2"),
        ("b", "sub/b.jsonl:1"),
        ("c", "sub/b.jsonl:3"),
    ]
    assert done.rows[0].turns[0].text == "<image>\nRed?", "one image: its marker comes first, as in LLaVA"
    assert done.rows[1].turns[0].text == "First <image>, then <image>?", "several: markers stay where they are"
    assert done.questions() == [
        {
            "question_id": "a-1",
            "image": "photos/0.png",
            "text": "Red?",
            "category": "photos",
            "answer": "no",
            "answers": ["no"],
        },
        {
            "question_id": "a-2",
            "image": "photos/0.png",
            "text": "Why?",
            "category": "photos",
            "answer": "So.",
            "answers": ["So."],
        },
    ]


def test_prepared_rows_equal_the_records_that_training_reads_from_the_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw_sets.write_image(raw / "coco/1.jpg", 1)
    talks = [
        raw_sets.talk("What?\n<image>", "A."),
        raw_sets.talk("<image>\nWhat?", "A.", "B?", "C."),
        raw_sets.talk("<image>  ", "A."),
        raw_sets.talk("<image>\n", "A."),
        raw_sets.talk("<image>\nWhat? ", "A."),
        raw_sets.talk("<image>\n\nWhat?", "A.", "B?", ""),
    ]
    records = [{"id": str(n), "image": "coco/1.jpg", "conversations": t} for n, t in enumerate(talks)]
    records.append({"id": "t", "conversations": [{"from": "gpt", "value": "Hi."}, *raw_sets.talk("Two?", "2")]})
    raw_sets.write_json(raw / "a.json", records)
    done = raw_sets.prepare("llava-json", raw / "a.json", tmp_path / "out")
    direct = read_records(raw / "a.json", "x")
    prepared = read_records(done.out / "train", "x")
    assert len(direct) == len(prepared) == 7
    for a, b in zip(direct, prepared, strict=True):
        assert (a.id, a.images, a.turns) == (b.id, b.images, b.turns)


def test_the_report_stands_beside_the_published_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_sets.write_sharegpt4v_pt(tmp_path / "raw")
    raw_sets.prepare("sharegpt4v-pt", tmp_path / "raw", tmp_path / "out")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "sam", "2", "2", "about", "570K"] in lines
    assert ["train", "total", "7", "2", "about", "1,246K"] in lines
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["report"]["defects"][0]["kind"] == "missing-image"


def test_animated_and_cmyk_images_load_in_training(tmp_path: Path) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    for name in ("ocr_vqa/images/3.jpg", "vg/VG_100K/5.jpg"):
        image = load_image(name, tmp_path / "raw")
        assert isinstance(image, Image.Image)
        assert (image.mode, image.size) == ("RGB", raw_sets.SIZE)


def test_images_are_read_as_image_is(tmp_path: Path) -> None:
    for n in range(2):
        raw_sets.write_image(tmp_path / f"raw/{n}.jpg", n)
    one, two = raw_sets.talk("<image>\nRed?", "yes"), raw_sets.talk("<image> or <image>?", "yes")
    rows = [
        {"images": "0.jpg", "conversations": one},
        {"images": ["0.jpg", "1.jpg"], "conversations": two},
        {"image": "0.jpg", "images": ["0.jpg"], "conversations": one},
        {"image": "0.jpg", "images": ["1.jpg"], "conversations": one},
        {"images": {"path": "0.jpg"}, "conversations": one},
        {"images": ["0.jpg"], "conversations": raw_sets.talk("Two?", "2")},
    ]
    raw_sets.write_lines(tmp_path / "raw/a.jsonl", rows)
    done = raw_sets.prepare("llava-json", tmp_path / "raw", tmp_path / "out")
    assert [row.images for row in done.rows[:3]] == [("0.jpg",), ("0.jpg", "1.jpg"), ("0.jpg",)]
    assert done.defects["bad-record dropped"] == 2
    assert sum(done.defects.values()) == len(rows) - len(done.rows)


def test_a_named_file_is_a_train_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_mole.cli import main

    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    out = tmp_path / "raw" / "out"  # only the file itself is read, so this may lie below --raw
    given = ["prepare", "sharegpt4v-instruct", "--raw", str(tmp_path / "raw"), "--out", str(out), "--workers", "1"]
    assert main([*given, "--train-splits", "val"]) == 2
    assert "--train-splits val: the file holds the train split" in capsys.readouterr().err
    assert not out.exists()
    assert main(given) == 0
