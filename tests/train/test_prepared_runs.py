"""Training from a prepared data set, with one, two or no image a sample, equals training from the JSON file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.tiny_models import IMAGE_SIZE, NUM_IMAGE_TOKENS, make_world

from llava_mole.config import parse_run_config
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.data.collator import Example, collate, collate_packed
from llava_mole.data.records import parse_record
from llava_mole.data.store import PreparedRow, StoreWriter
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

STEPS = 3


def prepare(raw: Path, directory: Path) -> None:
    with StoreWriter(directory, name=raw.stem, shard_rows=5) as writer:
        for line, value in enumerate(json.loads(raw.read_text()), 1):
            record, _ = parse_record(value, "", f"{raw}:{line}")
            writer.add(PreparedRow(record.id, raw.stem, record.images, record.turns, (), None, record.where))
        writer.finish({})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third sample is text only, every third one shows a second image."""
    directory = tmp_path_factory.mktemp("world")
    config = yaml.safe_load(make_world(directory, samples=12, text_only_every=3).read_text())
    for name, source in config["data"]["sources"].items():
        raw = Path(source["annotations"])
        records = json.loads(raw.read_text())
        Image.new("RGB", (IMAGE_SIZE, 9), (5, 200, 90)).save(raw.parent / "images" / "second.png")
        for record in records[1::3]:
            record["image"] = [record["image"], "images/second.png"]
            record["conversations"][0]["value"] = "What color is <image> and what color is <image>?"
        raw.write_text(json.dumps(records))
        prepare(raw, directory / f"{name}-set")
        source["annotations"] = str(directory / f"{name}-set")
    (directory / "prepared.yaml").write_text(yaml.safe_dump(config))
    return directory


def run(world: Path, name: str, config: str, *more: str) -> Path:
    options = ["--train.output_dir", str(world / name), "--train.max_steps", str(STEPS), *more]
    train(parse_run_config([str(world / config), *options]))
    return world / name


def assert_same(own: Path, expected: Path) -> None:
    for entry, other in zip(read_metrics(own / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True):
        for key in ("loss", "grad_norm"):
            assert entry[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4)
        assert entry["tokens"] == other["tokens"]
    assert_same_state(optimizer_state(own, STEPS), optimizer_state(expected, STEPS))


def test_prepared_equals_json_and_packed_equals_padded(world: Path) -> None:
    padded = run(world, "padded", "config.yaml", "--train.batching", "padded")
    for name, config, batching in (("packed", "config.yaml", "packed"), ("own", "prepared.yaml", "packed")):
        assert_same(run(world, name, config, "--train.batching", batching), padded)
    assert_same(run(world, "workers", "prepared.yaml", "--train.num_workers", "2"), padded)
    summary = json.loads((world / "own" / "summary.json").read_text())
    expected = {"records": 12, "text_only": 4, "cut": 0, "shortened": 0, "dropped": 0}
    assert summary["data"] == {"red": expected, "blue": expected}
    assert len(list((world / "red-set").glob("lengths-*.npy"))) == 1


def test_grouped_equals_json(world: Path) -> None:
    raw = run(world, "grouped-raw", "config.yaml", "--train.batching", "grouped")
    assert_same(run(world, "grouped-own", "prepared.yaml", "--train.batching", "grouped"), raw)


def example(ids: list[int | str], images: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    tokens = [t for i in ids for t in ([IMAGE_TOKEN_INDEX] * NUM_IMAGE_TOKENS if i == "I" else [int(i)])]
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) if images else None
    return Example(f"e{seed}", "s", 0, tokens, tokens, pixels)


EXAMPLES = [
    example([1, 7, "I", 9, 11, "I", 6], 2, 0),
    example([1, 5, 8, 13], 0, 1),
    example([1, "I", 21, 22], 1, 2),
    example([1, "I", "I", 4], 2, 3),
]


@pytest.fixture(scope="module")
def model(world: Path) -> Any:
    from llava_mole.config import load_config
    from llava_mole.model.builder import build_parts

    torch.manual_seed(1)
    return build_parts(load_config(world / "config.yaml").model)[0].eval()


def by_hand(model: Any, sample: Example) -> torch.Tensor:
    """Logits [1, L, V]: features written over the placeholders one image at a time, then the language model alone."""
    table = model.causal_lm.get_input_embeddings()
    rows, position = [], 0
    images = iter([] if sample.images is None else sample.images)
    while position < len(sample.input_ids):
        if sample.input_ids[position] == IMAGE_TOKEN_INDEX:
            rows.append(model.projector(model.vision_tower(next(images)[None]))[0])
            position += NUM_IMAGE_TOKENS
        else:
            rows.append(table(torch.tensor(sample.input_ids[position : position + 1])))
            position += 1
    return model.causal_lm(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits


@torch.no_grad()
def test_several_images_padded_packed_and_alone_equal_the_model_run_by_hand(model: Any) -> None:
    from llava_mole.model.packed_attention import enable_packing

    expected = [by_hand(model, sample) for sample in EXAMPLES]
    for sample, logits in zip(EXAMPLES, expected, strict=True):
        batch = collate([sample], pad_token_id=0)
        alone = model(batch["input_ids"], batch["attention_mask"], batch["images"])
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-4)
    batch = collate(EXAMPLES, pad_token_id=0)
    assert batch["images"].shape[0] == 5
    padded = model(batch["input_ids"], batch["attention_mask"], batch["images"])
    for row, logits in enumerate(expected):
        torch.testing.assert_close(padded[row, : logits.shape[1]], logits[0], atol=1e-5, rtol=1e-4)
    enable_packing(model.causal_lm)
    batch = collate_packed(EXAMPLES, pad_token_id=0)
    packed = model(batch["input_ids"], batch["attention_mask"], batch["images"], sample_lengths=batch["sample_lengths"])
    torch.testing.assert_close(packed, torch.cat(expected, dim=1), atol=1e-5, rtol=1e-4)
