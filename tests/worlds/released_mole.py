"""The recorded experts in the file layout of the LLaVA-MoLE authors."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds.foreign_models import FFN, HIDDEN, projector_state
from worlds.golden_cases import load_arrays, load_cases
from worlds.tiny_models import make_language_model

CASES = [c for c in load_cases("mole_ffn")[1] if (c["d_model"], c["d_ff"]) == (HIDDEN, FFN)]
LAYERS = 2


def golden(case: dict[str, Any]) -> dict[str, Tensor]:
    prefix = case["key"] + "."
    found = load_arrays("mole_ffn").items()
    return {name.removeprefix(prefix): torch.tensor(v) for name, v in found if name.startswith(prefix)}


def make_released(directory: Path, case: dict[str, Any], data: dict[str, Tensor], *, ends: bool = True) -> None:
    """`directory/vicuna` with the recorded FFNs, `released.pt` in float64 with their experts in each layer."""
    make_language_model(directory / "vicuna", layers=LAYERS)
    base_file = directory / "vicuna" / "model.safetensors"
    base = load_file(base_file)
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for n in range(LAYERS):
        layer = f"llm_model.base_model.model.model.layers.{n}."
        for name, value in data.items():
            if name.startswith("weight."):
                state[f"{layer}mlp.{name.removeprefix('weight.')}"] = value
        for projection in ("gate", "up", "down"):
            weight = data[f"weight.original_module.{projection}_proj.weight"]
            base[f"model.layers.{n}.mlp.{projection}_proj.weight"] = weight.clone()
        for p in "qkvo":
            rank = case["lora_rank"]
            for half, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank))):
                name = f"{layer}self_attn.{p}_proj.lora_{half}.default.weight"
                state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2
    save_file(base, base_file, metadata={"format": "pt"})
    state |= {f"in_adaptor.projector.{name}": value for name, value in projector_state().items()}
    state["in_adaptor.text_embed.weight"] = base["model.embed_tokens.weight"].bfloat16()
    if ends:
        for name in ("visual_start_token", "visual_end_token"):
            state[f"in_adaptor.{name}"] = torch.randn(1, 1, HIDDEN, generator=generator)
    torch.save({"state_dict": state, "epoch": 1}, directory / "released.pt")
