"""Token counts of a prepared set: equal to those of training, counted once, and never taken for another tokenizer."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_mole.common.errors import DataError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.constants import IGNORE_INDEX
from llava_mole.conversation import TEMPLATES, Turn, get_template
from llava_mole.data import lengths as lengths_module
from llava_mole.data.dataset import build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.lengths import (
    CountPlace,
    Limits,
    add_lengths,
    count_record,
    count_tokens,
    fit_source,
    most_tokens,
    stored_counts,
)
from llava_mole.data.store import (
    PreparedRecords,
    PreparedRow,
    StoreWriter,
    content_digest,
    read_records,
    verify_shards,
)
from llava_mole.data.tokenization import HFTextTokenizer, encode_record

TEMPLATE = get_template("vicuna_v1")


def hf_tokenizer(extra: tuple[str, ...] = ()) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "an", "th"]
    inner = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("a", "n"), ("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", additional_special_tokens=list(extra))


def prepare(directory: Path, count: int = 30) -> PreparedRecords:
    with StoreWriter(directory, name="toy", shard_rows=11) as writer:
        for number in range(count):
            images = number % 3
            first = "then " * (number % 300 + 1) + "<image>" * images
            turns = (Turn("user", first), Turn("assistant", "than 图 " * (1 + number % 7)), Turn("user", "and?"))
            paths = tuple(f"{k}.png" for k in range(images))
            writer.add(PreparedRow(f"{number}", "s", paths, turns, (), None, f"raw.json:{number + 1}"))
        writer.finish({})
    return PreparedRecords(directory, "s")


@pytest.mark.parametrize("image_tokens", [1, 4, 9])
def test_counts_hold_for_every_number_of_image_tokens(image_tokens: int, tmp_path: Path) -> None:
    tokenizer = HFTextTokenizer(hf_tokenizer())
    for record in prepare(tmp_path / "set"):
        tokens, needed = count_record(record, TEMPLATE, tokenizer)
        images = len(record.images) * image_tokens
        assert len(encode_record(record, TEMPLATE, tokenizer, image_tokens, None).input_ids) == tokens + images
        cut = encode_record(record, TEMPLATE, tokenizer, image_tokens, needed + images)
        assert sum(label != IGNORE_INDEX for label in cut.labels) == 1
        with pytest.raises(DataError):
            encode_record(record, TEMPLATE, tokenizer, image_tokens, needed + images - 1)


def test_an_image_behind_the_first_answer_is_needed_too(tmp_path: Path) -> None:
    from llava_mole.data.records import Record

    tokenizer = HFTextTokenizer(hf_tokenizer())
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c <image>"), Turn("assistant", "d"))
    record = Record("x", ("a.png",), turns, "s", "f:1")
    needed = count_record(record, TEMPLATE, tokenizer)[1] + 5
    assert len(encode_record(record, TEMPLATE, tokenizer, 5, needed).input_ids) == needed
    with pytest.raises(DataError, match="the image ends at token"):
        encode_record(record, TEMPLATE, tokenizer, 5, needed - 1)


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_llama_2", "chatml_direct"])
def test_the_bound_from_columns_is_never_below_the_tokens(name: str, tmp_path: Path) -> None:
    records, tokenizer = prepare(tmp_path / "set"), HFTextTokenizer(hf_tokenizer())
    bound = most_tokens(records, TEMPLATES[name], 7)
    exact = [len(encode_record(record, TEMPLATES[name], tokenizer, 7, None).input_ids) for record in records]
    assert (bound >= exact).all()
    assert (bound < np.array(exact) + 250).all()


def test_several_processes_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_CHUNK", 4)
    monkeypatch.setattr(lengths_module, "_ALONE", 1)
    records, tokenizer = prepare(tmp_path / "set"), HFTextTokenizer(hf_tokenizer())
    alone = count_tokens(records, TEMPLATE, tokenizer, processes=1)
    assert np.array_equal(count_tokens(records, TEMPLATE, tokenizer, processes=2), alone)
    assert alone.dtype == np.int32
    with pytest.raises(DataError, match=r"raw\.json:1: template 'plain' needs an image marker"):
        count_tokens(records, TEMPLATES["plain"], tokenizer, processes=2)


def test_they_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, tokenizer = prepare(tmp_path / "set"), HFTextTokenizer(hf_tokenizer())
    first = stored_counts(records, TEMPLATE, tokenizer)
    verify_shards(tmp_path / "set")
    assert sorted(path.suffix for path in (tmp_path / "set").iterdir()).count(".npy") == 1
    counted: list[str] = []
    original = lengths_module.count_tokens

    def spy(*arguments: Any, **options: Any) -> Any:
        counted.append("once more")
        return original(*arguments, **options)

    monkeypatch.setattr(lengths_module, "count_tokens", spy)
    assert np.array_equal(stored_counts(PreparedRecords(tmp_path / "set", "s"), TEMPLATE, tokenizer), first)
    assert not counted
    stored_counts(records, get_template("chatml_direct"), tokenizer)
    stored_counts(records, TEMPLATE, HFTextTokenizer(hf_tokenizer(("<extra>",))))
    monkeypatch.setattr(lengths_module, "VERSION", 99)
    stored_counts(records, TEMPLATE, tokenizer)
    assert len(counted) == 3


def test_a_json_file_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its content changes; a small one is counted every time, and a dry run keeps nothing."""
    counted: list[int] = []
    original = lengths_module.count_tokens

    def spy(records: Any, *arguments: Any, **options: Any) -> Any:
        counted.append(len(records))
        return original(records, *arguments, **options)

    monkeypatch.setattr(lengths_module, "count_tokens", spy)
    limits = Limits(TEMPLATE, HFTextTokenizer(hf_tokenizer()), 4, 2048)

    def lengths(count: int, question: str, store: bool = True) -> list[int]:
        entries = [{"id": str(n), "conversations": [{"from": "human", "value": question * (1 + n % 3)},
                    {"from": "gpt", "value": "yes"}]} for n in range(count)]  # fmt: skip
        file = tmp_path / "raw.json"
        file.write_text(json.dumps(entries))
        place = CountPlace(tmp_path / "cache" / "lengths", content_digest(file))
        fitted = fit_source(
            read_records(file, "s"), limits, "s", all_lengths=True, store=store, count_place=place
        )  # fmt: skip
        assert fitted.lengths is not None
        return fitted.lengths.tolist()

    assert len(set(lengths(999, "red "))) == 3
    assert not (tmp_path / "cache").exists()
    lengths(1000, "red ", store=False)
    assert not (tmp_path / "cache").exists()
    first = lengths(1000, "red ")
    assert counted == [999, 1000, 1000]
    assert lengths(1000, "red ") == first
    assert counted == [999, 1000, 1000]
    assert lengths(1000, "red or blue ") != first
    assert lengths(1000, "red ") == first
    assert counted == [999, 1000, 1000, 1000]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY rubbish", "short", "negative", "pickle"])
