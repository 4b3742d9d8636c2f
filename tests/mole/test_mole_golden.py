"""The expert FFN and the balance loss against recorded results of the authors' released code, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds.golden_cases import load_arrays, load_cases

from llava_mole.mole import MoleConfig, MoleMlp, Routing, balance_loss
from llava_mole.mole.ffn import find_layout
from llava_mole.mole.routing import RoutingInputs


class GatedMlp(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def arrays(name: str, key: str, separator: str = ".") -> dict[str, Tensor]:
    prefix = key + separator
    return {k.removeprefix(prefix): torch.tensor(v) for k, v in load_arrays(name).items() if k.startswith(prefix)}


def recorded_layer(case: dict[str, Any], data: dict[str, Tensor], mode: str, backend: str) -> MoleMlp:
    base = GatedMlp(case["d_model"], case["d_ff"]).double().requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(base, name).weight.copy_(data[f"weight.original_module.{name}.weight"])
    layout = find_layout(base)
    assert layout is not None
    layer = MoleMlp(base, layout, RoutingInputs())
    config = MoleConfig.from_preset(
        "released",
        r=case["lora_rank"],
        alpha=case["lora_alpha"],
        num_experts=case["num_experts"],
        mode=mode,
        backend=backend,
    )
    layer.add_adapter("default", config)
    experts = layer.mole_experts["default"]
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            a, b = experts.pair(f"{name}_proj")
            for k in range(case["num_experts"]):
                a[k] = data[f"weight.moe_{name}.{k}.lora_A"]
                b[k] = data[f"weight.moe_{name}.{k}.lora_B"].T
        if case["num_experts"] > 1:
            router = layer.mole_router["default"]
            router.weight.copy_(data["weight.router.weight"])
            router.bias.copy_(data["weight.router.bias"])
    return layer.eval()


FFN_CASES = load_cases("mole_ffn")[1]
BALANCE_CASES = load_cases("mole_balance")[1]


@pytest.mark.parametrize("backend", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("case", FFN_CASES, ids=[f"{c['key']}-{c['kind']}" for c in FFN_CASES])
def test_outputs_and_gradients_equal_the_released_code(case: dict[str, Any], mode: str, backend: str) -> None:
    data = arrays("mole_ffn", case["key"])
    layer = recorded_layer(case, data, mode, backend)
    x = data["x"].requires_grad_()
    out = layer(x)
    (out * data["probe"]).sum().backward()
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(out, data[f"{mode}.out"], **close)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, data[f"{mode}.grad.x"], **close)
    experts = layer.mole_experts["default"]
    for name in ("gate", "up", "down"):
        a, b = experts.pair(f"{name}_proj")
        for k in range(case["num_experts"]):
            torch.testing.assert_close(a.grad[k], data[f"{mode}.grad.moe_{name}.{k}.lora_A"], **close)
            torch.testing.assert_close(b.grad[k].T, data[f"{mode}.grad.moe_{name}.{k}.lora_B"], **close)
    if case["num_experts"] == 1:
        return
    torch.testing.assert_close(layer.routing.logits, data["router_logits"], **close)
    torch.testing.assert_close(layer.routing.index, data["index"].view(layer.routing.index.shape))
    for name, parameter in layer.mole_router["default"].named_parameters():
        if f"router.{name}" in case["none_grads"][mode]:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, data[f"{mode}.grad.router.{name}"], **close)


@pytest.mark.parametrize("case", FFN_CASES, ids=[f"{c['key']}-{c['kind']}" for c in FFN_CASES])
def test_without_adapter_it_is_the_recorded_base(case: dict[str, Any]) -> None:
    data = arrays("mole_ffn", case["key"])
    layer = recorded_layer(case, data, "sparse", "auto")
    layer.enable_adapters(False)
    assert torch.equal(layer(data["x"]), layer.base_layer(data["x"]))
    torch.testing.assert_close(layer(data["x"]), data["base_out"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", BALANCE_CASES, ids=[f"{c['key']}-{c['name']}" for c in BALANCE_CASES])
def test_balance_loss_equals_the_released_code(case: dict[str, Any]) -> None:
    data = arrays("mole_balance", case["key"])
    logits = data["logits"].requires_grad_()
    routing = Routing(
        names=tuple(str(i) for i in range(case["layers"])),
        logits=tuple(logits),
        index=tuple(data["expert_choice"].argmax(dim=-1, keepdim=True)),
        layers=(),
    )
    loss = balance_loss(routing, data["attention_mask"].bool(), scale="mean", layers="pooled", group="sample")
    if case["num_experts"] == 1:
        return  # no balance term is recorded for one expert; test_mole_loss has ours
    if case["is_nan"]:
        assert torch.isfinite(loss)
    else:
        total = case["lm_part"] + case["moe_balance_w"] * loss
        torch.testing.assert_close(total, torch.tensor(case["total"], dtype=torch.float64), rtol=0, atol=1e-10)
    if case["grad"] and not case["grad_has_nan"]:
        (case["moe_balance_w"] * loss).backward()
        torch.testing.assert_close(logits.grad, data["grad.logits"], rtol=0, atol=1e-10)
