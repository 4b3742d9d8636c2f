"""Which tensors of an export belong to experts, and where they go. Needs no vLLM."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llava_mole.mole.static import MODULE
from llava_mole.serve.vllm.layers import shard


class Destinations:
    """The tensors of all experts of a model, each of which is to come exactly once.

    Args:
        layout: Path of every FFN with experts -> its layout, as in the export's config.json.
    """

    def __init__(self, layout: Mapping[str, Mapping[str, Any]]) -> None:
        self._shapes = {
            f"{path}.{MODULE}.{name}": tuple(shape)
            for path, own in layout.items()
            for name, shape in own["shapes"].items()
        }
        self.loaded: set[str] = set()

    def others(
        self, weights: Iterable[tuple[str, Tensor]], put: Callable[[str, Tensor], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Give the experts' tensors to `put`, and yield the others.

        Raises ValueError for a tensor of an expert that the layout does not know, that has another shape, or that comes
        twice.
        """
        for name, tensor in weights:
            if f".{MODULE}." not in name:
                yield name, tensor
                continue
            if name not in self._shapes:
                raise ValueError(f"{name}: no FFN of the model has such a tensor; export the run again")
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; config.json says {self._shapes[name]}")
            if name in self.loaded:
                raise ValueError(f"{name} comes twice")
            put(name, tensor)
            self.loaded.add(name)

    def check(self) -> None:
        """Raise ValueError if a tensor has not come."""
        missing = sorted(set(self._shapes) - self.loaded)
        if missing:
            raise ValueError(f"{len(missing)} tensors of experts are missing, the first is {missing[0]}; export again")


def local_layout(layout: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The layout of the part of an FFN's experts that one of `size` ranks holds."""
    shapes = {
        name: list(shard(name, torch.empty(tuple(shape), device="meta"), 0, size).shape)
        for name, shape in layout["shapes"].items()
    }
    return {**layout, "shapes": shapes}
