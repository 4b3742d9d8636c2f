"""Experts out of and into plain LoRAs, more and fewer experts: what is claimed to be exact is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp, collect_routing, routing_load, set_routing_inputs
from llava_mole.mole.surgery import from_loras, grow, prune, to_lora

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)
MASK = torch.ones(2, 9).bool()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("expert", [0, 2, "uniform", "usage"])
def test_an_exported_lora_equals_the_mixture_with_fixed_weights(
    tiny_llama: Make, randomized: Randomize, tmp_path: Path, expert: int | str, family: str
) -> None:
    make: Callable[[], Any] = tiny_llama if family == "llama" else tiny_gpt2
    config = MoleConfig(r=4, granularity="given", shared_r=2, attention_r=3)
    model = randomized(get_peft_model(make(), config)).eval()
    usage = torch.tensor([[0.5, 0.25, 0.25]] * 2)
    weights = {"uniform": torch.full((3,), 1 / 3), "usage": usage[0]}.get(expert)
    if weights is None:
        weights = torch.nn.functional.one_hot(torch.tensor(expert), 3).float()
    set_routing_inputs(model, experts=weights.expand(2, 3).contiguous())
    expected = model(IDS).logits
    to_lora(model, tmp_path, expert=expert, usage=usage)
    plain = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_may_be_unused_in_one_layer_only(tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4)))
    logits = []
    for name, unused in (("zero", 0.0), ("nearly", 1e-9)):
        usage = torch.tensor([[1.0, unused, unused], [0.5, 0.5, unused]])
        to_lora(model, tmp_path / name, expert="usage", usage=usage)
        logits.append(PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval()(IDS).logits)
    torch.testing.assert_close(*logits)
    for wrong in ([[0.0, 0, 0], [1, 0, 0]], [[float("nan")] * 3] * 2, [[-1.0, 1, 1]] * 2):
        with pytest.raises(ValueError, match="needs usage of at least 0, and in every layer an expert that was used"):
            to_lora(model, tmp_path / "wrong", expert="usage", usage=torch.tensor(wrong))


def train_lora(make: Make, directory: Path, seed: int, **options: Any) -> Tensor:
    modules = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(seed)
    model = get_peft_model(make(), LoraConfig(target_modules=modules, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    return model(IDS).logits


def test_loras_become_experts(tiny_llama: Make, tmp_path: Path) -> None:
    first = train_lora(tiny_llama, tmp_path / "a", 1, r=4, lora_alpha=8)
    train_lora(tiny_llama, tmp_path / "b", 2, r=2, lora_alpha=6)
    one = from_loras(tiny_llama(), [tmp_path / "a"]).eval()
    torch.testing.assert_close(one(IDS).logits, first, rtol=1e-4, atol=1e-5)
    for k, name in enumerate("ab"):
        both = from_loras(tiny_llama(), [tmp_path / "a", tmp_path / "b"], attention="none", granularity="given").eval()
        set_routing_inputs(both, experts=torch.full((2,), k))
        lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval()
        with torch.no_grad():
            for key, parameter in lora.named_parameters():
                if "self_attn" in key and "lora_B" in key:
                    parameter.zero_()
        torch.testing.assert_close(both(IDS).logits, lora(IDS).logits, rtol=1e-4, atol=1e-5)
    mean = from_loras(tiny_llama(), [tmp_path / "a", tmp_path / "b"]).eval()
    assert mean.peft_config["default"].num_experts == 2
    mean.save_pretrained(tmp_path / "mole")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mole").eval()
    assert torch.equal(again(IDS).logits, mean(IDS).logits)


def test_what_is_no_lora_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        from_loras(tiny_llama(), [tmp_path])
    get_peft_model(tiny_llama(), MoleConfig(r=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'MOLE'; experts are made of plain LoRA pairs"):
        from_loras(tiny_llama(), [tmp_path])
    with pytest.raises(ValueError, match="must be mean, first or none"):
        from_loras(tiny_llama(), [tmp_path], attention="sum")
    with pytest.raises(ValueError, match="it must be 0 to 2, 'uniform' or 'usage'"):
        to_lora(get_peft_model(tiny_llama(), MoleConfig(r=4)), tmp_path, expert=3)
    with pytest.raises(ValueError, match="has no MoLE adapter"):
        to_lora(tiny_llama(), tmp_path, expert=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),  # its base is another one
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_alpha": None}, "does not hold a LoRA as PEFT saves it"),
        ({"alpha_pattern": {"(": 3}}, "does not hold a LoRA as PEFT saves it"),
    ],
)
def test_loras_of_another_arithmetic_are_refused(change: dict, message: str, tiny_llama: Make, tmp_path: Path) -> None:
    train_lora(tiny_llama, tmp_path, 1, r=2)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_loras(tiny_llama(), [tmp_path])


def test_alpha_patterns_are_regular_expressions(tiny_llama: Make, tmp_path: Path) -> None:
    expected = train_lora(tiny_llama, tmp_path, 1, r=2, lora_alpha=4, alpha_pattern={r"layers\.[01]\.mlp\.\w+": 12})
    torch.testing.assert_close(from_loras(tiny_llama(), [tmp_path]).eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "coupled", "best"])
def test_growing_without_noise_changes_nothing(
    tiny_llama: Make, randomized: Randomize, tmp_path: Path, preset: str
) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig.from_preset(preset, r=4))).eval()
    expected = model(IDS).logits
    grow(model, 5)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert routing_load(collect_routing(model), MASK).shape == (2, 5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    grow(model, 6, noise=0.5)
    loads = routing_load(collect_routing(model), MASK)
    model(IDS)
    loads = routing_load(collect_routing(model), MASK)
    assert loads.shape == (2, 6)
    assert (loads[:, 5] > 0).any(), "noise separates a copy from its original"
    with pytest.raises(ValueError, match="use prune"):
        grow(model, 2)


@pytest.mark.parametrize("preset", ["paper", "coupled", "best"])
def test_one_expert_grows_into_a_mixture(tiny_llama: Make, randomized: Randomize, tmp_path: Path, preset: str) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig.from_preset(preset, r=4, num_experts=1))).eval()
    expected = model(IDS).logits
    grow(model, 2, frozen=1)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert model.peft_config["default"].frozen_experts == 1
    loads = routing_load(collect_routing(model), MASK)
    assert loads.shape == (2, 2)
    assert (loads > 0).all(), "a new router sends some tokens to either"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("backend", ["masked", "grouped", "loop"])
@pytest.mark.parametrize("options", [{}, {"router_scope": "linear"}, {"router_bias": True, "shared_r": 2}])
def test_frozen_experts_stay_to_the_bit_and_the_others_train_as_ever(
    tiny_llama: Make, randomized: Randomize, backend: str, options: dict[str, Any]
) -> None:
    """The gradients of what trains are those of a model without frozen experts; the others' are zero."""
    models = []
    for frozen in (0, 2):
        torch.manual_seed(5)
        config = MoleConfig.from_preset("coupled", r=4, backend=backend, frozen_experts=frozen, **options)
        models.append(randomized(get_peft_model(tiny_llama(), config)))
        models[-1](IDS, labels=IDS).loss.backward()
    free, frozen_model = (dict(model.named_parameters()) for model in models)
    rows = 0
    for name, parameter in frozen_model.items():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        of_experts = ("mole_router" in name or "mole_experts" in name) and "shared" not in name
        kept = 2 if of_experts else 0
        rows += kept
        assert not parameter.grad[:kept].any(), name
        torch.testing.assert_close(parameter.grad[kept:], free[name].grad[kept:], msg=name)
    assert rows
    before = {name: value.detach().clone() for name, value in frozen_model.items()}
    optimizer = torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        models[1](IDS, labels=IDS).loss.backward()
        optimizer.step()
    changed = [name for name, value in frozen_model.items() if not torch.equal(value, before[name])]
    assert any("mole_experts" in name for name in changed)
    for name in changed:
        if ("mole_router" in name or "mole_experts" in name) and "shared" not in name:
            assert torch.equal(frozen_model[name][:2], before[name][:2]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_experts": 3}, "frozen_experts is 3 of 3: no expert would train"),
        ({"frozen_experts": 1, "shared_a": True}, "with shared_a: the A that trains is that of all experts"),
        (
            {"frozen_experts": 1, "granularity": "task", "num_tasks": 2, "balance_group": "micro_batch"},
            "with granularity 'task'",
        ),
        ({"frozen_experts": -1}, "frozen_experts"),
    ],
)
def test_what_cannot_be_frozen_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoleConfig(r=4, **options)


