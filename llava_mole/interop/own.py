"""A checkpoint of ours as parts on disk, for exporting: located and identified, not loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import RunConfig, load_config
from llava_mole.interop.causal_lm import Skeleton, fingerprint_language_model
from llava_mole.interop.lora import Lora, read_lora
from llava_mole.interop.tensors import Weights, open_weights, read_json
from llava_mole.interop.towers import Tower, open_tower, tower_fingerprint
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
    """Where its parts are, and what they hold."""

    path: Path
    manifest: dict[str, Any]
    config: RunConfig
    language_model: Path
    weights: Weights
    """Of the language model."""
    names: dict[str, str]
    """Name in the language model -> name in `weights`."""
    skeleton: Skeleton
    tower: Tower
    projector: dict[str, torch.Tensor]

    @property
    def method(self) -> str:
        """`none`, `lora` or `mole`."""
        return self.manifest["adapter"]

    @property
    def adapter_dir(self) -> Path:
        return self.path / ADAPTER_DIR

    @property
    def aspect_ratio(self) -> str:
        return self.config.data.image_aspect_ratio

    def lora(self, directory: Path | None = None) -> Lora:
        """Its plain LoRA, or the one in `directory`. Raises WeightsError where that is none or does not fit."""
        return read_lora(directory or self.adapter_dir, self.skeleton.linears())


def read_projector(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's projector, names without `mm_projector.`, as stored."""
    weights = open_weights(path / PROJECTOR_FILE)
    return {name.removeprefix(PROJECTOR_PREFIX): weights[name] for name in weights}


def open_own(path: Path, model_base: Path | None) -> OwnCheckpoint:
    """Open a run (its newest valid checkpoint) or a checkpoint.

    Raises:
        CheckpointError: it does not verify, or the language model or tower is another than it was trained on.
        WeightsError: a part is not where it should be, or does not fit.
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
    check_base(checkpoint, {"language_model": fingerprint, "vision_tower": tower_fingerprint(tower)})
    weights = open_weights(directory)
    skeleton = Skeleton(read_json(directory / "config.json"), directory / "config.json")
    names = {name: name for name in weights if not name.endswith("rotary_emb.inv_freq")}
    skeleton.check(weights, {name: weights.shape(name) for name in names})
    projector = read_projector(checkpoint)
    return OwnCheckpoint(checkpoint, manifest, config, directory, weights, names, skeleton, tower, projector)


def llava_projector(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A projector in LLaVA's names, without prefix. Raises ConfigError for one that LLaVA has not."""
    if kind == "linear":
        return {name.removeprefix("0."): value for name, value in state.items()}
    if any(not name.endswith((".weight", ".bias")) for name in state):
        raise ConfigError(f"projector {kind!r} has learned vectors around an image, for which LLaVA has no place")
    return dict(state)
