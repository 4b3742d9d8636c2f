"""Sources on a real S3 server on loopback: the same samples as on disk; every fault is survived or one clear line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import shard_sets as sets
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import DataError, StorageError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data import remote
from llava_mole.data.block_cache import BlockCache
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import ImageProcessor

pytest.importorskip("moto", reason="needs the extra dev")
pytest.importorskip("s3fs", reason="needs the extra remote")
TOKENIZER = LlamaSentencePiece(legacy=False)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, sets.FaultyServer]]:
    with pytest.MonkeyPatch.context() as patch, sets.s3_server(patch) as (client, proxy):
        yield client, proxy
    remote._filesystem.cache_clear()


@pytest.fixture
def proxy(server: tuple[Any, sets.FaultyServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[sets.FaultyServer]:
    """Without faults, and with short pauses."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    _, proxy = server
    proxy.asked.clear()
    proxy.bytes = 0
    yield proxy
    proxy.fault = lambda key, times: None


@pytest.fixture(scope="module")
def places(server: tuple[Any, sets.FaultyServer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of each form, and its local folder under `local/FORM`."""
    client, _ = server
    folder, found = tmp_path_factory.mktemp("forms"), {}
    for form, write in sets.WRITERS.items():
        found[f"local/{form}"] = str(write(folder / form))
        found[form] = sets.upload(client, folder / form, "data", form)
    records = sets.write_json(folder / "json")
    found["images"] = sets.upload(client, folder / "json" / "images", "data", "images")
    found["json"] = sets.upload(client, folder / "json", "data", "json") + "/records.jsonl"
    found["local/json"], found["local/images"] = str(records), str(folder / "json" / "images")
    return found


def build(place: str, cache: Path, image_folder: str = "absent", **options: Any) -> SupervisedDataset:
    values = {"allow_remote": True, "remote_timeout": 5.0, "remote_retries": 3, "cache_dir": str(cache)}
    source = SourceConfig(annotations=place, image_folder=image_folder)
    data = DataConfig(sources={"a": source}, max_length=128, **values | options)
    return build_dataset(data, TOKENIZER, ImageProcessor(16), 4, seed=0, epochs=1)


def assert_equal(one: SupervisedDataset, other: SupervisedDataset) -> None:
    a, b = one.plan.epoch_plan(0), other.plan.epoch_plan(0)
    assert np.array_equal(a.sample_index, b.sample_index)
    for left, right in zip(read_all(one), read_all(other), strict=True):
        assert (left.id, left.input_ids, left.replaced_image) == (right.id, right.input_ids, right.replaced_image)
        assert (left.images is None) == (right.images is None)
        assert left.images is None or torch.equal(left.images, right.images)


def read_all(dataset: SupervisedDataset) -> list[Any]:
    """Every example, four at a time."""
    return [e for n in range(0, len(dataset), 4) for e in dataset.__getitems__(range(n, min(n + 4, len(dataset))))]


@pytest.mark.parametrize(
    ("form", "cache_gb"), [("tar", 1.0), ("tar", 1e-9), ("parquet", 1e-9), ("saved", 1.0)], ids=str
)
def test_a_bucket_gives_what_the_disk_gives(
    form: str, cache_gb: float, tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    local = build(places[f"local/{form}"], tmp_path / "local")
    distant = build(places[form], tmp_path / "remote", cache_gb=cache_gb)
    assert distant.plan.digest == local.plan.digest, "a run may move between both"
    assert distant.digests == local.digests
    before = proxy.bytes
    assert_equal(local, distant)
    assert (proxy.bytes == before) == (cache_gb == 1.0), "what the index has read is in the cache if it fits"
    again = build(places[form], tmp_path / "remote", cache_gb=cache_gb)
    assert again.plan.digest == local.plan.digest


def test_records_and_loose_images_of_a_bucket(tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer) -> None:
    local = build(places["local/json"], tmp_path, places["local/images"])
    assert_equal(local, build(places["local/json"], tmp_path, places["images"]))
    assert_equal(local, build(places["json"], tmp_path, places["images"]))
    asked = sum(proxy.asked.values())
    assert_equal(local, build(places["json"], tmp_path, places["images"]))
    assert sum(proxy.asked.values()) == asked, "all of them are in the cache"


FAULTS = {"fail": 5.0, "stall": 0.6, "damage": 5.0, "cut": 5.0}
"""What the server does, and the time limit with which the test does not take long."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_survived(
    fault: str, tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    local = build(places["local/tar"], tmp_path / "local")
    options = {"cache_gb": 1e-9, "remote_timeout": FAULTS[fault]}
    proxy.fault = lambda key, times: fault if times == 1 else None
    dataset = build(places["tar"], tmp_path / "remote", **options)
    proxy.asked.clear()
    assert_equal(local, dataset)
    assert max(proxy.asked.values()) > 1


REASONS = {
    "fail": r"4 attempts in \d+ s failed .*; the last one: .*busy.*nothing is lost: continue with --train.resume auto",
    "stall": r"4 attempts in \d+ s failed .*; the last one: no answer within 0.6 s",
    "damage": r"4 attempts in \d+ s failed .*the bytes differ from those that were indexed",
    "cut": r"4 attempts in \d+ s failed",
    "expired": r"the server refuses: The provided token has expired.*; check the credentials",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_that_stays_is_one_line(
    fault: str, tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    dataset = build(places["tar"], tmp_path, cache_gb=1e-9, remote_timeout=FAULTS.get(fault, 5.0))
    proxy.fault = lambda key, times: fault
    proxy.asked.clear()
    with pytest.raises(StorageError, match=r"s3://data/tar/shard-00\d.tar: .*" + REASONS[fault]) as error:
        read_all(dataset)
    assert "\n" not in str(error.value)
    if fault == "expired":
        assert max(proxy.asked.values()) == 1, "another attempt would not help"
    proxy.fault = lambda key, times: None
    assert all(example.replaced_image is None for example in read_all(dataset)), "nothing was replaced or kept"


def test_damage_while_indexing_is_found_by_the_etag(
    tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    count = iter(range(10**6))
    proxy.fault = lambda key, times: "damage" if next(count) >= 0 else None
    with pytest.raises(DataError):  # the same damage each time cannot be told from a server that encrypts
        build(places["tar"], tmp_path)
    proxy.fault = lambda key, times: "expired"
    with pytest.raises(StorageError, match=r"shard-000.tar: the server refuses: The provided token has expired"):
        build(places["tar"], tmp_path)
    assert not list((tmp_path / "index").glob("*/manifest.json"))


def test_a_bucket_that_vanishes(
    tmp_path: Path, server: tuple[Any, sets.FaultyServer], places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    client, _ = server
    where = sets.upload(client, Path(places["local/tar"]), "gone", "tar")
    images = sets.upload(client, Path(places["local/images"]), "gone", "images")
    shards = build(where, tmp_path / "a", cache_gb=1e-9)
    loose = build(places["local/json"], tmp_path / "b", images, cache_gb=1e-9)
    for entry in client.list_objects_v2(Bucket="gone")["Contents"]:
        client.delete_object(Bucket="gone", Key=entry["Key"])
    client.delete_bucket(Bucket="gone")
    for dataset in (shards, loose):
        with pytest.raises(StorageError, match=r"s3://gone/.*: is no longer there .*bring the bucket or file back"):
            read_all(dataset)
    with pytest.raises(DataError, match="s3://gone/tar: there is no such file, folder or bucket"):
        build(where, tmp_path / "c")


def test_a_missing_loose_image_is_replaced_like_one_on_disk(
    tmp_path: Path, server: tuple[Any, sets.FaultyServer], places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    client, _ = server
    images = sets.upload(client, Path(places["local/images"]), "data", "holes")
    dataset = build(places["local/json"], tmp_path, images)
    client.delete_object(Bucket="data", Key="holes/5.png")
    replaced = [example.replaced_image for example in read_all(dataset) if example.replaced_image]
    assert len(replaced) == 1
    assert "image 's3://data/holes/5.png' does not exist" in replaced[0]


def test_a_changed_object_is_indexed_again(
    tmp_path: Path, server: tuple[Any, sets.FaultyServer], places: dict[str, str], proxy: sets.FaultyServer
) -> None:
    client, _ = server
    where = sets.upload(client, Path(places["local/tar"]), "data", "changing")
    assert len(build(where, tmp_path)) == sets.COUNT
    client.delete_object(Bucket="data", Key="changing/shard-002.tar")
    assert len(build(where, tmp_path)) == sets.COUNT - sets.COUNT // sets.FILES


def test_loader_workers_and_a_damaged_cache(tmp_path: Path, places: dict[str, str], proxy: sets.FaultyServer) -> None:
    """Forked workers make connections of their own; a block that is damaged on disk is fetched again."""
    dataset = build(places["tar"], tmp_path)
    expected = [example.input_ids for example in read_all(dataset)]
    for path in (tmp_path / "blocks").glob("*/*"):
        if path.name != ".lock":
            path.write_bytes(b"damaged" + path.read_bytes()[7:])
    loader = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=3,
        num_workers=2,
        collate_fn=list,
    )
    assert [example.input_ids for batch in loader for example in batch] == expected
    assert BlockCache(tmp_path / "blocks", 10**9).used() > 0
