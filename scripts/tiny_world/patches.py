"""The words that stand in each patch of an image: what the tower learns of its tokens one by one.

CLIP's loss and the pooling head reward tokens that together tell what an image shows. The names in a document's
patches then make up 2% of the tokens' variance, and no projector finds them. Here each token is compared with the words
of its own patch, without a projection in between, so that they become its largest part.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from llava_mole.data.prepare.sources.tiny.document import ORDINALS
from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE, Sample

SIDE = 4
"""Patches from edge to edge."""
BLANK = "nothing"
GROUND = 200
"""A pixel whose darkest channel is below this belongs to a shape; grounds are light."""
COVERED = 0.25
"""Share of a patch's pixels that a shape covers, from which on the patch shows it."""
TALL = 7
"""Value from which on a bar reaches into the second row of patches from above."""
TEMPERATURE = 20.0
BLANKS = 0.2
"""Share of the empty patches that count in a step: most patches are empty."""


def words_of(sample: Sample) -> list[set[str]]:
    """Return the words of each of the 16 patches, row by row, or an empty list for an image of tissue."""
    facts = [fact.split() for fact in sample.facts]
    words: list[set[str]] = [set() for _ in range(SIDE * SIDE)]
    if "shape" in sample.facts[-1]:
        shape, colour = facts[2][-1], facts[3][-1]
        dark = (np.asarray(sample.image).min(-1) < GROUND).reshape(SIDE, IMAGE_SIZE // SIDE, SIDE, IMAGE_SIZE // SIDE)
        for patch, share in enumerate(dark.mean((1, 3)).flatten()):
            words[patch] |= {shape, colour} if share >= COVERED else set()
    elif facts[0][:2] == ["the", "bar"]:
        values = {fact[2]: int(fact[-1]) for fact in facts if fact[:2] == ["the", "bar"] and fact[3] == "has"}
        for fact in (fact for fact in facts if fact[:2] == ["the", "bar"]):
            column, word = int(fact[2]) - 1, fact[-1]
            row = 0 if word.isdigit() else 3 if word[0].isupper() else 2
            words[SIDE * row + column].add(word)
            if row == 2 and values[fact[2]] >= TALL:
                words[SIDE + column].add(word)
    elif facts[0][:2] == ["the", "first"]:
        for fact in facts:
            if fact[:3] == ["a", "table", "of"]:
                words[0].add(fact[-1])
                words[1].add(fact[-1])
            elif fact[0] == "the":
                row = SIDE * (ORDINALS.index(fact[1]) + 1)
                words[row + (2 if fact[-1].isdigit() else 0)].add(fact[-1])
    else:
        return []
    return [found or {BLANK} for found in words]


class PatchWords(torch.nn.Module):
    """The loss of patches against words; one vector of the tokens' width for each word, used in training only."""

    truth: torch.Tensor

    def __init__(self, samples: Sequence[Sample], width: int) -> None:
        """Find the words of all patches: `truth`, bool `[N, 16, W]`, without a word where nothing is known."""
        super().__init__()
        found = [words_of(sample) for sample in samples]
        self.words = sorted({word for patches in found for patch in patches for word in patch})
        index = {word: number for number, word in enumerate(self.words)}
        truth = torch.zeros(len(samples), SIDE * SIDE, len(self.words), dtype=torch.bool)
        for row, patches in enumerate(found):
            for patch, words in enumerate(patches):
                truth[row, patch, [index[word] for word in words]] = True
        self.register_buffer("truth", truth, persistent=False)
        self.blank = index[BLANK]
        self.vectors = torch.nn.Parameter(torch.randn(len(self.words), width) * width**-0.5)

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Compute the loss of the tokens, float `[B, 16, width]`, of the images `rows`. Returns a scalar.

        A token's similarity to its words competes with that to all other words. Most empty patches are left out.
        """
        truth = self.truth[rows].flatten(0, 1)
        chance = torch.rand(len(truth), generator=generator)
        used = truth.any(1) & (~truth[:, self.blank] | (chance < BLANKS))
        tokens = F.normalize(F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1)[used], dim=-1)
        logits = TEMPERATURE * tokens @ F.normalize(self.vectors, dim=-1).T
        truth = truth[used]
        false_sum = logits.masked_fill(truth, -torch.inf).logsumexp(1, keepdim=True)
        return (F.softplus(false_sum - logits) * truth).sum() / truth.sum()
