"""Annotation files become records, and everything wrong with one is named with file and line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llava_mole.common.errors import DataError
from llava_mole.conversation import Turn
from llava_mole.data.records import Record
from llava_mole.data.store import read_records

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A mill."}
GOOD = {"id": "a", "image": "x/1.jpg", "conversations": [QUESTION, ANSWER]}


def text_record(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": "t", "conversations": [{"from": role, "value": value} for role, value in turns], **keys}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, "general")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    records = [GOOD, text_record(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Bye"), model="x")]
    listed = read_records(write(tmp_path / "a.json", json.dumps(records)), "general")
    lined = read_records(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)) + "\n\n"), "general")
    assert [(r.id, r.images, r.turns, r.source) for r in listed] == [(r.id, r.images, r.turns, r.source) for r in lined]
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A mill."))
    assert listed[0] == Record("a", ("x/1.jpg",), turns, "general", f"{tmp_path}/a.json:1")
    assert listed[1].images == ()
    assert [turn.role for turn in listed[1].turns] == ["user", "assistant"] * 2


def test_each_record_knows_the_line_it_starts_on(tmp_path: Path) -> None:
    text = json.dumps([GOOD, GOOD, GOOD], indent=1)
    records = read_records(write(tmp_path / "a.json", text), "s")
    starts = [index for index, line in enumerate(text.split("\n"), 1) if line == " {"]
    assert [record.where for record in records] == [f"{tmp_path}/a.json:{line}" for line in starts]
    one_line = json.dumps(GOOD)
    records = read_records(write(tmp_path / "b.json", f"\n[\n{one_line}, {one_line}\n,\n\n{one_line}]\n"), "s")
    assert [record.where.rpartition(":")[2] for record in records] == ["3", "3", "6"]
    records = read_records(write(tmp_path / "c.jsonl", f"\n{one_line}\n\n{one_line}"), "s")
    assert [record.where.rpartition(":")[2] for record in records] == ["2", "4"]


def test_line_separator_characters_inside_strings_do_not_break_lines(tmp_path: Path) -> None:
    record = text_record(("human", "a\u2028b\x85c"), ("gpt", "d"))
    text = json.dumps(record, ensure_ascii=False)
    records = read_records(write(tmp_path / "a.jsonl", f"{text}\n{text}"), "s")
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "2"]
    assert records[0].turns[0].text == "a\u2028b\x85c"


def test_image_marker_moves_to_the_front_of_its_turn(tmp_path: Path) -> None:
    record = text_record(
        ("human", "Hi"), ("gpt", "Yes?"), ("human", "See <image> here"), ("gpt", "I do"), image="i.png"
    )
    (read,) = read_records(write(tmp_path / "a.json", json.dumps([record])), "s")
    assert [turn.text for turn in read.turns] == ["Hi", "Yes?", "<image>\nSee  here", "I do"]


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    text = "[\r\n" + json.dumps(GOOD) + "\r\n]\r\n"
    (record,) = read_records(write(tmp_path / "a.json", b"\xef\xbb\xbf" + text.encode()), "s")
    assert record.where.endswith(":2")
    lines = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"
    assert len(read_records(write(tmp_path / "a.jsonl", lines), "s")) == 1


@pytest.mark.parametrize(("keys", "expected"), [({}, "1"), ({"id": 7}, "7"), ({"id": "x"}, "x")])
def test_id_is_text_and_falls_back_to_the_line(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    record = {key: value for key, value in GOOD.items() if key != "id"} | keys
    assert read_records(write(tmp_path / "a.json", json.dumps([record])), "s")[0].id == expected


def test_answer_before_the_first_question_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = text_record(("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello"))
    with caplog.at_level(logging.WARNING, "llava_mole"):
        (read,) = read_records(write(tmp_path / "a.json", json.dumps([record])), "s")
    assert [turn.text for turn in read.turns] == ["Hi", "Hello"]
    assert "the first answer of 1 record, which" in caplog.text


def test_last_question_may_stay_unanswered(tmp_path: Path) -> None:
    record = text_record(("human", "Hi"), ("gpt", "Hello"), ("human", "And?"))
    assert len(read_records(write(tmp_path / "a.json", json.dumps([record])), "s")[0].turns) == 3


BAD_RECORDS = {
    "no object": ("text", "must be an object, got a string"),
    "no conversations": ({"id": "a"}, "no 'conversations'"),
    "empty conversations": ({"conversations": []}, "an empty 'conversations'"),
    "conversations no list": ({"conversations": {"from": "human"}}, "a malformed 'conversations'"),
    "turn no object": ({"conversations": ["hello"]}, "turn 1 must be an object"),
    "turn without value": ({"conversations": [{"from": "human"}]}, "turn 1 has no 'value'"),
    "turn without from": ({"conversations": [{"value": "x"}]}, "turn 1 has no 'from'"),
    "unknown role": (text_record(("user", "Hi"), ("gpt", "Hello")), "'user'; allowed are 'human' and 'gpt'"),
    "role no string": (text_record((["human"], "Hi"), ("gpt", "Hello")), "allowed are 'human' and 'gpt'"),  # type: ignore[arg-type]
    "two questions": (
        text_record(("human", "a"), ("human", "b"), ("gpt", "c")),
        "two consecutive turns from 'human' (turns 1 and 2)",
    ),
    "two answers": (
        text_record(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        "two consecutive turns from 'gpt' (turns 2 and 3)",
    ),
    "late two answers": (text_record(("gpt", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")), "(turns 3 and 4)"),
    "value no string": (text_record(("human", "a"), ("gpt", 3)), "turn 2: 'value' must be a string, got a number"),
    "value null": (text_record(("human", None), ("gpt", "b")), "turn 1: 'value' must be a string, got null"),
    "half a surrogate": (
        text_record(("human", "\ud83d"), ("gpt", "b")),
        "turn 1: 'value' holds an unpaired surrogate; remove it",
    ),
    "no answer": (text_record(("human", "a")), "nothing to train on"),
    "only an answer": (text_record(("gpt", "a")), "nothing to train on"),
    "empty answer": (text_record(("human", "a"), ("gpt", "")), "nothing to train on"),
    "two markers": (text_record(("human", "<image><image>"), ("gpt", "b"), image="i.png"), "2 times <image>"),
    "two markers in two turns": (
        text_record(("human", "<image>"), ("gpt", "b"), ("human", "<image>"), ("gpt", "c"), image="i.png"),
        "2 times <image> for 1 image; keep one marker",
    ),
    "marker without image": (text_record(("human", "<image>\na"), ("gpt", "b")), "without 'image'"),
    "image without marker": (text_record(("human", "a"), ("gpt", "b"), image="i.png"), "would never be seen"),
    "marker only in left out answer": (
        text_record(("gpt", "<image>"), ("human", "a"), ("gpt", "b"), image="i.png"),
        "would never be seen",
    ),
    "marker in answer": (text_record(("human", "a"), ("gpt", "<image>"), image="i.png"), "in a gpt turn"),
    "one marker for two images": (
        text_record(("human", "<image>"), ("gpt", "b"), image=["1.png", "2.png"]),
        "1 times <image> for 2 images; every image needs one marker",
    ),
    "three markers for two images": (
        text_record(("human", "<image><image>"), ("gpt", "b"), ("human", "<image>"), image=["1.png", "2.png"]),
        "3 times <image> for 2 images",
    ),
    "no images": (GOOD | {"image": []}, "'image' is an empty list"),
    "null among images": (
        GOOD | {"image": ["1.png", None]},
        "'image' must be one relative path or a list of them, got null",
    ),
    "image of the web": (
        GOOD | {"image": "https://example.org/a.png"},
        "is a URL; images are read from the image folder",
    ),
    "image inside the record": (GOOD | {"image": "data:image/png;base64,iVBORw0"}, "is a URL"),
    "surrogate in the path": (GOOD | {"image": "\ud83d.png"}, "'image' holds an unpaired surrogate; remove it"),
    "surrogate in the id": (GOOD | {"id": "\ud83d"}, "'id' holds an unpaired surrogate; remove it"),
    "image null": (GOOD | {"image": None}, "got null"),
    "image empty": (GOOD | {"image": ""}, "got an empty string"),
}


@pytest.mark.parametrize(("record", "expected"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_bad_record_is_named_with_its_line(tmp_path: Path, record: Any, expected: str) -> None:
    listed = write(tmp_path / "a.json", f"[\n{json.dumps(GOOD)},\n{json.dumps(record)}\n]")
    lined = write(tmp_path / "a.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(record)}\n")
    for path in (listed, lined):
        assert message(path).startswith(f"{path}:3: ")
        assert expected in message(path)


LINE = json.dumps(GOOD)
BAD_FILES = {
    "object": ("a.json", LINE, ":1: not a JSON list"),
    "object later": ("a.json", f"\n\n{LINE}", ":3: not a JSON list"),
    "lines in a list file": ("a.json", f"{LINE}\n{LINE}", "must be named .jsonl"),
    "empty file": ("a.json", "", ":1: not a JSON list"),
    "empty list": ("a.json", "[ ]", "holds no record"),
    "empty lines": ("a.jsonl", "\n\n", "holds no record"),
    "trailing comma": ("a.json", f"[\n{LINE},\n]", ":3: not valid JSON"),
    "missing comma": ("a.json", f"[{LINE}\n{LINE}]", ":2: not valid JSON: ',' or ']' expected"),
    "cut between records": ("a.json", f"[{LINE},\n{LINE}\n", ":3: not valid JSON: ',' or ']' expected"),
    "cut inside a record": ("a.json", f"[{LINE},\n\n{LINE[:-5]}", ":3: not valid JSON"),
    "text after the list": ("a.json", f"[{LINE}]\n[]", ":2: not valid JSON: more text"),
    "not UTF-8": ("a.json", f"[{LINE},\n".encode() + b'{"id": "\xff"}]', ":2: byte 0xff is not UTF-8"),
    "line not UTF-8": ("a.jsonl", f"{LINE}\n".encode() + b'{"id": "\xff"}', ":2: byte 0xff is not UTF-8"),
    "broken line": ("a.jsonl", f"{LINE}\n{LINE[:-5]}\n", ":2: not valid JSON"),
    "two records on a line": ("a.jsonl", f"{LINE} {LINE}\n", ":1: not valid JSON"),
    "list in a line file": ("a.jsonl", f"[{LINE}]", ":1: a record must be an object, got a list"),
}


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    path = write(tmp_path / name, content)
    assert message(path).startswith(str(path))
    assert expected in message(path)


@pytest.mark.parametrize("name", ["absent.json", "absent.jsonl"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert message(tmp_path / name).startswith(f"{tmp_path / name}: the annotation file does not exist")


def test_folder_is_no_annotation_file(tmp_path: Path) -> None:
    assert message(tmp_path).startswith(f"{tmp_path}: cannot read")
