"""Images under keys that are not read: taken, or refused with what to do; never trained on as if there were none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import raw_sets

from llava_mole.common.errors import DataError
from llava_mole.conversation import Turn
from llava_mole.data.records import parse_record, unread_image
from llava_mole.data.store import read_records
from llava_mole.eval.questions import read_questions

TALK = raw_sets.talk("What is it?", "A mill.")
CONVERTS = "`llava-mole prepare messages --raw FILE --out DIR`"


def refusal(record: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_record(record, "s", "f.json:7")
    message = str(caught.value)
    assert message.startswith("f.json:7: ")
    assert "\n" not in message
    return message


OTHER_KEYS = {
    "Image": "a.png",
    "IMAGE": "folder/no-suffix",
    "Images": ["a.png", "b.png"],
    "image_path": "a.jpg",
    "imagePath": "a",
    "image_paths": ["x/a.jpeg"],
    "image_file": "a.tif",
    "image_url": "https://example.org/a?size=3",
    "image0": "a",
    "img": "a",
    "img_path": "a",
    "picture": "a",
    "photo": {"path": "a"},
    "file_name": "scans/1.PNG",
    "path": "C:\\scans\\1.bmp",
    "url": "https://example.org/a.webp?size=3",
    "media": ["notes.txt", "a.gif"],
    "scan": {"path": "a.dcm", "bytes": None},
    "content": "data:image/png;base64,iVBORw0",
    "video": "clip",
    "clip": "a.mp4",
    "pixel_values": [1, 2],
    "audio": "a.wav",
}


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_a_record_without_image_but_with_another_medium_is_refused(key: str) -> None:
    message = refusal({"id": "a", "conversations": TALK, key: OTHER_KEYS[key]})
    assert repr(key) in message
    assert "images are read from 'image' or 'images' only" in message
    assert CONVERTS in message


@pytest.mark.parametrize("key", ["image", "img", "image_path", "file", "video"])
def test_an_image_inside_a_turn_is_refused(key: str) -> None:
    turns = [{**TALK[0], key: "a.png"}, TALK[1]]
    assert f"{key!r} of turn 1 is 'a.png'" in refusal({"id": "a", "conversations": turns})


HARMLESS = {
    "image_id": 7,
    "model": "gpt-4",
    "image_path": None,
    "img": "",
    "photos": [],
    "picture": True,
    "image_count": 0,
    "note": "Compare with photo.jpg\nand answer",
    "license": "CC-BY-4.0",
    "url": "https://example.org/page.html",
    "source": "textbook",
    "scores": [0.5, 2],
    "nested": {"width": 3},
    "long": "x" * 2000 + ".png",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_other_keys_are_still_ignored(key: str) -> None:
    record, _ = parse_record({"id": "a", "conversations": TALK, key: HARMLESS[key]}, "s", "f.json:7")
    assert record.images == ()


def test_keys_beside_an_image_are_still_ignored() -> None:
    turns = raw_sets.talk("<image>\nWhat?", "A mill.")
    record, _ = parse_record(
        {"image": "a.png", "url": "https://x/b.jpg", "image_path": "c.png", "images": [], "conversations": turns},
        "s",
        "f.json:7",
    )
    assert record.images == ("a.png",)


@pytest.mark.parametrize("value", ["a.png", ["a.png"], ["a.png", "b.png"]])
def test_images_is_another_name_of_image(value: Any) -> None:
    count = len(value) if isinstance(value, list) else 1
    turns = raw_sets.talk("<image>" * count + " What?", "A mill.")
    named = [parse_record({"conversations": turns, key: value}, "s", "f:1")[0] for key in ("image", "images")]
    assert named[0] == named[1]
    assert len(named[0].images) == count
    message = refusal({"conversations": turns, "image": value, "images": "other.png"})
    assert "'image' and 'images' name different images; keep one of these keys" in message
    assert "image 'a.png' would never be seen" in refusal({"conversations": TALK, "images": value})


CHATS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A mill."}]
OTHER_FORMATS: list[dict[str, Any]] = [
    {"messages": CHATS},
    {"messages": CHATS, "images": ["a.png"]},
    {"conversations": CHATS},
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    {"conversations": [{"from": "human", "value": [{"type": "text", "text": "Hi"}]}, TALK[1]]},
    {"instruction": "What is it?", "output": "A mill."},
    {"question": "What is it?", "answer": "A mill.", "image": "a.png"},
    {"query": "What is it?", "response": "A mill.", "images": ["a.png"]},
]


@pytest.mark.parametrize("record", OTHER_FORMATS, ids=range(len(OTHER_FORMATS)))
def test_other_formats_are_refused_with_the_command_that_converts_them(record: dict[str, Any], tmp_path: Path) -> None:
    assert CONVERTS in refusal(record)
    raw_sets.write_image(tmp_path / "raw" / "a.png", 1, kind="PNG")
    raw_sets.write_json(tmp_path / "raw" / "own.json", [record])
    with pytest.raises(DataError, match="own.json:2: "):
        read_records(tmp_path / "raw" / "own.json", "s")
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    (row,) = done.rows
    assert len(row.images) == ("image" in record or "images" in record)


@pytest.mark.parametrize("key", ["image_path", "Image", "img", "image_file", "photo"])
def test_a_question_is_not_asked_without_its_image(key: str, tmp_path: Path) -> None:
    question = {"question_id": 1, "text": "What is it?", "answer": "photo.jpg", "image_id": 4}
    raw_sets.write_lines(tmp_path / "q.jsonl", [question])
    assert read_questions([str(tmp_path / "q.jsonl")])[0].images == ()
    raw_sets.write_lines(tmp_path / "q.jsonl", [question | {key: "a.png"}])
    with pytest.raises(DataError, match=f"q.jsonl:1: '{key}' is 'a.png', but the image of a question is read from"):
        read_questions([str(tmp_path / "q.jsonl")])


# prepare


@pytest.mark.parametrize("key", ["image_path", "img", "Image", "image_file", "picture", "image_url"])
def test_messages_takes_the_usual_names(key: str, tmp_path: Path) -> None:
    raw_sets.write_image(tmp_path / "raw" / "a.png", 1, kind="PNG")
    raw_sets.write_lines(tmp_path / "raw" / "own.jsonl", [{"messages": CHATS, key: "a.png"}])
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [(row.images, row.turns[0]) for row in done.rows] == [(("a.png",), Turn("user", "<image>\nWhat is it?"))]
    assert done.defects == {}


UNREAD: list[tuple[str, dict[str, Any]]] = [
    ("llava-json", {"conversations": TALK, "image_path": "a.png"}),
    ("llava-json", {"conversations": [{**TALK[0], "image": "a.png"}, TALK[1]]}),
    ("llava-json", {"conversations": TALK, "clip": "a.mp4"}),
    ("messages", {"messages": CHATS, "scan": "a.png"}),
    ("messages", {"messages": [{**CHATS[0], "images": ["a.png"]}, CHATS[1]]}),
    ("messages", {"messages": CHATS, "video": "a.mp4"}),
    ("messages", {"question": "What?", "answer": "This.", "path": "a.png"}),
]


@pytest.mark.parametrize(("source", "record"), UNREAD, ids=range(len(UNREAD)))
def test_prepare_leaves_such_records_out_and_shows_one(
    source: str, record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"conversations": TALK}
    raw_sets.write_lines(tmp_path / "raw" / "own.jsonl", [plain, record, record])
    done = raw_sets.prepare(source, tmp_path / "raw", tmp_path / "out")
    assert len(done.rows) == 1
    assert done.defects["image-key dropped"] == 2
    assert "image-key, first: own.jsonl:2: " in capsys.readouterr().out


@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from([*OTHER_KEYS, *HARMLESS, "image", "conversations"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.text()
            | st.sampled_from(["a.png", "data:image/png;base64,"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_any_record_is_read_or_refused_in_one_line(record: dict[str, Any]) -> None:
    record = json.loads(json.dumps(record))
    found = unread_image(record, record.get("conversations") if isinstance(record.get("conversations"), list) else [])
    given_record = {"conversations": TALK, **record}
    try:
        read, _ = parse_record(given_record, "s", "f:1")
    except DataError:
        with pytest.raises(DataError, match=r"^f:1: [^\n]*$"):
            parse_record(given_record, "s", "f:1")
    else:
        assert read.images or found is None
