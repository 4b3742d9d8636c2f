"""The expert FFN against a naive per-token loop, PEFT's LoRA, and its own base."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp, collect_routing, routing_load

Make = Callable[[], LlamaForCausalLM]


def naive_weights(logits: Tensor, config: MoleConfig) -> list[tuple[int, Tensor]]:
    """The experts of one token and their weights."""
    p = torch.softmax(logits, dim=0)
    if config.mode == "dense":
        factor = config.num_experts if config.expert_scale == "prob_times_k" else 1
        return [(k, p[k] * factor) for k in range(len(p))]
    chosen = [int(k) for k in torch.argsort(logits, descending=True)[: config.top_k]]
    weight = {
        "none": torch.ones_like(p),
        "straight_through": p + (1 - p).detach(),
        "prob": p,
        "prob_times_k": p * config.num_experts,
        "topk_renorm": p / p[chosen].sum(),
    }[config.expert_scale]
    return [(k, weight[k]) for k in chosen]


def naive_ffn(layer: MoleMlp, x_TD: Tensor, config: MoleConfig) -> Tensor:
    """One token, one expert at a time, straight from the equations."""
    base, experts = layer.base_layer, layer.mole_experts["default"]
    router = layer.mole_router["default"]

    def project(name: str, v: Tensor, weights: list[tuple[int, Tensor]]) -> Tensor:
        a, b = experts.pair(name)
        y = getattr(base, name)(v)
        for k, weight in weights:
            y = y + config.scaling * weight * (b[k].T @ (a[k] @ v))
        return y

    rows = []
    for x in x_TD:
        weights = naive_weights(router.weight @ x + (router.bias if router.bias is not None else 0), config)
        hidden = base.act_fn(project("gate_proj", x, weights)) * project("up_proj", x, weights)
        rows.append(project("down_proj", hidden, weights))
    return torch.stack(rows)


WEIGHTS_OF_EXPERTS = [
    {"mode": "sparse", "expert_scale": scale, "top_k": k}
    for scale in ("none", "straight_through", "prob", "prob_times_k", "topk_renorm")
    for k in (1, 2)
    if (scale, k) != ("topk_renorm", 1)
] + [{"mode": "dense", "expert_scale": scale} for scale in ("prob", "prob_times_k")]


@pytest.mark.parametrize("backend", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("options", WEIGHTS_OF_EXPERTS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_every_weight_and_backend_equals_a_naive_loop(
    options: dict[str, Any],
    backend: str,
    tiny_llama: Make,
    randomized: Callable[[nn.Module], nn.Module],
    first_mlp: Callable[[nn.Module], MoleMlp],
) -> None:
    config = MoleConfig(r=4, num_experts=4, router_bias=True, backend=backend, **options)
    layer = first_mlp(randomized(get_peft_model(tiny_llama().double(), config)))
    x = torch.randn(1, 11, 32, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(1, 11, 32, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    got_out = layer(x)
    got = torch.autograd.grad((got_out * probe).sum(), [x, *parameters], allow_unused=True)
    out = naive_ffn(layer, x[0], config).unsqueeze(0)
    expected = torch.autograd.grad((out * probe).sum(), [x, *parameters], allow_unused=True)
    torch.testing.assert_close(got_out, out, rtol=0, atol=1e-10)
    for ours, naive in zip(got, expected, strict=True):
        if naive is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, naive, rtol=0, atol=1e-10)


def copy_lora_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Put the weights of a one-expert MoLE into a PEFT LoRA on the same linears."""
    source = {
        k.replace(".mole_lora.default.", ".").replace(".mole_experts.default.", "."): v
        for k, v in ours.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" not in name:
                continue
            stem, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
            attention = f"{stem}.{kind}"
            parent, _, projection = stem.rpartition(".")
            value = source[attention] if attention in source else source[f"{parent}.{projection}_{kind}"][0]
            parameter.copy_(value if kind == "A" else value.T)


def test_one_expert_trains_like_peft_lora(tiny_llama: Make, randomized: Callable[[nn.Module], nn.Module]) -> None:
    ours = randomized(get_peft_model(tiny_llama(), MoleConfig(r=4, alpha=8, num_experts=1)))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    copy_lora_weights(ours, theirs)
    ids = torch.randint(64, (50, 2, 9), generator=torch.Generator().manual_seed(2))
    losses: list[list[float]] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        losses.append([])
        for batch in ids:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3


def test_a_fresh_adapter_is_the_identity_and_disabling_gives_the_base(
    tiny_llama: Make, randomized: Callable[[nn.Module], nn.Module]
) -> None:
    base = tiny_llama().eval()
    ids = torch.arange(10).view(1, 10)
    expected = base(ids).logits
    model = get_peft_model(copy.deepcopy(base), MoleConfig(r=4)).eval()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    randomized(model)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
        assert collect_routing(model).logits == ()


@pytest.mark.parametrize("backend", ["masked", "grouped", "loop"])
@pytest.mark.parametrize("preset", ["paper", "released", "coupled", "best"])
def test_every_expert_and_router_moves(preset: str, backend: str, tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig.from_preset(preset, r=4, num_experts=3, backend=backend))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        ids = torch.randint(64, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    load = routing_load(collect_routing(model), torch.ones(2, 16).bool())
    assert (load > 0).all(), "the test needs every expert in use"
    for name, parameter in model.named_parameters():
        if name in before:
            moved = (parameter - before[name]).abs().flatten(1 if "mole_experts" in name else 0).amax(dim=-1)
            assert (moved > 0).all(), name
    assert all("mole_" in name for name in before)


def test_save_and_load_are_exact(tiny_llama: Make, randomized: Callable[[nn.Module], nn.Module], tmp_path: Any) -> None:
    model = randomized(get_peft_model(tiny_llama(), MoleConfig.from_preset("released", r=4))).eval()
    ids = torch.arange(12).view(1, 12)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.peft_config["default"].router_bias is True
    from safetensors.torch import load_file

    keys = sorted(k for k in load_file(tmp_path / "adapter_model.safetensors") if ".layers.0." in k)
    stem = "base_model.model.model.layers.0."
    assert [k.removeprefix(stem) for k in keys] == sorted(
        [f"self_attn.{n}_proj.mole_lora.{ab}" for n in "qkvo" for ab in "AB"]
        + [f"mlp.mole_experts.{n}_proj_{ab}" for n in ("gate", "up", "down") for ab in "AB"]
        + ["mlp.mole_router.weight", "mlp.mole_router.bias"]
    )
