"""Experts in an FFN whose forward pass stays with the base: its linears are wrapped one by one and share a router.

For FFNs that are not a module of their own (OPT, BART: the linears lie in the decoder layer), that need more than one
tensor (BLOOM, MPT), or that compute something between the linears which `FfnLayout` cannot describe (T5).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.experts import ExpertMix, linear_with_experts
from llava_mole.mole.ffn import FfnLayout, linear_widths
from llava_mole.mole.layer import AdaptedLayer, MoleMlp
from llava_mole.mole.routing import RoutingInputs


class MoleSplitMlp(MoleMlp):
    """An FFN in parts. This layer wraps its first linear and owns the router and the experts of all its linears.

    The tokens are routed when a linear reads the FFN's input, and the decision holds until the down projection.
    """

    def __init__(self, container: nn.Module, layout: FfnLayout, inputs: RoutingInputs) -> None:
        first, *others = layout.projections
        # Plain dictionaries, because these modules are already registered in the container.
        self._linears = {name: getattr(container, name) for name in layout.projections}
        super().__init__(self._linears[first], layout, inputs)
        self.out_features = self.widths[first][1]
        self._parts = {name: MolePart(self._linears[name], name, self) for name in others}
        self._input: Tensor | None = None
        self._current: ExpertMix | None = None
        for name, layer in {first: self, **self._parts}.items():
            setattr(container, name, layer)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_input": None,
            "_current": None,
        }  # tensors of a graph can be neither copied nor pickled

    def add_adapter(self, name: str, config: MoleConfig, r: int | None = None, scaling: float | None = None) -> None:
        """As `MoleMlp.add_adapter`; the other linears learn its name."""
        super().add_adapter(name, config, r, scaling)
        for part in self._parts.values():
            part.note_adapter(name, config, self.r[name], self.scaling[name])

    def forget_adapter(self, name: str) -> None:
        """Undo `add_adapter`, whatever is left of it."""
        super().forget_adapter(name)
        for part in self._parts.values():
            part.forget_adapter(name)

    def linear(self, projection: str) -> nn.Module:
        """The base linear of a projection of `layout`."""
        return self._linears[projection]

    def linear_path(self, path: str, projection: str) -> str:
        """The path of that linear in the base model, where `path` is the path of this layer."""
        return f"{path.rpartition('.')[0]}.{projection}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., D]` to the output of the first linear. Raises what `router.route` raises."""
        return self.project(self.layout.projections[0], x)

    def project(self, projection: str, x: Tensor) -> Tensor:
        """`x` `[..., I]` to the output of the linear `projection` with its experts, `[..., O]`."""
        name = self.current_adapter()
        if name is None:
            self.routing.logits = self.routing.index = None
            return self._linears[projection](x)
        is_down = projection == self.layout.down
        if not is_down and self._input is not x:
            self._input = x
            x, self._current = self._mix(x, name)
        assert self._current is not None
        y_TO = linear_with_experts(self._linears[projection], projection, x.flatten(0, -2), self._current)
        if is_down:
            self._input = self._current = None
        return y_TO.view(x.shape[:-1] + y_TO.shape[-1:])


class MolePart(nn.Module, AdaptedLayer):
    """One of the further linears of an FFN in parts. Its experts belong to the `MoleSplitMlp` on the first linear."""

    other_param_names = ("configs", "r", "scaling")
    owner: MoleSplitMlp

    def __init__(self, base_layer: nn.Module, projection: str, owner: MoleSplitMlp) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.projection = projection
        self.in_features, self.out_features = linear_widths(base_layer) or (0, 0)
        self.start_adapters()
        self.__dict__["owner"] = owner  # not registered as a child: it is a sibling

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., I]` to the output of this linear with its experts, `[..., O]`."""
        return self.owner.project(self.projection, x)

    def updates(self, name: str) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """None: those of the owner contain this linear's."""
        return iter(())
