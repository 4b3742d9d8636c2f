"""Foreign checkpoints become ours with the same outputs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import HIDDEN, VOCABULARY, make_clip, make_llava, make_llava_hf, make_llava_lora, projector_state
from safetensors.torch import load_file
from tiny_models import IMAGE_SIZE, NUM_IMAGE_TOKENS, make_language_model

from llava_mole import cli
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.inference import Predictor
from llava_mole.model.builder import LoadedModel, load_pretrained_model


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [2, L] with one image each, and the images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=generator)
    ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN_INDEX
    return ids, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def our_logits(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """With images, and of text only."""
    ids, images = example()
    text = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return loaded.model(ids, mask, images), loaded.model(text, mask)


def hf_logits(model: Any, image_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, images = example()
    text = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 7)
    with torch.no_grad():
        with_images = model(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_token), pixel_values=images)
        return with_images.logits, model(input_ids=text).logits


@pytest.mark.parametrize("names", ["old", "new"])
def test_llava_hf_gives_the_logits_of_transformers(names: str, tmp_path: Path) -> None:
    theirs = make_llava_hf(tmp_path / "hf", names)
    assert convert(tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    loaded = load_pretrained_model(tmp_path / "run", device="cpu")
    for ours, expected in zip(our_logits(loaded), hf_logits(theirs, VOCABULARY), strict=True):
        assert expected.abs().max() > 1
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert loaded.template == "vicuna_v1"
    assert loaded.config.model.vision_tower.activation == "quick_gelu"
    # The directory can be moved, and answers prompts.
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    (answer,) = Predictor.from_pretrained(tmp_path / "elsewhere", device="cpu").generate(
        [None], ["What color is this?"], max_new_tokens=3
    )
    assert isinstance(answer, str)


def reference_logits(base: Path, tower: Any, state: dict[str, torch.Tensor], lora: Path | None = None) -> Any:
    """What LLaVA computes, put together from transformers' and PEFT's parts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llm: Any = AutoModelForCausalLM.from_pretrained(base)
    embeddings = llm.get_input_embeddings()
    if lora is not None:
        llm = PeftModel.from_pretrained(llm, lora)
    ids, images = example()
    with torch.no_grad():
        features = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = torch.nn.functional.gelu(features @ state["0.weight"].T + state["0.bias"])
        projected = hidden @ state["2.weight"].T + state["2.bias"]
        is_image = ids == IMAGE_TOKEN_INDEX
        inputs = embeddings(ids.masked_fill(is_image, 0)).masked_scatter(is_image.unsqueeze(-1), projected)
        return llm(inputs_embeds=inputs).logits


@pytest.mark.parametrize("binary", [False, True])
def test_a_full_llava_checkpoint_with_its_tower(binary: bool, tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_llava(tmp_path / "llava", tower=tower, binary=binary)
    make_language_model(tmp_path / "vicuna")  # the same seed: LLaVA's language model alone
    assert convert(tmp_path / "llava", "--to", "checkpoint", "--out", tmp_path / "run", "--vision-tower", tmp_path / "clip") == 0
    loaded = load_pretrained_model(tmp_path / "run", device="cpu")
    expected = reference_logits(tmp_path / "vicuna", tower, projector_state())
    torch.testing.assert_close(our_logits(loaded)[0], expected, rtol=0, atol=1e-5)
    assert loaded.config.data.image_aspect_ratio == "pad"
    assert loaded.config.model.vision_tower.select_layer == -2
