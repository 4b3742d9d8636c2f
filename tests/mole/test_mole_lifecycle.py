"""What PEFT's own tests expect of a life cycle, on small models; `scripts/test_peft_suite.sh` runs them all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp, mole_auxiliary_loss
from llava_mole.mole.split import MoleSplitMlp

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)
MASK = torch.ones(2, 9).bool()

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "coupled": {"expert_scale": "straight_through", "balance_scale": "switch", "balance_group": "global_batch"},
    "pooled": {"balance_layers": "pooled", "balance_group": "micro_batch"},
    "dense": {"mode": "dense"},
    "top2": {"top_k": 2, "expert_scale": "topk_renorm"},
    "one_expert": {"num_experts": 1},
    "shared": {"shared_r": 2},
}


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: grad.clone() for name, grad in found.items()}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_from_any_output(variant: str, training: bool, tiny_llama: Make) -> None:
    """Models of `from_pretrained` are in evaluation mode, in which some training loops leave them."""
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, **VARIANTS[variant])).train(training)
    model(input_ids=IDS).logits.sum().backward()
    assert set(gradients(model)) == trainable(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert set(gradients(model)) == trainable(model)


def test_in_evaluation_mode_the_balance_loss_has_a_gradient_but_no_value(
    tiny_llama: Make, randomized: Randomize
) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, balance_coef=0.5))).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS, labels=IDS)
    out = model(input_ids=IDS, labels=IDS)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.loss, plain.loss)
    out.loss.backward()
    automatic = gradients(model)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(automatic[name], grad, msg=name)


def test_gradients_of_the_inputs_of_a_frozen_adapter_are_those_of_the_loss_alone(tiny_llama: Make) -> None:
    found = []
    for add in (True, False):
        config = MoleConfig(r=4, balance_coef=10.0, add_balance_loss=add, init_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama(), config).eval().requires_grad_(False)
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=IDS).loss.backward()
        found.append(inputs.grad)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_load_is_counted_in_evaluation_mode_when_its_gradient_is_used(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig.from_preset("coupled", r=4)).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layers = [m for m in model.modules() if isinstance(m, MoleMlp)]

    def load() -> int:
        return sum(int(layer.current_state().load.sum()) for layer in layers)

    out = model(input_ids=IDS)
    optimizer.step()
    assert load() == 0, "a pass without a backward pass is no training"
    out.logits.sum().backward()
    optimizer.step()
    assert load() == len(layers) * IDS.numel()


def test_missing_masks_do_not_matter_in_evaluation_mode(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, balance_tokens="supervised"))
    assert model.eval()(input_ids=IDS).logits.shape == (2, 9, 64)
    with pytest.raises(ValueError, match="supervised"):
        model.train()(input_ids=IDS)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reentrant_checkpointing_gives_the_same_gradients(
    variant: str, labels: bool, tiny_llama: Make, randomized: Randomize
) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, balance_coef=0.3, **VARIANTS[variant]))).train()

    def step() -> dict[str, torch.Tensor]:
        out = model(input_ids=IDS, **({"labels": IDS} if labels else {}))
        (out.loss if labels else (out.logits**2).mean()).backward()
        return gradients(model)

    expected = step()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for _ in range(2):
        actual = step()
        assert set(actual) == set(expected) == trainable(model)
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_reentrant_checkpointing_refuses_where_the_balance_loss_would_be_lost(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, add_balance_loss=False)).train()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    out = model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="use_reentrant"):
        (out.loss + mole_auxiliary_loss(model, token_mask=MASK)).backward()


def test_reentrant_checkpointing_refuses_two_passes_before_a_backward_pass(tiny_llama: Make) -> None:
    """The recomputation of the first would get the balance loss of the second."""
    model = get_peft_model(tiny_llama(), MoleConfig(r=4)).train()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS + 7)]
    with pytest.raises(ValueError, match="use_reentrant"):
        sum(losses).backward()


def test_a_second_adapter_finds_the_same_modules(randomized: Randomize) -> None:
    """GPT-2 calls a linear of its attention as one of its FFN, which the first adapter has wrapped."""
    model = get_peft_model(make_gpt2(), MoleConfig(r=4), adapter_name="one")
    model.add_adapter("two", MoleConfig(r=2))
    one, two = model.peft_config["one"], model.peft_config["two"]
    assert (two.attention_modules, two.ffn_modules) == (one.attention_modules, one.ffn_modules)
    randomized(model).eval()
    first = model(IDS).logits
    model.set_adapter("two")
    assert not torch.allclose(model(IDS).logits, first, atol=1e-3)


def test_adapters_may_share_one_configuration_object(tiny_llama: Make) -> None:
    config = MoleConfig(r=4)
    model = get_peft_model(tiny_llama(), config, adapter_name="one")
    model.add_adapter("two", config)
    model.set_adapter("two")
    model(IDS)
    model.delete_adapter("one")
    assert not any(".one." in name for name, _ in model.named_parameters())
    model.delete_adapter("two")
    assert model.active_adapters == []


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_option_that_mole_does_not_have_is_found_out_as_with_other_methods(bias: str) -> None:
    with pytest.raises(TypeError, match="bias"):
        MoleConfig(bias=bias)
    with pytest.raises(ValueError, match="modules_to_save"):
        MoleConfig(bias=bias)


def test_an_ffn_in_parts_has_the_features_of_its_linears_and_merges(randomized: Randomize) -> None:
    """BLOOM's FFN needs more than one tensor, so its linears are wrapped one by one."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    base = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    before = copy.deepcopy(base.state_dict())
    model = randomized(get_peft_model(base, MoleConfig(r=4, num_experts=1))).eval()
    first = next(m for m in model.modules() if isinstance(m, MoleSplitMlp))
    assert (first.in_features, first.out_features) == (32, 128)
    adapted = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, adapted)
    plain = model.unload()
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
