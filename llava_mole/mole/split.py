"""Experts in an FFN whose forward pass stays with the base: its linears are wrapped one by one and share a router.

For FFNs that are not a module of their own (OPT, BART: the linears lie in the decoder layer), that need more than one
tensor (BLOOM, MPT), or that compute something between the linears which `FfnLayout` cannot describe (T5).
"""

from typing import Any

from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.experts import ExpertMix, linear_with_experts
from llava_mole.mole.ffn import FfnLayout
from llava_mole.mole.layer import AdaptedLayer, MoleMlp
from llava_mole.mole.routing import RoutingInputs


class MoleSplitMlp(MoleMlp):
    """An FFN in parts. This layer wraps its first linear and owns the router and the experts of all its linears.

    The tokens are routed when a linear reads the FFN's input, and the decision holds until the down projection.
    """

    def __init__(self, container: nn.Module, layout: FfnLayout, inputs: RoutingInputs) -> None:
        first, *others = layout.projections
        super().__init__(getattr(container, first), layout, inputs)
        # Plain dictionaries, because these modules are already registered in the container.
        self._linears = {name: getattr(container, name) for name in layout.projections}
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

    def add_adapter(self, name: str, config: MoleConfig) -> None:
        """As `MoleMlp.add_adapter`; the other linears learn its name."""
        super().add_adapter(name, config)
        for part in self._parts.values():
            part.configs[name] = config

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
            self._input, self._current = x, self._mix(x, name)
        assert self._current is not None
        y_TO = linear_with_experts(self._linears[projection], projection, x.flatten(0, -2), self._current)
        if is_down:
            self._input = self._current = None
        return y_TO.view(x.shape[:-1] + y_TO.shape[-1:])


class MolePart(nn.Module, AdaptedLayer):
    """One of the further linears of an FFN in parts. Its experts belong to the `MoleSplitMlp` on the first linear."""

    other_param_names = ("configs",)
    owner: MoleSplitMlp

    def __init__(self, base_layer: nn.Module, projection: str, owner: MoleSplitMlp) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.projection = projection
        self.configs = {}
        self.__dict__["owner"] = owner  # not registered as a child: it is a sibling

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., I]` to the output of this linear with its experts, `[..., O]`."""
        return self.owner.project(self.projection, x)