def test_what_cannot_grow_is_refused(tiny_llama: Make) -> None:
    for options in ({"router": "random"}, {"granularity": "given"}):
        with pytest.raises(ValueError, match="grow needs an adapter with a router"):
            grow(get_peft_model(tiny_llama(), MoleConfig(r=4, **options)), 4)
    with pytest.raises(ValueError, match="frozen_experts is 4 of 4"):
        grow(get_peft_model(tiny_llama(), MoleConfig(r=4)), 4, frozen=4)


def test_pruning_is_exact_for_tokens_whose_expert_stays(tiny_llama: Make, randomized: Randomize) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=4))).eval()
    layer = next(m for m in model.modules() if isinstance(m, MoleMlp))
    x = torch.randn(1, 40, 32)
    before = layer(x)
    index = layer.routing.index.clone()
    usage = torch.tensor([[4.0, 1, 3, 2]] * 2)
    prune(model, 3, usage)
    after = layer(x)
    stays = index.squeeze(-1) != 1
    assert 0 < stays.sum() < 40
    torch.testing.assert_close(after[stays], before[stays])
    assert not torch.allclose(after[~stays], before[~stays], atol=1e-4)
    assert model.peft_config["default"].num_experts == 3
    for number in (1, 3):
        with pytest.raises(ValueError, match="it must be 2 to 2"):
            prune(model, number, usage[:, :3])
