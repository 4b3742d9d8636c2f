"""The chunked head: equal to full cross-entropy, and never more logits than a chunk."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_mole.model import head_loss
from llava_mole.model.head_loss import head_losses
from llava_mole.mole import MoleConfig


def _inputs(n: int, width: int = 16, vocabulary: int = 37, bias: bool = False) -> tuple:
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=bias).requires_grad_(False)
    return head, torch.randn(n, width), torch.randint(vocabulary, (n,)), torch.rand(n)


def _reference(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = head(hidden)
    return F.cross_entropy(
        logits if softcap is None else softcap * torch.tanh(logits / softcap), targets, reduction="none"
    )


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (None, True), (5.0, False)])
def test_losses_and_gradients_equal_full_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk: int, softcap: float | None, bias: bool
) -> None:
    head, hidden, targets, weights = _inputs(11, bias=bias)
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk * 37)
    own, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses = head_losses(head, own, targets, vocabulary=37, softcap=softcap)
    expected = _reference(head, other, targets, softcap)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-6)


def test_no_position_at_all_still_reaches_the_graph() -> None:
    head, hidden, targets, _ = _inputs(0)
    hidden.requires_grad_()
    head_losses(head, hidden, targets, vocabulary=37).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 16)


def test_a_chunk_is_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets, _ = _inputs(64)
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 8 * 37)
    sizes = []
    hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        losses = head_losses(lambda h: sizes.append(len(h)) or head(h), hidden, targets, vocabulary=37)
    assert sizes == [8] * 8
    saved = losses.grad_fn.saved_tensors
    assert [tuple(t.shape) for t in saved] == [(64, 16)]  # [n, D], where full cross-entropy keeps [n, V]


def test_without_gradients_none_are_computed() -> None:
    head, hidden, targets, _ = _inputs(5)
    with torch.no_grad():
        losses = head_losses(head, hidden, targets, vocabulary=37)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, _reference(head, hidden, targets, None))


def trained_heads() -> dict[str, nn.Module]:
    """Heads [16] -> [37] that train: whole, in part, or through an adapter, as PEFT and MoLE make them."""

    def causal_lm() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=37, **sizes)).requires_grad_(False)

    configs = {
        "saved": MoleConfig(r=2, modules_to_save=["lm_head"]),
        "adapted": MoleConfig(r=2, attention_modules=["q_proj", "lm_head"]),
        "lora": LoraConfig(r=2, target_modules=["lm_head"]),
    }
    heads = {name: get_peft_model(causal_lm(), config).get_output_embeddings() for name, config in configs.items()}
    return {**heads, "whole": nn.Linear(16, 37), "bias": nn.Linear(16, 37)}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["saved", "adapted", "lora", "whole", "bias"])
def test_a_head_that_trains_gets_the_gradient_of_full_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, kind: str, softcap: float | None
) -> None:
    head = trained_heads()[kind]
    if kind == "bias":
        head.weight.requires_grad_(False)
    for name, parameter in head.named_parameters():
        if "B" in name:
            nn.init.normal_(parameter)
    _, hidden, targets, weights = _inputs(11)
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 4 * 37)
    own, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert trained
    losses = head_losses(head, own, targets, vocabulary=37, softcap=softcap)
    found = torch.autograd.grad((losses * weights).sum(), [own, *trained])
    expected = torch.autograd.grad((_reference(head, other, targets, softcap) * weights).sum(), [other, *trained])
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    nothing = head_losses(head, own[:0], targets[:0], vocabulary=37, softcap=softcap).sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(nothing, trained)), "every rank has one"
    with torch.no_grad():
        torch.testing.assert_close(head_losses(head, hidden, targets, vocabulary=37, softcap=softcap), losses)
