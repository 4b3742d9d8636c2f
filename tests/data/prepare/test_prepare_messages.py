"""Anyone's own data: chat messages, ShareGPT with images, a `datasets` folder, parquet."""

from pathlib import Path
from typing import Any

import pytest
from worlds import raw_sets

from llava_mole.cli import main
from llava_mole.conversation import Turn


def test_chat_messages_and_sharegpt(tmp_path: Path) -> None:
    raw_sets.write_messages(tmp_path / "raw")
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [(row.id, row.images) for row in done.rows] == [
        ("a", ("photos/0.jpg",)),
        ("b", ("photos/1.jpg",)),
        ("d", ()),
        ("f", ("photos/2.jpg",)),
        ("g", ("photos/0.jpg", "photos/1.jpg")),
    ]
    assert done.rows[0].turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A card."))
    assert done.rows[1].turns == done.rows[0].turns
    assert done.rows[4].turns[0].text == "<image> or <image>?"
    assert done.defects == {
        "system-turn kept": 1,
        "remote-image dropped": 1,
        "unknown-role dropped": 1,
        "several-images kept": 1,
        "bad-record dropped": 1,
        "ignored-keys kept": 1,
    }
    assert [(q["text"], q["answer"]) for q in done.questions()] == [("Red?", "yes"), ("Blue?", "no")]


def test_a_system_prompt_can_be_put_in_front(tmp_path: Path) -> None:
    raw_sets.write_messages(tmp_path / "raw")
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out", "--system", "prepend")
    assert done.rows[0].turns[0].text == "<image>\nBe brief.\n\nWhat is it?"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_datasets_folder(tmp_path: Path, split: str) -> None:
    raw_sets.write_datasets_folder(tmp_path / "raw")
    raw = tmp_path / "raw" if split == "test" else tmp_path / "raw" / "train"  # a DatasetDict, and one Dataset
    done = raw_sets.prepare("messages", raw, tmp_path / "out")
    assert [[turn.text for turn in row.turns] for row in done.rows] == [
        [f"<image>\nNumber {n}?", str(n)] for n in range(3)
    ]
    assert all((done.out / "images" / image).is_file() for row in done.rows for image in row.images)
    if split == "test":
        assert [q["answer"] for q in done.questions()] == ["3", "4"]


@pytest.mark.parametrize("form", ["bytes", "base64", "data", "struct", "path"])
def test_image_columns_of_parquet(tmp_path: Path, form: str) -> None:
    data = raw_sets.image_bytes(7, kind="PNG")
    text = raw_sets.base64_image(7, kind="PNG")
    column = {
        "bytes": data,
        "base64": text,
        "data": f"data:image/png;base64,{text}",
        "struct": {"bytes": data, "path": None},
        "path": "photos/a.png",
    }[form]
    raw_sets.write_image(tmp_path / "raw/photos/a.png", 7, kind="PNG")
    rows = [{"id": "x", "image": column, "instruction": "Look.", "input": "Red?", "output": "no"}]
    raw_sets.write_parquet(tmp_path / "raw/rows.parquet", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    (row,) = done.rows
    assert [turn.text for turn in row.turns] == ["<image>\nLook.\nRed?", "no"]
    assert (done.out / "images" / row.images[0]).read_bytes() == data


def test_lists_of_images_in_parquet(tmp_path: Path) -> None:
    images = [{"bytes": raw_sets.image_bytes(n), "path": None} for n in range(2)]
    rows = [
        {"images": images, "messages": [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "no"}]},
        {
            "images": images[:1],
            "messages": [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "no"}],
        },
        {"images": [], "messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]},
    ]
    raw_sets.write_parquet(tmp_path / "raw/rows.parquet", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [len(row.images) for row in done.rows] == [2, 1, 0]
    assert done.rows[0].turns[0].text == "<image>\n<image>\nSame?"
    first = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "first", "--multi-image", "first")
    assert first.rows[0].turns[0].text == "<image>\nSame?"


