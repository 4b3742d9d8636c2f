"""Runs with images in tiles as LLaVA-NeXT of transformers, and back: the same ids, pixels and logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import HIDDEN, VOCABULARY, randomize, vision_config
from worlds.interop_tools import close, convert, load, refused
from worlds.tiny_models import make_tokenizer

from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.data.images import normalise_pixels
from llava_mole.inference.predictor import Predictor
from llava_mole.interop.tensors import open_weights
from llava_mole.model.builder import LoadedModel

ANYRES = ("--data.image_aspect_ratio", "anyres", "--model.projector", "mlp2x_gelu+newline")
SIZES = ((40, 24), (16, 61), (90, 31), (7, 9))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("anyres"), "lora", std=0.1, overrides=ANYRES)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "next"
    assert convert(run, "--to", "llava-next-hf", "--out", out) == 0
    return out


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def load_next(path: Path) -> Any:
    from transformers import LlavaNextForConditionalGeneration

    model, info = LlavaNextForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def processor_of(path: Path) -> Any:
    """The exported processor with Pillow's arithmetic, which is ours."""
    from transformers import AutoProcessor, LlavaNextImageProcessorPil

    processor = AutoProcessor.from_pretrained(path)
    processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(path)
    return processor


def asked(number: int) -> str:
    return "<image>\n" * number + "Is it blue?"


def our_inputs(loaded: LoadedModel, images: list[Image.Image]) -> tuple[list[int], torch.Tensor]:
    """Ids and logits of a prompt about these images."""
    predictor = Predictor(loaded)
    (batch,) = predictor.batches([images], [asked(len(images))], batch_size=1)
    with torch.inference_mode():
        logits = loaded.model.causal_lm(inputs_embeds=predictor.embed(batch), use_cache=False).logits
    return batch.input_ids[0].tolist(), logits


def test_an_exported_run_has_the_same_ids_pixels_and_logits(run: Path, exported: Path) -> None:
    loaded, model, processor = load(run), load_next(exported), processor_of(exported)
    image_id = model.config.image_token_id
    assert model.config.image_grid_pinpoints == [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    for images in [[picture(size)] for size in SIZES] + [[picture(SIZES[0]), picture(SIZES[1])]]:
        content = [*([{"type": "image"}] * len(images)), {"type": "text", "text": "Is it blue?"}]
        ids, logits = our_inputs(loaded, images)
        if len(images) == 1:
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            theirs = processor(text=text, images=images, return_tensors="pt")
            assert theirs["input_ids"][0].tolist() == [image_id if n == IMAGE_TOKEN_INDEX else n for n in ids]
        else:  # the chat template shows one image a message; the ids are ours
            theirs = dict(processor.image_processor(images, return_tensors="pt"))
            theirs["input_ids"] = torch.tensor([[image_id if n == IMAGE_TOKEN_INDEX else n for n in ids]])
        for image, pixels in zip(images, theirs["pixel_values"], strict=True):
            ours = loaded.image_processor.tiles(image).pixels
            normalised = normalise_pixels(ours, loaded.image_processor.mean, loaded.image_processor.std)
            torch.testing.assert_close(normalised, pixels[: len(ours)], rtol=0, atol=1e-5)
        with torch.no_grad():
            expected = model(**theirs).logits
        close(logits, expected[..., : logits.shape[-1]])


def test_an_export_comes_back_with_the_same_tensors_and_logits(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(exported, "--to", "checkpoint", "--out", tmp_path / "back") == 0
    there, here = load(run), load(tmp_path / "back")
    for size in SIZES:
        ids, logits = our_inputs(here, [picture(size)])
        expected_ids, expected = our_inputs(there, [picture(size)])
        assert ids == expected_ids
        close(logits[..., : expected.shape[-1]], expected)
    assert torch.equal(here.model.projector.newline.vector, there.model.projector.newline.vector)
    assert convert(tmp_path / "back", "--to", "llava-next-hf", "--out", tmp_path / "again") == 0
    first, second = (open_weights(path) for path in (exported, tmp_path / "again"))
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    refused(
        capsys, "--image-aspect-ratio pad does not fit it", exported, "--to", "checkpoint",
        "--image-aspect-ratio", "pad", "--out", tmp_path / "o",
    )  # fmt: skip


def test_a_checkpoint_saved_by_transformers_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    text = LlamaConfig(
        vocab_size=VOCABULARY + 8, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision_config(), text_config=text, image_token_index=VOCABULARY, image_seq_length=4,
        image_grid_pinpoints=[[32, 16], [16, 64]],
    )  # fmt: skip
    torch.manual_seed(4)
    model = LlavaNextForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "next")
    make_tokenizer(tmp_path / "next")
    assert convert(tmp_path / "next", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    loaded = load(tmp_path / "run")
    for size in ((40, 24), (16, 61)):
        tiles = loaded.image_processor.tiles(picture(size))
        ids, logits = our_inputs(loaded, [picture(size)])
        pixels = torch.stack(
            [loaded.image_processor(Image.fromarray(t.permute(1, 2, 0).numpy())) for t in tiles.pixels]
        )
        with torch.no_grad():
            expected = model(
                input_ids=torch.tensor([[VOCABULARY if n == IMAGE_TOKEN_INDEX else n for n in ids]]),
                pixel_values=pixels[None],
                image_sizes=torch.tensor([[size[1], size[0]]]),
            ).logits
        close(logits, expected)
    capsys.readouterr()
    wrong = json.loads((tmp_path / "next" / "config.json").read_text()) | {"image_grid_pinpoints": [[20, 16]]}
    (tmp_path / "next" / "config.json").write_text(json.dumps(wrong))
    refused(capsys, "multiples of 16", tmp_path / "next", "--to", "checkpoint", "--out", tmp_path / "o")


def test_layouts_without_tiles_refuse_such_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("llava", "llava-lora", "llava-hf", "vllm"):
        refused(capsys, "export it with --to llava-next-hf", run, "--to", layout, "--out", tmp_path / "o")
    assert convert(run, "--to", "peft", "--out", tmp_path / "peft") == 0
    assert (tmp_path / "peft" / "mm_projector.safetensors").is_file()
