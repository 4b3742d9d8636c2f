"""Sources on Google's storage (an emulator on loopback) and on the Hugging Face hub (a stand-in): as on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import shard_sets as sets
from worlds.hub_server import HubServer
from worlds.llama_sentencepiece import LlamaSentencePiece
from worlds.processes import free_port

from llava_mole.common.errors import DataError, StorageError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data import remote
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import ImageProcessor

TOKENIZER = LlamaSentencePiece(legacy=False)


def build(place: str, cache: Path, image_folder: str = "absent", **options: Any) -> SupervisedDataset:
    values = {"allow_remote": True, "remote_timeout": 10.0, "remote_retries": 2, "cache_dir": str(cache)}
    source = SourceConfig(annotations=place, image_folder=image_folder)
    data = DataConfig(sources={"a": source}, max_length=128, **values | options)
    return build_dataset(data, TOKENIZER, ImageProcessor(16), 4, seed=0, epochs=1)


def read_all(dataset: SupervisedDataset) -> list[Any]:
    return [e for n in range(0, len(dataset), 4) for e in dataset.__getitems__(range(n, min(n + 4, len(dataset))))]


def assert_equal(one: SupervisedDataset, other: SupervisedDataset) -> None:
    assert one.digests == other.digests
    assert np.array_equal(one.plan.epoch_plan(0).sample_index, other.plan.epoch_plan(0).sample_index)
    for left, right in zip(read_all(one), read_all(other), strict=True):
        assert (left.id, left.input_ids, left.replaced_image) == (right.id, right.input_ids, None)
        assert (left.images is None) == (right.images is None)
        assert left.images is None or torch.equal(left.images, right.images)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    remote._filesystem.cache_clear()
    yield
    remote._filesystem.cache_clear()


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each form of the data set."""
    folder = tmp_path_factory.mktemp("forms")
    for form, write in sets.WRITERS.items():
        write(folder / form)
    sets.write_json(folder / "json")
    return folder


@pytest.fixture
def google(forms: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulator, with the forms in the bucket `data`."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs the extra dev")
    import fsspec

    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # gcsfs asks Google's control server for the kind of a bucket, which the emulator does not have.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    files = fsspec.filesystem("gs", token="anon", skip_instance_cache=True)
    for path in sorted(path for path in forms.rglob("*") if path.is_file()):
        files.pipe(f"data/{path.relative_to(forms)}", path.read_bytes())
    yield files
    server.stop()


@pytest.mark.parametrize("form", sets.WRITERS)
def test_a_bucket_of_google_gives_what_the_disk_gives(form: str, forms: Path, tmp_path: Path, google: Any) -> None:
    distant = build(f"gs://data/{form}", tmp_path / "remote", cache_gb=1e-9)
    assert_equal(distant, build(str(forms / form), tmp_path / "local"))


def test_loose_images_and_records_of_a_bucket_of_google(forms: Path, tmp_path: Path, google: Any) -> None:
    local = build(str(forms / "json/records.jsonl"), tmp_path / "a", str(forms / "json/images"))
    distant = build("gs://data/json/records.jsonl", tmp_path / "b", "gs://data/json/images")
    for left, right in zip(read_all(distant), read_all(local), strict=True):
        assert left.images is None or torch.equal(left.images, right.images)


def test_what_google_no_longer_has_is_one_line(tmp_path: Path, google: Any) -> None:
    dataset = build("gs://data/tar", tmp_path / "a", cache_gb=1e-9)
    google.rm("data/tar", recursive=True)
    with pytest.raises(StorageError, match=r"gs://data/tar/shard-00\d.tar: is no longer there") as error:
        read_all(dataset)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="gs://nowhere/tar: there is no such file, folder or bucket"):
        build("gs://nowhere/tar", tmp_path / "b")


def test_the_digest_of_google_is_an_md5(google: Any) -> None:
    import hashlib

    (file, *_) = remote.list_files("gs://data/tar", [".tar"], remote.Access(10, 1))
    content = google.cat_file("data/tar/shard-000.tar")
    assert file.tag == hashlib.md5(content).hexdigest(), "damage of a download is then found"


@pytest.fixture
def hub(forms: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in of the hub, with the forms in the data set `us/set`."""
    import huggingface_hub.constants as constants

    server = HubServer("us/set", forms)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # HF_ENDPOINT, which is read on import
    files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    yield server
    server.close()
    assert not server.unknown


@pytest.mark.parametrize("form", sets.WRITERS)
def test_a_data_set_of_the_hub_gives_what_the_disk_gives(
    form: str, forms: Path, tmp_path: Path, hub: HubServer
) -> None:
    distant = build(f"hf://datasets/us/set/{form}", tmp_path / "remote", cache_gb=1e-9)
    before = hub.reads
    assert_equal(distant, build(str(forms / form), tmp_path / "local"))
    assert hub.reads > before


def test_what_the_hub_does_not_have_or_give_is_one_line(tmp_path: Path, hub: HubServer) -> None:
    with pytest.raises(DataError, match="hf://datasets/us/set/nowhere: there is no such file, folder or bucket"):
        build("hf://datasets/us/set/nowhere", tmp_path / "a")
    hub.token = "secret"
    remote._filesystem.cache_clear()
    with pytest.raises(DataError, match="make sure you are authenticated") as error:
        build("hf://datasets/us/set/tar", tmp_path / "b")
    assert "\n" not in str(error.value)
