"""Checkpoints of this package as parts on disk, for exporting: located and identified, not loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import RunConfig, load_config
from llava_mole.interop.causal_lm import Skeleton, fingerprint_language_model
from llava_mole.interop.names import BUFFERS
from llava_mole.interop.tensors import Weights, open_weights
from llava_mole.interop.towers import Tower, open_tower
from llava_mole.model.builder import (
    ADAPTER_DIR,
    CONFIG_FILE,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    check_base,
    locate_parts,
)
from llava_mole.model.checkpoint import read_manifest, resolve_checkpoint


@dataclass
class OwnCheckpoint:
    """A checkpoint and its parts."""

    path: Path
    manifest: dict[str, Any]
    config: RunConfig
    language_model: Path
    weights: Weights
    """Tensors of the language model."""
    names: list[str]
    """Names in `weights`, without constant buffers."""
    skeleton: Skeleton
    tower: Tower
    projector: dict[str, torch.Tensor]

    @property
    def method(self) -> str:
        """`none`, `lora` or `mole`."""
        return self.manifest["adapter"]

    @property
    def adapter_dir(self) -> Path:
        """Directory of the PEFT adapter, if the checkpoint has one."""
        return self.path / ADAPTER_DIR

    @property
    def aspect_ratio(self) -> str:
        """`pad` or `square`."""
        return self.config.data.image_aspect_ratio


def open_own(path: Path, model_base: Path | None) -> OwnCheckpoint:
    """Open a checkpoint, or the newest valid one of a run.

    Raises:
        CheckpointError: it does not verify, or was trained on another language model or tower.
        WeightsError: a part is missing or does not fit.
    """
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    config = load_config(checkpoint / CONFIG_FILE)
    locate_parts(config.model, manifest, checkpoint, None if model_base is None else str(model_base))
    directory = Path(config.model.language_model)
    if not directory.is_dir():
        raise WeightsError(f"the language model of {checkpoint} is no longer in {directory}; name it with --model-base")
    fingerprint = fingerprint_language_model(directory)
    tower_path = Path(config.model.vision_tower.weights)
    if not tower_path.is_file():
        raise WeightsError(f"the vision tower of {checkpoint} is no longer in {tower_path}; put it back")
    tower = open_tower(tower_path, config.model.vision_tower.name)
    check_base(checkpoint, {"language_model": fingerprint, "vision_tower": tower.fingerprint()})
    weights = open_weights(directory)
    skeleton = Skeleton.of_directory(directory)
    names = [name for name in weights if not name.endswith(BUFFERS)]
    skeleton.check(weights, {name: weights.shape(name) for name in names})
    projector = read_projector(checkpoint)
    return OwnCheckpoint(checkpoint, manifest, config, directory, weights, names, skeleton, tower, projector)


def read_projector(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's projector as stored, named without `mm_projector.`."""
    weights = open_weights(checkpoint / PROJECTOR_FILE)
    return {name.removeprefix(PROJECTOR_PREFIX): weights[name].clone() for name in weights}


def llava_projector(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projector in LLaVA's names, without prefix. Raises ConfigError for a kind that LLaVA lacks."""
    if any(not name.endswith((".weight", ".bias")) for name in state):
        raise ConfigError("the projector has learned vectors around an image, for which LLaVA has no place")
    is_linear = set(state) == {"0.weight", "0.bias"}
    return {name.removeprefix("0."): value for name, value in state.items()} if is_linear else state
