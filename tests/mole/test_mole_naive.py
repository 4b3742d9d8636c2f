"""Every routing rule on every backend against the equations, token by token, in float64: outputs and all gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from llava_mole.mole import MoleConfig, MoleMlp, set_routing_inputs

B, S, D, K, TASKS = 2, 7, 32, 4, 3
SOURCE = torch.tensor([2, 0])
TOKENS = torch.tensor([[0, 1, 1, 2, 0, 0, 1], [2, 2, 0, 1, 0, 2, 2]])  # expert 3 gets nothing
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 3, 3]])
IMAGES = torch.tensor(
    [[0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
).bool()  # row 1 and packed samples 1 to 3 have none

Weights = list[list[tuple[int, Tensor]]]
"""For each of B x S tokens the experts it uses, with their weights."""


def _softmax(logits: Tensor) -> Tensor:
    exponentials = (logits - logits.max().detach()).exp()
    return exponentials / exponentials.sum()


def _from_logits(logits_TK: Tensor, options: dict[str, Any]) -> Weights:
    """Choice and weight of every token, from the definitions of `mode`, `top_k` and `expert_scale`."""
    scale, top_k = options.get("expert_scale", "none"), options.get("top_k", 1)
    rows: Weights = []
    for logits in logits_TK:
        probs = _softmax(logits)
        if options.get("mode") == "dense":
            factor = K if scale == "prob_times_k" else 1
            rows.append([(k, factor * probs[k]) for k in range(K)])
            continue
        order = sorted(range(K), key=lambda k: -float(logits[k].detach()))[:top_k]
        total = sum(probs[k] for k in order)
        weigh: dict[str, Callable[[int], Tensor]] = {
            "none": lambda k: torch.ones((), dtype=torch.float64),
            "straight_through": lambda k, p=probs: 1 + p[k] - p[k].detach(),
            "prob": lambda k, p=probs: p[k],
            "prob_times_k": lambda k, p=probs: K * p[k],
            "topk_renorm": lambda k, p=probs, t=total: p[k] / t,
        }
        rows.append([(k, weigh[scale](k)) for k in order])
    return rows


def _expected(case: str, options: dict[str, Any], layer: MoleMlp, x_BSD: Tensor) -> tuple[Weights, Tensor | None]:
    """The weights by the definition of the routing rule, and the logits if a router made them."""
    one = torch.ones((), dtype=torch.float64)
    fixed = {
        "given by sample": SOURCE.unsqueeze(1).expand(B, S),
        "given by token": TOKENS,
        "oracle": SOURCE.unsqueeze(1).expand(B, S),
    }
    if case in fixed:
        return [[(int(k), one)] for k in fixed[case].flatten()], None
    if case == "given as weights":
        return [[(k, WEIGHTS[b, k]) for k in range(K)] for b in range(B) for _ in range(S)], None
    if case == "random":  # the draw is the layer's own; only what follows from it is tested
        assert layer.routing.index is not None
        return [[(int(k), one)] for k in layer.routing.index.flatten()], None
    router = layer.router("default")
    assert router is not None
    if options.get("granularity") == "task":
        logits = router.weight[SOURCE].unsqueeze(1).expand(B, S, K)
    else:
        detached = case == "hash" or options.get("router_detach_input")
        logits = (x_BSD.detach() if detached else x_BSD) @ router.weight.T
        if router.bias is not None:
            logits = logits + router.bias
    if case in ("sequence", "sequence image"):
        shown = [IMAGES[b] if "image" in case and IMAGES[b].any() else PROMPT[b] for b in range(B)]
        mean = [logits[b][shown[b]].mean(dim=0) for b in range(B)]
        logits = torch.stack(mean).unsqueeze(1).expand(B, S, K)
    if case in ("sequence packed", "sequence image packed"):
        flat, sample, prompt = logits.flatten(0, 1), PACKED.flatten(), PROMPT.flatten()
        rows = []
        for s in sample:
            image = (sample == s) & IMAGES.flatten()
            own = flat[image if "image" in case and image.any() else (sample == s) & prompt]
            rows.append(own.mean(dim=0) if len(own) else torch.zeros(K, dtype=torch.float64))
        logits = torch.stack(rows).view(B, S, K)
    logits = logits / options.get("temperature", 1.0)
    return _from_logits(logits.flatten(0, 1), options), logits.flatten(0, 1)


def _naive(layer: MoleMlp, options: dict[str, Any], x_BSD: Tensor, case: str) -> Tensor:
    """`down(act(gate(x)) * up(x))` with the update of every projection summed expert by expert, one token at a time."""
    base, experts = layer.base_layer, layer.experts("default")
    scaling = layer.configs["default"].scaling
    weights, logits_TK = _expected(case, options, layer, x_BSD)
    outputs = []
    for t, x in enumerate(x_BSD.flatten(0, 1)):
        shared = torch.ones((), dtype=torch.float64)
        if options.get("shared_scale") == "complement":
            assert logits_TK is not None
            shared = 1 - _softmax(logits_TK[t])[weights[t][0][0]]

        def project(name: str, value: Tensor, t: int = t, shared: Tensor = shared) -> Tensor:
            y = getattr(base, name)(value)
            a, b = experts.pair(name)
            for k, weight in weights[t]:
                y = y + scaling * weight * ((a[k] @ value) @ b[k])
            if options.get("shared_r"):
                shared_a, shared_b = experts.shared_pair(name)
                y = y + scaling * shared * ((shared_a @ value) @ shared_b)
            return y

        outputs.append(project("down_proj", base.act_fn(project("gate_proj", x)) * project("up_proj", x)))
    return torch.stack(outputs).view(B, S, D)


NO_ROUTER = {"expert_scale": "none", "balance_coef": 0.0}
SAMPLE_FREE = {"balance_group": "global_batch"}
ROUTING_RULES: dict[str, dict[str, Any]] = {
    **{f"top 1 {s}": {"expert_scale": s} for s in ("none", "straight_through", "prob", "prob_times_k")},
    **{f"top 2 {s}": {"top_k": 2, "expert_scale": s} for s in ("none", "prob", "straight_through", "topk_renorm")},
    "top 3 renorm": {"top_k": 3, "expert_scale": "topk_renorm"},
    "dense": {"mode": "dense"},
    "dense times k": {"mode": "dense", "expert_scale": "prob_times_k"},
    "bias and temperature": {"router_bias": True, "temperature": 0.7, "expert_scale": "prob"},
    "detached": {"router_detach_input": True, "expert_scale": "prob"},
    "sequence": {"granularity": "sequence", "expert_scale": "prob", **SAMPLE_FREE},
    "sequence packed": {"granularity": "sequence", "expert_scale": "prob", **SAMPLE_FREE},
    **{
        f"sequence image{packed}": {
            "granularity": "sequence",
            "sequence_tokens": "image",
            "expert_scale": "prob_times_k",
            **SAMPLE_FREE,
        }
        for packed in ("", " packed")
    },
    "task": {"granularity": "task", "num_tasks": TASKS, "expert_scale": "prob", **SAMPLE_FREE},
    "given by sample": {"granularity": "given", **NO_ROUTER},
    "given by token": {"granularity": "given", **NO_ROUTER},
    "given as weights": {"granularity": "given", **NO_ROUTER},
    "random": {"router": "random", **NO_ROUTER},
    "hash": {"router": "hash", **NO_ROUTER},
    "oracle": {"router": "oracle", **NO_ROUTER},
    "shared": {"shared_r": 2, "expert_scale": "prob"},
    "shared of the same rank": {"shared_r": 3, "top_k": 2},
    "shared complement of the same rank": {"shared_r": 3, "shared_scale": "complement", "expert_scale": "prob"},
    "shared complement": {"shared_r": 2, "shared_scale": "complement", "expert_scale": "prob"},
}
WEIGHTS = torch.rand(B, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _routing_inputs(case: str) -> dict[str, Tensor]:
    experts = {"given by token": TOKENS, "given as weights": WEIGHTS}.get(case, SOURCE)
    inputs = {"experts": experts, "source": SOURCE, "task": SOURCE, "prompt_mask": PROMPT, "image_mask": IMAGES}
    return {**inputs, "sample_index": PACKED} if "packed" in case else inputs


@pytest.mark.parametrize("backend", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("case", ROUTING_RULES)
def test_outputs_and_all_gradients_equal_the_equations(
    case: str,
    backend: str,
    tiny_llama: Callable[[], nn.Module],
    randomized: Callable[[nn.Module], nn.Module],
    first_mlp: Callable[[nn.Module], MoleMlp],
) -> None:
    options = ROUTING_RULES[case]
    config = MoleConfig(r=3, num_experts=K, backend=backend, **options)
    model = randomized(get_peft_model(tiny_llama().double(), config, autocast_adapter_dtype=False)).double().train()
    layer = first_mlp(model)
    set_routing_inputs(model, **_routing_inputs(case))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, D, generator=generator, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(B, S, D, generator=generator, dtype=torch.float64)

    names, parameters = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad], strict=True)
    own = layer(x)
    expected = _naive(layer, options, x, case)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    leaves = (x, *parameters)
    own_grads = torch.autograd.grad((own * probe).sum(), leaves, allow_unused=True)
    expected_grads = torch.autograd.grad((expected * probe).sum(), leaves, allow_unused=True)
    assert expected_grads[0] is not None
    for name, got, want in zip(("x", *names), own_grads, expected_grads, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(
            zero if got is None else got,
            torch.zeros_like(zero if got is None else got) if want is None else want,
            rtol=0,
            atol=1e-10,
            msg=lambda message, name=name: f"{name}: {message}",
        )
    learns = options.get("expert_scale", "none") != "none" or options.get("mode") == "dense"
    routers = [g for n, g in zip(names, expected_grads[1:], strict=True) if "mole_router" in n]
    assert any(g is not None and g.abs().max() > 0 for g in routers) == (learns and bool(routers))
