"""Initial weights of the language model with rough heads for looking up, which training then refines.

From random weights, heads that look things up form late and suddenly; on two cores that costs hours. The circuit that
training finds in the end is known (induction heads: Olsson et al., 2022, "In-context learning and induction heads"), so
its rough form is the starting point here. Nothing is frozen, and the other weights are random as usual.

* Layer 0: each head attends to the position a fixed distance back (1, 2, 4 or 12: in a line, in a row and in a column
  of a 4 x 4 grid) and writes that word's vector into a subspace of its own.
* Layers 1 and 2: each head compares the word before the current position (what is asked for) with a subspace of all
  earlier positions, and copies a word from where they agree.

Positions can only be told apart by a vector that all words share: the embeddings' first coordinate is a constant.
"""

import math
from typing import Any

import torch

DISTANCES = (1, 2, 4, 12)
CONSTANT = 0.7
"""First coordinate of all embeddings; the rest of an embedding has a norm of about 1."""
SHARPNESS = 0.8
"""Squared amplitude of each frequency of a positional head."""
FAST = range(0, 6)
"""RoPE's frequencies that a positional head uses, from the highest on."""
MIDDLE = range(1, 7)
"""Those by which a look-up head shuns nearby positions, above all its own, which always agrees with itself."""
SLOW = range(7, 16)
"""Those that hardly turn within a sequence: words are compared in them, wherever they stand."""
MATCH, FAR = 1.9, 1.2
"""Scale of queries and keys of a look-up head: of the words' part and of the distance's."""
WRITE, COPY = 0.2, 1.5
"""Scale of what positional and look-up heads write."""
OWN = -1
"""In `LOOK_UPS`: the word of a position itself, in place of the one a distance of `DISTANCES` before it."""
LOOK_UPS = (
    ((0, OWN), (OWN, 0), (1, OWN), (2, OWN)),
    ((3, OWN), (OWN, 1), (OWN, 2), (OWN, 3)),
)
"""For each head of layers 1 and 2: which subspace is compared with the word asked for, and which one is copied."""


@torch.no_grad()
def initialise(model: Any, generator: torch.Generator) -> None:
    """Write the heads into a `LlamaForCausalLM` with four heads a layer and at least three layers."""
    config = model.config
    width, size = config.hidden_size, config.head_dim
    embeddings = model.get_input_embeddings().weight
    embeddings.copy_(torch.randn(embeddings.shape, generator=generator) * width**-0.5)
    embeddings[:, 0] = CONSTANT
    half = size // 2
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    slow = torch.tensor([index + shift for shift in (0, half) for index in SLOW])

    def basis(count: int) -> torch.Tensor:
        """Return `[count, width]` with orthonormal rows, blind to the constant."""
        rows = torch.linalg.qr(torch.randn(width - 1, count, generator=generator))[0].T
        return torch.cat([torch.zeros(count, 1), rows], dim=1)

    def embed(rows: torch.Tensor) -> torch.Tensor:
        """Put the rows of a basis at the slow coordinates of a head: `[size, width]`."""
        out = torch.zeros(size, width)
        out[slow] = rows
        return out

    read = embed(basis(len(slow)))  # what a positional head reads of a word
    written = [embed(basis(len(slow))) for _ in DISTANCES]  # where it writes it
    first = model.model.layers[0].self_attn
    for head, distance in enumerate(DISTANCES):
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size), torch.zeros(size)
        for pair in FAST:
            # RoPE turns the pair (i, i + half): the scores are highest where the key is `distance` before the query.
            query[pair] = SHARPNESS**0.5 * math.cos(theta[pair] * distance)
            query[pair + half] = -(SHARPNESS**0.5) * math.sin(theta[pair] * distance)
            key[pair] = SHARPNESS**0.5
        first.q_proj.weight[rows], first.k_proj.weight[rows] = 0.0, 0.0
        first.q_proj.weight[rows, 0], first.k_proj.weight[rows, 0] = query, key
        first.v_proj.weight[rows] = read
        first.o_proj.weight[:, rows] = WRITE * written[head].T
    own = basis(size)
    for layer, heads in enumerate(LOOK_UPS, start=1):
        attention = model.model.layers[layer].self_attn
        for head, (compared, copied) in enumerate(heads):
            rows = slice(head * size, (head + 1) * size)
            attention.q_proj.weight[rows] = MATCH * written[0]  # the word asked for is the one before
            attention.k_proj.weight[rows] = MATCH * (read if compared == OWN else written[compared])
            for pair in MIDDLE:
                attention.q_proj.weight[rows.start + pair, 0] = FAR
                attention.k_proj.weight[rows.start + pair, 0] = -FAR
            attention.v_proj.weight[rows] = own if copied == OWN else written[copied]
            attention.o_proj.weight[:, rows] = COPY * (own if copied == OWN else read).T
