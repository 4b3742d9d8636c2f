"""FLOPs from shapes: hand-computed for Vicuna-7B with CLIP-L, and the shape read from real modules."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.model.adapters import add_adapter
from llava_mole.model.flops import (
    ModelShape,
    _adapter_parameters,
    _linear_parameters,
    model_shape,
    recompute_flops,
    training_flops,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import VisionTower
from llava_mole.model.multimodal_projector import build_projector

VICUNA_7B = ModelShape(
    hidden_size=4096,
    ffn_size=11008,
    layers=32,
    attention_heads=32,
    attention_width=4096,
    key_value_width=4096,
    vocab_size=32000,
    linear_parameters=32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    head_parameters=4096 * 32000,
    # LoRA of rank 32 on four attention linears and, of one expert, three FFN linears; a router of three rows
    adapter_parameters=32 * 32 * (4 * 8192 + 3 * 15104) + 32 * 3 * 4096,
    experts_used=1,
    has_router=True,
    projector_parameters=1024 * 4096 + 4096 * 4096,
    projector_trains=True,
    tower_width=1024,
    image_tokens=576,
    tower_flops=0.366e12,
)


# Teraflops of one text sequence with all logits, without and with recomputation of every layer: 4 N l for frozen
# weights, 6 A l for adapters, 3 x 2 L w l^2 for causal attention; 2 (N + A) l + 2 L w l^2 more for recomputation.
@pytest.mark.parametrize(
    ("length", "plain", "recomputed"),
    [(736, 20.2, 30.0), (1000, 27.7, 41.1), (2048, 58.4, 86.4), (4096, 123.4, 181.5)],
)
def test_a_sequence_of_vicuna_7b(length: int, plain: float, recomputed: float) -> None:
    once = training_flops(VICUNA_7B, float(length), float(length**2), float(length), 0.0)
    again = recompute_flops(VICUNA_7B, float(length), float(length**2), 32)
    assert once / 1e12 == pytest.approx(plain, abs=0.06)
    assert (once + again) / 1e12 == pytest.approx(recomputed, abs=0.06)
    assert recompute_flops(VICUNA_7B, float(length), float(length**2), 8) == pytest.approx(again / 4)


def test_an_image_costs_tower_and_projector() -> None:
    image = training_flops(VICUNA_7B, 0.0, 0.0, 0.0, 1.0)
    assert image == pytest.approx(0.366e12 + 6 * 20_971_520 * 576)
    frozen = training_flops(replace(VICUNA_7B, projector_trains=False), 0.0, 0.0, 0.0, 1.0)
    assert frozen == pytest.approx(0.366e12 + 2 * 20_971_520 * 576)


def test_sums_over_a_batch_are_enough() -> None:
    lengths = np.array([10.0, 20.0, 300.0])
    apart = training_flops(VICUNA_7B, lengths, lengths**2, lengths / 2, np.ones(3))
    together = training_flops(VICUNA_7B, lengths.sum(), (lengths**2).sum(), lengths.sum() / 2, 3.0)
    assert apart.sum() == pytest.approx(together)


def test_quadratic_length_is_where_attention_costs_as_much_as_the_rest() -> None:
    length = VICUNA_7B.quadratic_length
    linear = training_flops(VICUNA_7B, length, 0.0, 0.0, 0.0)
    assert training_flops(VICUNA_7B, 0.0, length**2, 0.0, 0.0) == pytest.approx(linear)
    assert 30_000 < length < 40_000


@pytest.mark.parametrize("method", ["none", "lora", "mole"])
def test_shapes_are_read_from_modules(method: str) -> None:
    with torch.device("meta"):
        lm = LlamaForCausalLM(
            LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
        )
        adapted = add_adapter(
            lm,
            method,
            rank=4,
            alpha=None,
            dropout=None,
            num_experts=3,
            preset="paper",
            options={"shared_r": 2} if method == "mole" else {},
        )
    base = adapted.get_base_model() if method != "none" else adapted
    assert _linear_parameters(base, base.get_output_embeddings()) == 2 * (4 * 16 * 16 + 3 * 16 * 40)
    attention, ffn = 4 * 4 * 32, 4 * 3 * 56
    expected = {"none": 0, "lora": 2 * (attention + ffn), "mole": 2 * (attention + ffn + ffn // 2 + 3 * 16)}
    assert _adapter_parameters(adapted) == expected[method]


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Configuration, and weights of a layer's matrix products: attention then FFN.
FAMILIES = {
    "Llama": (GROUPED, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
    "Qwen2": (GROUPED, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
    "Gemma": ({**GROUPED, "head_dim": 16}, 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48),
    "Phi3": (GROUPED, 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48),
    "GPTNeoX": (SIZES, 4 * 32 * 32 + 2 * 32 * 48),
    "GPT2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, 12 * 32 * 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_other_families(family: str) -> None:
    sizes, weights = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    vision = open_clip.CLIPVisionCfg(image_size=16, layers=3, width=24, head_width=12, patch_size=8)
    with torch.device("meta"):
        lm = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
        clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=open_clip.CLIPTextCfg(layers=1))
        tower = VisionTower(clip.visual, -2, "")
        shape = model_shape(LlavaMole(tower, build_projector("linear", 24, 32), lm))
    assert shape.linear_parameters == 3 * weights
    assert shape.head_parameters == 64 * 32
    assert (shape.layers, shape.hidden_size, shape.attention_heads) == (3, 32, 4)
    assert (shape.projector_parameters, shape.image_tokens, shape.has_router) == (24 * 32, 4, False)
    # two of three blocks: attention 4 w^2 and FFN 8 w^2 weights, 5 tokens with the class token
    assert shape.tower_flops == 2 * 3 * 64 * 24 * 4 + 2 * (2 * 12 * 24 * 24 * 5 + 4 * 5 * 5 * 24)


def test_a_pixel_shuffle_quarters_the_tokens_and_widens_the_projector() -> None:
    config = LlamaConfig(**SIZES)
    vision = open_clip.CLIPVisionCfg(image_size=32, layers=2, width=24, head_width=12, patch_size=8)
    with torch.device("meta"):
        clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=open_clip.CLIPTextCfg(layers=1))
        tower = VisionTower(clip.visual, -1, "")
        projector = build_projector("pixel_shuffle+mlp2x_gelu+ends", 24, 32, tower.grid)
        shape = model_shape(LlavaMole(tower, projector, LlamaForCausalLM(config)))
    assert (shape.image_tokens, shape.tower_width, shape.image_size) == (4 + 2, 96, 32)
    assert shape.projector_parameters == 96 * 32 + 32 * 32
