"""Memory by item: hand-computed, and activations against what autograd really keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.analysis.plan.memory import (
    FRAGMENTATION,
    RESERVE_BYTES,
    TOWER_NUMBERS,
    Row,
    Strategy,
    activation_bytes,
    layer_bytes_per_token,
    memory_items,
)
from llava_mole.model.adapters import add_adapter
from llava_mole.model.flops import ModelShape
from llava_mole.model.packed_attention import enable_packing, packed_arguments

WIDTH, FFN, HEADS, TOKENS, RANK = 64, 176, 4, 48, 4


def shape(layers: int = 2, method: str = "mole") -> ModelShape:
    return ModelShape(
        hidden_size=WIDTH, ffn_size=FFN, layers=layers, attention_heads=HEADS, attention_width=WIDTH,
        key_value_width=WIDTH, vocab_size=50, linear_parameters=0, head_parameters=0, adapter_parameters=0,
        experts_used=1, has_router=method == "mole", projector_parameters=0, projector_trains=False, tower_width=32,
        image_tokens=9, tower_flops=0,
    )  # fmt: skip


def kept_bytes(layers: int, method: str, sample_lengths: list[int] | None = None, *, full: bool = False) -> int:
    """Bytes that a forward pass of a float32 Llama keeps for the backward pass, parameters left out."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
        )
    )
    lm.requires_grad_(full)
    # On a CPU the automatic backend keeps rank activations of all experts; the formula is that of a GPU.
    options = {"backend": "grouped"} if method == "mole" else {}
    adapted = add_adapter(
        lm, method, rank=RANK, alpha=None, dropout=None, num_experts=3, preset="paper", options=options
    )
    arguments: dict = {"use_cache": False}
    if sample_lengths is not None:
        enable_packing(lm)
        arguments = packed_arguments(lm.config._attn_implementation, sample_lengths, torch.device("cpu"))
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = lm.model(inputs_embeds=inputs, **arguments).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["none", "lora", "mole"])
def test_a_layer_keeps_what_the_formula_says(method: str) -> None:
    measured = (kept_bytes(3, method) - kept_bytes(2, method)) / TOKENS
    formula = layer_bytes_per_token(shape(method=method), method, RANK, 4)
    # The mixture keeps a few bytes more: router logits and the order of the tokens.
    assert measured == pytest.approx(formula, rel=0.02 if method == "mole" else 1e-6)


@pytest.mark.parametrize("method", ["none", "lora", "mole"])
def test_packed_rows_keep_attention_twice(method: str) -> None:
    lengths = [TOKENS - 20, 20]
    measured = (kept_bytes(3, method, lengths) - kept_bytes(2, method, lengths)) / TOKENS
    formula = layer_bytes_per_token(shape(method=method), method, RANK, 4, packed=True)
    assert measured == pytest.approx(formula, rel=0.02 if method == "mole" else 1e-6)


def test_a_layer_that_trains_keeps_the_inputs_of_its_linears() -> None:
    measured = (kept_bytes(3, "none", full=True) - kept_bytes(2, "none", full=True)) / TOKENS
    trains = dataclasses.replace(shape(method="none"), trained_linear_parameters=1)
    assert measured == pytest.approx(layer_bytes_per_token(trains, "none", RANK, 4), rel=1e-6)


