"""Each backend's four products against the definition, in float64, with experts that get no token."""

import pytest
import torch
from torch import Tensor

from llava_mole.mole.experts import build_backend, choose_backend
from llava_mole.mole.kernels import Backend, Dense, Gathered, GroupedGemm, Masked, Pairs, Slices
from llava_mole.mole.router import Gate

T, IN, OUT, K, R = 13, 8, 12, 4, 3


def chosen(top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(T, K - 1, generator=generator).topk(top_k, dim=-1).indices  # expert K-1 gets nothing


def backends(top_k: int) -> dict[str, Backend]:
    index = chosen(top_k)
    small = index.to(torch.uint8)
    found: dict[str, Backend] = {"masked": Masked(small, K), "gather": Gathered(small), "pairs": Pairs(small, K)}
    if top_k == 1:
        slices = build_backend("grouped", Gate(index, None), K, torch.zeros(T, IN))
        assert isinstance(slices, Slices)
        found |= {"slices": slices, "gemm": GroupedGemm(slices.order, slices.ends)}
    return found


CASES = [(k, name) for k in (1, 2) for name in backends(k)]


@pytest.mark.parametrize(("top_k", "name"), CASES)
def test_products_equal_their_definition(top_k: int, name: str) -> None:
    backend, index = backends(top_k)[name], chosen(top_k)
    order = getattr(backend, "order", None)
    if order is not None:
        index = index[order.long()]
    # The grouped product has no float64 kernel and wants rows of 16 bytes.
    dtype, rank, tolerance = (torch.float32, 4, 1e-5) if name == "gemm" else (torch.float64, R, 1e-12)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, y, dy = random(T, IN), random(T, OUT), random(T, OUT)
    stacks, b = [random(K, rank, IN), random(K, rank, IN)], random(K, rank, OUT)
    leaves = [t.clone().requires_grad_() for t in (x, *stacks, b)]
    hs = [torch.einsum("ti,tkri->tkr", leaves[0], a[index]).flatten(1) for a in leaves[1:3]]
    out = y + torch.einsum("tkr,tkro->to", hs[0].view(T, top_k, rank), leaves[3][index])
    close = {"rtol": 0, "atol": tolerance}

    got_hs = backend.shrink(x, stacks)
    for got, expected in zip(got_hs, hs, strict=True):
        torch.testing.assert_close(got, expected, **close)
    got_y = y.clone()
    backend.expand_(got_y, got_hs[0], b)
    torch.testing.assert_close(got_y, out, **close)

    dhs = [random(T, top_k * rank), random(T, top_k * rank)]
    expected = torch.autograd.grad(hs, leaves[:3], dhs, retain_graph=True)
    dx, grads = backend.shrink_grad(x, stacks, dhs, True)
    for got, want in zip([dx, *grads], expected, strict=True):
        torch.testing.assert_close(got, want, **close)
    assert backend.shrink_grad(x, stacks, dhs, False)[0] is None
    dh, db = backend.expand_grad(dy, got_hs[0], b)
    want_dh, want_db = torch.autograd.grad(out, [hs[0], leaves[3]], dy)
    torch.testing.assert_close(dh, want_dh, **close)
    torch.testing.assert_close(db, want_db, **close)
    assert (db[-1] == 0).all(), "an expert without tokens gets a whole gradient of zeros"


def test_the_rule_of_auto() -> None:
    cpu = torch.zeros(5, IN)
    gate = Gate(torch.zeros(5, 1, dtype=torch.int64), None)
    assert choose_backend("auto", None, 1, R, cpu) == "dense"
    assert choose_backend("auto", Gate(None, torch.ones(5, K)), K, R, cpu) == "dense"
    assert choose_backend("auto", gate, K, R, cpu) == "grouped"
    assert choose_backend("masked", gate, K, R, cpu) == "masked"
    device = torch.zeros(5, IN, device="meta", dtype=torch.bfloat16)  # stands for a GPU: only its type is read
    assert choose_backend("auto", gate, 8, 32, device) == "masked"
    assert choose_backend("auto", gate, 9, 32, device) == "grouped"
    assert choose_backend("auto", gate, 9, 30, device) == "masked"
    assert choose_backend("auto", gate, 16, 32, device) == "gather"
    assert isinstance(build_backend("dense", None, 1, cpu), Dense)
