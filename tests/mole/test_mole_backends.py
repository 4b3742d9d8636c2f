"""Each backend's three products, and the gradients made of them, against the definition, in float64."""

import pytest
import torch
from torch import Tensor

from llava_mole.mole import kernels
from llava_mole.mole.experts import build_backend, choose_backend, lora_linear
from llava_mole.mole.kernels import Backend, expand, shrink
from llava_mole.mole.router import ExpertWeights

T, IN, OUT, K, R = 13, 8, 12, 4, 3


def chosen(top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(T, K - 1, generator=generator).topk(top_k, dim=-1).indices  # expert K-1 gets nothing


def build(name: str, index: Tensor) -> Backend:
    if name == "wide":
        return Backend(kernels.wide, (torch.zeros(T, K).scatter(1, index, 1.0),))
    return build_backend("grouped" if name == "gemm" else name, ExpertWeights(index, None), K)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["masked", "wide", "grouped", "gemm"])
def test_products_equal_their_definition(top_k: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_grouped_mm", lambda x: name == "gemm")
    index = chosen(top_k)
    backend = build(name, index)
    products = backend.products()
    if backend.order is not None:
        index = index[backend.order.long()]
    # The grouped product has no float64 kernel and needs rows of 16 bytes.
    dtype, rank, tolerance = (torch.float32, 4, 1e-5) if name == "gemm" else (torch.float64, R, 1e-12)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, y, a, b, h = random(T, IN), random(T, OUT), random(K, rank, IN), random(K, rank, OUT), random(T, top_k, rank)
    close = {"rtol": 0, "atol": tolerance}
    if name == "wide":  # all experts have a row; those that a token does not use must not count
        torch.testing.assert_close(products.shrink(x, [a]), torch.einsum("ti,kri->tkr", x, a), **close)
        h_of_all = random(T, K, rank).scatter(1, index.unsqueeze(-1).expand(-1, -1, rank), h)
    else:
        torch.testing.assert_close(products.shrink(x, [a]), torch.einsum("ti,tkri->tkr", x, a[index]), **close)
        h_of_all = h
    expanded = torch.einsum("tkr,tkro->to", h, b[index])
    torch.testing.assert_close(products.expand(h_of_all, b, None), expanded, **close)
    onto = y.clone()
    assert products.expand(h_of_all, b, onto) is onto
    torch.testing.assert_close(onto, y + expanded, **close)
    outer = torch.zeros(K, rank, IN, dtype=dtype)
    outer.index_add_(0, index.flatten(), torch.einsum("tkr,ti->tkri", h, x).flatten(0, 1))
    torch.testing.assert_close(products.outer(h_of_all, x), outer, **close)
    assert (products.outer(h_of_all, x)[-1] == 0).all(), "an expert without tokens gets a whole gradient of zeros"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["masked", "wide", "grouped"])
def test_gradients_equal_those_of_the_definition(top_k: int, name: str) -> None:
    index = chosen(top_k)
    backend = build(name, index)
    if backend.order is not None:
        index = index[backend.order.long()]
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, y, b, stacks = leaf(T, IN), leaf(T, OUT), leaf(K, R, OUT), [leaf(K, R, IN), leaf(K, R, IN)]
    own = shrink(backend, 2.0, x, stacks)
    expected = [2.0 * torch.einsum("ti,tkri->tkr", x, a[index]) for a in stacks]
    outputs = [expand(backend, y.clone(), own[0], b)]
    definitions = [y + torch.einsum("tkr,tkro->to", expected[0], b[index])]
    if name != "wide":  # it computes rows of experts that a token does not use, whose gradient is zero
        outputs, definitions = [*own, *outputs], [*expected, *definitions]
    probes = [leaf(*out.shape).detach() for out in outputs]
    leaves = [x, y, b, *stacks]
    for got, want in zip(outputs, definitions, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(outputs, leaves, probes, allow_unused=True, materialize_grads=True)
    definition = torch.autograd.grad(definitions, leaves, probes, allow_unused=True, materialize_grads=True)
    for got, want in zip(gradients, definition, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (gradients[-1][-1] == 0).all(), "an expert without tokens gets a whole gradient of zeros"


@pytest.mark.parametrize("bias", [False, True])
def test_lora_on_a_frozen_linear_equals_its_definition(bias: bool) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((T, IN), (R, IN), (R, OUT)))
    own = lora_linear(base, x, a, b, 2.0, 0.0)
    assert own.grad_fn is not None
    assert own.grad_fn.name() == "_LoraOnFrozenBackward"
    hooked = torch.nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    hooked.load_state_dict(base.state_dict())
    called = []
    hooked.register_forward_hook(lambda *_: called.append(1))
    other = lora_linear(hooked, x, a, b, 2.0, 0.0)  # a linear with hooks is called
    assert called
    definition = base(x) + 2.0 * x @ a.T @ b
    probe = torch.randn(T, OUT, dtype=torch.float64)
    wanted = torch.autograd.grad(definition, (x, a, b), probe)
    for result in (own, other):
        torch.testing.assert_close(result, definition, rtol=0, atol=1e-12)
        for got, want in zip(torch.autograd.grad(result, (x, a, b), probe), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_rule_of_auto() -> None:
    cpu = torch.zeros(5, IN)
    weights = ExpertWeights(torch.zeros(5, 1, dtype=torch.int64), None)
    assert choose_backend("auto", None, 1, R, cpu) == "dense"
    assert choose_backend("auto", ExpertWeights(None, torch.ones(5, K)), K, R, cpu) == "dense"
    assert choose_backend("auto", weights, 4, 8, cpu) == "masked"
    assert choose_backend("auto", weights, 5, 8, cpu) == "grouped"
    assert choose_backend("masked", weights, K, R, cpu) == "masked"
    device = torch.zeros(5, IN, device="meta", dtype=torch.bfloat16)  # stands for a GPU: only its type is read
    assert choose_backend("auto", weights, 8, 32, device) == "masked"
    assert choose_backend("auto", weights, 9, 32, device) == "grouped"
    assert choose_backend("auto", weights, 9, 30, device) == "masked"
    assert choose_backend("auto", weights, 16, 32, device) == "grouped"
    assert build_backend("dense", None, 1).function is kernels.dense
