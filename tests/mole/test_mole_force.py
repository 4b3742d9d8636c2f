"""`force_expert`: every token through one expert equals the LoRA that the surgery exports of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, collect_routing, force_expert
from llava_mole.mole.surgery import to_lora

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "masked"},
        {"backend": "loop"},
        {"top_k": 2, "expert_scale": "topk_renorm"},
        {"expert_scale": "prob", "shared_r": 2, "shared_scale": "complement"},
        {"mode": "dense", "expert_scale": "prob"},
        {"expert_scale": "prob_times_k"},
        {"mode": "dense", "expert_scale": "prob_times_k", "experts_by_layer": [4, 3]},
        {"granularity": "sequence", "balance_group": "micro_batch"},
        {"router_scope": "linear"},
        {"router_scope": "model", "granularity": "sequence", "balance_group": "micro_batch"},
        {"router": "random"},
    ],
    ids=str,
)
def test_it_equals_the_exported_lora(
    tiny_llama: Make, randomized: Randomize, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=3, **options))).eval()
    free = model(IDS).logits
    to_lora(model, tmp_path, expert=2)
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with force_expert(model, 2):
        torch.testing.assert_close(model(IDS).logits, exported(IDS).logits, rtol=1e-4, atol=1e-5)
        assert all((index == 2).all() for index in collect_routing(model).index)
    if options.get("router") != "random":
        assert torch.equal(model(IDS).logits, free)
        assert not torch.allclose(free, exported(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("scale", ["none", "straight_through", "prob", "prob_squared", "prob_times_k", "topk_renorm"])
def test_it_equals_a_router_that_is_certain(tiny_llama: Make, randomized: Randomize, scale: str) -> None:
    options: dict[str, Any] = {"expert_scale": scale, "top_k": 2 if scale == "topk_renorm" else 1}
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=3, router_bias=True, **options))).eval()
    for name, parameter in model.named_parameters():
        if "mole_router" in name:
            parameter.data = torch.tensor([0.0, 200.0, 0.0]) if name.endswith("bias") else torch.zeros_like(parameter)
    certain = model(IDS).logits
    with force_expert(model, 1):
        torch.testing.assert_close(model(IDS).logits, certain, rtol=1e-5, atol=1e-6)
    with force_expert(model, 2):
        assert not torch.allclose(model(IDS).logits, certain, atol=1e-3)


def test_an_error_inside_ends_the_force(tiny_llama: Make, randomized: Randomize) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4))).eval()
    free = model(IDS).logits
    with pytest.raises(KeyError), force_expert(model, 1), force_expert(model, 0):
        raise KeyError
    assert torch.equal(model(IDS).logits, free)


def test_only_experts_that_exist(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=3))
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"expert {wrong} cannot be forced: the adapter has the experts 0 to 2"):
            force_expert(model, wrong).__enter__()
    with pytest.raises(ValueError, match="the model has no experts"):
        force_expert(tiny_llama(), 0).__enter__()
    with force_expert(tiny_llama(), None):
        pass
