"""Which FFNs can carry experts, and how their forward pass is composed.

The wrapper of a whole FFN calls its linears as modules, so quantized linears work, but composes them itself, because
the experts of each projection act on that projection's own input. `composition_error` verifies on random tokens that
the composition equals the FFN's own forward pass. An FFN that computes something else keeps its forward pass, and its
linears are wrapped one by one (see `split`).

Here "gate" always means the gate projection of the FFN.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FfnLayout:
    """Attribute names of an FFN's parts.

    With `gate`: `down(act(gate(x)) * up(x))`. Without: `down(act(up(x)))`. With `fused`, the linear `up` computes gate
    and up side by side (Phi-3). `dropout`, if the FFN has one, is applied to the output (GPT-2). Without `activation`
    the FFN computes something else from these linears, and its forward pass cannot be composed.
    """

    up: str
    down: str
    activation: str | None
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
    ("wi_0", "wi_1", "wo"),
    (None, "gate_up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "up_proj", "down_proj"),
    (None, "wi", "wo"),
    (None, "Wi", "Wo"),
    (None, "input_linear", "output_linear"),
    (None, "lin1", "lin2"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_DROPOUTS = ("dropout", "residual_dropout", "resid_dropout")
_NEVER_COMPOSED = ("wo", "Wo", "output_linear", "lin2")
"""Down projections of FFNs with dropout before them, or with a gate in an unusual place (T5, ModernBERT, Granite)."""


def linear_widths(linear: nn.Module) -> tuple[int, int] | None:
    """`(input width, output width)` of a linear-like module, adapted or not, or None for any other module."""
    linear = getattr(linear, "base_layer", linear)
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
    if down in _NEVER_COMPOSED:
        activation = None
    dropout = next((name for name in _DROPOUTS if isinstance(children.get(name), nn.Dropout)), None)
    return FfnLayout(up, down, activation, gate, fused=up == "gate_up_proj", dropout=dropout)


def is_whole_layer(layout: FfnLayout, module: nn.Module) -> bool:
    """Whether `module` is a decoder layer that holds the FFN's linears itself, beside its attention (OPT, BART)."""
    others = [child for name, child in module.named_children() if name not in layout.projections]
    return any(linear_widths(part) is not None for child in others for part in child.modules())


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
    assert layout.activation is not None
    act = getattr(ffn, layout.activation)
    if layout.fused:
        gate, up = up.chunk(2, dim=-1)
    return act(up) if gate is None else act(gate) * up


def composition_error(layout: FfnLayout, ffn: nn.Module, in_training: bool = True) -> str | None:
    """Why the forward pass of `ffn` cannot be composed from its parts, as the end of a sentence; None if it can.

    The two are compared on random tokens, in evaluation and, if `in_training`, also in training with the same random
    numbers, where a dropout that `FfnLayout` does not describe shows. Weights that cannot compute here (meta device,
    the integers of a quantized linear) are trusted.
    """
    if layout.activation is None or is_whole_layer(layout, ffn):
        return "is not an FFN of its own with a known activation"
    required = [p for p in inspect.signature(ffn.forward).parameters.values() if p.default is p.empty]
    if len([p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]) > 1:
        return "cannot be called with one tensor"
    weights = [getattr(getattr(ffn, name), "weight", None) for name in layout.projections]
    if any(w is None or w.device.type == "meta" or not w.is_floating_point() or w.numel() == 0 for w in weights):
        return None
    weight, widths = weights[0], linear_widths(getattr(ffn, layout.projections[0]))
    assert weight is not None
    assert widths is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, widths[0], generator=generator).to(weight.device, weight.dtype)
    was_training = ffn.training
    try:
        same = all(_composes(layout, ffn.train(training), x) for training in (False, True)[: 1 + in_training])
    except (RuntimeError, TypeError) as error:
        return f"cannot be called with one tensor: {error}"
    finally:
        ffn.train(was_training)
    if same:
        return None
    form = "down(act(up(x)))" if layout.gate is None else "down(act(gate(x)) * up(x))"
    return f"does not compute {form}"


def _composes(layout: FfnLayout, ffn: nn.Module, x: Tensor) -> bool:
    seed = torch.cuda.manual_seed if x.is_cuda else torch.default_generator.manual_seed
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        seed(0)
        expected = ffn(x)
        seed(0)
        gate = None if layout.gate is None else getattr(ffn, layout.gate)(x)
        composed = getattr(ffn, layout.down)(activate(layout, ffn, getattr(ffn, layout.up)(x), gate))
        composed = getattr(ffn, layout.dropout)(composed) if layout.dropout else composed
    if not isinstance(expected, Tensor) or expected.shape != composed.shape:
        return False
    return bool((expected - composed).abs().max() <= 1e-2 * expected.abs().max())
