"""The comparison of optimizer states passes what rounding may decide, and nothing else."""

import pytest
import torch
from worlds.optimizer_state import assert_same_state


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{kind}/w": torch.randn(100, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(
    ("kind", "weights", "by"),
    [("master", 3, 1e-4), ("master", 1, 2e-3), ("exp_avg", 1, 0.05), ("exp_avg_sq", 1, 0.05)],
    ids=["many masters a little", "one master far", "first moment", "second moment"],
)
def test_it_finds_other_work(kind: str, weights: int, by: float) -> None:
    own = state()
    own[f"{kind}/w"][:weights] += by
    with pytest.raises(AssertionError, match=f"{kind}/w: "):
        assert_same_state(own, state())


def test_it_passes_rounding_and_refuses_other_tensors() -> None:
    own = state()
    own["master/w"][:2] += 5e-4
    own["exp_avg/w"] += 1e-6
    assert_same_state(own, state())
    del own["exp_avg/w"]
    with pytest.raises(AssertionError):
        assert_same_state(own, state())
