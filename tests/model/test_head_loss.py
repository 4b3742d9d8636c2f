"""The chunked head: equal to full cross-entropy, and never more logits than a chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_mole.model import head_loss
from llava_mole.model.head_loss import head_losses


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
