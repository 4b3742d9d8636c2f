"""The projector's shapes and LLaVA's state keys."""

import pytest
import torch

from llava_mole.common.errors import ConfigError
from llava_mole.model.multimodal_projector import build_projector, image_positions


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


@pytest.mark.parametrize(
    "kind", ["mlp", "+ends", "mlp2x_gelu+end", "mlp0x_gelu", "MLP2x_gelu", "mlp2x_relu", "pixel_shuffle+", ""]
)
def test_unknown_kinds_are_errors(kind: str) -> None:
    with pytest.raises(ConfigError, match="mlp2x_gelu"):
        build_projector(kind, 5, 7)


@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (2, 5)])
def test_pixel_shuffle_joins_two_by_two_patches(grid: tuple[int, int]) -> None:
    """Against a loop over tokens in float64; beyond an odd side there are zeros."""
    rows, columns = grid
    projector = build_projector("pixel_shuffle+mlp2x_gelu", 5, 7, grid).double()
    assert sorted(projector.state_dict()) == ["1.bias", "1.weight", "3.bias", "3.weight"]
    features = torch.randn(2, rows * columns, 5, dtype=torch.float64)
    expected = []
    for n in range(2):
        for r in range(0, rows, 2):
            for c in range(0, columns, 2):
                joined = torch.zeros(20, dtype=torch.float64)
                for place, (dr, dc) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                    if r + dr < rows and c + dc < columns:
                        joined[5 * place : 5 * place + 5] = features[n, (r + dr) * columns + c + dc]
                hidden = projector[1].weight @ joined + projector[1].bias
                gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
                expected.append(projector[3].weight @ gelu + projector[3].bias)
    ours = projector(features)
    assert ours.shape[1] == image_positions("pixel_shuffle+mlp2x_gelu", grid)
    torch.testing.assert_close(ours.flatten(0, 1), torch.stack(expected), rtol=0, atol=1e-12)


def test_positions_of_an_image() -> None:
    assert image_positions("mlp2x_gelu", (24, 24)) == 576
    assert image_positions("pixel_shuffle+linear", (24, 24)) == 144
    assert image_positions("pixel_shuffle+mlp2x_gelu+ends", (27, 27)) == 198
    assert build_projector("pixel_shuffle+linear+ends", 5, 7, (4, 4))(torch.zeros(1, 16, 5)).shape == (1, 6, 7)
