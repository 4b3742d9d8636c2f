"""From a configuration to examples: what is trained, what is counted, and what is refused before anything starts."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.data.collator import Example
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import ImageProcessor
from llava_mole.data.mixture import plan_epoch

IMAGE_TOKENS = 4
Write = Any


def image_record(index: int, answer: str = "Red.") -> dict[str, Any]:
    return {
        "id": f"i{index}",
        "image": f"{index}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": answer},
        ],
    }


def text_record(index: int, answer: str = "Hello.") -> dict[str, Any]:
    return {"id": f"t{index}", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def world(tmp_path: Path) -> DataConfig:
    """Source `general`: four images and two texts; source `document`: three images."""
    for name, records in {
        "general": [*map(image_record, range(4)), *map(text_record, range(2))],
        "document": [image_record(index, f"Page {index}.") for index in range(3)],
    }.items():
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (8, 6), (60 * index, 0, 0)).save(tmp_path / name / f"{index}.png")
        # One record a line, so that record i stands on line i + 2.
        (tmp_path / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    sources = {
        name: SourceConfig(annotations=str(tmp_path / f"{name}.json"), image_folder=str(tmp_path / name))
        for name in ("general", "document")
    }
    return DataConfig(sources=sources, mixture={"document": 2.0}, max_length=128)


def rewrite(world: DataConfig, name: str, *records: dict[str, Any]) -> None:
    Path(world.sources[name].annotations).write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")


def build(
    world: DataConfig, *, epochs: int = 1, seed: int = 0, image_tokens: int = IMAGE_TOKENS, resuming: bool = False
) -> SupervisedDataset:
    tokenizer = LlamaSentencePiece(legacy=False)
    return build_dataset(world, tokenizer, ImageProcessor(8), image_tokens, seed=seed, epochs=epochs, resuming=resuming)


def test_every_position_is_the_example_the_plan_names(world: DataConfig) -> None:
    dataset = build(world, seed=3, epochs=2)
    assert len(dataset) == 2 * (6 + 2 * 3)
    assert dataset.source_names == ("general", "document")
    for epoch in range(2):
        plan = plan_epoch({"general": 6, "document": 3}, {"document": 2.0}, 3, epoch)
        for offset in range(12):
            example = dataset[epoch * 12 + offset]
            sample = int(plan.sample_index[offset])
            assert example.source_index == plan.source_index[offset]
            assert example.source == ("general", "document")[example.source_index]
            is_text = example.source == "general" and sample >= 4
            assert example.id == (f"t{sample - 4}" if is_text else f"i{sample}")
            assert (example.images is None) == is_text
            assert example.input_ids.count(IMAGE_TOKEN_INDEX) == (0 if is_text else IMAGE_TOKENS)


def test_example_carries_its_own_answer_and_image(world: DataConfig) -> None:
    dataset = build(world)
    tokenizer = LlamaSentencePiece(legacy=False)
    examples = [dataset[position] for position in range(len(dataset))]
    for example in (example for example in examples if example.source == "document"):
        index = int(example.id[1:])
        spoken = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
        assert spoken == f"Page {index}."
        expected = ImageProcessor(8).pixels(Image.new("RGB", (8, 6), (60 * index, 0, 0)))
        assert example.images is not None
        assert torch.equal(example.images, expected[None])


def test_counts_are_logged_for_each_source(world: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(world, "general", image_record(0), text_record(0, "long " * 200))
    with caplog.at_level(logging.INFO, "llava_mole"):
        build(world, epochs=3)
    assert "general: 2 records, lambda 1, 2 samples per epoch, 1 text only, 1 cut at 128 tokens" in caplog.text
    assert "document: 3 records, lambda 2, 6 samples per epoch, 0 text only, 0 cut at 128 tokens" in caplog.text
    assert "24 samples in 3 epochs" in caplog.text


def test_long_sample_is_cut_at_the_end(world: DataConfig) -> None:
    rewrite(world, "general", text_record(0, "long " * 200))
    world.mixture = {"document": 0.0}
    example = build(world)[0]
    assert len(example.input_ids) == len(example.labels) == 128
    assert example.labels[-1] == example.input_ids[-1]


def test_source_with_lambda_zero_is_not_read(world: DataConfig) -> None:
    world.mixture = {"document": 0.0}
    world.sources["document"].annotations = "absent.json"
    dataset = build(world)
    assert len(dataset) == 6
    assert dataset.source_names == ("general",)


def test_dataset_works_in_loader_workers_as_in_the_process(world: DataConfig) -> None:
    dataset = build(world)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    for own, sent in zip(map(dataset.__getitem__, range(len(dataset))), loader, strict=True):
        assert (own.id, own.input_ids, own.labels) == (sent.id, sent.input_ids, sent.labels)
        assert (own.images is None and sent.images is None) or torch.equal(own.images, sent.images)


def test_plain_template_trains_the_caption_only(world: DataConfig) -> None:
    world.template = "plain"
    rewrite(world, "general", image_record(0, "a red field"))
    world.mixture = {"document": 0.0}
    example: Example = build(world)[0]
    tokenizer = LlamaSentencePiece(legacy=False)
    assert example.input_ids[: 1 + IMAGE_TOKENS] == [1] + [IMAGE_TOKEN_INDEX] * IMAGE_TOKENS
    assert tokenizer.decode(example.input_ids[1 + IMAGE_TOKENS :]) == "a red field\n"
    assert example.labels[1 + IMAGE_TOKENS :] == example.input_ids[1 + IMAGE_TOKENS :]


def missing_image(world: DataConfig) -> None:
    (Path(world.sources["general"].image_folder) / "2.png").unlink()


def missing_file(world: DataConfig) -> None:
    Path(world.sources["document"].annotations).unlink()


def missing_folder(world: DataConfig) -> None:
    world.sources["document"].image_folder += "-absent"


def path_that_climbs(world: DataConfig) -> None:
    rewrite(world, "document", image_record(0), image_record(1) | {"image": "../general/1.png"})


def text_for_plain(world: DataConfig) -> None:
    world.template = "plain"


def answer_out_of_reach(world: DataConfig) -> None:
    record = text_record(0)
    record["conversations"][0]["value"] = "long " * 200
    rewrite(world, "document", image_record(0), record)


def image_out_of_reach(world: DataConfig) -> None:
    record = image_record(0)
    record["conversations"][:0] = [{"from": "human", "value": "long " * 200}, {"from": "gpt", "value": "Yes."}]
    rewrite(world, "document", record)


@pytest.mark.parametrize(
    ("damage", "start", "message"),
    [
        (missing_image, "general.json:4: ", "image '2.png' is not a file in the image folder"),
        (missing_file, "document.json: ", "does not exist"),
        (missing_folder, "document.json:2: ", "this folder does not exist"),
        (path_that_climbs, "document.json:3: ", "must be relative to the image folder"),
        (text_for_plain, "general.json:6: ", "template 'plain' needs an image marker in the first turn"),
        (
            answer_out_of_reach,
            "document.json:3: ",
            "no token of an answer is left after truncation at data.max_length 128",
        ),
        (image_out_of_reach, "document.json:2: ", "behind max_length 128; raise data.max_length"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_found_before_training(
    damage: Any, start: str, message: str, world: DataConfig, tmp_path: Path
) -> None:
    damage(world)
    with pytest.raises(DataError) as caught:
        build(world)
    assert str(caught.value).startswith(f"{tmp_path}/{start}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "vicuna"}, "template 'vicuna' does not exist"),
        ({"mixture": {"document": -1.0}}, "data.mixture.document is -1.0"),
        ({"mixture": {"x": 1.0}}, "data.mixture.x: no such source"),
        ({"mixture": {"document": 0.0, "general": 0.0}}, "data.mixture is empty"),
        ({"sources": {}, "mixture": {}}, "data.mixture is empty"),
        ({"mixture": {"document": 0.0, "general": 0.01}}, "data.mixture is empty: lambda times"),
        ({"max_length": IMAGE_TOKENS}, "data.max_length 4 leaves no room"),
    ],
)
def test_wrong_setting_is_found_before_training(settings: dict[str, Any], message: str, world: DataConfig) -> None:
    for key, value in settings.items():
        setattr(world, key, value)
    with pytest.raises(ConfigError) as caught:
        build(world)
    assert message in str(caught.value)


def test_wrong_setting_is_found_before_files_are_read(world: DataConfig) -> None:
    missing_file(world)
    world.mixture = {"document": -1.0}
    with pytest.raises(ConfigError):
        build(world)


def test_image_that_breaks_in_a_run_is_replaced_by_the_next_of_its_source(world: DataConfig, tmp_path: Path) -> None:
    dataset = build(world)
    whole = [dataset[position] for position in range(len(dataset))]
    (tmp_path / "general" / "2.png").write_bytes((tmp_path / "general" / "2.png").read_bytes()[:40])
    (tmp_path / "general" / "3.png").unlink()
    for again in (dataset, build(world, resuming=True), pickle.loads(pickle.dumps(build(world, resuming=True)))):
        for position, before in enumerate(whole):
            example = again[position]
            if before.source == "general" and before.id in ("i2", "i3"):
                # Records 4 and 5 have no image; the search goes on at the source's start.
                assert example.id == "i0"
                assert torch.equal(
                    example.images, next(e.images for e in whole if e.id == "i0" and e.source == "general")
                )
                assert example.replaced_image.startswith(f"{tmp_path}/general.json:{int(before.id[1]) + 2}: image ")
            else:
                assert (example.id, example.replaced_image) == (before.id, None)
    with pytest.raises(DataError, match=r"general\.json:5: image '3\.png' is not a file"):
        build(world)


def test_a_source_without_any_readable_image_is_an_error(world: DataConfig, tmp_path: Path) -> None:
    dataset = build(world)
    for file in (tmp_path / "document").glob("*.png"):
        file.unlink()
    position = next(p for p in range(len(dataset)) if dataset.plan[p][0] == "document")
    with pytest.raises(
        DataError, match=r"document\.json:\d: image .* nor can the image of any of the 100 records after"
    ):
        dataset[position]


def test_end_marker_of_several_tokens_is_warned_about(world: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    world.template = "chatml_direct"
    with caplog.at_level(logging.WARNING, "llava_mole"):
        build(world)
    assert "'<|im_end|>', which this tokenizer splits into several tokens" in caplog.text
    caplog.clear()
    world.template = "vicuna_v1"
    with caplog.at_level(logging.WARNING, "llava_mole"):
        build(world)
    assert not caplog.text


def test_dataset_can_be_pickled(world: DataConfig) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from llava_mole.data.tokenization import HFTextTokenizer

    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = HFTextTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    world.max_length = 1024
    dataset = build_dataset(world, tokenizer, ImageProcessor(8), IMAGE_TOKENS, seed=0, epochs=1)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[3].input_ids == dataset[3].input_ids
    assert copy.plan.digest == dataset.plan.digest
