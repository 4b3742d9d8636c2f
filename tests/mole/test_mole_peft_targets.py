"""Where adapters go, and PEFT's options of a LoRA: what is given is done or refused."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleLinear, MoleMlp, collect_routing, mole_auxiliary_loss
from llava_mole.mole.surgery import to_lora

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)
MASK = torch.ones(2, 9).bool()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


def places(model: nn.Module, name: str = "default") -> dict[str, type]:
    """Path of every adapted module, within the base model, and the class of its layer."""
    return {
        path.removeprefix("base_model.model."): type(module)
        for path, module in model.named_modules()
        if isinstance(module, MoleMlp | MoleLinear) and name in module.configs
    }


def at(names: list[str], kind: type, layers: tuple[int, ...] = (0, 1)) -> dict[str, type]:
    where = {"mlp": "", **dict.fromkeys(ATTENTION, "self_attn.")}
    return {f"model.layers.{i}.{where[name]}{name}": kind for i in layers for name in names}


EVERYWHERE = {**at(ATTENTION, MoleLinear), **at(["mlp"], MoleMlp)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, EVERYWHERE),
        ({"target_modules": "all-linear"}, EVERYWHERE),
        ({"target_modules": [*ATTENTION, *FFN]}, EVERYWHERE),
        ({"target_modules": {"q_proj", "mlp"}}, {**at(["q_proj"], MoleLinear), **at(["mlp"], MoleMlp)}),
        ({"target_modules": ["mlp", *FFN]}, at(["mlp"], MoleMlp)),
        ({"target_modules": r".*\.(gate|up|down)_proj"}, at(["mlp"], MoleMlp)),
        ({"target_modules": r"model\.layers\.1\.(mlp|self_attn\.v_proj)"},
         {**at(["v_proj"], MoleLinear, (1,)), **at(["mlp"], MoleMlp, (1,))}),
        ({"target_modules": FFN, "layers_to_transform": 0}, at(["mlp"], MoleMlp, (0,))),
        ({"target_modules": [*FFN, "q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
         {**at(["q_proj"], MoleLinear, (1,)), **at(["mlp"], MoleMlp, (1,))}),
        ({"target_modules": ["model.layers.0.mlp", "lm_head"]},
         {**at(["mlp"], MoleMlp, (0,)), "lm_head": MoleLinear}),
        ({"ffn_modules": []}, at(ATTENTION, MoleLinear)),
        ({"attention_modules": []}, at(["mlp"], MoleMlp)),
        ({"attention_modules": ["q_proj"]}, {**at(["q_proj"], MoleLinear), **at(["mlp"], MoleMlp)}),
        ({"attention_modules": ["q_proj", "down_proj"], "ffn_modules": []},
         {**at(["q_proj"], MoleLinear), "model.layers.0.mlp.down_proj": MoleLinear,
          "model.layers.1.mlp.down_proj": MoleLinear}),
        ({"target_modules": ["q_proj", "mlp"], "attention_modules": ["q_proj"], "ffn_modules": ["mlp"]},
         {**at(["q_proj"], MoleLinear), **at(["mlp"], MoleMlp)}),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp", "o_proj"]}, at(ATTENTION[:3], MoleLinear)),
        ({"exclude_modules": FFN}, at(ATTENTION, MoleLinear)),
        ({"exclude_modules": r".*layers\.0\..*"}, {**at(ATTENTION, MoleLinear, (1,)), **at(["mlp"], MoleMlp, (1,))}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:no FFN is among the target modules")
def test_targets_are_found_and_come_back(
    options: dict[str, Any], expected: dict[str, type], tiny_llama: Make, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, init_weights=False, **options)).eval()
    assert places(model) == expected
    assert sorted(model.targeted_module_names) == sorted(expected)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(another base|not match|inconsistency)")
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert places(again) == expected
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["down_proj"]}, "takes down_proj of model.layers.0.mlp, but not gate_proj, up_proj"),
        ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, "but not up_proj"),
        ({"exclude_modules": ["up_proj"]}, "exclude_modules takes up_proj out of model.layers.0.mlp"),
        ({"target_modules": ["embed_tokens"]}, "is a Embedding, not a linear"),
        ({"target_modules": ["self_attn"]}, "is a LlamaAttention, not a linear and no FFN of a known structure"),
        ({"target_modules": ["wq"]}, "not found in the base model"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"attention_modules": [], "ffn_modules": []}, "both empty"),
        ({"target_modules": ["q_proj"], "ffn_modules": ["mlp"]}, "give either target_modules or the other two"),
        ({"target_modules": "all-linear", "attention_modules": ["q_proj"]}, "give either target_modules"),
        ({"attention_modules": ["down_proj"]}, "attention_modules names model.layers.0.mlp.down_proj, but ffn_modules"),
        ({"target_modules": "(q_proj"}, "target_modules holds .* not a regular expression"),
        ({"target_modules": "q_proj", "layers_to_transform": 1}, "layers_to_transform is 1, but target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers' without layers_to_transform"),
        ({"attention_modules": "q_proj"}, "attention_modules is 'q_proj'; it must be a list of names"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; it must be a list of names or one regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"ffn_projections": ["up"]}, "ffn_projections is"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern maps 'q_proj' to 0"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern maps 'q_proj' to 2.0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .* must map module names"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern maps 'q_proj' to nan"),
        ({"rank_pattern": {"wq": 2}}, "rank_pattern names 'wq', but no adapted module has that name"),
        ({"rank_pattern": {"up_proj": 2}}, "different values .*up_proj r 2.*name the FFN"),
        ({"alpha_pattern": {"down_proj": 2}}, "different values"),
        ({"alpha_pattern": {"v_proj": 2, r"layers\.1.*": 3}}, "alpha_pattern names .*v_proj by 'v_proj' and"),
        ({"init_weights": "pissa"}, "init_weights is 'pissa'; it must be True, False or 'gaussian'"),
        ({"init_lora_weights": "eva"}, "init_weights is 'eva'"),
        ({"lora_alpha": 8, "alpha": 4.0}, "lora_alpha is 8 and alpha is 4.0: they are one option"),
        ({"use_dora": True}, "use_dora is True: MoLE has no weight-decomposed variant"),
        ({"bias": "all"}, "bias is 'all': base biases stay frozen"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: MoLE reads the layout"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"target_parameters": ["x.weight"]}, "target_parameters"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is .* does not exist in MoLE"),
        ({"lora_alhpa": 3}, "unknown MoLE option 'lora_alhpa'.*did you mean 'lora_alpha'"),
        ({"rank": 3}, "unknown MoLE option 'rank'.*did you mean 'r'"),
        ({"n_experts": 3}, "did you mean 'num_experts'"),
        ({"balance_cof": 3}, "did you mean 'balance_coef'"),
        ({"xyzzy": 3}, "unknown MoLE option 'xyzzy'.*the options are .*alpha"),
        ({"router_bias": "yes"}, "router_bias is 'yes'; it must be True or False"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices is \[-1\]"),
        ({"trainable_token_indices": [64]}, "trainable_token_indices holds 64, but the input embedding has 64 rows"),
        ({"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices names 'wte'"),
        ({"modules_to_save": ["layers"]}, "modules_to_save names 'layers'"),
        ({"modules_to_save": ["norm", "nrom"]}, "modules_to_save names 'nrom'"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    options: dict[str, Any], message: str, tiny_llama: Make
) -> None:
    base = tiny_llama()
    before = repr(base), [(n, p.requires_grad) for n, p in base.named_parameters()], base.config.to_dict()
    made: list[MoleConfig] = []

    def build() -> None:
        made.append(MoleConfig(r=4, **options))
        get_peft_model(base, made[0])

    with pytest.raises(ValueError, match=message):
        build()
    assert all(vars(config) == vars(MoleConfig(r=4, **options)) for config in made)
    assert before == (repr(base), [(n, p.requires_grad) for n, p in base.named_parameters()], base.config.to_dict())
    assert not hasattr(base, "peft_config")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_refused_second_adapter_leaves_the_first(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, init_weights=False)).eval()
    before, expected = repr(model), model(IDS).logits
    trains = [(n, p.requires_grad) for n, p in model.named_parameters()]
    for options in ({"rank_pattern": {"nothing": 3}}, {"modules_to_save": ["layers"]}, {"target_modules": ["wq"]}):
        with pytest.raises(ValueError, match="nothing|layers|wq"):
            model.add_adapter("two", MoleConfig(r=2, **options))
    assert before == repr(model)
    assert trains == [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert list(model.peft_config) == ["default"]
    assert all("two" not in getattr(m, "configs", {}) for m in model.modules())
    assert torch.equal(model(IDS).logits, expected)
    model.add_adapter("two", MoleConfig(r=2))


def test_a_second_adapter_finds_the_same_places(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, modules_to_save=["norm"]))
    model.add_adapter("all", MoleConfig(r=2, target_modules="all-linear"))
    model.add_adapter("ffn", MoleConfig(r=2, target_modules=FFN))
    model.add_adapter("head", MoleConfig(r=2, ffn_modules=[], attention_modules=["lm_head"]))
    assert places(model) == places(model, "all") == EVERYWHERE
    assert places(model, "ffn") == at(["mlp"], MoleMlp)
    assert places(model, "head") == {"lm_head": MoleLinear}
    for name in ("all", "ffn", "head", "default"):
        model.set_adapter(name)
        model(IDS)
        assert len(collect_routing(model).names) == (0 if name == "head" else 2)


def test_an_ffn_with_plain_lora_inside_cannot_get_experts(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(r=4, attention_modules=["down_proj"], ffn_modules=[]))
    with pytest.raises(ValueError, match=r"mlp.down_proj carries plain LoRA of another adapter"):
        model.add_adapter("two", MoleConfig(r=2))


def test_an_adapter_without_experts_says_so(tiny_llama: Make) -> None:
    with pytest.warns(UserWarning, match="plain LoRA without experts; num_experts 3 has no effect"):
        model = get_peft_model(tiny_llama(), MoleConfig(r=4, target_modules=["q_proj"]))
    loss = model(IDS, labels=IDS).loss + mole_auxiliary_loss(model, token_mask=MASK)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert collect_routing(model).names == ()


def test_a_long_list_of_names_is_saved_as_it_was_given(tiny_llama: Make, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION]
    names += [f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION]
    names += [f"self_attn.{name}" for name in ATTENTION]  # 20 names, which PEFT would shorten
    config = MoleConfig(r=4, attention_modules=names)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == [*names, "mlp"]
    assert places(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == EVERYWHERE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_mean_what_they_mean_to_lora(use_rslora: bool, tiny_llama: Make, tmp_path: Path) -> None:
    ranks, alphas = {"q_proj": 6, ".*q_proj": 6, r"layers\.1\..*v_proj": 3, "0.mlp": 5}, {"k_proj": 1.5, "q_proj": 12.0}
    shared: dict[str, Any] = {"lora_alpha": 8, "use_rslora": use_rslora, "alpha_pattern": alphas, "r": 4}
    model = get_peft_model(tiny_llama(), MoleConfig(rank_pattern=ranks, **shared, init_weights=False)).eval()
    lora_ranks = {key: r for key, r in ranks.items() if key != "0.mlp"}
    lora = get_peft_model(tiny_llama(), LoraConfig(rank_pattern=lora_ranks, target_modules=ATTENTION, **shared))
    for path, module in model.named_modules():
        if isinstance(module, MoleLinear):
            other = lora.get_submodule(path)
            assert (module.r["default"], module.scaling["default"]) == (other.r["default"], other.scaling["default"])
            assert module.pair("default").A.shape == other.lora_A["default"].weight.shape
    first, second = (m for m in model.modules() if isinstance(m, MoleMlp))
    assert first.experts("default").pair("up_proj")[0].shape == (3, 5, 32)
    assert second.experts("default").pair("up_proj")[0].shape == (3, 4, 32)
    root = math.sqrt if use_rslora else float
    assert [m.scaling["default"] for m in (first, second)] == [8 / root(5), 8 / root(4)]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    to_lora(model, tmp_path / "lora", expert="uniform")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    for module in (first, second):
        with torch.no_grad():
            for name in FFN:
                for parameter in module.experts("default").pair(name):
                    parameter.copy_(parameter[:1].expand_as(parameter))  # then the mean is each of them
    to_lora(model, tmp_path / "one", expert=0)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one").eval()
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_pattern_for_an_ffn_may_name_its_projections(tiny_llama: Make) -> None:
    config = MoleConfig(r=4, rank_pattern={"(gate|up|down)_proj": 2}, alpha_pattern=dict.fromkeys(FFN, 3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's own check does not know that projections were meant
        model = get_peft_model(tiny_llama(), config)
    layer = next(m for m in model.modules() if isinstance(m, MoleMlp))
    assert (layer.r["default"], layer.scaling["default"]) == (2, 1.5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_expert_is_pefts_lora(use_rslora: bool, tiny_llama: Make) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "target_modules": "all-linear"}
    mole = get_peft_model(tiny_llama(), MoleConfig(num_experts=1, init_lora_weights=False, **options)).eval()
    lora = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for path, module in mole.named_modules():
            if isinstance(module, MoleLinear | MoleMlp):
                for linear, a_RI, b_RO in module.updates("default"):
                    name = next((n for n, m in module.base_layer.named_modules() if m is linear), "")
                    other = lora.get_submodule(f"{path}.{name}".removesuffix("."))
                    other.lora_A["default"].weight.copy_(a_RI)
                    other.lora_B["default"].weight.copy_(b_RO.T)
    torch.testing.assert_close(mole(IDS).logits, lora(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("init", "zero"), [(True, True), ("gaussian", True), (False, False)])
def test_initialisations_are_those_of_lora(init: bool | str, zero: bool, tiny_llama: Make) -> None:
    r, base = 8, tiny_llama().eval()
    expected = base(IDS).logits
    model = get_peft_model(base, MoleConfig(r=r, init_weights=init, shared_r=4)).eval()
    assert torch.equal(model(IDS).logits, expected) == zero
    a, b = next(m for m in model.modules() if isinstance(m, MoleMlp)).experts("default").pair("up_proj")
    width = a.shape[-1]
    std = 1 / r if init == "gaussian" else 1 / math.sqrt(3 * width)
    assert a.std().item() == pytest.approx(std, rel=0.1)
    assert b.std().item() == pytest.approx(0 if zero else 1 / math.sqrt(3 * r), rel=0.1)


def test_lora_names_are_accepted_everywhere(tiny_llama: Make, tmp_path: Path) -> None:
    lora = {"lora_alpha": 3, "lora_dropout": 0.25, "init_lora_weights": "gaussian", "bias": "none", "use_dora": False}
    for config in (MoleConfig(r=4, **lora), MoleConfig.from_preset("released", r=4, **lora)):
        assert (config.alpha, config.dropout, config.init_weights, config.scaling) == (3, 0.25, "gaussian", 0.75)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    assert "lora_alpha" not in json.loads((tmp_path / "adapter_config.json").read_text())
    changed = MoleConfig.from_pretrained(str(tmp_path), lora_alpha=12, strict_base=True)
    assert (changed.alpha, changed.strict_base, changed.dropout, changed.r) == (12, True, 0.25, 4)
    with pytest.raises(ValueError, match="alpha is -1"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, lora_alpha=-1)


def test_a_file_of_a_newer_version_is_read_with_a_warning(tiny_llama: Make, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), MoleConfig(r=4)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'from_the_future'."):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("experts", [256, 257, 300])
def test_many_experts_keep_their_numbers(experts: int, tiny_llama: Make) -> None:
    logits, grads = [], []
    for backend in ("masked", "grouped", "loop"):
        torch.manual_seed(5)
        config = MoleConfig(r=2, num_experts=experts, backend=backend, expert_scale="prob", init_weights=False)
        model = get_peft_model(tiny_llama(), config)
        out = model(IDS, labels=IDS)
        out.loss.backward()
        logits.append(out.logits)
        layer = next(m for m in model.modules() if isinstance(m, MoleMlp))
        grads.append(layer.experts("default").pair("down_proj")[1].grad)
    for other, gradient in zip(logits[1:], grads[1:], strict=True):
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, grads[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", [[1, 5], {"embed_tokens": [2]}], ids=str)
def test_trained_tokens_come_back(tokens: list[int] | dict, tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama().eval()
    expected = base(IDS).logits
    model = get_peft_model(base, MoleConfig(r=4, trainable_token_indices=tokens)).train()
    (model(IDS, labels=IDS).loss + mole_auxiliary_loss(model, token_mask=MASK)).backward()
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert deltas
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in deltas)
    with torch.no_grad():
        for delta in deltas:
            delta += 1
    adapted = model.eval()(IDS).logits
    assert not torch.equal(adapted, expected)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(IDS).logits, adapted)
    assert torch.equal(model.unload()(IDS).logits, expected)
