"""A trained adapter for inference engines that need static shapes, such as vLLM with CUDA graphs.

The experts of an FFN are computed by two products over all of them, `B'((A' x) * rep(G, R))`, where G `[T, K]` is zero
for the experts that a token does not use: no shape depends on the routing, and nothing synchronises. Each projection
has its matrices of all experts side by side, with alpha / r inside B. Attention LoRA is the same for all tokens, so it
is merged into the weights.

Shape legend: T tokens, D hidden size, K experts, R rank, N = K R, I input size, O output size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.experts import weight_matrix
from llava_mole.mole.layer import ExpertLayer, MoleLinear, MoleMlp
from llava_mole.mole.router import choose, dense_weights, router_dtype, sparse_weights

MODULE = "mole"
"""Name of the experts inside their FFN, in an exported model: `model.layers.0.mlp.mole.router`."""


@dataclass(frozen=True)
class StaticGate:
    """How the experts of an FFN are chosen, as plain values that JSON keeps."""

    num_experts: int
    top_k: int
    mode: str
    expert_scale: str
    temperature: float
    shared_scale: str | None
    """`one` or `complement`; None without a shared expert."""

    @classmethod
    def of(cls, config: MoleConfig) -> "StaticGate":
        """The gate of an adapter. Raises ValueError, with the options that have no static form."""
        problems = [
            f"{name} {value!r}"
            for name, value, allowed in (
                ("granularity", config.granularity, ("token",)),
                ("router", config.router, ("learned", "hash")),
                ("router_scope", config.router_scope, ("ffn",)),
                ("attention_experts", config.attention_experts, (False,)),
                ("mix", config.mix, ("projection",)),
                ("modules_to_save", config.modules_to_save, (None, [])),
                ("trainable_token_indices", config.trainable_token_indices, (None, [], {})),
            )
            if value not in allowed
        ]
        if problems:
            raise ValueError(
                f"the adapter has {', '.join(problems)}; a static form needs experts of whole FFNs that a router "
                "chooses for every token by itself"
            )
        return cls(
            config.num_experts,
            config.top_k,
            config.mode,
            config.expert_scale,
            config.temperature,
            config.shared_scale if config.shared_r else None,
        )

    def settings(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


class StaticExperts(nn.Module):
    """The experts of one FFN and their router, for inference.

    Its parameters are those of `static_tensors`: `router` `[K, D]`, `router_bias` and `selection_bias` `[K]`, all
    float32; `<projection>_A` `[N, I]` (`[R, I]` if the experts share it), `<projection>_B` `[N, O]`, and with a shared
    expert `<projection>_shared_A` and `_shared_B`.

    Args:
        gate: How experts are chosen.
        shapes: The shape of every parameter.
        device, dtype: Of the experts; routers are float32, or float64 with a float64 `dtype`.
    """

    def __init__(
        self,
        gate: StaticGate,
        shapes: Mapping[str, Sequence[int]],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.gate = gate
        for name, shape in shapes.items():
            kind = router_dtype(dtype) if name in _ROUTER else dtype
            self.register_parameter(name, nn.Parameter(torch.empty(tuple(shape), device=device, dtype=kind), False))

    @classmethod
    def of(cls, layout: Mapping[str, Any], **placement: Any) -> "StaticExperts":
        """From an entry of `static_layout`; `placement` is `device` and `dtype`."""
        return cls(StaticGate(**layout["gate"]), layout["shapes"], **placement)

    def weights(self, x_TD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """G `[T, K]` in float32 (None: one expert), and the weight of the shared expert `[T, 1]` (None: 1)."""
        gate = self.gate
        if gate.num_experts == 1:
            return None, None
        bias = self._parameters.get("router_bias")
        router: Any = self.router
        logits_TK = F.linear(x_TD.to(router.dtype), router, bias) / gate.temperature
        index_Tk = choose(logits_TK, gate.top_k, self._parameters.get("selection_bias"))
        if gate.mode == "dense":
            found = dense_weights(logits_TK, gate.expert_scale)
        else:
            found = sparse_weights(logits_TK, index_Tk, gate.expert_scale)
        shared = None
        if gate.shared_scale == "complement":
            shared = 1 - logits_TK.softmax(dim=-1).gather(-1, index_Tk)
        return weight_matrix(found, gate.num_experts, logits_TK), shared

    def shrink(self, projection: str, x_TI: Tensor) -> Tensor:
        """`A' x` `[T, N]`, followed by that of the shared expert if there is one."""
        return torch.cat([x_TI @ a.T for a in self._matrices(projection, "A")], dim=-1)

    def expand(self, projection: str, h_TN: Tensor, weight_TK: Tensor | None, shared_T1: Tensor | None) -> Tensor:
        """What the experts add to the output of a projection, `[T, O]`, from what `shrink` gave."""
        b, *shared_b = self._matrices(projection, "B")
        width = self._matrices(projection, "A")[0].shape[0]
        h_TN, shared_h = h_TN[:, :width], h_TN[:, width:]
        if weight_TK is not None:
            rank = b.shape[0] // self.gate.num_experts
            h_TN = (h_TN.unflatten(-1, (-1, rank)) * weight_TK.to(h_TN.dtype).unsqueeze(-1)).flatten(1)
        y_TO = h_TN @ b
        for matrix in shared_b:
            y_TO = y_TO + (shared_h if shared_T1 is None else shared_h * shared_T1.to(shared_h.dtype)) @ matrix
        return y_TO

    def _matrices(self, projection: str, side: str) -> list[Tensor]:
        found = [self._parameters.get(f"{projection}{part}_{side}") for part in ("", "_shared")]
        return [matrix for matrix in found if matrix is not None]


_ROUTER = ("router", "router_bias", "selection_bias")


def is_router(name: str) -> bool:
    """Whether a tensor of `static_tensors` belongs to a router; these stay in float32."""
    return name.rpartition(".")[2] in _ROUTER


def static_layout(model: nn.Module, adapter_name: str = "default") -> dict[str, dict[str, Any]]:
    """Path of every FFN with experts -> `gate` and `shapes`, from which `StaticExperts.of` builds them. Plain values.

    Raises ValueError for an adapter without a static form, or without experts.
    """
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, tensor in static_tensors(model, adapter_name):
        path, _, parameter = name.rpartition(f".{MODULE}.")
        shapes.setdefault(path, {})[parameter] = list(tensor.shape)
    if not shapes:
        raise ValueError(f"adapter {adapter_name!r} has no experts")
    gates = {path: StaticGate.of(layer.configs[adapter_name]) for path, layer in _expert_layers(model, adapter_name)}
    return {path: {"gate": gates[path].settings(), "shapes": shapes[path]} for path in shapes}


@torch.no_grad()
def static_tensors(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """The tensors of all `StaticExperts`: `<path of the FFN>.mole.<parameter>`, with paths of the base model.

    Raises ValueError for an adapter without a static form.
    """
    for path, layer in _expert_layers(model, adapter_name):
        experts, router = layer.experts(adapter_name), layer.router(adapter_name)
        state: Any = layer.mole_state[adapter_name] if adapter_name in layer.mole_state else None
        prefix = f"{path}.{MODULE}."
        if router is not None:
            yield f"{prefix}router", router.weight.detach().to(router_dtype(router.weight.dtype))
            if router.bias is not None:
                yield f"{prefix}router_bias", router.bias.detach().to(router_dtype(router.bias.dtype))
        if state is not None and (bias := state.selection_bias()) is not None:
            yield f"{prefix}selection_bias", bias
        for projection in layer.projections:
            a_KRI, b_KRO = experts.pair(projection)
            yield f"{prefix}{projection}_A", a_KRI.detach().flatten(0, 1)
            yield f"{prefix}{projection}_B", b_KRO.detach().flatten(0, 1) * layer.scaling[adapter_name]
            if layer.configs[adapter_name].shared_r:
                a_RI, b_RO = experts.shared_pair(projection)
                yield f"{prefix}{projection}_shared_A", a_RI.detach()
                yield f"{prefix}{projection}_shared_B", b_RO.detach() * layer.scaling[adapter_name]


@torch.no_grad()
def merged_linears(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """The weights of the linears with plain LoRA, merged: `<path of the linear>.weight` in the base model."""
    for path, module in _base_paths(model):
        if isinstance(module, MoleLinear) and adapter_name in module.mole_lora:
            for linear, a_RI, b_RO in module.updates(adapter_name):
                weight: Any = linear.weight
                yield f"{path}.weight", weight + (b_RO.T @ a_RI * module.scaling[adapter_name]).to(weight.dtype)


def _base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a PEFT model with their paths in the base model."""
    base: Any = model
    yield from (base.get_base_model() if hasattr(base, "get_base_model") else base).named_modules()


def _expert_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, MoleMlp]]:
    for path, module in _base_paths(model):
        if isinstance(module, ExpertLayer) and adapter_name in module.mole_experts:
            StaticGate.of(module.configs[adapter_name])
            if not isinstance(module, MoleMlp):
                raise ValueError(f"{path}: its linears carry experts one by one, which has no static form")
            yield path, module
