"""The balance loss in every reading, and what must not count in it."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_mole.mole import (
    MoleConfig,
    Routing,
    balance_loss,
    collect_routing,
    mole_after_step,
    mole_auxiliary_loss,
    routing_load,
    set_routing_inputs,
    z_loss,
)
from llava_mole.mole.loss import source_loss

L, B, S, K = 3, 4, 7, 3


def random_routing(top_k: int = 1) -> Routing:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(L, B, S, K, generator=generator, dtype=torch.float64).requires_grad_()
    index = logits.detach().topk(top_k, dim=-1).indices
    return Routing(tuple("abc"), tuple(logits.unbind()), tuple(index.unbind()), ())


def random_mask() -> Tensor:
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(6)) > 0.3
    mask[0] = False
    return mask


def naive_balance(routing: Routing, mask: Tensor, scale: str, layers: str, group: str) -> float:
    """Tokens counted one by one."""
    samples = [[b] for b in range(B)] if group == "sample" else [list(range(B))]
    pools = [[layer] for layer in range(L)] if layers == "mean_of_layers" else [list(range(L))]
    total = 0.0
    for members, pool in itertools.product(samples, pools):
        counts, probs, tokens = torch.zeros(K), torch.zeros(K, dtype=torch.float64), 0
        for layer, b, s in itertools.product(pool, members, range(S)):
            if not mask[b, s]:
                continue
            tokens += 1
            for k in routing.index[layer][b, s]:
                counts[k] += 1 / routing.index[0].shape[-1]
            probs += routing.logits[layer][b, s].detach().softmax(0)
        if tokens and scale != "raw":
            counts, probs = counts / tokens, probs / tokens
        value = float((counts * probs).sum()) * (K if scale == "switch" else 1)
        total += value / len(samples) / len(pools)
    return total


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("group", ["sample", "micro_batch"])
@pytest.mark.parametrize("layers", ["mean_of_layers", "pooled"])
@pytest.mark.parametrize("scale", ["mean", "switch", "raw"])
def test_every_reading_equals_a_count_by_hand(scale: str, layers: str, group: str, top_k: int) -> None:
    routing, mask = random_routing(top_k), random_mask()
    loss = balance_loss(routing, mask, scale=scale, layers=layers, group=group)
    assert loss.item() == pytest.approx(naive_balance(routing, mask, scale, layers, group), rel=1e-6)


def test_padding_is_never_counted_and_an_empty_mask_gives_zero() -> None:
    routing, mask = random_routing(), random_mask()
    changed = Routing(
        routing.names,
        tuple(torch.where(mask.unsqueeze(-1), x, 1e3 * torch.ones_like(x)) for x in routing.logits),
        tuple(torch.where(mask.unsqueeze(-1), i, torch.zeros_like(i)) for i in routing.index),
        (),
    )
    for group in ("sample", "micro_batch"):
        assert torch.equal(balance_loss(routing, mask, group=group), balance_loss(changed, mask, group=group))
        empty = balance_loss(routing, torch.zeros_like(mask), group=group)
        assert empty.item() == 0
        (gradient,) = torch.autograd.grad(empty, routing.logits[0])
        assert torch.isfinite(gradient).all()
    assert torch.equal(z_loss(routing, mask), z_loss(Routing(routing.names, routing.logits, routing.index, ()), mask))
    assert torch.equal(routing_load(routing, mask), routing_load(changed, mask))
    assert (routing_load(routing, torch.zeros_like(mask)) == 0).all()


def test_uniform_and_collapsed_routing_give_the_known_values() -> None:
    zeros = torch.zeros(1, 6, K, dtype=torch.float64)
    uniform = Routing(("a",), (zeros,), (torch.arange(6).remainder(K).view(1, 6, 1),), ())
    collapsed = Routing(("a",), (zeros + torch.tensor([100.0, 0, 0]),), (torch.zeros(1, 6, 1).long(),), ())
    mask = torch.ones(1, 6).bool()
    assert balance_loss(uniform, mask).item() == pytest.approx(1 / K)
    assert balance_loss(uniform, mask, scale="switch").item() == pytest.approx(1)
    assert balance_loss(collapsed, mask, scale="switch").item() == pytest.approx(K)
    assert z_loss(uniform, mask).item() == pytest.approx(float(torch.log(torch.tensor(3.0)) ** 2))


@pytest.mark.parametrize("group", ["sample", "global_batch"])
def test_splitting_a_batch_changes_nothing(group: str) -> None:
    routing, mask = random_routing(), random_mask()
    load = torch.tensor([[5.0, 3, 1]] * L)
    whole = balance_loss(routing, mask, group=group, global_load=load)
    parts = [
        balance_loss(
            Routing(routing.names, tuple(x[b] for x in routing.logits), tuple(x[b] for x in routing.index), ()),
            mask[b],
            group=group,
            sample_weights=torch.full((b.stop - b.start,), 1 / B, dtype=torch.float64),
            global_load=load,
        )
        for b in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("tokens", ["text", "supervised", "stratified"])
def test_token_sets(tokens: str, tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    model = get_peft_model(
        tiny_llama(), MoleConfig(add_balance_loss=False, r=4, balance_tokens=tokens, balance_coef=1.0)
    )
    model(torch.arange(16).view(2, 8))
    routing = collect_routing(model)
    mask = torch.ones(2, 8).bool()
    mask[1, 6:] = False
    image, supervised = torch.zeros(2, 8).bool(), torch.zeros(2, 8).bool()
    image[0, 1:5] = True
    supervised[:, 5:] = True
    loss = mole_auxiliary_loss(model, token_mask=mask, supervised_mask=supervised, image_mask=image)
    text = mask & ~image
    if tokens == "stratified":  # sample 0 has both modalities, sample 1 only text
        expected = balance_loss(routing, image, sample_weights=torch.tensor([0.25, 0]))
        expected = expected + balance_loss(routing, text, sample_weights=torch.tensor([0.25, 0.5]))
    else:
        expected = balance_loss(routing, text if tokens == "text" else mask & supervised)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="needs"):
        mole_auxiliary_loss(model, token_mask=mask)


def test_global_batch_weighs_by_the_load_of_the_step_before(tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    config = MoleConfig(add_balance_loss=False, r=4, balance_group="global_batch", balance_coef=1.0)
    model = get_peft_model(tiny_llama(), config)
    mask = torch.ones(2, 8).bool()
    batches = torch.randint(64, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    loads = torch.zeros(2, 3)
    for ids in batches:
        model(ids)
        first = mole_auxiliary_loss(model, token_mask=mask)
        assert first.item() == pytest.approx(1 / 3), "a uniform load stands in before the first step"
        loads += routing_load(collect_routing(model), mask) * mask.sum()
    mole_after_step(model)
    model(batches[0])
    expected = balance_loss(collect_routing(model), mask, group="global_batch", global_load=loads)
    torch.testing.assert_close(mole_auxiliary_loss(model, token_mask=mask), expected)


def test_loss_free_bias_moves_to_starved_experts_and_survives_a_cast(
    tiny_llama: Callable[[], LlamaForCausalLM], tmp_path: object
) -> None:
    config = MoleConfig(
        add_balance_loss=False, r=4, expert_scale="straight_through", balance_coef=0, bias_update_rate=0.05
    )
    model = get_peft_model(tiny_llama(), config)
    ids, mask = torch.arange(32).view(2, 16), torch.ones(2, 16).bool()
    worst = []
    for _ in range(60):
        model(ids)
        worst.append(routing_load(collect_routing(model), mask).amax(dim=-1).mean().item())
        mole_auxiliary_loss(model, token_mask=mask)
        mole_after_step(model)
    assert worst[-1] < worst[0]
    assert worst[-1] < 0.45
    steps = {n: b.clone() for n, b in model.named_buffers() if "bias_steps" in n}
    assert any(b.abs().max() > 1 for b in steps.values())
    model.to(torch.bfloat16)
    assert all(torch.equal(b, steps[n]) for n, b in model.named_buffers() if "bias_steps" in n)
    from peft import PeftModel

    model.float().save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert all(torch.equal(b, steps[n]) for n, b in loaded.named_buffers() if "bias_steps" in n)


def test_without_mole_or_with_one_expert_the_loss_is_zero(tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    mask = torch.ones(1, 4).bool()
    plain = tiny_llama()
    plain(torch.arange(4).view(1, 4))
    assert mole_auxiliary_loss(plain, token_mask=mask).item() == 0
    one = get_peft_model(tiny_llama(), MoleConfig(r=4, num_experts=1))
    one(torch.arange(4).view(1, 4))
    assert mole_auxiliary_loss(one, token_mask=mask).item() == 0
    assert routing_load(collect_routing(one), mask).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_source_loss_is_the_cross_entropy_counted_token_by_token(weighted: bool, by_position: bool) -> None:
    routing, mask, source = random_routing(), random_mask(), torch.tensor([2, 0, 1, 1])
    given = source.unsqueeze(1).expand(B, S) if by_position else source
    weights = torch.tensor([0.1, 0.2, 0.3, 0.9], dtype=torch.float64) if weighted else None
    expected = 0.0
    for b in range(B):
        values = [
            -float(layer[b, s].softmax(-1)[source[b]].log()) for layer in routing.logits for s in range(S) if mask[b, s]
        ]
        mean = sum(values) / len(values) if values else 0.0
        expected += mean * (1 / B if weights is None else float(weights[b]))
    own = source_loss(replace(routing, source=given), mask, weights)
    assert float(own) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="source_coef needs"):
        source_loss(routing, mask)


def test_source_loss_trains_the_router_and_is_no_part_of_evaluation(tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    config = MoleConfig(r=2, num_experts=3, source_coef=1.0, balance_coef=0.0)
    model = get_peft_model(tiny_llama(), config).train()
    ids, source = torch.arange(1, 17).view(4, 4), torch.tensor([0, 1, 2, 1])
    with pytest.raises(ValueError, match="this adapter knows 0 to 2"):
        set_routing_inputs(model, source=source + 1)
    with pytest.raises(ValueError, match="source_coef needs"):
        model(ids, labels=ids)
    set_routing_inputs(model, source=source)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    routing = collect_routing(model)
    assert all((index[..., 0] == source.unsqueeze(1)).all() for index in routing.index)
    set_routing_inputs(model)  # a prompt has no source and needs none
    model.eval()
    assert model(ids).logits.isfinite().all()
    with torch.no_grad():
        assert float(mole_auxiliary_loss(model, token_mask=torch.ones_like(ids).bool())) == 0
