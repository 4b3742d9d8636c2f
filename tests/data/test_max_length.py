"""`data.max_length_policy`: what each choice makes of long samples, and that lengths, plan and counts are exact."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import DataError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Turn, get_template
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.mixture import TrainingPlan
from llava_mole.data.records import Record, parse_record
from llava_mole.data.store import PreparedRow, StoreWriter
from llava_mole.data.tokenization import encode_record, encode_shortened

N = 4
TEMPLATE = get_template("vicuna_v1")


@pytest.fixture(scope="module")
def tokenizer() -> LlamaSentencePiece:
    return LlamaSentencePiece(legacy=False)


def conversation(*rounds: str, images: int = 0, image_round: int = 0, open_end: bool = False) -> dict[str, Any]:
    turns = []
    for number, answer in enumerate(rounds):
        marker = "<image>\n" * images if number == image_round else ""
        turns.append({"from": "human", "value": f"{marker}question {number}?"})
        turns.append({"from": "gpt", "value": answer})
    if open_end:
        turns.append({"from": "human", "value": "and then " * 9})
    record: dict[str, Any] = {"id": "x", "conversations": turns}
    return record | {"image": [f"{n}.png" for n in range(images)]} if images else record


def record_of(raw: dict[str, Any]) -> Record:
    return parse_record(raw, "s", "f:1")[0]


def size(record: Record, tokenizer: LlamaSentencePiece) -> int:
    return len(encode_record(record, TEMPLATE, tokenizer, N, None).input_ids)


def spoken(encoded: Any, tokenizer: LlamaSentencePiece) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])


ANSWERS = [f"{word} " * 10 for word in ("one", "two", "three", "four", "five", "six")]


@pytest.mark.parametrize("removed", range(5))
def test_the_oldest_rounds_go_one_after_the_other(removed: int, tokenizer: LlamaSentencePiece) -> None:
    record = record_of(conversation(*ANSWERS))
    rest = Record(record.id, (), record.turns[2 * removed :], "s", "f:1")
    exact = size(rest, tokenizer)
    for limit, gone in ((exact, removed), (exact - 1, removed + 1), (exact + 1, removed)):
        encoded = encode_shortened(record, TEMPLATE, tokenizer, N, limit)
        if gone == len(ANSWERS):
            assert encoded is None
            continue
        assert encoded is not None
        kept = Record(record.id, (), record.turns[2 * gone :], "s", "f:1")
        assert encoded == encode_record(kept, TEMPLATE, tokenizer, N, None)
        assert (len(encoded.input_ids) <= limit, encoded.truncated) == (True, 0)


@pytest.mark.parametrize("image_round", [0, 2, 5])
def test_the_rounds_of_the_images_and_the_last_one_stay(image_round: int, tokenizer: LlamaSentencePiece) -> None:
    record = record_of(conversation(*ANSWERS, images=2, image_round=image_round))
    stays = sorted({image_round, 5})
    smallest = Record("x", record.images, tuple(t for n in stays for t in record.turns[2 * n : 2 * n + 2]), "s", "f:1")
    limit = size(smallest, tokenizer)
    encoded = encode_shortened(record, TEMPLATE, tokenizer, N, limit)
    assert encoded == encode_record(smallest, TEMPLATE, tokenizer, N, None)
    assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == 2 * N
    assert spoken(encoded, tokenizer).split() == " ".join(ANSWERS[n] for n in stays).split()
    assert encode_shortened(record, TEMPLATE, tokenizer, N, limit - 1) is None


def test_an_unanswered_question_goes_first(tokenizer: LlamaSentencePiece) -> None:
    record = record_of(conversation(*ANSWERS[:2], open_end=True))
    answered = Record("x", (), record.turns[:4], "s", "f:1")
    encoded = encode_shortened(record, TEMPLATE, tokenizer, N, size(answered, tokenizer))
    assert encoded == encode_record(answered, TEMPLATE, tokenizer, N, None)


def test_a_caption_has_no_history(tokenizer: LlamaSentencePiece) -> None:
    record = record_of(conversation("long " * 50, images=1))
    assert encode_shortened(record, get_template("plain"), tokenizer, N, 40) is None


LIMIT = 100
RAW = [
    conversation("short"),
    conversation(*ANSWERS, images=1),  # fits without some rounds
    conversation("word " * 200),  # never fits
    conversation(*ANSWERS[:4], images=2),
    conversation("tiny", images=1),
]


def write_raw(directory: Path) -> str:
    path = directory / "raw.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, RAW)) + "\n]")
    return str(path)


def write_prepared(directory: Path, parse: Any = parse_record) -> str:
    with StoreWriter(directory / "set", name="toy", shard_rows=2) as writer:
        for line, raw in enumerate(RAW, 2):
            r, _ = parse(raw, "s", f"{directory}/raw.json:{line}")
            writer.add(PreparedRow(r.id, "sub", r.images, r.turns, (), None, r.where))
        writer.finish({})
    return str(directory / "set")


def build(tmp_path: Path, tokenizer: Any, kind: str, policy: Any, batching: Any, **more: Any) -> SupervisedDataset:
    (tmp_path / kind).mkdir(exist_ok=True)
    for number in range(2):
        Image.new("RGB", (8, 6), (90 * number, 0, 0)).save(tmp_path / kind / f"{number}.png")
    target = tmp_path / kind / ("raw.json" if kind == "raw" else "set")
    path = str(target) if target.exists() else (write_raw if kind == "raw" else write_prepared)(tmp_path / kind)
    source = SourceConfig(annotations=path, image_folder=str(tmp_path / kind))
    config = DataConfig(sources={"s": source}, max_length=LIMIT, max_length_policy=policy, **more)
    return build_dataset(config, tokenizer, ImageProcessor(8), N, seed=0, epochs=1, batching=batching)


@pytest.mark.parametrize("kind", ["raw", "prepared"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize(
    ("policy", "left", "counts"),
    [
        ("truncate", 5, {"cut": 3, "shortened": 0, "dropped": 0}),
        ("drop", 2, {"cut": 0, "shortened": 0, "dropped": 3}),
        ("truncate_history", 4, {"cut": 0, "shortened": 2, "dropped": 1}),
    ],
)
def test_each_policy(
    kind: str,
    batching: Any,
    policy: Any,
    left: int,
    counts: dict[str, int],
    tmp_path: Path,
    tokenizer: Any,
    caplog: Any,
) -> None:
    with caplog.at_level(logging.INFO, "llava_mole"):
        dataset = build(tmp_path, tokenizer, kind, policy, batching)
    assert len(dataset) == left
    assert {key: dataset.report["s"][key] for key in counts} == counts
    assert dataset.report["s"]["records"] == left
    examples = [dataset[position] for position in range(left)]
    assert all(len(e.input_ids) <= LIMIT and any(label >= 0 for label in e.labels) for e in examples)
    if batching == "packed":
        assert dataset.lengths(range(left)) == [len(example.input_ids) for example in examples]
    for what, count in counts.items():
        assert (f"{count} {what}" in caplog.text) == bool(count or what == "cut")
    again = build(tmp_path, tokenizer, kind, policy, batching)
    assert again.plan.digest == dataset.plan.digest
    assert [again[position].input_ids for position in range(left)] == [example.input_ids for example in examples]


@pytest.mark.parametrize("kind", ["raw", "prepared"])
@pytest.mark.parametrize("batching", ["packed", "padded", "grouped"])
def test_error_names_the_first_and_how_many(kind: str, batching: Any, tmp_path: Path, tokenizer: Any) -> None:
    tokens = size(record_of(RAW[1]), tokenizer)
    with pytest.raises(DataError) as caught:
        build(tmp_path, tokenizer, kind, "error", batching)
    start = f"{tmp_path}/{kind}/raw.json:3: {tokens} tokens, more than data.max_length {LIMIT}"
    assert str(caught.value).startswith(f"{start} (3 of the 5 records of source s are longer)")


def test_the_digest_knows_which_records_are_left(tmp_path: Path, tokenizer: Any) -> None:
    cut, dropped = (build(tmp_path, tokenizer, "raw", policy, "padded").plan.digest for policy in ("truncate", "drop"))
    assert cut != dropped
    # Another record of the same length of list is left out: sizes and order are equal, the samples are not.
    path = tmp_path / "raw" / "raw.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, [RAW[1], RAW[0], *RAW[2:]])) + "\n]")
    assert build(tmp_path, tokenizer, "raw", "drop", "padded").plan.digest != dropped


def test_the_digest_knows_the_content_of_prepared_sets(tmp_path: Path, tokenizer: Any) -> None:
    def digest(folder: str, raw: list[dict[str, Any]], when: str) -> str:
        (tmp_path / folder).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "RAW", raw)
            patch.setattr("llava_mole.__version__", when)  # of the manifest, as its time
            return build(tmp_path / folder, tokenizer, "prepared", "truncate", "padded").plan.digest

    other = [*RAW[:-1], conversation("tidy", images=1)]
    first = digest("a", RAW, "1")
    assert digest("b", RAW, "2") == first
    assert digest("c", other, "1") != first


def test_the_digest_of_json_sources_is_that_of_the_plan_alone(tmp_path: Path, tokenizer: Any) -> None:
    wanted = TrainingPlan({"s": len(RAW)}, {}, 0, 1).digest
    assert build(tmp_path, tokenizer, "raw", "truncate", "padded").plan.digest == wanted


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "raw.json").write_text(json.dumps([RAW[2]]))
    with pytest.raises(DataError, match="source s: none of its records \\(1\\) fits into data.max_length 100"):
        build(tmp_path, tokenizer, "raw", "drop", "packed")


def test_validation_samples_are_taken_from_what_is_left(tmp_path: Path, tokenizer: Any) -> None:
    dataset = build(tmp_path, tokenizer, "prepared", "truncate_history", "packed", validation_samples=1)
    assert dataset.validation is not None
    assert (len(dataset), len(dataset.validation)) == (3, 1)
    for own in (dataset, dataset.validation):
        assert own.lengths(range(len(own))) == [len(own[position].input_ids) for position in range(len(own))]


def test_a_user_turn_that_only_looks_like_an_answer_is_no_answer(tokenizer: Any) -> None:
    turns = (Turn("user", "q" * 50), Turn("assistant", ""), Turn("user", "last?"), Turn("assistant", "yes"))
    record = Record("x", (), turns, "s", "f:1")
    encoded = encode_shortened(record, TEMPLATE, tokenizer, N, size(record, tokenizer) - 1)
    assert encoded is not None
    assert spoken(encoded, tokenizer).startswith("yes")
    assert np.count_nonzero(np.array(encoded.labels) != IGNORE_INDEX) < 5


SILENT = [conversation("short"), conversation(" \n"), conversation("tiny", images=1), conversation("图", "\u3000")]
"""With a template that strips, the second record has no answer; the last one has."""


def parse_blank(raw: dict[str, Any], source: str, where: str) -> tuple[Record, bool]:
    """As an earlier version, which took a blank answer for a text and could store it in a prepared set."""
    record, removed = parse_record(json.loads(json.dumps(raw).replace('" \\n"', '"BLANK"')), source, where)
    turns = tuple(Turn(turn.role, turn.text.replace("BLANK", " \n")) for turn in record.turns)
    return Record(record.id, record.images, turns, source, where), removed


def build_silent(tmp_path: Path, tokenizer: Any, kind: str, policy: Any, batching: Any) -> SupervisedDataset:
    (tmp_path / kind).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RAW", SILENT)
        if kind == "prepared":
            write_prepared(tmp_path / kind, parse_blank)
        return build(tmp_path, tokenizer, kind, policy, batching, template="gemma")


@pytest.mark.parametrize("batching", ["packed", "padded", "grouped"])
@pytest.mark.parametrize("policy", ["truncate", "error", "truncate_history", "drop"])
def test_an_answer_that_renders_to_nothing_is_found_before_training(
    batching: Any, policy: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_mole.data.lengths.SAMPLE", 1)
    if policy == "drop":
        dataset = build_silent(tmp_path, tokenizer, "prepared", policy, batching)
        assert (len(dataset), dataset.report["s"]["dropped"]) == (3, 1)
        assert all(any(label >= 0 for label in dataset[position].labels) for position in range(3))
        return
    with pytest.raises(DataError) as caught:
        build_silent(tmp_path, tokenizer, "prepared", policy, batching)
    assert str(caught.value) == (
        f"{tmp_path}/prepared/raw.json:3: none of its answers has text with template 'gemma'; add one, or remove the "
        "record"
    )


@pytest.mark.parametrize("policy", ["truncate", "error", "truncate_history", "drop"])
def test_a_blank_answer_is_refused_as_prepare_refuses_it(policy: Any, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        build_silent(tmp_path, tokenizer, "raw", policy, "padded")
    assert str(caught.value).startswith(f"{tmp_path}/raw/raw.json:3: no gpt turn with text answers a human turn")
