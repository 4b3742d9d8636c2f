"""Hostile raw data: nothing outside the image root is read, nothing is run or fetched; a clear error or a count."""

import base64
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from worlds import raw_sets

from llava_mole.cli import main
from llava_mole.common.errors import DataError
from llava_mole.data.prepare.image_pool import Task, run_task
from llava_mole.data.prepare.images import ImageRoot, look, path_problem, safe_name, unpack


def record(image: str) -> dict[str, object]:
    return {"image": image, "conversations": raw_sets.talk("<image>\nRed?", "yes")}


def huge_png(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels in a few bytes of header; its data are not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("check", ["exist", "decode"])
def test_paths_that_lead_out_of_the_root(tmp_path: Path, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    raw_sets.write_image(tmp_path / "secret" / "a.jpg", 1)
    raw_sets.write_image(raw / "in" / "a.jpg", 2)
    (raw / "link.jpg").symlink_to(tmp_path / "secret" / "a.jpg")
    (raw / "folder").symlink_to(tmp_path / "secret")
    (raw / "inside.jpg").symlink_to(raw / "in" / "a.jpg")
    (raw / "dead.jpg").symlink_to(raw / "in" / "b.jpg")
    os.mkfifo(raw / "pipe.jpg")
    outside = [
        str(tmp_path / "secret" / "a.jpg"),
        "../secret/a.jpg",
        "in/../../secret/a.jpg",
        "link.jpg",
        "folder/a.jpg",
        "a\0.jpg",
        "..\\secret\\a.jpg",
    ]
    remote = ["http://127.0.0.1:9/a.jpg", "file:///etc/passwd", "https://example.org/a.jpg"]
    missing = ["dead.jpg", "pipe.jpg", "in", "none/a.jpg", "x" * 5000]
    raw_sets.write_lines(raw / "a.jsonl", map(record, [*outside, *remote, *missing, "inside.jpg", "in/a.jpg"]))
    monkeypatch.setattr("socket.socket", None)
    done = raw_sets.prepare("llava-json", raw, tmp_path / "out", "--check-images", check)
    assert [row.images[0] for row in done.rows] == ["inside.jpg", "in/a.jpg"]
    assert done.defects == {"outside-image dropped": 7, "remote-image dropped": 3, "missing-image dropped": 5}


def test_without_a_check_the_path_itself_is_still_looked_at(tmp_path: Path) -> None:
    paths = ["/etc/passwd", "../a.jpg", "http://x/a.jpg", "data:image/png;base64,AAAA", "in/a.jpg"]
    raw_sets.write_lines(tmp_path / "raw/a.jsonl", map(record, paths))
    done = raw_sets.prepare("llava-json", tmp_path / "raw", tmp_path / "out", "--check-images", "none")
    assert [row.images[0] for row in done.rows] == ["in/a.jpg"]
    assert done.defects == {"outside-image dropped": 2, "remote-image dropped": 2}


@pytest.mark.parametrize("path", ["a..b/c.jpg", "a...jpg", "..a/b.jpg", "a/b c.jpg", "ä.jpg"])
def test_dots_in_names_are_no_way_out(path: str) -> None:
    assert path_problem(path) is None


def test_a_root_that_is_a_link_itself(tmp_path: Path) -> None:
    raw_sets.write_image(tmp_path / "real/a.jpg", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert ImageRoot(tmp_path / "link").problem("a.jpg") is None


def test_a_name_that_begins_like_the_root_is_outside_it(tmp_path: Path) -> None:
    raw_sets.write_image(tmp_path / "root-2/a.jpg", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x").symlink_to(tmp_path / "root-2")
    problem = ImageRoot(tmp_path / "root").problem("x/a.jpg")
    assert problem is not None
    assert problem.kind == "outside-image"


def test_images_that_do_not_decode(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    whole = raw_sets.image_bytes(1)
    files = {
        "bomb.png": huge_png(60_000),
        "empty.jpg": b"",
        "text.jpg": b"not an image at all",
        "cut.jpg": whole[: len(whole) // 2],
        "nul.jpg": b"\0" * 4096,
        "good.jpg": whole,
    }
    for name, data in files.items():
        (raw / name).write_bytes(data)
    raw_sets.write_lines(raw / "a.jsonl", map(record, files))
    done = raw_sets.prepare("llava-json", raw, tmp_path / "out", "--check-images", "decode")
    assert [row.images[0] for row in done.rows] == ["good.jpg"]
    assert done.defects == {"too-large-image dropped": 1, "corrupt-image dropped": 4}


@pytest.mark.parametrize("text", ["", "@@@", "data:image/png;base64,", "A" * 4001, "é" * 100, "\0", "/9j/" + "A" * 400])
def test_rubbish_instead_of_base64(tmp_path: Path, text: str) -> None:
    good = raw_sets.base64_image(1)
    rows = [{"instruction": "D.", "inputs": "", "image": [image], "outputs": "x"} for image in (text, good)]
    raw_sets.write_lines(tmp_path / "raw/data/vqa/a/train.jsonl", rows)
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    assert len(done.rows) == 1
    assert set(done.defects) <= {"base64 dropped", "corrupt-image dropped", "no-image dropped"}
    assert sum(done.defects.values()) == 1


@pytest.mark.parametrize("embedded", ["bytes", "base64"])
def test_images_of_too_many_bytes_are_refused(embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = raw_sets.image_bytes(1), raw_sets.image_bytes(2) + b"\0" * 5000  # it decodes all the same
    assert look(large, "a.jpg", decode=True)[0].problem is None
    monkeypatch.setattr("llava_mole.data.prepare.images.LARGEST_IMAGE", len(small) + 4000)
    for number, data in enumerate((small, large)):
        given = data if embedded == "bytes" else base64.b64encode(data).decode()
        info = run_task(Task(given, "bytes", f"{number}", "s"), tmp_path, True)
        assert (info.problem and info.problem.kind) == (None, "too-large-image")[number]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_group_names_cannot_climb(tmp_path: Path) -> None:
    info = unpack(raw_sets.image_bytes(1), tmp_path / "images", "../../x/..", "n", decode=True)
    assert info.problem is None
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent.parent for path in written] == [tmp_path / "images"]
    assert safe_name("...") == "images"


def test_an_animated_gif_named_jpg_is_told_by_its_content() -> None:
    info, extension = look(raw_sets.image_bytes(1, kind="GIF", frames=3), "a.jpg", decode=True)
    assert [note.kind for note in info.notes] == ["wrong-extension", "animated-image"]
    assert (extension, info.problem) == ("gif", None)


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw_sets.write_image(raw / "a.jpg", 1)
    good = json.dumps(record("a.jpg")).encode()
    lines = [
        good,
        b'{"image": "a.jpg", "conversations": "\xff\xfe"}',
        b"\0\0\0",
        b"[" * 100_000,
        b"{" + b" " * (70 << 20) + b"}",
        b'{"id": ' + b"9" * 10_000 + b"}",
        b"null",
        b"[]",
        b'{"image": {"a": 1}, "conversations": [{"from": "human", "value": "x"}]}',
        b'{"image": "a.jpg", "conversations": [{"from": ["human"], "value": "x"}]}',
        b'{"image": "a.jpg", "conversations": [[], {}, 3]}',
        b'{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}',
        b'{"image": [], "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "\\u0000x"}]}',
        good,
    ]
    (raw / "a.jsonl").write_bytes(b"\n".join(lines))
    done = raw_sets.prepare("llava-json", raw, tmp_path / "out")
    assert [row.where for row in done.rows] == ["a.jsonl:1", "a.jsonl:13", "a.jsonl:14"]
    assert done.defects == {"bad-json dropped": 5, "bad-record dropped": 5, "bad-text dropped": 1}


@pytest.mark.parametrize("check", ["exist", "none", "decode"])
def test_names_that_are_no_text(tmp_path: Path, check: str) -> None:
    raw_sets.write_image(tmp_path / "raw/ä.jpg", 1)
    good = record("ä.jpg")
    rows = [{**good, "id": "\ud800"}, record("\ud800.jpg"), record("\ud800/a.jpg"), good, {**good, "extra\ud800": 1}]
    raw_sets.write_lines(tmp_path / "raw/a.jsonl", rows)
    done = raw_sets.prepare("llava-json", tmp_path / "raw", tmp_path / "out", "--check-images", check)
    assert [row.where for row in done.rows] == ["a.jsonl:4", "a.jsonl:5"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"id": 1}, {"id"', r"a\.json:1: not valid JSON"),
        (b'[{"id": "\xff"}]', r"a\.json:1: byte 0xff is not UTF-8"),
        (b"\0\0", r"a\.json:1: not a JSON list"),
        (b"", r"a\.json:1: not a JSON list"),
        (b'["' + b"x" * (70 << 20) + b'"]', r"a\.json:1: a record of more than"),
    ],
)
def test_a_damaged_list_is_an_error_that_leaves_nothing(
    tmp_path: Path, data: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.json").write_bytes(data)
    assert main(["prepare", "llava-json", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_an_error(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    for data in (b"", b"PAR1", b"ARROW1\0\0rubbish", b"x" * 1000):
        (tmp_path / "raw" / name).write_bytes(data)
        assert main(["prepare", "messages", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
        assert f"{name}" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["question", "date"])
def test_values_that_python_cannot_hold(tmp_path: Path, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: dict[str, object] = {"question": ["a", "b"], "answer": ["a", "b"]}
    if column == "question":
        table[column] = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    else:
        table[column] = pa.array([0, 2**62], pa.timestamp("us"))
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(table), tmp_path / "raw/a.parquet")
    assert main(["prepare", "messages", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    assert "a.parquet:1: cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 5000, "ä" * 200, "x" * 101])
def test_long_names_are_cut_and_stay_different(tmp_path: Path, name: str) -> None:
    info = unpack(raw_sets.image_bytes(1), tmp_path, name, "n", decode=True)
    assert info.problem is None
    assert (tmp_path / info.path).is_file()
    assert safe_name(name) != safe_name(name + "y")
    assert len(safe_name(name).encode()) <= 120
    assert safe_name("x" * 100) == "x" * 100


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        unpack(raw_sets.image_bytes(1), tmp_path, "a", "n", decode=True)