@pytest.mark.parametrize("together", [False, True])
def test_images_in_records_and_beside_them_are_gathered_on_request(
    tmp_path: Path, together: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_sets.write_image(tmp_path / "raw/a.jpg", 1)
    images = ["a.jpg", f"data:image/jpeg;base64,{raw_sets.base64_image(2)}"]
    rows = [
        {"images": named, "question": "Red?", "answer": "no"}
        for named in ([images] if together else zip(images, strict=True))
    ]
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    arguments = [
        "prepare",
        "messages",
        "--raw",
        str(tmp_path / "raw"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    assert main(arguments) == 2
    assert "--images unpack copies all of them into one folder" in capsys.readouterr().err
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out", "--images", "unpack")
    assert all((done.out / "images" / image).is_file() for row in done.rows for image in row.images)


def test_records_of_no_known_form_say_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", [{"caption": "A card."}, [1], 3])
    assert main(["prepare", "messages", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    assert "no usable record (3 x bad-record)" in capsys.readouterr().err


def test_image_parts_take_the_images_of_the_record(tmp_path: Path) -> None:
    for n in range(2):
        raw_sets.write_image(tmp_path / f"raw/{n}.jpg", n)
    say = {"role": "assistant", "content": "No."}

    def ask(*parts: object) -> list[object]:
        return [{"role": "user", "content": [*parts]}, say]

    part, text = {"type": "image"}, {"type": "text", "text": "Same?"}
    rows = [
        {"messages": ask(part, text, part), "images": ["0.jpg", "1.jpg"]},
        {"messages": ask(part, text, {"type": "image", "path": "0.jpg"}), "images": ["1.jpg"]},
        {"messages": ask(part, text), "images": ["0.jpg", "1.jpg"]},
        {"messages": ask(part, text)},
        {"messages": ask({"type": "image", "url": "0.jpg"}, text), "images": ["0.jpg"]},
    ]
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [row.images for row in done.rows] == [("0.jpg", "1.jpg"), ("1.jpg", "0.jpg")]
    assert done.rows[0].turns[0].text == "<image>\nSame?\n<image>"
    assert done.defects == {"several-images kept": 2, "marker dropped": 3}


@pytest.mark.parametrize(("system", "action", "text"), [("drop", "kept", ""), ("prepend", "repaired", "Be brief.\n")])
def test_a_system_key_is_a_system_turn(tmp_path: Path, system: str, action: str, text: str) -> None:
    chat = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    rows = [
        {"system": "Be brief.", "messages": chat},
        {"system": "Be brief.", "question": "Two?", "answer": "2"},
        {"system": "", "messages": chat},
        {"system": ["x"], "messages": chat},
    ]
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out", "--system", system)
    assert [row.turns[0].text for row in done.rows] == [f"{text}Two?", f"{text}Two?", "Two?"]
    assert done.defects == {f"system-turn {action}": 2, "bad-record dropped": 1}


def test_merged_turns_are_counted(tmp_path: Path) -> None:
    chat = [("user", "Look."), ("user", "Two?"), ("assistant", "2")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat[start:]]} for start in (0, 1)]
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [row.turns[0].text for row in done.rows] == ["Look.\nTwo?", "Two?"]
    assert done.defects == {"merged-turns repaired": 1}


def test_thousands_of_sources_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_mole.data.prepare import pipeline

    monkeypatch.setattr(pipeline, "MOST_SUB_SOURCES", 3)
    raw_sets.write_image(tmp_path / "raw/a.jpg", 1)
    rows = [{"source": f"s{n % 5}", "question": "Two?", "answer": "2"} for n in range(10)]
    rows.append({"source": "s9", "image": "a.jpg", "question": "Red?", "answer": "no"})
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [row.source for row in done.rows] == ["s0", "s1", "s2", "text", "text"] * 2 + ["images"]
    assert done.defects == {"many-sources repaired": 5}


def test_questions_about_several_images_say_where_they_stand(tmp_path: Path) -> None:
    for n in range(3):
        raw_sets.write_image(tmp_path / f"raw/{n}.jpg", n)
    names = ["0.jpg", "1.jpg", "2.jpg"]
    talk = [("user", "See <image>"), ("assistant", "yes"), ("user", "<image> or <image>?"), ("assistant", "both")]
    talk += [("user", "Sure?"), ("assistant", "yes")]
    rows: list[dict[str, Any]] = [{"images": names[:n], "question": "Red?", "answer": "no"} for n in (1, 2)]
    rows.append({"images": names, "messages": [{"role": role, "content": text} for role, text in talk]})
    raw_sets.write_lines(tmp_path / "raw/test.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [(question["image"], question["text"]) for question in done.questions()] == [
        ("0.jpg", "Red?"),
        (["0.jpg", "1.jpg"], "<image>\n<image>\nRed?"),
        ("0.jpg", "See"),
        (names, "<image>\n<image> or <image>?"),
        (names, "Sure?"),
    ]
    assert done.counts == {"test/images": 3}
    assert done.defects == {"several-images kept": 2}


def test_an_output_inside_what_is_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", [{"question": "Two?", "answer": "2"}])
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    for out in ("raw", "raw/out", "link/deep/out"):
        assert main(["prepare", "messages", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / out)]) == 2
        assert "lies inside --raw" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["rows.jsonl"]
