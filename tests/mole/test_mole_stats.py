"""Routing statistics by layer, modality and source."""

import math
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from llava_mole.mole import MoleConfig, Routing, RoutingMeter, collect_routing, mole_auxiliary_loss
from llava_mole.mole.routing import routing_entropy, routing_margin


def fixed(index: list[list[int]]) -> Routing:
    chosen = torch.tensor(index)
    logits = torch.full((*chosen.shape, 3), -1e4).scatter(-1, chosen.unsqueeze(-1), 0.0)
    return Routing(("a",), (logits,), (chosen.unsqueeze(-1),), ())


def test_load_by_modality_and_source_adds_up_over_passes() -> None:
    meter = RoutingMeter(num_sources=2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    image = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    meter.update(fixed([[0, 1, 2, 2], [2, 2, 2, 1]]), mask, image, torch.tensor([0, 1]))
    meter.update(fixed([[0, 1, 1, 2], [2, 2, 0, 2]]), mask, image, torch.tensor([0, 1]))
    assert meter.counts is not None
    assert meter.counts.sum() == 14
    assert meter.load(modality="image")[0].tolist() == [0.5, 0.5, 0]
    torch.testing.assert_close(meter.load(source=1)[0], torch.tensor([1, 1, 6]) / 8)
    torch.testing.assert_close(meter.load()[0], torch.tensor([3.0, 4, 7]) / 14)
    assert meter.load(modality="image", source=1)[0].tolist() == [0, 0, 0]
    meter.reset()
    with pytest.raises(ValueError, match="nothing|no routing"):
        meter.load()


def test_information_about_the_source() -> None:
    mask = torch.ones(2, 4).bool()
    sources = torch.tensor([0, 1])
    for index, expected in (([[0] * 4, [1] * 4], math.log(2)), ([[0, 1, 0, 1]] * 2, 0.0)):
        meter = RoutingMeter(num_sources=2)
        meter.update(fixed(index), mask, None, sources)
        assert meter.source_information()[0].item() == pytest.approx(expected, abs=1e-6)


def test_entropy_and_margin() -> None:
    mask = torch.tensor([[1, 1, 0]]).bool()
    logits = torch.tensor([[[0.0, 0, 0], [100, 0, 0], [5, 5, 5]]])
    routing = Routing(("a",), (logits,), (torch.zeros(1, 3, 1).long(),), ())
    assert routing_entropy(routing, mask).tolist() == pytest.approx([math.log(3) / 2])
    assert routing_margin(routing, mask).tolist() == pytest.approx([0.5])


def test_recomputation_counts_once(tiny_llama: Callable[[], LlamaForCausalLM]) -> None:
    model = get_peft_model(tiny_llama(), MoleConfig(add_balance_loss=False, r=4)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    meter, ids, mask = RoutingMeter(), torch.arange(12).view(2, 6), torch.ones(2, 6).bool()
    for step in range(1, 3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss + mole_auxiliary_loss(model, token_mask=mask)
        meter.update(collect_routing(model), mask)
        loss.backward()
        assert meter.counts is not None
        assert meter.counts.sum() == step * 12 * 2
