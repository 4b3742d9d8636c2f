"""Checkpoints of a build: an interrupted stage goes on from its last one and ends as if it had not been interrupted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.log import get_logger

LOG = get_logger("llava_mole.tiny_world")


class Checkpoint:
    """The state of one training run in one file, or nowhere when `path` is None.

    Random draws of the runs depend on seed and step alone, so that modules, optimizers and the step are all there is.
    """

    def __init__(self, path: Path | None, modules: Sequence[Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Name the file, and the modules and optimizers whose state it holds."""
        self.path = path
        self.parts = [*modules, *optimizers]

    def load(self, recipe: str) -> int:
        """Restore the state if there is a checkpoint of this `recipe`. Returns the number of finished steps."""
        if self.path is None or not self.path.is_file():
            return 0
        saved = torch.load(self.path, weights_only=True)
        if saved["recipe"] != recipe:
            LOG.warning("%s belongs to another recipe (%s); starting anew", self.path, saved["recipe"])
            return 0
        for part, state in zip(self.parts, saved["states"], strict=True):
            part.load_state_dict(state)
        LOG.info("going on from step %d of %s", saved["step"], self.path)
        return int(saved["step"])

    def save(self, recipe: str, step: int) -> None:
        """Write the state after `step` finished steps; a reader sees the old file or the new one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"recipe": recipe, "step": step, "states": [part.state_dict() for part in self.parts]}, temporary)
        temporary.replace(self.path)
