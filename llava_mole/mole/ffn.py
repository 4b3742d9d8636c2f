"""Which FFNs can carry experts, and how their forward pass is composed.

The wrapper calls an FFN's linears as modules, so quantized linears work, but composes them itself, because the
experts of each projection act on that projection's own input. `check_composition` verifies on one random token that
the composition equals the FFN's own forward pass.

Here "gate" always means the gate projection of the FFN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FfnLayout:
    """Attribute names of an FFN's parts.

    With `gate`: `down(act(gate(x)) * up(x))`. Without: `down(act(up(x)))`. With `fused`, the linear `up` computes gate
    and up side by side (Phi-3). `dropout`, if the FFN has one, is applied to the output (GPT-2).
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False
    dropout: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linears that carry experts; those before `down` read the FFN's input."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


_LINEARS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "gate_up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "up_proj", "down_proj"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_DROPOUTS = ("dropout", "residual_dropout", "resid_dropout")

KNOWN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Attention linears of Llama, Mistral, Qwen2, Qwen3, Gemma and most others."""

FAMILY_ATTENTION = {
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
    "gptj": ["q_proj", "k_proj", "v_proj", "attn.out_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "self_attn.dense"],
    "phi3": ["qkv_proj", "o_proj"],
    "falcon": ["query_key_value", "self_attention.dense"],
}
"""Attention linears of families that use other names, by `config.model_type`."""


def linear_widths(linear: nn.Module) -> tuple[int, int] | None:
    """`(input width, output width)` of a linear-like module, or None for any other module."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # nx, nf: transformers' Conv1D, as in GPT-2
        found = [getattr(linear, name, None) for name in names]
        if all(isinstance(width, int) for width in found):
            return found[0], found[1]  # type: ignore[return-value]
    return None


def find_layout(module: nn.Module) -> FfnLayout | None:
    """The layout of `module` if its parts have names of a known family, else None."""
    children = dict(module.named_children())
    for gate, up, down in _LINEARS:
        names = [name for name in (gate, up, down) if name]
        if all(name in children and linear_widths(children[name]) for name in names):
            break
    else:
        return None
    activation = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    if activation is None:
        return None
    dropout = next((name for name in _DROPOUTS if isinstance(children.get(name), nn.Dropout)), None)
    return FfnLayout(up, down, activation, gate, fused=up == "gate_up_proj", dropout=dropout)


def layout_from_names(names: dict[str, str], module: nn.Module, where: str) -> FfnLayout:
    """The layout that the user spelled out as `ffn_projections`.

    Raises:
        ValueError: an unknown or missing role, or an attribute that `module` does not have; `where` names the module.
    """
    roles = ("gate", "up", "down", "activation", "dropout")
    for role in names:
        if role not in roles:
            raise ValueError(f"ffn_projections has the role {role!r}; the roles are {', '.join(roles)}")
    for role in ("up", "down", "activation"):
        if role not in names:
            raise ValueError(f"ffn_projections lacks the role {role!r}")
    for role, name in names.items():
        if not hasattr(module, name):
            raise ValueError(
                f"ffn_projections.{role} is {name!r}, but {where} ({type(module).__name__}) has no such attribute"
            )
    return FfnLayout(names["up"], names["down"], names["activation"], names.get("gate"), dropout=names.get("dropout"))


def activate(layout: FfnLayout, ffn: nn.Module, up: Tensor, gate: Tensor | None) -> Tensor:
    """The input of the down projection, computed from the outputs of the other projections."""
    act = getattr(ffn, layout.activation)
    if layout.fused:
        gate, up = up.chunk(2, dim=-1)
    return act(up) if gate is None else act(gate) * up


def check_composition(layout: FfnLayout, ffn: nn.Module, where: str) -> None:
    """Raise ValueError unless the composed forward pass of `ffn` equals its own, on one random token.

    The check is skipped for weights that cannot compute here (meta device, the integers of a quantized linear).
    """
    weights = [getattr(getattr(ffn, name), "weight", None) for name in layout.projections]
    if any(w is None or w.device.type == "meta" or not w.is_floating_point() or w.numel() == 0 for w in weights):
        return
    weight = weights[0]
    assert weight is not None
    widths = linear_widths(getattr(ffn, layout.projections[0]))
    assert widths is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, widths[0], generator=generator).to(weight.device, weight.dtype)
    was_training = ffn.training
    ffn.eval()
    try:
        with torch.no_grad():
            expected = ffn(x)
            gate = None if layout.gate is None else getattr(ffn, layout.gate)(x)
            composed = getattr(ffn, layout.down)(activate(layout, ffn, getattr(ffn, layout.up)(x), gate))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where} ({type(ffn).__name__}) cannot be called with one tensor: {error}") from None
    finally:
        ffn.train(was_training)
    if not isinstance(expected, Tensor) or not torch.allclose(expected, composed, rtol=1e-2, atol=1e-3):
        form = "down(act(up(x)))" if layout.gate is None else "down(act(gate(x)) * up(x))"
        raise ValueError(
            f"{where} ({type(ffn).__name__}) does not compute {form}, so experts cannot be placed in it; "
            "exclude it with exclude_modules"
        )
