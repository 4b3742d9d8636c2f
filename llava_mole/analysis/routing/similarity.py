"""How alike the experts of a projection are: in their weights, and in what they do to the same inputs.

With `H_k = X A_k^T` `[T, R]` the update of expert k on T inputs is `U_k = H_k B_k`. Linear CKA (Kornblith et al. 2019)
of two experts is `|U_i^T U_j|^2 / (|U_i^T U_i| |U_j^T U_j|)`, of updates whose mean over the inputs is taken out. As
`U_i^T U_j = B_i^T (H_i^T H_j) B_j`, it needs products of rank size only, which are summed over the inputs. The inputs
are all tokens, also those that another expert was chosen for.

Shape legend: T tokens, K experts, R rank, I input size, O output size, M = K R.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_mole.analysis.conflict.gradients import layer_of
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import ExpertLayer


@dataclass
class Projection:
    """One projection with several experts, and sums over its inputs."""

    name: str
    layer: int | None
    linear: nn.Module
    a: Tensor
    """`[K, R, I]`."""
    b: Tensor
    """`[K, R, O]`."""
    tokens: int = 0
    products: Tensor = field(init=False)
    """float64 `[M, M]`: sum of the outer products of `x A^T`."""
    sums: Tensor = field(init=False)
    """float64 `[M]`."""

    def __post_init__(self) -> None:
        width = self.a.shape[0] * self.a.shape[1]
        self.products = torch.zeros(width, width, dtype=torch.float64, device=self.a.device)
        self.sums = torch.zeros(width, dtype=torch.float64, device=self.a.device)

    def add(self, x: Tensor) -> None:
        """Add inputs `[..., I]`."""
        h_TM = (x.flatten(0, -2).to(self.a.dtype) @ self.a.flatten(0, 1).T).double()
        self.products += h_TM.T @ h_TM
        self.sums += h_TM.sum(dim=0)
        self.tokens += len(h_TM)

    def cka(self) -> Tensor:
        """Linear CKA of the updates, float64 `[K, K]`; NaN for an expert whose update is constant."""
        centred = self.products - torch.outer(self.sums, self.sums) / max(1, self.tokens)
        return alignment(centred, self.b)


def alignment(products_MM: Tensor, b_KRO: Tensor) -> Tensor:
    """CKA of K updates `H_k B_k`, from the products `H_i^T H_j` of centred `H`."""
    count, rank, _ = b_KRO.shape
    products = products_MM.view(count, rank, count, rank).transpose(1, 2)  # [K, K, R, R]
    b = b_KRO.double()
    outputs = b @ b.mT  # B_k B_k^T
    # |B_i^T P B_j|^2 = tr(P (B_j B_j^T) P^T (B_i B_i^T))
    squares = torch.einsum("ijrs,jst,ijut,iur->ij", products, outputs, products, outputs)
    own = squares.diagonal()
    return squares / (own.unsqueeze(0) * own.unsqueeze(1)).sqrt()


def weight_cosines(a_KRI: Tensor, b_KRO: Tensor) -> Tensor:
    """Cosine of the updates `B_k^T A_k` as vectors of `O I` numbers, float64 `[K, K]`."""
    a, b = a_KRI.double(), b_KRO.double()
    products = (torch.einsum("iro,jso->ijrs", b, b) * torch.einsum("irx,jsx->ijrs", a, a)).sum(dim=(-2, -1))
    own = products.diagonal()
    return products / (own.unsqueeze(0) * own.unsqueeze(1)).sqrt()


def find_projections(model: LlavaMole) -> list[Projection]:
    """All projections of the active adapter that have more than one expert."""
    found = []
    for name, module in model.named_modules():
        adapter = module.current_adapter() if isinstance(module, ExpertLayer) else None
        if not isinstance(module, ExpertLayer) or adapter is None or module.configs[adapter].num_experts == 1:
            continue
        for projection in module.projections:
            a_KRI, b_KRO = (value.detach() for value in module.experts(adapter).pair(projection))
            a_KRI = a_KRI.expand(len(b_KRO), -1, -1)
            found.append(Projection(f"{name}.{projection}", layer_of(name), module.linear(projection), a_KRI, b_KRO))
    return found


@contextmanager
def read_inputs(projections: Sequence[Projection]) -> Iterator[None]:
    """Add the inputs of every forward pass in the block, which must have no padding."""

    def adding(projection: Projection) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: projection.add(args[0].detach())

    with ExitStack() as stack:
        for projection in projections:
            stack.callback(projection.linear.register_forward_pre_hook(adding(projection)).remove)
        yield


def describe_similarity(projections: Sequence[Projection]) -> list[dict[str, Any]]:
    """CKA of updates and cosine of weights of every projection, as plain values."""
    return [
        {
            "name": projection.name,
            "layer": projection.layer,
            "projection": projection.name.rpartition(".")[2],
            "cka": projection.cka().tolist(),
            "weight_cosine": weight_cosines(projection.a, projection.b).tolist(),
        }
        for projection in projections
    ]
