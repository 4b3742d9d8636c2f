"""The PEFT life cycle, other model families, gradient checkpointing, compilation."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

from llava_mole.mole import (
    MoleConfig,
    MoleLinear,
    MoleMlp,
    collect_routing,
    mole_auxiliary_loss,
    routing_load,
)
from llava_mole.mole.surgery import to_lora

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)
MASK = torch.ones(2, 9).bool()


def test_several_adapters_of_different_sizes(tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    base = tiny_llama().eval()
    expected = base(IDS).logits
    model = get_peft_model(base, MoleConfig(r=4, num_experts=3), adapter_name="one")
    model.add_adapter("two", MoleConfig.from_preset("best", r=2, num_experts=5))
    randomized(model).eval()
    model.set_adapter("one")
    one = model(IDS).logits
    model.set_adapter("two")
    two = model(IDS).logits
    assert routing_load(collect_routing(model), MASK).shape == (2, 5)
    assert not torch.allclose(one, two, atol=1e-3)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".two" in name for name in trainable)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "two", adapter_name="b").eval()
    fresh.load_adapter(tmp_path / "one", adapter_name="a")
    assert torch.equal(fresh(IDS).logits, two)
    fresh.set_adapter("a")
    assert torch.equal(fresh(IDS).logits, one)
    model.delete_adapter("two")
    assert torch.equal(model(IDS).logits, one)
    assert not any(".two" in name for name, _ in model.named_parameters())
    plain = model.unload()
    assert torch.equal(plain(IDS).logits, expected)
    assert not any(isinstance(m, MoleMlp | MoleLinear) for m in plain.modules())


def test_two_active_adapters_are_refused(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4), adapter_name="one")
    model.add_adapter("two", MoleConfig(r=2))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="one at a time"):
        model(IDS)


def test_merging_is_refused_and_names_the_alternatives(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="to_lora"):
            merge()
    assert not torch.isnan(model(IDS).logits).any(), "the model still works"


def test_loading_with_little_memory_and_the_trainable_report(
    tiny_llama: Make, randomized: Randomize, tmp_path: Path
) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig.from_preset("best", r=4))).eval()
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total
    status = model.get_model_status()
    assert status.enabled
    assert status.available_adapters == ["default"]
    model.save_pretrained(tmp_path)
    lean = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(lean(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in lean.parameters())
    trained = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())


def test_injection_without_a_peft_model(tiny_llama: Make) -> None:
    model = inject_adapter_in_model(MoleConfig(r=4), tiny_llama())
    model(IDS)
    assert len(collect_routing(model).logits) == 2
    with torch.no_grad():
        assert mole_auxiliary_loss(model, token_mask=MASK) > 0


class IntegerLinear(nn.Module):
    """Stands for a quantized linear: its weight holds integers, and only its forward knows what they mean."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantized_base_linears_are_only_called(tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    def quantized() -> nn.Module:
        base = tiny_llama()
        for layer in base.model.layers:
            for parent in (layer.mlp, layer.self_attn):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, IntegerLinear(child))
        return base

    expected = quantized()(IDS).logits
    model = randomized(get_peft_model(quantized(), MoleConfig.from_preset("best", r=4)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mole_" in n)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].base_fingerprint, "an unquantized copy of the base is recognised"


def test_padding_changes_nothing(tiny_llama: Make, randomized: Randomize) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(add_balance_loss=False, r=4, balance_coef=1.0)))
    alone = [model(row[:length].unsqueeze(0)).logits[0] for row, length in zip(IDS, (5, 9), strict=True)]
    model(IDS[:1, :5])
    first = mole_auxiliary_loss(model, token_mask=MASK[:1, :5])
    mask = MASK.clone()
    mask[0, 5:] = False
    together = model(IDS, attention_mask=mask.long()).logits
    torch.testing.assert_close(together[0, :5], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-5)
    both = mole_auxiliary_loss(model, token_mask=mask)
    model(IDS[1:])
    second = mole_auxiliary_loss(model, token_mask=MASK[1:])
    torch.testing.assert_close(both, (first + second) / 2)


