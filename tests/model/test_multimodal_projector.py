"""The projector's shapes and LLaVA's state keys."""

import pytest
import torch

from llava_mole.common.errors import ConfigError
from llava_mole.model.multimodal_projector import build_projector


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", ["0"]),
        ("mlp1x_gelu", ["0"]),
        ("mlp2x_gelu", ["0", "2"]),
        ("mlp3x_gelu", ["0", "2", "4"]),
    ],
)
def test_keys_and_shapes(kind: str, keys: list[str]) -> None:
    projector = build_projector(kind, 5, 7)
    assert sorted(projector.state_dict()) == sorted(f"{k}.{p}" for k in keys for p in ("weight", "bias"))
    assert projector(torch.zeros(2, 3, 5)).shape == (2, 3, 7)


def test_mlp2x_is_linear_exact_gelu_linear() -> None:
    projector = build_projector("mlp2x_gelu", 5, 7).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    first = x @ projector[0].weight.T + projector[0].bias
    gelu = first * 0.5 * (1 + torch.erf(first / 2**0.5))
    torch.testing.assert_close(projector(x), gelu @ projector[2].weight.T + projector[2].bias)


def test_learned_vectors_stand_around_an_image() -> None:
    projector = build_projector("mlp2x_gelu+ends", 5, 7)
    assert sorted(projector.state_dict())[-2:] == ["3.end", "3.start"]
    out = projector(torch.randn(2, 3, 5))
    assert out.shape == (2, 5, 7)
    for row in out:
        assert torch.equal(row[0], projector[3].start)
        assert torch.equal(row[-1], projector[3].end)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


@pytest.mark.parametrize("kind", ["mlp", "+ends", "mlp2x_gelu+end", "mlp0x_gelu", "MLP2x_gelu", "mlp2x_relu", ""])
def test_unknown_kinds_are_errors(kind: str) -> None:
    with pytest.raises(ConfigError, match="mlp2x_gelu"):
        build_projector(kind, 5, 7)