def test_stored_counts_that_cannot_be_right_are_counted_again(content: Any, tmp_path: Path, caplog: Any) -> None:
    records, tokenizer = prepare(tmp_path / "set"), HFTextTokenizer(hf_tokenizer())
    counts = stored_counts(records, TEMPLATE, tokenizer)
    (path,) = (tmp_path / "set").glob("lengths-*.npy")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        wrong = {"short": counts[:-1], "negative": -counts, "pickle": np.array([{}], dtype=object)}[content]
        np.save(path, wrong, allow_pickle=True)
    with caplog.at_level(logging.WARNING, "llava_mole"):
        assert np.array_equal(stored_counts(records, TEMPLATE, tokenizer), counts)
    assert "counted again" in caplog.text
    assert np.array_equal(np.load(path), counts)


def test_a_directory_that_cannot_be_written_is_said_so(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    records, tokenizer = prepare(tmp_path / "set"), HFTextTokenizer(hf_tokenizer())

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING, "llava_mole"):
        assert stored_counts(records, TEMPLATE, tokenizer).shape == (30, 2)
    assert "cannot be written (Permission denied); the next run counts the tokens again" in caplog.text
    assert not [path.name for path in (tmp_path / "set").iterdir() if "lengths" in path.name]


def test_prepared_with_a_tokenizer_a_run_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "set")
    tokenizer = hf_tokenizer()
    total = add_lengths(tmp_path / "set", tokenizer, "vicuna_v1")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    monkeypatch.setattr(lengths_module, "count_record", None)
    source = SourceConfig(annotations=str(tmp_path / "set"), image_folder=str(tmp_path))
    dataset = build_dataset(
        DataConfig(sources={"s": source}), HFTextTokenizer(tokenizer), ImageProcessor(8), 3, seed=0, epochs=1,
        batching="packed",
    )  # fmt: skip
    assert sum(dataset.lengths(range(30))) == total + 30 * 3  # 0, 1 or 2 images, one on average


def test_starting_does_not_read_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "set", 3000)
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    tokenizer = hf_tokenizer()
    add_lengths(tmp_path / "set", tokenizer, "vicuna_v1")
    reads: list[int] = []
    original = PreparedRecords.__getitem__

    def spy(self: PreparedRecords, index: Any) -> Any:
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(PreparedRecords, "__getitem__", spy)
    source = SourceConfig(annotations=str(tmp_path / "set"), image_folder=str(tmp_path))
    for batching in ("packed", "padded", "grouped"):
        config = DataConfig(sources={"s": source}, validation_samples=10, max_length=200_000)
        arguments = (config, HFTextTokenizer(tokenizer), ImageProcessor(8), 3)
        build_dataset(
            *arguments, seed=0, epochs=1, batching=batching, global_batch_size=10, micro_batch_size=1  # type: ignore[arg-type]
        )  # fmt: skip
        assert len(reads) <= 200
        reads.clear()


def test_the_manifest_is_not_changed(tmp_path: Path) -> None:
    prepare(tmp_path / "set")
    before = json.loads((tmp_path / "set" / "manifest.json").read_text())
    add_lengths(tmp_path / "set", hf_tokenizer(), "vicuna_v1")
    assert json.loads((tmp_path / "set" / "manifest.json").read_text()) == before