def test_a_trained_block_of_the_tower_keeps_so_many_numbers() -> None:
    import open_clip

    sizes = {"image_size": 32, "width": WIDTH, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    kept = {}
    for layers in (2, 3):
        clip = open_clip.CLIP(embed_dim=32, vision_cfg={**sizes, "layers": layers}, text_cfg=text, quick_gelu=True)
        total, own = 0, {p.untyped_storage().data_ptr() for p in clip.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            clip.visual(torch.randn(1, 3, 32, 32))
            total = sum(seen.values())
        kept[layers] = total
    # 16 patches and the class token; float32. Norms and attention keep a few statistics more.
    assert kept[3] - kept[2] == pytest.approx(4 * TOWER_NUMBERS * WIDTH * 17, rel=0.05)


def test_vicuna_7b_layer_by_hand() -> None:
    vicuna = ModelShape(4096, 11008, 32, 32, 4096, 4096, 32000, 0, 0, 0.0, 1, True, 0, True, 1024, 576, 0.0)
    norms, attention = 8 * 4097, 2 * 4 * 4096 + 4 * 32 + 2 * 4096
    low_rank, ffn, router = 2 * 32 * 7, 2 * (4096 + 2 * 11008), 4 * 4096
    assert layer_bytes_per_token(vicuna, "mole", 32, 2) == norms + attention + low_rank + ffn + router
    # About 4.6 MB a token over 32 layers: 18 GiB for 4,096 tokens.
    assert 32 * 4096 * layer_bytes_per_token(vicuna, "mole", 32, 2) / 2**30 == pytest.approx(17.5, abs=0.3)


def test_recomputed_layers_keep_their_input_and_one_unfolds() -> None:
    row = Row(tokens=100, images=2, supervised=10)
    layer, inputs = 100 * layer_bytes_per_token(shape(4), "mole", RANK, 2), 100 * 2 * WIDTH
    ends = 100 * WIDTH * 8 + 2 * 9 * (32 + 2 * WIDTH) * 2
    args = (shape(4), row, "mole", RANK, 2)
    assert activation_bytes(*args, 0) == pytest.approx(4 * layer + ends)
    assert activation_bytes(*args, 1) == pytest.approx(3 * layer + inputs + layer + ends)
    assert activation_bytes(*args, 4) == pytest.approx(4 * inputs + layer + ends)


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "optimizer", "buckets"),
    [
        ("single", 6000, 4000, 8000, 0),
        ("ddp", 6000, 4000, 8000, 4000),
        ("zero0", 2000, 2000, 12000, 2 * 70),
        ("zero1", 2000, 2000, 3000, 2 * 70),
        ("zero2", 2000, 500, 3000, 2 * 70),
        ("zero3", 500, 500, 3000, 2 * 70 + 2 * 11_000),  # fewer weights than DeepSpeed may hold gathered
        ("fsdp2", 1000, 1000, 2000, 10 * 500),  # two layers gathered, gradients of one in both precisions
    ],
)
def test_what_a_strategy_shards(kind: str, weights: int, gradients: int, optimizer: int, buckets: int) -> None:
    items = memory_items(
        shape(),
        frozen_parameters=10_000,
        trainable_parameters=1000,
        compute_bytes=2,
        strategy=Strategy(kind, 4, bucket_elements=70),
        row=Row(tokens=100, images=0, supervised=30),
        adapter="mole",
        rank=RANK,
        recomputed_layers=0,
        head_chunk=20,
    )
    assert items["frozen weights"] == (5000 if kind in ("zero3", "fsdp2") else 20_000)
    assert (items["trainable weights"], items["gradients"]) == (weights, gradients)
    assert (items["optimizer"], items["buckets"]) == (optimizer, buckets)
    assert items["logits"] == 20 * 50 * 16 + 2 * 2 * WIDTH * 30  # a chunk of 20 of 30 positions
    rest = sum(size for name, size in items.items() if name != "reserve")
    assert items["reserve"] == pytest.approx(RESERVE_BYTES + FRAGMENTATION * rest)


def test_float32_needs_no_copies() -> None:
    items = memory_items(
        shape(),
        frozen_parameters=10,
        trainable_parameters=1000,
        compute_bytes=4,
        strategy=Strategy("single", 1),
        row=Row(tokens=1, images=0, supervised=1),
        adapter="none",
        rank=1,
        recomputed_layers=0,
        head_chunk=20,
    )
    assert (items["frozen weights"], items["trainable weights"]) == (40, 4000)


def test_quantised_linears_take_fewer_bytes_and_one_is_expanded() -> None:
    def items(quantization: Any, recomputed: int = 0) -> dict[str, float]:
        return memory_items(
            dataclasses.replace(shape(), linear_parameters=64_000),
            frozen_parameters=100_000,
            trainable_parameters=0,
            compute_bytes=2,
            strategy=Strategy("single", 1),
            row=Row(tokens=100, images=0, supervised=30),
            adapter="mole",
            rank=RANK,
            recomputed_layers=recomputed,
            head_chunk=20,
            quantization=quantization,
        )

    none, four, eight = items("none"), items("4bit"), items("8bit")
    assert none["frozen weights"] == 2 * 100_000
    # A half byte each; a byte for 64; 4 bytes for 256 of those bytes.
    assert four["frozen weights"] == 2 * 36_000 + 32_000 + 1000 + 15.625
    assert eight["frozen weights"] == 2 * 36_000 + 64_000
    assert four["workspace"] - none["workspace"] == eight["workspace"] - none["workspace"] == 2 * WIDTH * FFN
    assert four["activations"] == none["activations"]
    # The mixture computes the input of down anew for the backward pass, but 8 bits keep it.
    assert eight["activations"] - none["activations"] == 2 * 100 * 2 * FFN
    kept = items("8bit", recomputed=2)["activations"] - items("none", recomputed=2)["activations"]
    assert kept == 2 * 100 * 2 * (3 * WIDTH + FFN)
