"""Shared by the tests of training: is the state of two optimizers the same, computed in another order?"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

ROUNDING = 1e-4
"""A gradient below this share of its tensor's largest one may be float32's rounding alone."""


def optimizer_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """`{"master/NAME" | "exp_avg/NAME" | "exp_avg_sq/NAME": float32 tensor}` of a checkpoint."""
    return load_file(run / f"checkpoint-{step}" / "trainer" / "optimizer.safetensors")


def assert_same_state(own: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Masters and moments of two runs that did the same work in another order, up to float32's rounding.

    AdamW divides the first moment by the root of the second. Where a gradient is rounding alone, rounding decides the
    whole step of that weight, and a processor with other matrix kernels takes another one. Such weights (root of the
    second moment above 0 but below `ROUNDING` of the tensor's largest) are compared by their moments only, which are
    polynomials of the gradients. They must be few: at most 5% of a tensor, or one weight.
    """
    assert own.keys() == expected.keys()
    for key, value in own.items():
        other, kind, name = expected[key], *key.split("/", 1)
        atol = 5e-5
        if kind == "master":
            root = torch.maximum(own[f"exp_avg_sq/{name}"], expected[f"exp_avg_sq/{name}"]).sqrt()
            doubtful = (root > 0) & (root < ROUNDING * root.max())
            assert int(doubtful.sum()) <= max(1, 0.05 * doubtful.numel()), f"{key}: {int(doubtful.sum())} doubtful"
            value, other = value[~doubtful], other[~doubtful]
        torch.testing.assert_close(value, other, atol=atol, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
