"""Compressed record files and linked folders: read, or refused by name."""

import bz2
import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
from worlds import raw_sets
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.analysis.check.images import evaluation_files
from llava_mole.cli import main
from llava_mole.common.errors import DataError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data.dataset import build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.json_stream import COMPRESSED
from llava_mole.data.prepare.files import find_files
from llava_mole.data.store import read_records

RECORDS = [{"id": str(n), "conversations": raw_sets.talk(f"Number {n}?", "It is. " * 40)} for n in range(3000)]
LISTED = ("[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]").encode()
LINES = ("\n".join(map(json.dumps, RECORDS)) + "\n").encode()
KINDS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


def packed(suffix: str, data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, KINDS[suffix]) as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["", *COMPRESSED, ".GZ"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSON", "A.JSONL"])
def test_compressed_files_are_read_like_others(name: str, suffix: str, tmp_path: Path) -> None:
    data = LISTED if name.lower().endswith(".json") else LINES
    path = tmp_path / (name + suffix)
    path.write_bytes(packed(suffix.lower(), data) if suffix else data)
    records = read_records(path, "s")
    assert [record.id for record in records] == [record["id"] for record in RECORDS]
    assert records[7].where == f"{path}:{9 if data is LISTED else 8}"


def test_files_of_the_usual_tools_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(LINES))  # as `cat a.gz b.gz` does
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(LINES))
    assert len(read_records(tmp_path / "a.jsonl.gz", "s")) == 2 * len(RECORDS)
    assert len(read_records(tmp_path / "a.jsonl.bz2", "s")) == len(RECORDS)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("damage", ["half", "tail", "other", "garbage"])
def test_a_damaged_file_is_refused_and_never_cut_short(suffix: str, damage: str, tmp_path: Path) -> None:
    data = packed(suffix, LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    changed = {"half": data[: len(data) // 2], "tail": data[:-4], "other": LINES, "garbage": data + b"garbage"}
    path.write_bytes(changed[damage])
    with pytest.raises(DataError, match="cannot read the annotation file: .*; is it damaged or not complete"):
        read_records(path, "s")


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.json.zip", "a.jsonl.br", "a.7z", "a.jsonl.XZ"])
def test_other_compression_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xfd7zXZ")
    with pytest.raises(DataError, match=r"files are not read; unpack it, or use one of \.gz, \.zst, \.bz2, \.lz4"):
        read_records(tmp_path / name, "s")


# prepare


def test_prepare_reads_every_compressed_file_of_a_folder(tmp_path: Path) -> None:
    for n, suffix in enumerate(["", *COMPRESSED]):
        line = json.dumps({"id": str(n), "conversations": raw_sets.talk("Hi?", "Hello.")}).encode()
        path = tmp_path / "raw" / f"part{n}.jsonl{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed(suffix, line) if suffix else line)
    for source in ("llava-json", "messages"):
        done = raw_sets.prepare(source, tmp_path / "raw", tmp_path / source)
        assert len(done.rows) == 5


@pytest.mark.parametrize("name", ["b.jsonl.xz", "b.json.zip", "b.JSONL.7z", "b.jsonl.Z", "b.parquet.gz"])
def test_prepare_refuses_what_it_cannot_unpack(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_sets.write_lines(tmp_path / "raw" / "a.jsonl", RECORDS[:2])
    (tmp_path / "raw" / name).write_bytes(b"x")
    given = ["prepare", "messages", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(given) == 2
    assert f"{name}: is compressed in a way that this source does not read; unpack it" in capsys.readouterr().err
    (tmp_path / "raw" / name).rename(tmp_path / "raw" / "b.jsonl.gz")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: is compressed"):
        find_files(tmp_path / "raw", (".jsonl",), "file")


def linked_world(tmp_path: Path) -> Path:
    """`raw` with own.jsonl, a link to a folder with more.jsonl and images, and a link back to itself."""
    raw, away = tmp_path / "raw", tmp_path / "away"
    for folder, name in ((raw, "own"), (away, "more")):
        raw_sets.write_image(folder / f"{name}.png", 1, kind="PNG")
        image = f"{name}.png" if folder == raw else "link/more.png"
        record = {"id": name, "image": image, "conversations": raw_sets.talk("<image>\nWhat?", "This.")}
        raw_sets.write_lines(folder / f"{name}.jsonl", [record])
    (raw / "link").symlink_to(away)
    (away / "back").symlink_to(raw)
    (raw / "link-again").symlink_to(away)
    return raw


def test_linked_folders_are_searched_only_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = linked_world(tmp_path)
    with caplog.at_level(logging.WARNING, "llava_mole"):
        done = raw_sets.prepare("llava-json", raw, tmp_path / "without")
    assert [row.id for row in done.rows] == ["own"]
    assert sorted(record.message for record in caplog.records) == [
        f"{raw}/{name} is a link to a folder and is not searched; --follow-links searches it"
        for name in ("link", "link-again")
    ]
    done = raw_sets.prepare("llava-json", raw, tmp_path / "with", "--follow-links", "--check-images", "decode")
    assert sorted(row.id for row in done.rows) == ["more", "own"]
    found = find_files(raw, (".jsonl",), "file", follow_links=True)
    assert [path.name for path in found] == ["more.jsonl", "own.jsonl"]


def test_images_behind_links_are_read_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = linked_world(tmp_path)
    text = (tmp_path / "away" / "more.jsonl").read_text() + (raw / "own.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(text)
    for follow in (False, True):
        source = SourceConfig(annotations=str(tmp_path / "both.jsonl"), image_folder=str(raw), follow_links=follow)
        data = DataConfig(sources={"a": source}, max_length=64)
        arguments = (data, LlamaSentencePiece(legacy=False), ImageProcessor(8), 4)
        if not follow:
            with pytest.raises(DataError, match=r"both.jsonl:1: .*is a link to .*data\.sources\.<name>\.follow_links"):
                build_dataset(*arguments, seed=0, epochs=1)
            continue
        dataset = build_dataset(*arguments, seed=0, epochs=1)
        assert {dataset[n].id: dataset[n].replaced_image for n in range(2)} == {"more": None, "own": None}
    done = raw_sets.prepare("llava-json", tmp_path / "both.jsonl", tmp_path / "kept", "--image-root", str(raw))
    assert done.defects == {"outside-image dropped": 1}
    more = ["--image-root", str(raw), "--follow-links"]
    done = raw_sets.prepare("llava-json", tmp_path / "both.jsonl", tmp_path / "all", *more)
    assert (len(done.rows), done.defects) == (2, {})
    assert "follow_links: true" in capsys.readouterr().out


def test_evaluation_images_behind_links_are_compared(tmp_path: Path) -> None:
    raw = linked_world(tmp_path)
    assert [path.name for path in evaluation_files([str(raw)])] == ["more.png", "own.png"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../away/more.png", "link/../../x.png"])
def test_links_allow_no_other_way_out(path: str, tmp_path: Path) -> None:
    raw = linked_world(tmp_path)
    record = {"image": path, "conversations": raw_sets.talk("<image>\nWhat?", "This.")}
    raw_sets.write_lines(tmp_path / "a.jsonl", [record])
    source = SourceConfig(annotations=str(tmp_path / "a.jsonl"), image_folder=str(raw), follow_links=True)
    data = DataConfig(sources={"a": source}, max_length=64)
    with pytest.raises(DataError, match="must be relative to the image folder"):
        build_dataset(data, LlamaSentencePiece(legacy=False), ImageProcessor(8), 4, seed=0, epochs=1)
