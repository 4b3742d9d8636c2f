"""Checkpoints of random miniature models, as training writes them, for the tests of inference and evaluation."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from worlds.tiny_models import make_world

from llava_mole.config import config_to_dict, parse_run_config
from llava_mole.model.builder import attach_adapter, build_parts
from llava_mole.train.checkpointing import CheckpointWriter, Progress


def make_checkpoint(
    directory: Path,
    method: str = "mole",
    options: dict[str, Any] | None = None,
    chat_template: str | None = None,
    std: float = 0.3,
    tokenizer: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Write `<directory>/run/checkpoint-1` of an untrained model with random adapters. Returns the run directory.

    `std` is the adapters' standard deviation. With a `chat_template` the tokenizer has it, and
    the model was trained with it. `tokenizer` and `generation` change the language model's tokenizer_config.json and
    generation_config.json, `overrides` (`--key value`) the run's configuration.
    """
    path = make_world(directory, samples=1)
    for name, changes in (("tokenizer_config.json", tokenizer), ("generation_config.json", generation)):
        file = directory / "language_model" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **(changes or {})}))
    if chat_template:
        (directory / "language_model" / "chat_template.jinja").write_text(chat_template)
    mute_byte_pieces(directory / "language_model" / "model.safetensors")
    config = parse_run_config([str(path), "--adapter.method", method, *overrides])
    config.adapter.options = options or {}
    config.data.template = "tokenizer" if chat_template else config.data.template
    model, hf_tokenizer, fingerprints = build_parts(config.model)
    torch.manual_seed(3)
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    attach_adapter(model, config.adapter)
    for name, parameter in model.language_model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    run = directory / "run"
    writer = CheckpointWriter(run, config_to_dict(config), hf_tokenizer, fingerprints, {}, "tiny")
    writer.write(model, {}, Progress(step=1))
    return run


def mute_byte_pieces(weights: Path) -> None:
    """Give ids 3 to 258, the tokenizer's single bytes, logit 0, so that a random model writes valid text."""
    state = load_file(weights)
    state["lm_head.weight"][3:259] = 0
    save_file(state, weights, metadata={"format": "pt"})


@functools.cache
def colors() -> tuple[tuple[int, int, int], ...]:
    """Colours of the images that `make_questions` writes."""
    return ((250, 10, 10), (10, 10, 250), (10, 250, 10))


def make_questions(directory: Path, count: int = 11) -> Path:
    """Write images and `q.jsonl` with questions of different lengths, some about the same image, one about none."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for n, color in enumerate(colors()):
        Image.new("RGB", (20 + 8 * n, 16), color).save(directory / "images" / f"{n}.png")
    lines = []
    for n in range(count):
        text = "What color is this? " + "Is it blue or green? " * (n * 7 % 4)
        line = {"question_id": f"q{n}", "text": text.strip(), "category": ("one", "two")[n % 2], "answer": "red"}
        if n != 4:
            line["image"] = f"images/{n % 3}.png"
        lines.append(json.dumps(line) + "\n")
    path = directory / "q.jsonl"
    path.write_text("".join(lines))
    return path
