"""Recomputation where asked, and compilation of every layer by itself."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llava_mole.model.language_model import compile_layers, set_recompute
from llava_mole.model.packed_attention import enable_packing, packed_arguments


def _llama(layers: int = 5) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


@pytest.mark.parametrize(
    ("policy", "expected"), [("none", [0, 0, 0, 0, 0]), ("every_n", [1, 0, 1, 0, 1]), ("all", [1, 1, 1, 1, 1])]
)
def test_the_policy_chooses_the_layers(policy: Any, expected: list[int]) -> None:
    model = _llama()
    set_recompute(model, policy, 2)
    assert [int(layer.gradient_checkpointing) for layer in model.model.layers] == expected
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=5, n_head=1, n_positions=8))
    set_recompute(gpt2, policy, 2)
    assert [int(layer.gradient_checkpointing) for layer in gpt2.transformer.h] == expected


def _saved_bytes(model: Any, x: torch.Tensor) -> int:
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        total = sum(held.values())
        del out
    return total


def test_more_recomputation_keeps_less() -> None:
    kept = []
    for policy in ("none", "every_n", "all"):
        model = _llama()
        set_recompute(model, policy, 2)  # type: ignore[arg-type]
        kept.append(_saved_bytes(model, torch.randn(1, 32, 16, requires_grad=True)))
    assert kept[0] > kept[1] > kept[2]


def test_compiled_layers_equal_the_others_and_are_not_compiled_anew_for_every_row() -> None:
    model, reference = _llama(2), _llama(2)
    for own in (model, reference):
        own.requires_grad_(False)
        enable_packing(own)
    torch._dynamo.reset()
    compile_layers(model, backend="aot_eager")
    graphs = []
    for lengths in ((3, 4), (5, 2, 6), (7, 1), (2, 2, 2, 9), (11,), (4, 8)):
        x = torch.randn(1, sum(lengths), 16)
        results = []
        for own in (model, reference):
            leaf = x.clone().requires_grad_()
            arguments = packed_arguments(own.config._attn_implementation, lengths, x.device)
            out = own.get_decoder()(inputs_embeds=leaf, **arguments).last_hidden_state
            out.square().sum().backward()
            results.append((out, leaf.grad))
        torch.testing.assert_close(results[0], results[1])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[2]  # the second length makes the sizes dynamic; later ones add nothing
