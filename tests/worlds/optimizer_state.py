"""Shared by the tests of training: is the state of two optimizers the same, computed in another order?"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def optimizer_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """`{"master/NAME" | "exp_avg/NAME" | "exp_avg_sq/NAME": float32 tensor}` of a checkpoint."""
    return load_file(run / f"checkpoint-{step}" / "trainer" / "optimizer.safetensors")


def assert_same_state(own: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Moments and masters of two runs that did the same work in another order, up to float32's rounding.

    Moments are polynomials of the gradients, so all of them must agree, to 0.5% of the tensor's largest. AdamW divides
    the first moment by the root of the second: where an early gradient is little more than rounding, rounding decides
    a part of that weight's step, and another processor takes another one. So 98% of a tensor's masters must agree to
    5e-5 (in a small tensor all but one), and all to 1e-3, a tenth of a step at the tests' rate of 0.01.
    """
    assert own.keys() == expected.keys()
    for key, value in own.items():
        difference = (value - expected[key]).abs()
        if key.startswith("master/"):
            far = int((difference > 5e-5).sum())
            assert far <= max(1, 0.02 * difference.numel()), f"{key}: {far} of {difference.numel()} differ"
            assert float(difference.max()) <= 1e-3, f"{key}: {float(difference.max())}"
        else:
            limit = 5e-3 * float(expected[key].abs().max()) + 1e-9
            assert float(difference.max()) <= limit, f"{key}: {float(difference.max())} above {limit}"
