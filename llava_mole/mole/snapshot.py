"""A model's structure before adapters are injected, so that a refused adapter leaves no trace."""

from torch import nn

_TABLES = (
    "_modules", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Dictionaries of a module that injection may add to."""


class Snapshot:
    """The modules and hooks of a model, and which of its parameters train. Weights are not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = [(getattr(m, name), dict(getattr(m, name))) for m in model.modules() for name in _TABLES]
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back in place."""
        for table, before in self._tables:
            table.clear()
            table.update(before)
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
