"""A prepared data set gives back what was put in, opens lazily in every process, and is whole or refused."""

import contextlib
import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_mole.common.errors import DataError, UserError
from llava_mole.conversation import Turn
from llava_mole.data import store
from llava_mole.data.records import Record
from llava_mole.data.store import PreparedRecords, PreparedRow, StoreWriter, read_manifest, read_records, verify_shards


def row(number: int, *, images: int | None = None, rounds: int | None = None) -> PreparedRow:
    """Row `number`; none to two images, one to three rounds, text with characters of all widths."""
    images = number % 3 if images is None else images
    rounds = 1 + number % 3 if rounds is None else rounds
    turns = []
    for n in range(rounds):
        marker = "<image>" * images if n == 0 else ""
        turns += [
            Turn("user", f"{marker} Wie heißt Nr. {number}? 图 {n}"),
            Turn("assistant", f"🦉 {'no ' * number}{n}"),
        ]
    return PreparedRow(
        id=f"id-{number}",
        source=("coco", "vqa-v2")[number % 2],
        images=tuple(f"bild/{number}-{k}.jpg" for k in range(images)),
        turns=tuple(turns),
        image_sizes=tuple((100 + number, 50 + k) for k in range(images)) if number % 2 else (),
        answer_type=(None, "OPEN", "CLOSED")[number % 3],
        where=f"/raw/part{number % 2}.json:{number + 1}",
    )


def write(directory: Path, count: int = 20, shard_rows: int = 7) -> PreparedRecords:
    with StoreWriter(directory, name="toy", shard_rows=shard_rows) as writer:
        for number in range(count):
            writer.add(row(number))
        writer.finish({"kept": count})
    return PreparedRecords(directory, "general")


def as_record(expected: PreparedRow) -> Record:
    return Record(expected.id, expected.images, expected.turns, "general", expected.where)


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    records = write(tmp_path / "set")
    assert len(records) == 20
    order = list(range(20))
    random.Random(0).shuffle(order)
    for number in order:
        assert records[number] == as_record(row(number))
        assert records.row(number) == row(number)
    assert records[-1] == records[19]
    assert list(records[3:12:4]) == [records[3], records[7], records[11]]
    for outside in (20, -21):
        with pytest.raises(IndexError):
            records[outside]


def test_read_records_opens_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "set", 3)
    records = read_records(tmp_path / "set", "medicine")
    assert isinstance(records, PreparedRecords)
    assert [record.source for record in records] == ["medicine"] * 3
    with pytest.raises(DataError, match=r"it is a directory without manifest\.json"):
        read_records(tmp_path, "medicine")


def test_columns_describe_the_rows(tmp_path: Path) -> None:
    records = write(tmp_path / "set")
    rows = [row(number) for number in range(20)]
    assert records.sources == ("coco", "vqa-v2")
    assert [records.sources[k] for k in records.column("source")] == [r.source for r in rows]
    assert records.column("num_images").tolist() == [len(r.images) for r in rows]
    assert records.column("num_turns").tolist() == [len(r.turns) for r in rows]
    assert records.column("text_bytes").tolist() == [sum(len(t.text.encode()) for t in r.turns) for r in rows]
    assert records.column("words").tolist() == [sum(len(t.text.split()) for t in r.turns) for r in rows]
    assert records.column("where_line").tolist() == list(range(1, 21))


def test_shards_are_plain_arrow(tmp_path: Path) -> None:
    write(tmp_path / "set")
    files = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert files == ["manifest.json", "shard-00000.arrow", "shard-00001.arrow", "shard-00002.arrow"]
    with pa.ipc.open_file(str(tmp_path / "set" / "shard-00001.arrow")) as reader:
        table = reader.read_all()
    table.validate(full=True)
    assert table.num_rows == 7
    assert table["turns"][0].as_py() == [turn.text for turn in row(7).turns]
    assert table["image_sizes"][0].as_py() == [107, 50]
    manifest = read_manifest(tmp_path / "set")
    assert (manifest["name"], manifest["rows"], manifest["report"]) == ("toy", 20, {"kept": 20})


def test_a_pickled_copy_opens_the_files_again(tmp_path: Path) -> None:
    records = write(tmp_path / "set", 300)
    data = pickle.dumps(records)
    assert len(data) < 500
    assert pickle.loads(data)[123] == records[123]
    loader = torch.utils.data.DataLoader(records, batch_size=None, num_workers=2, multiprocessing_context="spawn")  # type: ignore[arg-type]
    assert list(loader) == list(records)
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        pickle.loads(data)


def test_a_copy_does_not_read_another_set_of_the_same_name(tmp_path: Path) -> None:
    data = pickle.dumps(write(tmp_path / "set", 3))
    os.rename(tmp_path / "set", tmp_path / "old")
    write(tmp_path / "set", 4)
    with pytest.raises(DataError, match="has been prepared anew while it was in use"):
        pickle.loads(data)


def test_large_shards_are_cut_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 1000)
    write(tmp_path / "set", 60, shard_rows=1000)
    shards = read_manifest(tmp_path / "set")["shards"]
    assert len(shards) > 5
    assert sum(shard["rows"] for shard in shards) == 60


def test_the_writer_holds_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 100_000)
    long = row(1, rounds=1)
    long = PreparedRow(long.id, "s", (), (Turn("user", "a " * 5000), Turn("assistant", "b")), (), None, "f:1")
    tracemalloc.start()
    try:
        with StoreWriter(tmp_path / "set", name="toy") as writer:
            for _ in range(1000):
                writer.add(long)
            writer.finish({})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "set" / "shard-00050.arrow").exists()
    assert peak < 3_000_000  # of 10 MB written


