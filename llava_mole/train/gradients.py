"""Gradient norms per part of the model, whatever shards the gradients."""

from collections.abc import Mapping
from typing import Any

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.model.adapters import parameter_part
from llava_mole.train.state import parameter_fragments


class GradientNorms:
    """Looks at the gradients when the optimizer is about to use them.

    That is the one moment at which they are summed over ranks and still there under every strategy: DeepSpeed frees
    them part by part, and keeps only a rank's own partition.

    Args:
        parameters: What trains, by name.
        optimizer: As accelerate has wrapped it.
        uses_deepspeed: Whether it shards.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, uses_deepspeed: bool) -> None:
        self._parts = {name: parameter_part(name) for name in parameters}
        self._names = list(dict.fromkeys(self._parts.values()))
        self._parameters = parameters
        self._zero = getattr(optimizer, "optimizer", optimizer) if uses_deepspeed else None
        self._squares: dict[str, torch.Tensor] = {}
        inner = getattr(optimizer, "optimizer", optimizer) if self._zero is None else self._zero.optimizer
        inner.register_step_pre_hook(self._before_step)

    def collect(self, total: float) -> dict[str, float]:
        """Norms of the latest step by part; a collective.

        Args:
            total: The global norm before clipping, which the parts' squares then add up to.
        """
        device = next(iter(self._parameters.values())).device
        none = torch.zeros((), device=device)
        squares = torch.stack([self._squares.get(name, none).to(device, torch.float32) for name in self._names])
        self._squares = {}
        if self._zero is not None:
            all_reduce_sum(squares)
        whole = float(squares.sum())
        scale = total / whole**0.5 if whole > 0 else 0.0  # clipping came before
        return dict(zip(self._names, (squares.sqrt() * scale).tolist(), strict=True))

    def _before_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        gradients: dict[str, list[torch.Tensor]] = {}
        if self._zero is None:
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    gradients.setdefault(self._parts[name], []).append(parameter.grad)
        else:
            masters = self._zero.single_partition_of_fp32_groups
            stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, _, group, _, partition in parameter_fragments(self._parameters, self._zero):
                # DeepSpeed steps one group at a time.
                if id(masters[group]) in stepping and partition.stop > partition.start:
                    gradients.setdefault(self._parts[name], []).append(masters[group].grad[partition])
        for part, tensors in gradients.items():
            square = torch.nn.utils.get_total_norm(tensors).float().square()
            self._squares[part] = self._squares[part] + square if part in self._squares else square
