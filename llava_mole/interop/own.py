"""Checkpoints of this package as parts on disk, for export: located and identified, not loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.config import RunConfig, load_config
from llava_mole.data.anyres import Grid
from llava_mole.interop.causal_lm import Skeleton, fingerprint_language_model, open_language_model
from llava_mole.interop.sources import read_projector
from llava_mole.interop.tensors import Weights
from llava_mole.interop.towers import Tower, open_tower
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE, INFERENCE_OPTIONS, check_base, locate_parts
from llava_mole.model.checkpoint import read_manifest, resolve_checkpoint


@dataclass
class OwnCheckpoint:
    """A checkpoint and its parts."""

    path: Path
    manifest: dict[str, Any]
    config: RunConfig
    language_model: Path
    weights: Weights
    """Tensors of the language model, without constant buffers."""
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
    def grid(self) -> Grid | None:
        """The tiles of images; None if images are not tiled."""
        if self.aspect_ratio != "anyres":
            return None
        vision = self.tower.config["vision_cfg"]
        features = (vision["image_size"] // vision["patch_size"]) ** 2
        return Grid.of_tower(vision["image_size"], features, self.config.data.image_grid_pinpoints)

    @property
    def aspect_ratio(self) -> str:
        """`pad`, `square`, `anyres` or `native`."""
        return self.config.data.image_aspect_ratio


def open_own(path: Path, model_base: Path | None = None, vision_tower: Path | None = None) -> OwnCheckpoint:
    """Open a checkpoint, or the newest valid one of a run; its parts may have moved to the given directories.

    Raises CheckpointError if it does not verify or was trained on another language model or tower, and WeightsError if
    a part is missing or does not fit.
    """
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    config = load_config(checkpoint / CONFIG_FILE)
    locate_parts(config.model, manifest, checkpoint, model_base, vision_tower)
    directory = Path(config.model.language_model)
    asked = config.model.vision_tower
    tower = open_tower(Path(asked.weights), asked.name)
    tower.settings = {key: getattr(asked, key) for key in ("image_size", "image_mean", "image_std")}
    found = {"language_model": fingerprint_language_model(directory), "vision_tower": tower.fingerprint()}
    check_base(checkpoint, found, INFERENCE_OPTIONS)
    weights, skeleton = open_language_model(directory), Skeleton.of_directory(directory)
    skeleton.check(weights, weights.shapes)
    projector = read_projector(checkpoint)
    return OwnCheckpoint(checkpoint, manifest, config, directory, weights, skeleton, tower, projector)