def nothing_is_left(tmp_path: Path) -> bool:
    return list(tmp_path.iterdir()) == []


def test_nothing_has_the_final_name_before_the_end(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "set", name="toy", shard_rows=2)
    for number in range(5):
        writer.add(row(number))
    assert not (tmp_path / "set").exists()
    writer.close()
    assert nothing_is_left(tmp_path)
    with StoreWriter(tmp_path / "set", name="toy", shard_rows=1) as writer:
        writer.add(row(0))
    assert nothing_is_left(tmp_path)
    with pytest.raises(DataError, match="no record is left to be written"):
        StoreWriter(tmp_path / "set", name="toy").finish({})
    assert nothing_is_left(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path / "set", name="toy", shard_rows=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        writer.add(row(0)), writer.add(row(1))
    assert nothing_is_left(tmp_path)


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "set", 3)
    with pytest.raises(DataError, match="exists already"):
        StoreWriter(tmp_path / "set", name="toy")
    (tmp_path / "empty").mkdir()
    assert len(write(tmp_path / "empty", 2)) == 2


WRONG_ROWS = {
    "two questions": (
        dict(turns=(Turn("user", "a"), Turn("user", "b")), images=()),
        r"two consecutive turns from the user \(turns 1 and 2\)",
    ),
    "no answer": (dict(turns=(Turn("user", "a"),), images=()), "no question with an answer"),
    "no marker": (dict(turns=(Turn("user", "a"), Turn("assistant", "b"))), "0 times <image> for 1 image"),
    "marker in answer": (dict(turns=(Turn("user", "a"), Turn("assistant", "<image>"))), "stands in an answer"),
    "one size for no image": (dict(images=(), turns=row(0).turns, image_sizes=((1, 2),)), "1 image size for 0 images"),
    "half a surrogate": (
        dict(turns=(Turn("user", "<image>\ud83d"), Turn("assistant", "b"))),
        "holds an unpaired surrogate; remove it",
    ),
}


@pytest.mark.parametrize(("change", "expected"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_row_that_no_record_may_be_is_refused(change: dict, expected: str, tmp_path: Path) -> None:
    from dataclasses import replace

    good = replace(row(1, images=1), image_sizes=())
    with StoreWriter(tmp_path / "set", name="toy") as writer:
        writer.add(good)
        with pytest.raises(DataError, match=expected) as caught:
            writer.add(replace(good, **change))
        assert str(caught.value).startswith("/raw/part1.json:2: ")
        writer.finish({})
    assert len(PreparedRecords(tmp_path / "set", "s")) == 1


def change_manifest(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["rows"] = 19
    (directory / "manifest.json").write_text(json.dumps(manifest))


def other_format(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format": "llava_mole.prepared/9"}')


def no_json(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format"')


def lost_shard(directory: Path) -> None:
    (directory / "shard-00001.arrow").unlink()


def cut_shard(directory: Path) -> None:
    data = (directory / "shard-00002.arrow").read_bytes()
    (directory / "shard-00002.arrow").write_bytes(data[:-1])


def zeroed_shard(directory: Path) -> None:
    path = directory / "shard-00002.arrow"
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change_manifest, "differs from what was written"),
        (other_format, "format 'llava_mole.prepared/9', but this version reads"),
        (no_json, "damaged"),
        (lost_shard, "incomplete, shard-00001.arrow is missing"),
        (cut_shard, "damaged, shard-00002.arrow has"),
        (zeroed_shard, "not an Arrow file"),
    ],
)
def test_a_damaged_set_is_refused_in_one_line(damage, expected: str, tmp_path: Path) -> None:
    write(tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=expected) as caught:
        read_records(tmp_path / "set", "general")
    assert str(caught.value).startswith(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_hashes_find_a_changed_byte(tmp_path: Path) -> None:
    write(tmp_path / "set")
    assert verify_shards(tmp_path / "set")["rows"] == 20
    path = tmp_path / "set" / "shard-00001.arrow"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Wie", b"Wer", 1))
    PreparedRecords(tmp_path / "set", "general")
    with pytest.raises(DataError, match=r"shard-00001\.arrow differs from what was written \(sha256\)"):
        verify_shards(tmp_path / "set")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_raise_nothing_but_our_own_errors(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    if not (tmp_path / "set").exists():
        write(tmp_path / "set", 5)
        (tmp_path / "whole").write_bytes((tmp_path / "set" / "shard-00000.arrow").read_bytes())
    data = bytearray((tmp_path / "whole").read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    (tmp_path / "new").write_bytes(data)  # writing over a file that is mapped would cut the map short
    (tmp_path / "new").rename(tmp_path / "set" / "shard-00000.arrow")
    with contextlib.suppress(UserError):
        records = PreparedRecords(tmp_path / "set", "general")
        assert len(records.column("words")) == 5
        for number in range(5):
            records.row(number)


@pytest.mark.parametrize(
    "text",
    ["", " ", "one", " one  two\n", "a\tb\vc\fd\re\x1cf\x1dg\x1eh\x1fi", "\x85a", "a\u00a0b \u3000c", "x x", "\0 \x7f"],
)
def test_words_are_those_of_split(text: str) -> None:
    assert store._count_words(Turn("user", text), text.encode()) == len(text.split())
