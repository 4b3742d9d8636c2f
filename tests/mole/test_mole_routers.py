"""Routers other than the learned token router: sequence, task, given, the controls, and the router's extras."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, MoleMlp, collect_routing, mole_auxiliary_loss, set_routing_inputs

Make = Callable[[], LlamaForCausalLM]
Randomize = Callable[[nn.Module], nn.Module]
IDS = torch.arange(1, 19).view(2, 9)


def build(make: Make, randomized: Randomize, **options: Any) -> nn.Module:
    return randomized(get_peft_model(make(), MoleConfig(r=4, **options))).eval()


def single(make: Make, randomized: Randomize, k: int, **options: Any) -> Tensor:
    """Logits with every token given to expert k."""
    model = build(make, randomized, granularity="given", **options)
    set_routing_inputs(model, experts=torch.full((2,), k))
    return model(IDS).logits


def test_given_experts_by_sample_by_token_and_as_weights(tiny_llama: Make, randomized: Randomize) -> None:
    model = build(tiny_llama, randomized, granularity="given")
    outputs = []
    for experts in (
        torch.tensor([2, 0]),
        torch.tensor([[2] * 9, [0] * 9]),
        torch.tensor([[0.0, 0, 1], [1, 0, 0]]),
        torch.tensor([[[0.0, 0, 1]] * 9, [[1.0, 0, 0]] * 9]),
    ):
        set_routing_inputs(model, experts=experts)
        outputs.append(model(IDS).logits)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])
    expected = torch.stack([single(tiny_llama, randomized, 2)[0], single(tiny_llama, randomized, 0)[1]])
    torch.testing.assert_close(outputs[0], expected)
    assert not torch.allclose(expected[0], single(tiny_llama, randomized, 1)[0], atol=1e-3)
    for wrong in (torch.tensor([[0] * 8] * 2), torch.rand(2, 9, 2)):
        set_routing_inputs(model, experts=wrong)
        with pytest.raises(ValueError, match="is needed"):
            model(IDS)
    set_routing_inputs(model)
    with pytest.raises(ValueError, match="experts="):
        model(IDS)


def test_oracle_routes_by_source(tiny_llama: Make, randomized: Randomize) -> None:
    model = build(tiny_llama, randomized, router="oracle")
    set_routing_inputs(model, source=torch.tensor([1, 2]))
    logits = model(IDS).logits
    torch.testing.assert_close(logits[0], single(tiny_llama, randomized, 1)[0])
    torch.testing.assert_close(logits[1], single(tiny_llama, randomized, 2)[1])
    assert not any("router" in name for name, _ in model.named_parameters())
    assert mole_auxiliary_loss(model, token_mask=torch.ones(2, 9).bool()).requires_grad is False


def test_task_routing_learns_a_table(tiny_llama: Make, randomized: Randomize) -> None:
    options = {"granularity": "task", "num_tasks": 5, "expert_scale": "prob", "balance_coef": 0}
    model = build(tiny_llama, randomized, **options).train()
    set_routing_inputs(model, task=torch.tensor([4, 0]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    router = next(m for m in model.modules() if isinstance(m, MoleMlp)).router("default")
    assert router is not None
    assert router.weight.shape == (5, 3)
    used = router.weight.grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True, False, False, False, True]
    logits = collect_routing(model).logits[0]
    torch.testing.assert_close(logits[0, 3], router.weight[4])


def test_random_is_uniform_and_hash_is_fixed(tiny_llama: Make, randomized: Randomize) -> None:
    model = build(tiny_llama, randomized, router="random")
    ids = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    model(ids)
    first = collect_routing(model).index[0]
    assert (first.flatten().bincount(minlength=3) / first.numel() - 1 / 3).abs().max() < 0.06
    model(ids)
    assert not torch.equal(first, collect_routing(model).index[0])

    model = build(tiny_llama, randomized, router="hash").train()
    out = model(input_ids=ids, labels=ids)
    (out.loss + mole_auxiliary_loss(model, token_mask=torch.ones_like(ids).bool())).backward()
    routers = [p for n, p in model.named_parameters() if "mole_router" in n]
    assert routers
    assert all(p.grad is None and not p.requires_grad for p in routers)


def test_sequence_routing_uses_the_prompt_only(tiny_llama: Make, randomized: Randomize) -> None:
    options = {"granularity": "sequence", "balance_group": "micro_batch"}
    model = build(tiny_llama, randomized, **options)
    prompt = torch.zeros(2, 9).bool()
    prompt[:, :4] = True
    set_routing_inputs(model, prompt_mask=prompt)
    model(IDS)
    before = [x.clone() for x in collect_routing(model).logits]
    changed = IDS.clone()
    changed[:, 4:] = 50
    model(changed)
    for ours, old in zip(collect_routing(model).logits, before, strict=True):
        torch.testing.assert_close(ours, old)
        assert (ours == ours[:, :1]).all(), "one decision a sample"
    set_routing_inputs(model)
    with pytest.raises(ValueError, match="let tokens see later ones"):
        model.train()(IDS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_scale": "prob", "top_k": 2},
        {"mode": "dense"},
        {"granularity": "sequence", "balance_group": "micro_batch"},
        {"router": "hash"},
        {"shared_r": 2, "shared_scale": "complement"},
    ],
    ids=str,
)
def test_cached_uncached_and_left_padded_generation_agree(
    tiny_llama: Make, randomized: Randomize, options: dict[str, Any]
) -> None:
    model = build(tiny_llama, randomized, num_experts=4, **options)
    model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    short = IDS[:1, :5]
    alone = model.generate(input_ids=short, **arguments)[:, 5:]
    if options.get("granularity") != "sequence":  # without a cache every pass has another prompt to average over
        uncached = model.generate(input_ids=short, use_cache=False, **arguments)[:, 5:]
        assert torch.equal(alone, uncached)
    padded = torch.zeros(2, 9, dtype=torch.int64)
    padded[0, 4:], padded[1] = short[0], IDS[1]
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    together = model.generate(input_ids=padded, attention_mask=mask, **arguments)[:, 9:]
    assert torch.equal(together[:1], alone)
    beams = model.generate(input_ids=short, num_beams=3, **arguments)
    assert beams.shape == (1, 11)


def test_temperature_jitter_and_detached_input(tiny_llama: Make, randomized: Randomize) -> None:
    plain = build(tiny_llama, randomized)
    warm = build(tiny_llama, randomized, temperature=4.0)
    plain(IDS)
    warm(IDS)
    torch.testing.assert_close(collect_routing(warm).logits[0] * 4, collect_routing(plain).logits[0])
    shaky = build(tiny_llama, randomized, jitter=0.3)
    shaky(IDS)
    assert torch.equal(collect_routing(shaky).logits[0], collect_routing(plain).logits[0]), "no jitter in evaluation"
    shaky.train()(IDS)
    assert not torch.equal(collect_routing(shaky).logits[0], collect_routing(plain).logits[0])
    mask = torch.ones(2, 9).bool()
    for detach in (False, True):
        model = build(tiny_llama, randomized, router_detach_input=detach)
        model(IDS)
        mole_auxiliary_loss(model, token_mask=mask).backward()
        reached = any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora" in n)
        assert reached is not detach


def test_the_shared_expert_adds_to_every_token(tiny_llama: Make, randomized: Randomize) -> None:
    layer = next(
        m
        for m in build(tiny_llama, randomized, shared_r=3, shared_scale="complement", num_experts=2).modules()
        if isinstance(m, MoleMlp)
    ).double()
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x)
        experts, router = layer.experts("default"), layer.router("default")
        assert router is not None
        rows = []
        for v in x[0]:
            p = torch.softmax(router.weight @ v, 0)
            k = int(p.argmax())

            def project(name: str, v: Tensor, k: int = k, p: Tensor = p) -> Tensor:
                (a, b), (sa, sb) = experts.pair(name), experts.shared_pair(name)
                shared = (1 - p[k]) * (sb.T @ (sa @ v))
                return getattr(layer.base_layer, name)(v) + 2 * (b[k].T @ (a[k] @ v) + shared)

            hidden = layer.base_layer.act_fn(project("gate_proj", v)) * project("up_proj", v)
            rows.append(project("down_proj", hidden))
    torch.testing.assert_close(out[0], torch.stack(rows), rtol=0, atol=1e-10)
