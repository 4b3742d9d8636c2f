"""Shared by the tests of interop: the command, an example batch, and the logits of both sides."""

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds.foreign_models import VOCABULARY
from worlds.tiny_models import IMAGE_SIZE, NUM_IMAGE_TOKENS

from llava_mole import cli
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.model.builder import LoadedModel, load_pretrained_model


def convert(*arguments: object) -> int:
    """Exit code of `llava-mole convert`."""
    return cli.main(["convert", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    """The command ends with exit code 2 and one line that holds `message`."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in line


def load(path: Path) -> LoadedModel:
    return load_pretrained_model(path, device="cpu")


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
    """The same of a LlavaForConditionalGeneration."""
    ids, images = example()
    text = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 7)
    with torch.no_grad():
        with_images = model(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_token), pixel_values=images)
        return with_images.logits, model(input_ids=text).logits


def reference_logits(base: Path, tower: Any, state: dict[str, torch.Tensor], lora: Path | None = None) -> torch.Tensor:
    """What LLaVA computes, put together from transformers' and PEFT's parts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llm: Any = AutoModelForCausalLM.from_pretrained(base)
    embeddings = llm.get_input_embeddings()
    if lora is not None:
        llm = PeftModel.from_pretrained(llm, str(lora))
    ids, images = example()
    with torch.no_grad():
        features = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = torch.nn.functional.gelu(features @ state["0.weight"].T + state["0.bias"])
        projected = hidden @ state["2.weight"].T + state["2.bias"]
        is_image = ids == IMAGE_TOKEN_INDEX
        inputs = embeddings(ids.masked_fill(is_image, 0)).masked_scatter(is_image.unsqueeze(-1), projected)
        return llm(inputs_embeds=inputs).logits


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32's rounding through two stacks of layers (up to 1e-5 seen), and not because all is zero."""
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)
