"""Loss weights are global: how a step's samples are cut or spread changes nothing."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava_mole.model.batch_loss import next_token_targets, sample_losses, weigh

LABELS = torch.tensor(
    [
        [-100, -100, 3, 4, -100],
        [-100, 1, 2, 3, 4],
        [-100, -100, -100, -100, 2],
        [5, 1, -100, -100, -100],
    ]
)


def test_targets_are_shifted_by_one() -> None:
    mask, targets = next_token_targets(LABELS)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert targets.tolist() == [3, 4, 1, 2, 3, 4, 2, 1]


def by_hand(logits: torch.Tensor, reduction: str) -> torch.Tensor:
    """Straight from the definition, a sample at a time."""
    means, sums, tokens = [], [], 0
    for row in range(len(LABELS)):
        losses = [
            cross_entropy(logits[row, t][None], LABELS[row, t + 1][None])
            for t in range(4)
            if LABELS[row, t + 1] != -100
        ]
        means.append(sum(losses) / len(losses))
        sums.append(sum(losses))
        tokens += len(losses)
    return sum(means) / len(means) if reduction == "sample_mean" else sum(sums) / tokens


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("cut", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_shares_add_up_to_the_definition(reduction: str, cut: list[int]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 7)
    total, start = torch.zeros(()), 0
    for size in cut:
        labels, own = LABELS[start : start + size], logits[start : start + size]
        mask, targets = next_token_targets(labels)
        losses = cross_entropy(own[mask], targets, reduction="none")
        sums, counts = sample_losses(losses, mask.nonzero()[:, 0], size)
        total = total + weigh(sums, counts, reduction, global_samples=4, global_tokens=8.0)
        start += size
    torch.testing.assert_close(total, by_hand(logits, reduction))


def test_a_sample_without_targets_weighs_nothing_and_is_not_nan() -> None:
    labels = torch.full((1, 3), -100)
    mask, targets = next_token_targets(labels)
    assert len(targets) == mask.sum() == 0
    sums, counts = sample_losses(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1)
    assert weigh(sums, counts, "sample_mean", 1, 0.0) == 0
    assert weigh(sums, counts, "token_mean", 1, 0.0) == 0
