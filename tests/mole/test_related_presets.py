"""The presets of the related methods: outputs, gradients and losses of their references, and a life from end to end."""

import ast
import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mole import related_references as ref
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from llava_mole.mole import (
    PRESETS,
    ExpertLayer,
    MoleConfig,
    MoleExpertLinear,
    Routing,
    balance_loss,
    collect_routing,
    mole_after_step,
    routing_load,
    set_routing_inputs,
)
from llava_mole.mole import mole_auxiliary_loss as auxiliary_loss
from llava_mole.mole.router import ExpertWeights
from llava_mole.mole.routing import routing_entropy, routing_margin
from llava_mole.mole.surgery import from_loras, grow, prune, to_lora

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]

IDS = torch.tensor([[5, 9, 2, 33, 60, 7, 8], [1, 4, 4, 20, 11, 3, 2]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
ONES = torch.ones_like(IDS)
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
TASKS = torch.tensor([2, 0])
KINDS = torch.tensor([1, 0])
OWN = ("paper", "released", "coupled", "best")
SMALL: dict[str, dict[str, Any]] = {
    "hydralora": {},
    "asymlora": {},
    "asymlora sparse": {"mode": "sparse"},
    "coin-moelora": {},
    "moelora-task": {"num_tasks": 3},
    "loramoe": {"balance_coef": 0.3, "group_delta": 0.2},
    "mocle": {"num_tasks": 3, "task_dim": 6, "shared_r": 2, "temperature": 0.5},
    "octavius": {},
    "mixlora": {},
    "mola": {"experts_by_layer": [3, 5]},
    "molora": {},
}
"""Every preset at a size for tests."""


def config_of(case: str, **options: Any) -> MoleConfig:
    name = case.split()[0]
    experts = {} if name == "mola" else {"num_experts": 4}
    return MoleConfig.from_preset(name, **{"r": 3, **experts, "dropout": 0.0, **SMALL[case], **options})


def make(config: MoleConfig, tiny_llama: Make, randomized: Randomize) -> PeftModel:
    """A model in float64 whose experts differ, and whose inputs are set."""
    model = get_peft_model(tiny_llama().double(), config, autocast_adapter_dtype=False)
    model = randomized(model).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # routers whose decisions are far from ties
            if "mole_router" in name and not name.endswith("embedding"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    set_routing_inputs(model, task=TASKS, prompt_mask=PROMPT, source=KINDS)
    return model


def run(model: nn.Module, mask: Tensor = ONES) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward pass; input and output of every layer with experts, with their graph."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, ExpertLayer)
    ]
    model(input_ids=IDS, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen


def pair(layer: ExpertLayer, name: str = "linear") -> tuple[Tensor, Tensor]:
    a, b = layer.experts("default").pair(name)
    return (a[0] if layer.configs["default"].shared_a else a), b


def ffn_of(layer: ExpertLayer) -> ref.Ffn:
    pairs = {name: pair(layer, f"{name}_proj") for name in ("gate", "up", "down")}
    weights = {name: getattr(layer.base_layer, f"{name}_proj").weight for name in pairs}
    return ref.Ffn(**weights, a={n: a for n, (a, _) in pairs.items()}, b={n: b for n, (_, b) in pairs.items()})


def reference(case: str, model: nn.Module, layer: ExpertLayer, x: Tensor) -> Tensor:
    """What the method computes for the input `x` of one of its layers."""
    config = layer.configs["default"]
    s, router = config.scaling, layer.router("default")
    if case in ("asymlora", "asymlora sparse"):
        dense = case == "asymlora"
        return ref.asymlora(x, ffn_of(layer), router.weight, router.bias, s, dense=dense)[0]
    if case == "mixlora":
        return ref.mixlora(x, ffn_of(layer), router.weight, s)[0]
    (a, b), weight = pair(layer), layer.base_layer.weight
    if case in ("moelora-task", "octavius"):
        owner = next(m for m in model.modules() if isinstance(m, ExpertLayer) and m.router("default") is not None)
        router = owner.router("default")
    if case == "hydralora":
        return ref.hydralora(x, weight, router.weight, a, b, s)
    if case == "coin-moelora":
        return ref.coin_moelora(x, weight, router.weight, a, b, s * a.shape[0] * a.shape[1])
    if case == "moelora-task":
        alpha = s * a.shape[0] * a.shape[1]
        tasks = [[int(task)] for task in TASKS]
        return ref.moelora_task(x, weight, tasks, router.embedding, router.weight, a, b, alpha)
    if case == "loramoe":
        return ref.loramoe(x, weight, router.weight, a, b, s, KINDS.tolist(), delta=0.2, coefficient=0.3)[0]
    if case == "mocle":
        universal = layer.experts("default").shared_pair("linear")
        gate = (router.embedding, router.weight, router.bias)
        return ref.mocle(x, weight, TASKS.tolist(), *gate, a, b, universal, s, config.temperature)
    if case == "octavius":
        embedded = model.get_input_embeddings()(IDS)
        return ref.octavius(x, weight, ref.octavius_weights([e[p] for e, p in zip(embedded, PROMPT, strict=True)],
                                                            router.weight), a, b)  # fmt: skip
    if case == "mola":
        return ref.mola(x, weight, router.weight, a, b, s)[0]
    return ref.molora(x, weight, router.weight, a, b, s)


def assert_same_gradients(model: nn.Module, own: Tensor, expected: Tensor, more: list[Tensor]) -> None:
    """Equal gradients of two scalars with respect to every adapter parameter and the tensors in `more`."""
    names, leaves = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    grads = [torch.autograd.grad(v, [*leaves, *more], retain_graph=True, allow_unused=True) for v in (own, expected)]
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in grads[1])
    for name, got, want in zip([*names, *["input"] * len(more)], *grads, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        got, want = (zero if g is None else g for g in (got, want))
        torch.testing.assert_close(got.expand_as(want) if got.dim() == 0 else got, want.expand_as(got), rtol=1e-8,
                                   atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("case", SMALL)
def test_outputs_and_gradients_equal_the_reference(
    case: str, backend: str, tiny_llama: Make, randomized: Randomize
) -> None:
    model = make(config_of(case, backend=backend), tiny_llama, randomized)
    seen = run(model)
    attention = [name for name in seen if "self_attn" in name]
    ffn = [name for name in seen if "mlp" in name]
    for name in [*attention[:1], *attention[-1:], *ffn[:1], *ffn[-1:]]:  # in the first and in the last layer
        layer, (x, own) = model.get_submodule(name), seen[name]
        expected = reference(case, model, layer, x)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
        base = layer.base_layer(x)
        assert (own - base).abs().max() > 1e-3
        probe = torch.randn(own.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert_same_gradients(model, (own * probe).sum(), (expected * probe).sum(), [x] if x.requires_grad else [])


def test_every_related_preset_has_its_place(tiny_llama: Make) -> None:
    assert {case.split()[0] for case in SMALL} == set(PRESETS) - set(OWN)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    places = {
        **dict.fromkeys(("hydralora", "loramoe"), seven[4:]),
        **dict.fromkeys(("coin-moelora", "moelora-task", "mola", "molora"), seven),
        "mocle": ["q_proj", "v_proj"],
        "octavius": seven[:4],
        "asymlora": ["mlp"],
        "mixlora": ["mlp"],
    }
    for name, expected in places.items():
        model = get_peft_model(tiny_llama(), config_of(name))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, ExpertLayer)}
        assert [n.rpartition(".")[-1] for n in layers if "layers.1." in n] == expected
        routers = [n for n, m in layers.items() if m.router("default") is not None]
        assert len(routers) == (1 if name in ("octavius", "moelora-task") else len(layers))
        plain = [n for n, _ in model.named_parameters() if "mole_lora" in n and "layers.1." in n]
        assert len(plain) == (8 if name in ("asymlora", "mixlora") else 0)
        assert all(isinstance(m, MoleExpertLinear) for m in layers.values()) == (expected != ["mlp"])


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_asymlora(padded: bool, tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("asymlora"), tiny_llama, randomized)
    mask = PADDED if padded else ONES
    seen = run(model, mask)
    probabilities = []
    for name, (x, _) in seen.items():
        layer = model.get_submodule(name)
        router = layer.router("default")
        probabilities.append(ref.asymlora(x, ffn_of(layer), router.weight, router.bias, 1.0, dense=True)[1])
    check_loss(model, mask, ref.asymlora_balance(probabilities, mask.bool()))


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_mixlora(padded: bool, tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("mixlora"), tiny_llama, randomized)
    mask = PADDED if padded else ONES
    seen = run(model, mask)
    logits = [x @ model.get_submodule(name).router("default").weight.T for name, (x, _) in seen.items()]
    check_loss(model, mask, ref.mixlora_balance(logits, mask.bool()))


def test_the_loss_of_mola(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("mola"), tiny_llama, randomized)
    seen = run(model)
    layers: dict[str, list[Tensor]] = {}
    for name, (x, _) in seen.items():
        logits = x @ model.get_submodule(name).router("default").weight.T
        layers.setdefault(name.split("layers.")[1][0], []).append(logits)
    assert [len(linears) for linears in layers.values()] == [7, 7]
    assert [linears[0].shape[-1] for linears in layers.values()] == [3, 5]
    check_loss(model, ONES, ref.mola_balance(list(layers.values())))


def test_the_loss_of_loramoe(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("loramoe"), tiny_llama, randomized)
    total: Any = 0
    for name, (x, _) in run(model).items():
        layer = model.get_submodule(name)
        given = (x, layer.base_layer.weight, layer.router("default").weight, *pair(layer), 1.0, KINDS.tolist())
        total = total + ref.loramoe(*given, delta=0.2, coefficient=0.3)[1]
    check_loss(model, ONES, total)


def check_loss(model: nn.Module, mask: Tensor, expected: Tensor) -> None:
    own = auxiliary_loss(model, token_mask=mask.bool())
    torch.testing.assert_close(own, expected)
    assert_same_gradients(model, own, expected, [])


@pytest.mark.parametrize("case", [case for case in SMALL if " " not in case])
def test_it_trains_saves_loads_and_generates(case: str, tiny_llama: Make, tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs = {"task": TASKS, "prompt_mask": PROMPT, "source": KINDS}
    model = get_peft_model(tiny_llama(), config_of(case, dropout=PRESETS[case].get("dropout", 0.0)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    set_routing_inputs(model, **inputs)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n: bool((p != before[n]).any()) for n, p in model.named_parameters() if n in before}
    assert all(moved.values()), [n for n, m in moved.items() if not m]
    assert any("mole_router" in name for name in before)
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for each in (model, again):
        set_routing_inputs(each, task=TASKS, source=KINDS)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": ONES}
    answers = model.generate(IDS, **arguments)
    assert torch.equal(again.generate(IDS, **arguments), answers)
    assert torch.equal(model.generate(IDS, use_cache=False, **arguments), answers) or case == "octavius"
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    base = tiny_llama().eval()
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, base(IDS).logits)
        assert collect_routing(again).logits == ()
    assert torch.equal(again.unload()(IDS).logits, base(IDS).logits)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention_experts": True}, "attention_experts with router_scope 'ffn'"),
    ({"router_scope": "linear", "attention_experts": True, "attention_r": 4}, "attention_experts with attention_r 4"),
    ({"router_scope": "linear", "attention_experts": True, "attention_modules": []}, "with attention_modules []"),
    ({"router_scope": "model"}, "granularity 'token': one decision for all layers needs"),
    ({"mix": "ffn_output", "top_k": 2, "expert_scale": "prob"}, "mix 'ffn_output' with expert_scale 'prob'"),
    ({"mix": "ffn_output", "mode": "dense"}, "mix 'ffn_output' needs mode 'sparse', not 'dense'"),
    ({"mix": "ffn_output", "shared_a": True}, "mix 'ffn_output' needs shared_a False"),
    ({"mix": "ffn_output", "router_scope": "linear"}, "mix 'ffn_output' needs router_scope 'ffn'"),
    ({"experts_by_layer": []}, "experts_by_layer is []"),
    ({"experts_by_layer": [1, 3]}, "whole numbers of at least 2"),
    ({"experts_by_layer": [2, 4], "num_experts": 5}, "num_experts is 5, but experts_by_layer"),
    ({"experts_by_layer": [2, 4], "top_k": 3, "expert_scale": "prob"}, "top_k is 3, but experts_by_layer"),
    ({"experts_by_layer": [2, 4], "balance_layers": "pooled"}, "use 'blocks' or 'mean_of_layers'"),
    ({"experts_by_layer": [2, 4], "router": "oracle"}, "experts_by_layer must be None"),
    ({"task_dim": 8}, "task_dim is 8 with granularity 'token'"),
    ({"logit_noise": 0.1, "router": "random"}, "has no logits"),
    ({"logit_noise": -1.0}, "logit_noise is -1.0"),
    ({"init_std": 0.1, "init_weights": "gaussian"}, "both say how A starts"),
    ({"init_std": 0.0}, "init_std is 0.0; it must be a number from 1e-6 to 1e6, or None"),
    ({"mode": "dense", "expert_scale": "prob_squared"}, "no meaning in mode 'dense'"),
    ({"group_delta": 0.1}, "it belongs to 'groups'"),
    ({"balance_kind": "groups"}, "balance_kind 'groups' needs mode 'dense'"),
    ({"balance_kind": "groups", "mode": "dense", "balance_group": "micro_batch"}, "num_experts is 3"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: "" if isinstance(value, str) else str(value)
)
def test_switches_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MoleConfig(**options)


def test_a_model_that_a_switch_does_not_fit_is_refused_and_left_alone(tiny_llama: Make) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="experts_by_layer has 4 entries, but model.layers has 2 layers"):
        get_peft_model(model, MoleConfig.from_preset("mola"))
    assert not any(isinstance(m, ExpertLayer) for m in model.modules())
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        get_peft_model(encoder_decoder, config_of("moelora-task"))
    opt = OPTForCausalLM(OPTConfig(vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match="mix 'ffn_output': model.decoder.layers.0 computes"):
        get_peft_model(opt, MoleConfig.from_preset("mixlora"))


def test_adapters_of_another_kind_on_the_same_modules_are_refused(tiny_llama: Make) -> None:
    linear = get_peft_model(tiny_llama(), config_of("molora"))
    with pytest.raises(ValueError, match="carries experts of its own of another adapter"):
        linear.add_adapter("second", MoleConfig(r=4))
    with pytest.raises(ValueError, match="q_proj should get plain LoRA, but another adapter has it adapted"):
        linear.add_adapter("second", config_of("loramoe", attention_modules=None))
    whole = get_peft_model(tiny_llama(), MoleConfig(r=4))
    with pytest.raises(
        ValueError, match=r"layers.0.mlp carries the experts of another adapter with router_scope 'ffn'"
    ):
        whole.add_adapter("second", config_of("hydralora"))
    assert list(whole.peft_config) == ["default"]
    linear.add_adapter("second", config_of("mola"))
    linear.set_adapter("second")
    linear(IDS)
    assert {logits.shape[-1] for logits in collect_routing(linear).logits} == {3, 5}


def test_one_decision_holds_for_all_layers_and_for_the_answer(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("octavius"), tiny_llama, randomized)
    model(IDS)
    assert len(collect_routing(model).logits) == 1
    decision = model.base_model.routing_inputs.decision
    assert decision.experts.index.view(2, 7, 2).unique(dim=1).shape[1] == 1
    prompts, lengths = torch.tensor([[5, 9, 2, 33], [1, 4, 4, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    set_routing_inputs(model)
    seen: list[Tensor] = []
    model.get_decoder().register_forward_hook(lambda *_: seen.append(collect_routing(model).logits[0][:, -1]))
    model.generate(prompts, attention_mask=lengths, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(seen) == 4
    assert all(torch.equal(logits, seen[0]) for logits in seen)
    embedded = model.get_input_embeddings()(prompts)
    router = next(m for m in model.modules() if isinstance(m, ExpertLayer)).router("default")
    expected = torch.stack([(embedded[row, :n] @ router.weight.T).mean(dim=0) for row, n in enumerate((4, 3))])
    torch.testing.assert_close(seen[0], expected)
    layer, x = next(m for m in model.modules() if isinstance(m, MoleExpertLinear)), torch.zeros(1, 2, 32).double()
    with pytest.raises(ValueError, match="decided for 2 tokens, but a linear with experts reads 3"):
        layer(torch.zeros(1, 3, 32).double())
    decision.experts = None
    with pytest.raises(ValueError, match="did not go through the decoder"):
        layer(x)


def test_checkpointing_and_copies_keep_the_decision_of_the_model(tiny_llama: Make, randomized: Randomize) -> None:
    grads = []
    for checkpointing in (False, True):
        model = make(config_of("octavius"), tiny_llama, randomized).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")
    twin = copy.deepcopy(model).eval()
    set_routing_inputs(twin, prompt_mask=PROMPT)
    torch.testing.assert_close(twin(IDS).logits, model.eval()(IDS).logits)
    assert pickle.loads(pickle.dumps(model.base_model.routing_inputs)).decision.experts is None


def test_noise_is_one_draw_for_each_sample_and_absent_in_evaluation(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("mocle", logit_noise=0.5), tiny_llama, randomized)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLayer))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    layer(x)
    quiet = layer.routing.logits
    layer.train()
    torch.manual_seed(0)
    layer(x)
    noise = layer.routing.logits - quiet
    assert (noise == noise[:, :1]).all()
    assert not torch.equal(noise[0], noise[1])
    assert 0.05 < noise.std() < 4
    packed = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    set_routing_inputs(model, task=torch.tensor([[1, 1, 1, 1, 1, 1, 1]]), sample_index=packed)
    layer(x[:1])
    noise = (layer.routing.logits - layer.router("default").task_logits(x.dtype)[1] / 0.5)[0]
    assert (noise[:3] == noise[0]).all()
    assert (noise[3:5] == noise[3]).all()
    assert not torch.equal(noise[0], noise[3])


def test_initialisation_and_scaling_follow_the_preset(tiny_llama: Make) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), MoleConfig.from_preset("molora"))
    values = {"_A": [], "router.": [], "_B": []}
    for name, parameter in model.named_parameters():
        for mark, found in values.items():
            if parameter.requires_grad and mark.replace("router.", "mole_router") in name:
                found.append(parameter.detach().flatten())
    spread = {mark: float(torch.cat(found).std()) for mark, found in values.items()}
    assert spread["_A"] == pytest.approx(0.02, rel=0.05)
    assert spread["router."] == pytest.approx(0.02, rel=0.1)
    assert spread["_B"] == 0
    task = get_peft_model(tiny_llama(), MoleConfig.from_preset("moelora-task", num_tasks=200))
    router = next(m for m in task.modules() if isinstance(m, ExpertLayer)).router("default")
    assert router.embedding.shape == (200, 64)
    assert float(router.embedding.std()) == pytest.approx(1, rel=0.05)
    assert MoleConfig.from_preset("octavius", r=8).scaling == 1
    assert MoleConfig.from_preset("hydralora", r=2).scaling == 8
    assert MoleConfig.from_preset("hydralora", r=2, alpha=2).scaling == 1
    assert MoleConfig.from_preset("mola").num_experts == 8


def test_packed_rows_balance_groups_like_padded_ones(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("loramoe"), tiny_llama, randomized)
    run(model, PADDED)
    padded = auxiliary_loss(model, token_mask=PADDED.bool())
    routing = collect_routing(model)
    row = [value.flatten(0, 1).unsqueeze(0) for value in routing.logits]
    kinds = KINDS.repeat_interleave(7).unsqueeze(0)
    packed = replace(
        routing, logits=tuple(row), index=tuple(i.flatten(0, 1)[None] for i in routing.index), source=kinds
    )
    positions = torch.arange(14).view(2, 7)
    assert torch.equal(packed.unpack(positions).source, KINDS)
    own = auxiliary_loss(model, routing=packed.unpack(positions), token_mask=PADDED.bool())
    torch.testing.assert_close(own, padded)
    none = auxiliary_loss(model, routing=packed.unpack(positions[:0]), token_mask=PADDED[:0].bool())
    assert none == 0
    set_routing_inputs(model)
    run(model)
    with pytest.raises(ValueError, match="needs set_routing_inputs"):
        auxiliary_loss(model, token_mask=ONES.bool())
    with pytest.raises(ValueError, match="source holds 2; this adapter knows 0 to 1"):
        set_routing_inputs(model, source=torch.tensor([0, 2]))


@pytest.mark.parametrize("kind", ["blocks", "mean_of_layers"])
@pytest.mark.parametrize("group", ["sample", "global_batch"])
def test_statistics_and_counters_of_layers_with_different_k(kind: str, group: str, tiny_llama: Make) -> None:
    config = config_of("mola", balance_layers=kind, balance_group=group, bias_update_rate=0.1, add_balance_loss=False)
    model = get_peft_model(tiny_llama(), config).train()
    values = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss + (own := auxiliary_loss(model, token_mask=PADDED.bool()))
        values.append(float(own))
        loss.backward()
        mole_after_step(model)
    routing = collect_routing(model)
    load = routing_load(routing, PADDED.bool())
    torch.testing.assert_close(load.sum(dim=-1), torch.ones(14))
    assert (load[:7, 3:] == 0).all()
    for values_L in (routing_entropy(routing, PADDED.bool()), routing_margin(routing, PADDED.bool())):
        assert values_L.isfinite().all()
    assert (routing_entropy(routing, PADDED.bool())[:7] <= math.log(3) + 1e-6).all()
    states = [m.current_state() for m in model.modules() if isinstance(m, ExpertLayer)]
    assert [len(state.bias_steps) for state in states] == [3] * 7 + [5] * 7
    counted = int(PADDED.sum()) * 2 if group == "global_batch" or config.bias_update_rate else 0
    assert all(int(state.load.sum()) == counted for state in states)
    assert all(math.isfinite(value) and value > 0 for value in values)


def test_blocks_are_pooled_and_summed() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("m.layers.0.q", "m.layers.0.up", "m.layers.1.q", "m.layers.1.up", "m.layers.10.q")
    logits = [torch.randn(2, 5, 3, generator=generator) for _ in names]
    routing = Routing(names, tuple(logits), tuple(x.topk(2).indices for x in logits), ())
    mask = torch.ones(2, 5, dtype=torch.bool)
    parts = [Routing(names[i:j], routing.logits[i:j], routing.index[i:j], ()) for i, j in ((0, 2), (2, 4), (4, 5))]
    for scale, group in itertools.product(("mean", "switch", "raw"), ("sample", "micro_batch")):
        expected = sum(balance_loss(part, mask, scale=scale, layers="pooled", group=group) for part in parts)
        torch.testing.assert_close(balance_loss(routing, mask, scale=scale, layers="blocks", group=group), expected)
    uniform = balance_loss(routing, mask, scale="switch", layers="blocks", group="global_batch",
                           global_load=torch.zeros(5, 3))  # fmt: skip
    torch.testing.assert_close(uniform, torch.tensor(3.0))


@pytest.mark.parametrize("case", ["hydralora", "asymlora sparse", "octavius", "mixlora", "coin-moelora"])
def test_an_expert_as_plain_lora(case: str, tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    """The export equals the mixture whose router has decided for this expert everywhere."""
    one = {"top_k": 1, "expert_scale": "prob", "mix": "projection", "mode": "sparse", "balance_coef": 0.0}
    model = make(config_of(case, **one), tiny_llama, randomized)
    to_lora(model, tmp_path, expert=2)
    plain = PeftModel.from_pretrained(tiny_llama().double(), tmp_path, autocast_adapter_dtype=False).eval()
    for layer in model.modules():
        if isinstance(layer, ExpertLayer):
            layer._route = decided_for_2  # type: ignore[method-assign]
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)


def decided_for_2(x: Tensor, name: str, config: MoleConfig) -> tuple[Tensor, ExpertWeights, Tensor | None]:
    return x, ExpertWeights(torch.full((x.shape[:-1].numel(), 1), 2), None), None


def test_surgery_on_linears_and_its_refusals(tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    model = make(config_of("molora", mode="sparse", balance_coef=0.01), tiny_llama, randomized)
    before = model(IDS).logits
    grow(model, 6)
    torch.testing.assert_close(model(IDS).logits, before)
    usage = torch.arange(6.0, 0, -1).expand(14, 6)
    prune(model, 4, usage)
    torch.testing.assert_close(model(IDS).logits, before)
    octavius = make(config_of("octavius"), tiny_llama, randomized)
    octavius(IDS)
    usage = routing_load(collect_routing(octavius), ONES.bool())
    assert usage.shape == (1, 4)
    to_lora(octavius, tmp_path / "usage", expert="usage", usage=usage)
    prune(octavius, 3, usage)
    assert octavius(IDS).logits.isfinite().all()
    mola = make(config_of("mola"), tiny_llama, randomized)
    to_lora(mola, tmp_path / "mola", expert=2)
    for action in (
        lambda: to_lora(mola, tmp_path, expert=3),
        lambda: to_lora(mola, tmp_path, expert="uniform"),
        lambda: grow(mola, 9),
        lambda: prune(mola, 3, torch.ones(14, 5)),
        lambda: from_loras(tiny_llama(), [tmp_path / "mola"], shared_a=True),
    ):
        with pytest.raises(ValueError, match="experts_by_layer|shared_a is True"):
            action()
    both = from_loras(tiny_llama(), [tmp_path / "mola", tmp_path / "usage"], router_scope="linear",
                      attention_experts=True)  # fmt: skip
    assert sum(isinstance(m, MoleExpertLinear) for m in both.modules()) == 14


@pytest.mark.parametrize("name", ["hydralora", "coin-moelora", "octavius", "mixlora", "asymlora"])
def test_one_expert_merges(name: str, tiny_llama: Make, randomized: Randomize) -> None:
    one = {"num_experts": 1, "top_k": 1}
    model = randomized(get_peft_model(tiny_llama(), config_of(name, **one))).eval()
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_table_of_the_docs_is_that_of_the_presets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "related-methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text.split("## Presets")[1].split("Where they differ")[0], re.M)
    values = {
        name: {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=(.*?)`", options)}
        for name, options in rows
    }
    assert values == {name: options for name, options in PRESETS.items() if name not in OWN}
