"""Records and images made to harm: nothing is read outside the folder, fetched or executed; our errors only."""

import contextlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import DataError, UserError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data.dataset import build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.records import Record
from llava_mole.data.store import read_records


def record(image: Any = "0.png", text: str = "<image>\nWhat?") -> dict[str, Any]:
    return {"image": image, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Red."}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6), (250, 0, 0)).save(tmp_path / "images" / "0.png")
    Image.new("RGB", (8, 6), (0, 0, 250)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    os.symlink(tmp_path, tmp_path / "images" / "up")
    return tmp_path


def build(folder: Path, *records: Any, resuming: bool = False) -> Any:
    (folder / "a.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    source = SourceConfig(annotations=str(folder / "a.json"), image_folder=str(folder / "images"))
    config = DataConfig(sources={"s": source}, max_length=128)
    tokenizer = LlamaSentencePiece(legacy=False)
    return build_dataset(config, tokenizer, ImageProcessor(8), 4, seed=0, epochs=1, resuming=resuming)


PATHS = {
    "climbs": "../secret.png",
    "climbs inside": "up/../secret.png",
    "absolute": "/etc/passwd",
    "link": "link.png",
    "link of a folder": "up/secret.png",
    "NUL": "0.png\0.jpg",
    "far too long": "a/" * 5000 + "0.png",
    "home": "~/0.png",
    "device": "../../../../dev/zero",
    "windows": "..\\secret.png",
    "url": "http://127.0.0.1:9/a.png",
    "https": "HTTPS://example.org/a.png",
    "file url": "file:///etc/passwd",
    "data url": "data:image/png;base64,AAAA",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_no_path_leads_out_of_the_folder(path: str, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(folder, record(), record(path))
    assert str(caught.value).startswith(f"{folder}/a.json:3: image ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "up/secret.png", "/etc/passwd"])
def test_nor_does_one_that_is_read_without_the_check_at_the_start(path: str, folder: Path) -> None:
    dataset = build(folder, record(), record(path), resuming=True)
    red = ImageProcessor(8).pixels(Image.open(folder / "images" / "0.png"))
    for position in range(2):
        example = dataset[position]
        assert (example.images[0] == red).all()  # never the secret: the good record stands for the bad one
        assert (example.replaced_image is None) == (dataset.plan[position][1] == 0)


def test_a_url_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(DataError, match="is a URL; images are read from the image folder and never fetched"):
        build(folder, record("https://example.org/a.png"))


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["pickle", "numpy", "html", "svg", "eps"])
def test_a_file_that_is_no_image_is_not_executed(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import numpy as np

    array = io.BytesIO()
    np.save(array, np.array([_Bomb()], dtype=object), allow_pickle=True)
    content = {
        "pickle": pickle.dumps(_Bomb()),
        "numpy": array.getvalue(),
        "html": b"<script>alert(1)</script>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n",
    }[kind]
    (folder / "images" / "bad.png").write_bytes(content)
    monkeypatch.chdir(folder)
    dataset = build(folder, record(), record("bad.png"))
    replaced = [dataset[position].replaced_image for position in range(2)]
    assert sum(problem is not None for problem in replaced) == 1
    assert not (folder / "executed").exists()


def test_an_animation_named_jpg_shows_its_first_frame(folder: Path) -> None:
    frames = [Image.new("P", (8, 6), color) for color in (3, 200)]
    frames[0].save(folder / "images" / "a.jpg", format="GIF", save_all=True, append_images=frames[1:])
    dataset = build(folder, record("a.jpg"))
    first = ImageProcessor(8).pixels(frames[0].convert("RGB"))
    assert (dataset[0].images[0] == first).all()


scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=8) | st.sampled_from(["<image>", "../a"])
texts = st.text(max_size=12) | st.sampled_from(["<image>", "<image>\nq", "a <image> b <image>", "\ud83d", "\0"])
turns = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "system", "user"]) | scalars, "value": texts | scalars}
)
records = st.fixed_dictionaries(
    {},
    optional={
        "id": scalars | st.lists(scalars, max_size=2),
        "image": st.sampled_from(["a.png", "0.png", "\ud83d.png", "http://x/y", "a\0b"]) | scalars | st.lists(scalars),
        "conversations": st.lists(turns | scalars, max_size=5) | scalars,
        "extra": scalars,
    },
)
good_turns = st.lists(
    st.tuples(st.sampled_from(["q", "<image>q", "q <image>", "<image><image>"]), st.text(max_size=5)),
    min_size=1,
    max_size=3,
)


def check(read: Any) -> None:
    for one in read:
        assert isinstance(one, Record)
        assert [turn.role for turn in one.turns] == ["user", "assistant"] * (len(one.turns) // 2) + ["user"] * (
            len(one.turns) % 2
        )
        assert sum(turn.text.count("<image>") for turn in one.turns[::2]) == len(one.images)
        "".join([one.id, *one.images, *(turn.text for turn in one.turns)]).encode()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(records | scalars, min_size=1, max_size=3), lines=st.booleans())
def test_any_json_is_records_or_our_error(values: list, lines: bool, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_text("\n".join(map(json.dumps, values)) if lines else json.dumps(values))
    with contextlib.suppress(UserError):
        check(read_records(path, "s"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=good_turns, images=st.none() | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=4))
def test_records_that_are_nearly_right_keep_their_markers(rounds: list, images: Any, tmp_path: Path) -> None:
    conversations = []
    for question, answer in rounds:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    raw = {"conversations": conversations} | ({} if images is None else {"image": images})
    (tmp_path / "a.jsonl").write_text(json.dumps(raw))
    with contextlib.suppress(UserError):
        check(read_records(tmp_path / "a.jsonl", "s"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), lines=st.booleans())
def test_any_bytes_are_records_or_our_error(content: bytes, lines: bool, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    for data in (content, json.dumps([record()]).encode()[:-2] + content):
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            check(read_records(path, "s"))
