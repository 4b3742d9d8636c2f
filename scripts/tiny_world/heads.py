"""Initial weights of the language model with rough heads for looking up, which training then refines.

From random weights, heads that look things up form late and suddenly; on two cores that costs hours. The circuit that
training finds in the end is known (induction heads: Olsson et al., 2022, "In-context learning and induction heads"), so
its rough form is the starting point here. Nothing is frozen, and the other weights are random as usual.

* Layer 0: each head attends to the position a fixed distance back (1, 2, 4 or 8: neighbours in a line, in a row and in a
  column of a 4 x 4 grid) and writes that word's vector into a subspace of its own.
* Layers 1 and 2: each head compares the word before the current position (what is asked for) with a subspace of all
  earlier positions, and copies a word from where they agree.

Positions can only be told apart by a vector that all words share: the embeddings' first coordinate is a constant.
"""

import math
from typing import Any

import torch

DISTANCES = (1, 2, 4, 8)
CONSTANT = 0.7
"""First coordinate of all embeddings; the rest of an embedding has a norm of about 1."""
SHARPNESS = 0.8
"""Squared amplitude of each frequency of a positional head."""
FREQUENCIES = 6
"""How many of RoPE's frequencies, the highest ones, a positional head uses."""
MATCH = 2.4
"""Scale of queries and keys of a look-up head."""
FAR = 1.2
"""Amplitude by which a look-up head shuns nearby positions, above all its own, which always agrees with itself."""
WRITE, COPY = 0.12, 0.5
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
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(size // 2) / (size // 2))
    used = torch.arange(size // 2) < FREQUENCIES

    def subspace() -> torch.Tensor:
        """Return `[size, width]` with orthonormal rows, blind to the constant."""
        basis = torch.linalg.qr(torch.randn(width - 1, size, generator=generator))[0].T
        return torch.cat([torch.zeros(size, 1), basis], dim=1)

    read = [subspace() for _ in DISTANCES]  # what a positional head reads of a word
    written = [subspace() for _ in DISTANCES]  # where it writes it
    first = model.model.layers[0].self_attn
    for head, distance in enumerate(DISTANCES):
        rows = slice(head * size, (head + 1) * size)
        amplitude = math.sqrt(SHARPNESS) * used
        query, key = torch.zeros(size), torch.zeros(size)
        # RoPE turns the pair (i, i + size / 2): the scores are highest where the key is `distance` before the query.
        query[: size // 2], query[size // 2 :] = amplitude * torch.cos(theta * distance), -amplitude * torch.sin(
            theta * distance
        )
        key[: size // 2] = amplitude
        first.q_proj.weight[rows], first.k_proj.weight[rows] = 0.0, 0.0
        first.q_proj.weight[rows, 0], first.k_proj.weight[rows, 0] = query, key
        first.v_proj.weight[rows] = read[head]
        first.o_proj.weight[:, rows] = WRITE * written[head].T
    own = subspace()
    for layer, heads in enumerate(LOOK_UPS, start=1):
        attention = model.model.layers[layer].self_attn
        for head, (compared, copied) in enumerate(heads):
            rows = slice(head * size, (head + 1) * size)
            # The word asked for is the one before; as a word is compared in the coordinates in which it was read.
            if compared == OWN:
                attention.q_proj.weight[rows], attention.k_proj.weight[rows] = MATCH * written[0], MATCH * read[0]
            else:
                turn = read[0] @ read[compared].T  # from the coordinates of one positional head to another's
                attention.q_proj.weight[rows] = MATCH * written[0]
                attention.k_proj.weight[rows] = MATCH * turn @ written[compared]
            for pair in range(1, 1 + FREQUENCIES):
                attention.q_proj.weight[rows.start + pair, 0] = FAR
                attention.k_proj.weight[rows.start + pair, 0] = -FAR
            attention.v_proj.weight[rows] = own if copied == OWN else written[copied]
            attention.o_proj.weight[:, rows] = COPY * (own if copied == OWN else read[copied]).T
