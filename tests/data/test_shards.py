"""Sources that hold their images: tar shards, parquet and saved data sets give what JSON with an image folder gives."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from worlds import shard_sets as sets
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import ConfigError, DataError, StorageError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data.block_cache import BlockCache
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.shard_files import find_shards, is_sharded
from llava_mole.data.shards import BLOCK, Checksums, Reference, parse_reference

TOKENIZER = LlamaSentencePiece(legacy=False)


def config(tmp_path: Path, place: Path | str, **options: Any) -> DataConfig:
    folder = options.pop("image_folder", str(tmp_path))
    source = SourceConfig(annotations=str(place), image_folder=folder)
    return DataConfig(sources={"a": source}, max_length=128, cache_dir=str(tmp_path / "cache"), **options)


def build(data: DataConfig, **options: Any) -> SupervisedDataset:
    return build_dataset(data, TOKENIZER, ImageProcessor(16), 4, **{"seed": 0, "epochs": 1, **options})


def assert_equal(one: SupervisedDataset, other: SupervisedDataset) -> None:
    """The same samples in the same order, and the same numbers."""
    assert len(one) == len(other)
    a, b = one.plan.epoch_plan(0), other.plan.epoch_plan(0)
    assert np.array_equal(a.sample_index, b.sample_index)
    for left, right in zip(one.__getitems__(range(len(one))), other.__getitems__(range(len(one))), strict=True):
        assert (left.id, left.input_ids, left.labels, left.replaced_image) == (
            right.id,
            right.input_ids,
            right.labels,
            None,
        )
        assert (left.images is None) == (right.images is None)
        assert left.images is None or torch.equal(left.images, right.images)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SupervisedDataset:
    folder = tmp_path_factory.mktemp("json")
    records = sets.write_json(folder)
    return build(config(folder, records, image_folder=str(folder / "images")))


@pytest.mark.parametrize("form", sets.WRITERS)
def test_a_source_is_the_same_in_every_form(form: str, tmp_path: Path, reference: SupervisedDataset) -> None:
    place = sets.WRITERS[form](tmp_path / "set")
    assert is_sharded(str(place))
    dataset = build(config(tmp_path, place))
    assert_equal(reference, dataset)
    assert_equal(reference, pickle.loads(pickle.dumps(dataset)))  # as in a loader worker
    again = build(config(tmp_path, place))
    assert again.plan.digest == dataset.plan.digest
    assert again.digests == dataset.digests


def test_the_index_is_built_once_and_again_for_changed_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(tmp_path, sets.write_tars(tmp_path / "set"))

    def indexed() -> int:
        caplog.clear()
        with caplog.at_level(logging.INFO, "llava_mole"):
            build(data)
        return sum("indexing" in line.message for line in caplog.records)

    assert [indexed(), indexed()] == [1, 0]
    shard = tmp_path / "set" / "shard-001.tar"
    os.utime(shard, (1, 1))
    assert [indexed(), indexed()] == [1, 0]
    index = tmp_path / "cache" / "index"
    assert not list(index.glob(".parts*"))


def test_a_killed_build_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: SupervisedDataset
) -> None:
    from llava_mole.data import shard_index

    data = config(tmp_path, sets.write_tars(tmp_path / "set"))
    read: list[str] = []
    original = shard_index.tar_samples

    def samples(path: Path, number: int, *rest: Any) -> Any:
        if number == 2 and len(read) == 2:
            read.append("killed")
            raise KeyboardInterrupt
        read.append(path.name)
        return original(path, number, *rest)

    monkeypatch.setattr(shard_index, "tar_samples", samples)
    with pytest.raises(KeyboardInterrupt):
        build(data)
    assert_equal(reference, build(data))
    assert read == ["shard-000.tar", "shard-001.tar", "killed", "shard-002.tar"]


def test_a_shard_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    data = config(tmp_path, sets.write_tars(tmp_path / "set"))
    dataset = build(data)
    for shard in (tmp_path / "set").iterdir():
        shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(StorageError, match=r"shard-00\d.tar: is not the file that was indexed when this run started"):
        dataset.__getitems__(range(len(dataset)))
    for file in sets.write_parquet(tmp_path / "tables").iterdir():
        dataset = build(config(tmp_path / "other", file))
        file.write_bytes(sets.write_tar(tmp_path / "x.tar", []).read_bytes())
        with pytest.raises(StorageError, match="parquet: "):
            dataset.__getitems__(range(len(dataset)))
        break


def test_patterns_and_other_records(tmp_path: Path) -> None:
    folder = sets.write_tars(tmp_path / "set")
    for pattern in ("shard-*.tar", "shard-{000..002}.tar", "shard-00{0,1,2}.tar"):
        assert is_sharded(f"{folder}/{pattern}")
        assert len(find_shards(f"{folder}/{pattern}", None)[1]) == 3  # type: ignore[arg-type]
    messages = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                             {"role": "assistant", "content": "A ramp."}]}  # fmt: skip
    pair = {"image": ["b/x.png", "a.png"], "conversations": [
        {"from": "human", "value": "<image><image>Two?"}, {"from": "gpt", "value": "Yes."}]}  # fmt: skip
    members = [
        ("0.jpg", sets.picture(1)), ("0.json", json.dumps(messages).encode()), ("1.png", sets.picture(2)),
        ("1.txt", b"A caption."), ("1.cls", b"7"), ("2.a.png", sets.picture(3)), ("2.b.png", sets.picture(4)),
        ("2.json", json.dumps(pair | {"image": ["z/2.b.png", "2.a.png"]}).encode()), ("._2.png", b"x"),
    ]  # fmt: skip
    dataset = build(config(tmp_path, sets.write_tar(tmp_path / "mixed.tar", members)))
    by_id = {}
    for position in range(3):
        _, found, images = dataset.sample(position)
        by_id[found.id] = ([turn.text for turn in found.turns], [image.width for image in images])
    assert by_id["0"] == (["<image>\nWhat?", "A ramp."], [25])
    assert by_id["1"][1] == [26]
    assert by_id["1"][0][1] == "A caption."
    assert by_id["2"] == (["<image><image>Two?", "Yes."], [28, 27])


def test_tables_with_lists_of_images_and_questions(tmp_path: Path) -> None:
    pictures = [sets.picture(n) for n in range(4)]
    rows = {"question": ["One?", "Two?", "None?"], "answer": ["a", "b", "c"],
            "photos": [pictures[:1], pictures[1:3], []]}  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    dataset = build(config(tmp_path, tmp_path / "t.parquet"))
    widths = {}
    for position in range(3):
        _, found, images = dataset.sample(position)
        widths[found.turns[0].text.split("\n")[-1]] = [image.width for image in images]
    assert widths == {"One?": [24], "Two?": [25, 26], "None?": []}


GOOD = sets.tar_members(0)
TEXT = json.dumps(sets.record(3)).encode()
TWO = json.dumps(sets.record(0) | {"image": ["a", "b"]}).encode()
BAD_TARS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "escape": ([("../../up.json", b"{}")], r"member '../../up.json' leads out of the shard"),
    "absolute": ([("/etc/x.json", b"{}")], r"member '/etc/x.json' leads out of the shard"),
    "no text": ([("1.png", b"x")], r"bad.tar:1: sample '1' has neither .json nor .txt, only .png"),
    "not JSON": ([("1.json", b"{")], r"bad.tar:1: sample '1': '1.json' is not valid: Expecting"),
    "a list": ([("1.json", b"[]")], r"'1.json' holds list; it must be one record"),
    "apart": ([*GOOD, ("1.json", TEXT), GOOD[0]], r"sample '000' do not stand side by side"),
    "twice": ([GOOD[1], GOOD[1]], r"two members are called '000.json'"),
    "another format": ([("1.json", b'{"question": "q"}')], r"bad.tar:1: bad-record: neither 'messages'"),
    "no marker": ([("1.png", b"x"), ("1.json", TEXT)], r"bad.tar:1: image .* never be"),
    "count": ([*GOOD[:1], ("000.json", TWO)], r"2 images, 1 of"),
    "empty": ([], r"bad.tar: holds no sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TARS)
def test_bad_tars_are_refused_with_one_line(name: str, tmp_path: Path) -> None:
    members, message = BAD_TARS[name]
    with pytest.raises(DataError, match=message) as error:
        build(config(tmp_path, sets.write_tar(tmp_path / "bad.tar", members)))
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache" / "index").iterdir() if not path.name.startswith(".parts")][1:]


def test_huge_members_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarfile

    from llava_mole.data import shards, tar_shard

    place = sets.write_tar(tmp_path / "bad.tar", GOOD)
    monkeypatch.setattr(shards, "LARGEST_IMAGE", 50)
    with pytest.raises(DataError, match=r"sample '000': image '000.png' has \d+ bytes, it may have 50; scale it down"):
        build(config(tmp_path, place))
    monkeypatch.undo()
    monkeypatch.setattr(tar_shard, "LARGEST_VALUE", 20)
    with pytest.raises(DataError, match=r"'000.json' has \d+ bytes, a record may have 20"):
        build(config(tmp_path, place))
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"link.tar: member '1.png' is a link; it is not read"):
        build(config(tmp_path, tmp_path / "link.tar"))


@pytest.mark.parametrize("form", sets.WRITERS)
@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_shard_that_is_cut_is_refused(form: str, where: str, tmp_path: Path) -> None:
    place = sets.WRITERS[form](tmp_path / "set")
    shard = sorted(path for path in place.iterdir() if path.suffix != ".json")[1]
    data = shard.read_bytes()
    # A tar file ends in two or more blocks of zeros, of which one is enough.
    end = len(data.rstrip(b"\0")) // 512 * 512 if form == "tar" else len(data) - 6
    shard.write_bytes(data[: len(data) // 2 if where == "middle" else end])
    with pytest.raises(DataError, match=f"{shard.name}: .*(cut short|cannot be read|no sound tar)") as error:
        build(config(tmp_path, place))
    assert "\n" not in str(error.value)


def test_folders_that_mean_several_things_are_refused(tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    for split in ("train", "test"):
        sets.write_saved(splits / split)
    (splits / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="holds the splits of a data set; name one of its folders"):
        build(config(tmp_path, splits))
    tables = sets.write_parquet(tmp_path / "tables")
    (tables / "train-00002-of-00003.parquet").rename(tables / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="holds files of the splits test, train; name those to train on, such as"):
        build(config(tmp_path, tables))
    assert len(build(config(tmp_path, tables / "train-*"))) == 8
    sets.write_tar(tables / "a.tar", GOOD)
    with pytest.raises(DataError, match="several kinds"):
        build(config(tmp_path, tables))
    sets.write_tar(tmp_path / "packed" / "a.tar", GOOD).rename(tmp_path / "packed" / "a.tar.gz")
    with pytest.raises(DataError, match=r"a.tar.gz is a compressed tar file"):
        build(config(tmp_path, tmp_path / "packed" / "a.tar.gz"))
    with pytest.raises(DataError, match=r"nothing-\*.tar: no such file or folder"):
        build(config(tmp_path, tmp_path / "nothing-*.tar"))


def test_parquet_of_another_schema_is_refused(tmp_path: Path) -> None:
    tables = sets.write_parquet(tmp_path / "tables")
    odd = pa.table({"question": ["q"], "answer": ["a"], "image": [sets.picture(0)]})
    pq.write_table(odd, tables / "train-00002-of-00003.parquet")
    with pytest.raises(DataError, match=r"00002-of-00003.parquet: has other columns than .*00000-of.* \(it lacks conv"):
        build(config(tmp_path, tables))
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet:1: .*conversations|other.parquet:1: bad-record"):
        build(config(tmp_path, tmp_path / "other.parquet"))
    pq.write_table(pa.table({"q": ["x"], "left": [b"1"], "right": [b"2"]}), tmp_path / "two.parquet")
    with pytest.raises(DataError, match="columns left, right all hold bytes; call the one with the images"):
        build(config(tmp_path, tmp_path / "two.parquet"))


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 1000, folders=1)
    for n in range(20):
        assert cache.put(f"b{n}", bytes([n]) * 196)
        os.utime(cache._path(f"b{n}"), (n, n))
        assert cache.used() <= 1000
        assert n == 0 or cache.get("b0", 196) is not None  # marks it as used
    assert [n for n in range(20) if cache.has(f"b{n}")] == [0, 16, 17, 18, 19]
    assert not cache.put("large", bytes(2000))
    path = cache._path("b19")
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    assert cache.get("b19", 196) is None
    assert cache.get("b18", 195) is None
    (tmp_path / "file").write_text("")
    assert not BlockCache(tmp_path / "file" / "c", 1000).put("x", b"1")


def test_references_and_checksums() -> None:
    place = Reference(3, 2, 10, 5, "a:b/c.jpg")
    assert parse_reference(str(place)) == place
    assert parse_reference("shard:1.png") is None
    sums = Checksums()
    for size in (BLOCK - 1, 2, BLOCK, 7):
        sums.add(bytes(size))
    assert (sums.finish().size, len(sums.crcs)) == (2 * BLOCK + 8, 3)


@pytest.mark.parametrize("place", ["shard:9:0+5:x", "shard:0:0+99999999:x", "shard:0.7:0+5:x"])
def test_a_made_up_reference_reads_nothing_else(place: str, tmp_path: Path) -> None:
    value = sets.record(0) | {"image": place}
    members = [("0.json", json.dumps(value).encode()), *sets.tar_members(1)]
    dataset = build(config(tmp_path, sets.write_tar(tmp_path / "a.tar", members)))
    replaced = [example.replaced_image for example in dataset.__getitems__(range(2)) if example.replaced_image]
    assert len(replaced) == 1
    assert f"a.tar:1: image {place!r} does not lie in the shards" in replaced[0]


def test_remote_paths_need_permission(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.sources.a.annotations is 's3://b/c', and data.allow_remote is false"):
        config(tmp_path, "s3://b/c")
    with pytest.raises(
        ConfigError, match=r"image_folder is 'http://b/c'; remote data are read from s3://, gs://, hf://"
    ):
        config(tmp_path, "a.json", image_folder="http://b/c", allow_remote=True)


def test_follow_links_of_all_sources(tmp_path: Path) -> None:
    records = sets.write_json(tmp_path / "real")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real" / "images")
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    named = [line | {"image": f"linked/{line['image']}"} if "image" in line else line for line in lines]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    options = {"image_folder": str(tmp_path / "data")}
    with pytest.raises(DataError, match="outside the image folder"):
        build(config(tmp_path, tmp_path / "data.jsonl", **options))
    dataset = build(config(tmp_path, tmp_path / "data.jsonl", follow_links=True, **options))
    assert all(example.replaced_image is None for example in dataset.__getitems__(range(len(dataset))))


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_packed_records_are_the_same(
    form: str, tmp_path: Path, reference: SupervisedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.examples import pack_shards

    records, out = sets.write_json(tmp_path / "json"), tmp_path / "packed"
    arguments = ["pack_shards.py", str(records), str(records.parent / "images"), str(out), "--samples", "5"]
    monkeypatch.setattr("sys.argv", [*arguments, "--form", form])
    assert pack_shards.main() == 0
    assert len(list(out.iterdir())) == 3
    assert_equal(reference, build(config(tmp_path, out)))
    assert pack_shards.main() == 2, "nothing is overwritten"


def test_checks_before_a_run_read_shards(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from llava_mole.analysis.check import cli
    from llava_mole.analysis.plan.lengths import source_lengths
    from llava_mole.config import parse_run_config
    from llava_mole.study.inputs import Inputs
    from llava_mole.train.preflight import missing_inputs

    values = yaml.safe_load((world / "config.yaml").read_text())
    broken = [("x.png", b"no image"), ("x.json", json.dumps(sets.record(0) | {"id": "x"}).encode())]
    members = [*broken, *(member for index in range(4) for member in sets.tar_members(index))]
    place = str(sets.write_tar(tmp_path / "a.tar", members))
    values["data"]["sources"] = {"a": {"annotations": place, "image_folder": "absent"}}
    values["data"]["mixture"] = {}
    values["data"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run = parse_run_config([str(tmp_path / "run.yaml")])
    assert not [line for line in missing_inputs(run.model, run.data, None, None) if "data.sources" in line]
    assert cli.main([str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    found = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["where"]) for line in found if "image" in line["kind"]] == [
        ("corrupt-image", f"{place}:1")
    ]
    (lengths,) = source_lengths(run.data, run.model.language_model, 4)
    assert lengths.records == 5
    assert Inputs(None).source("a", run.data.sources["a"], images=True) != "missing"