def test_a_bfloat16_base_keeps_a_float32_router(tiny_llama: Make, randomized: Randomize) -> None:
    model = randomized(get_peft_model(tiny_llama().to(torch.bfloat16), MoleConfig.from_preset("best", r=4)))
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    assert collect_routing(model).logits[0].dtype == torch.float32
    out.loss.backward()
    assert all(
        p.grad is not None and p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )
    cast = model.to(torch.bfloat16)
    cast(IDS)
    assert collect_routing(cast).logits[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        model.float()(IDS)
    assert collect_routing(model).logits[0].dtype == torch.float32


def test_a_model_that_ran_can_be_copied(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, granularity="given"))
    from llava_mole.mole import set_routing_inputs

    set_routing_inputs(model, experts=torch.tensor([0, 1]))
    model(IDS)
    twin = copy.deepcopy(model)
    assert collect_routing(twin).logits == ()
    with pytest.raises(ValueError, match="experts="):
        twin(IDS)
    set_routing_inputs(twin, experts=torch.tensor([1, 1]))
    assert torch.equal(twin(IDS).logits[1], model(IDS).logits[1])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("backend", ["masked", "grouped"])
@pytest.mark.parametrize("preset", ["paper", "coupled", "best", "released"])
def test_checkpointing_changes_nothing(tiny_llama: Make, randomized: Randomize, preset: str, backend: str) -> None:
    config = MoleConfig.from_preset(preset, r=4, backend=backend)
    model = randomized(get_peft_model(tiny_llama(), config)).train()
    torch.manual_seed(3)
    plain = gradients(model)
    index = [i.clone() for i in collect_routing(model).index]
    logits_before = collect_routing(model).logits[0]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    again = gradients(model)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(collect_routing(model).index, index, strict=True))
    assert collect_routing(model).logits[0] is not logits_before


@pytest.mark.parametrize(
    "options", [{}, {"mode": "dense"}, {"top_k": 2, "expert_scale": "prob", "shared_r": 2}], ids=str
)
def test_compiling_breaks_no_graph(tiny_llama: Make, randomized: Randomize, options: dict) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, **options)))
    layer = next(m for m in model.modules() if isinstance(m, MoleMlp))
    x = torch.randn(2, 5, 32, requires_grad=True)
    torch._dynamo.reset()
    if not options:
        found = torch._dynamo.explain(layer)(x)
        assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons
    expected = layer(x)
    logits = layer.routing.logits
    got = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.routing.logits, logits)
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(IDS, adapter_names=["one", "two"]),
        lambda model: model(input_ids=IDS, adapter_names=["one", "one"]),
        lambda model: model.generate(input_ids=IDS, max_new_tokens=1, adapter_names=["__base__", "two"]),
        lambda model: model(IDS, labels=IDS, alora_offsets=[1, 2]),
    ],
)
def test_an_adapter_per_row_is_refused(tiny_llama: Make, call: Callable[[nn.Module], object]) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4), adapter_name="one")
    model.add_adapter("two", MoleConfig(r=2))
    with pytest.raises(ValueError, match="is not supported: all rows of a batch use the one active adapter"):
        call(model)
    assert not torch.isnan(model(IDS).logits).any(), "the model still works"


@pytest.mark.parametrize("saved", [["lm_head"], ["norm"], ["embed_tokens"], ["lm_head", "norm"], ["input_layernorm"]])
def test_modules_to_save_train_and_come_back(
    saved: list[str], tiny_llama: Make, randomized: Randomize, tmp_path: Path
) -> None:
    plain = get_peft_model(tiny_llama(), MoleConfig(r=4))
    model = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, modules_to_save=saved))).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert copies
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in copies.values())
    with torch.no_grad():
        for parameter in copies.values():
            parameter += 0.5
    model.eval().save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    plain.save_pretrained(tmp_path / "b")
    fingerprints = [
        PeftModel.from_pretrained(tiny_llama(), tmp_path / n).peft_config["default"].base_fingerprint for n in "ab"
    ]
    assert fingerprints[0] == fingerprints[1], "a trained copy is not the base"
    with pytest.raises(ValueError, match=r"also trains modules_to_save .*, which a LoRA would lose"):
        to_lora(model, tmp_path / "lora", expert=0)
