"""Where routers and experts are: refusals, one router for the model, K by layer, noise, and surgery on linears."""

import copy
import itertools
import math
import os
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mole.preset_cases import IDS, KINDS, ONES, PADDED, PROMPT, TASKS, Make, Randomize, config_of, make, run
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from llava_mole.mole import (
    ExpertLayer,
    MoleConfig,
    MoleExpertLinear,
    MoleMlp,
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
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="router_scope 'model' with re-entrant gradient checkpointing"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_disable()
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


@pytest.mark.parametrize("case", ["hydralora", "mola", "octavius", "mixlora"])
def test_transformers_loads_them(case: str, tiny_llama: Make, randomized: Randomize, tmp_path: Path) -> None:
    model = randomized(get_peft_model(tiny_llama(), config_of(case))).eval()
    model.save_pretrained(tmp_path)
    again = tiny_llama().eval()
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Qwen2MoeForCausalLM": {**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 4,
                            "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "Phi3ForCausalLM": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "LlamaModel": SIZES,
}  # fmt: skip
"""Families whose FFN or attention is built in another way than Llama's."""


@pytest.mark.parametrize("case", ["hydralora", "asymlora", "molora", "octavius", "moelora-task", "mola"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, case: str, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        model_class = getattr(transformers, family)
        return model_class(model_class.config_class(**OTHERS[family]))

    config = config_of(case, add_balance_loss=False)
    model = get_peft_model(base(), config).train()
    set_routing_inputs(model, task=TASKS, prompt_mask=PROMPT)
    output = model(input_ids=IDS, attention_mask=ONES)[0]
    (output.square().mean() + auxiliary_loss(model, token_mask=ONES.bool())).backward()
    routing = collect_routing(model)
    assert routing.logits
    assert all(logits.shape[:2] == (2, 7) for logits in routing.logits)
    routers = [p for n, p in model.named_parameters() if "mole_router" in n]
    assert routers
    experts = [p for n, p in model.named_parameters() if "mole_experts" in n and n.endswith("_B")]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in experts)
    with torch.no_grad():
        for parameter in experts:
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    set_routing_inputs(again, task=TASKS, prompt_mask=PROMPT)
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])
    assert not torch.allclose(again(input_ids=IDS)[0], base().eval()(input_ids=IDS)[0])


@pytest.mark.parametrize("case", ["asymlora", "molora", "mixlora", "octavius", "mocle"])
def test_compiled_models_compute_the_same(case: str, tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of(case), tiny_llama, randomized)
    with torch.no_grad():
        expected = model(IDS).logits
        compiled = torch.compile(model, backend="eager")(IDS).logits
    torch.testing.assert_close(compiled, expected)


VALUES: dict[str, list[Any]] = {
    "router_scope": ["ffn", "linear", "model"],
    "attention_experts": [True, False],
    "shared_a": [True, False],
    "mix": ["projection", "ffn_output"],
    "experts_by_layer": [None, [2, 3], [4], [3, 2, 2]],
    "num_experts": [3, 1, 2, 4],
    "granularity": ["token", "sequence", "task", "given"],
    "sequence_tokens": ["prompt", "image"],
    "source_coef": [0.0, 0.1],
    "num_tasks": [3, 0],
    "task_dim": [0, 4],
    "mode": ["sparse", "dense"],
    "top_k": [1, 2],
    "expert_scale": ["none", "prob", "prob_squared", "topk_renorm", "straight_through"],
    "logit_noise": [0.0, 0.2],
    "router_bias": [True, False],
    "balance_kind": ["load", "groups"],
    "balance_layers": ["mean_of_layers", "pooled", "blocks"],
    "balance_group": ["micro_batch", "sample", "global_batch"],
    "balance_coef": [0.01, 0.0],
    "balance_scale": ["mean", "switch"],
    "bias_update_rate": [0.0, 0.1],
    "init_std": [None, 0.1],
    "router_init_std": [None, 0.1],
    "attention_modules": [None, [], ["q_proj"]],
    "ffn_modules": [None, [], ["mlp"]],
    "shared_r": [0, 2],
    "shared_scale": ["one", "complement"],
    "backend": ["auto", "masked", "grouped", "loop"],
    "router": ["learned", "hash", "random", "oracle"],
}


def test_random_switches_are_refused_by_name_or_train_and_come_back(tiny_llama: Make, tmp_path: Path) -> None:
    """`LLAVA_MOLE_CASES=2000` draws that many."""
    generator, trained = random.Random(0), 0
    refused: list[tuple[dict[str, Any], str]] = []
    inputs = {"task": TASKS, "source": KINDS, "experts": KINDS}
    for number in range(int(os.environ.get("LLAVA_MOLE_CASES", "120"))):
        names = generator.sample(sorted(VALUES), generator.randint(1, 9))
        options = {name: generator.choice(VALUES[name][: 2 if generator.random() < 0.6 else None]) for name in names}
        try:
            model = get_peft_model(tiny_llama(), MoleConfig(r=2, **options))
        except ValueError as error:
            refused.append((options, str(error)))
            continue
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        set_routing_inputs(model, prompt_mask=PROMPT, **inputs)
        for _ in range(2):
            loss = model(input_ids=IDS, labels=IDS, attention_mask=PADDED).loss
            assert loss.isfinite(), options
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(tmp_path / str(number))
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / str(number)).eval()
        for each in (model, again):
            set_routing_inputs(each, **inputs)
        with torch.no_grad():
            logits = []
            for each in (model, again):
                torch.manual_seed(0)
                logits.append(each(IDS).logits)
        assert torch.equal(*logits), options
        trained += 1
    assert [pair for pair in refused if not any(name in pair[1] for name in pair[0])] == []
    print(f"{trained} trained and came back, {len(refused)} refused")
    assert min(trained, len(refused)) > 20


@pytest.mark.parametrize("options", [{}, {"bias_update_rate": 0.1}])
def test_load_counters_advance_where_k_differs_by_layer(tiny_llama: Make, options: dict[str, Any]) -> None:
    own = {"attention_modules": [], "balance_group": "global_batch", "expert_scale": "straight_through"}
    model = get_peft_model(tiny_llama(), MoleConfig(r=2, experts_by_layer=[2, 4], **own, **options)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    loads = [layer.current_state().load for layer in model.modules() if isinstance(layer, MoleMlp)]
    assert [load.shape[-1] for load in loads] == [2, 4]
    assert all(int(load.sum()) == IDS.numel() for load in loads)
