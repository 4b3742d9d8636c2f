"""The language model and the vision tower of a run that trains them, written as directories that load by themselves.

`language_model/` is a Hugging Face model directory, `vision_tower/` one of open_clip. A later run names them as its
`model.language_model` and `model.vision_tower`, and a checkpoint's manifest as its parts, as if it had been imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.interop.causal_lm import copy_tokenizer, fingerprint_language_model
from llava_mole.interop.tensors import read_object, save_tensors, write_object, write_shards
from llava_mole.model.adapters import parameter_part
from llava_mole.model.checkpoint import fingerprint
from llava_mole.model.multimodal_encoder import read_visual_state
from llava_mole.model.tower_files import read_tower_config
from llava_mole.train.strategy import MASTER

LANGUAGE_MODEL, TOWER = "language_model", "vision_tower"
"""Parts, and the folders that hold them."""
TOWER_WEIGHTS, TOWER_CONFIG = "model.safetensors", "config.json"
_PART = {LANGUAGE_MODEL: "language model", TOWER: "vision tower"}


@dataclass(frozen=True)
class Origin:
    """Where the parts were before training, and the dtype in which they are written."""

    language_model: Path
    tower_weights: Path
    tower_name: str
    """open_clip model name or JSON file."""
    dtype: torch.dtype
    """That of training's forward passes."""

    @classmethod
    def of(cls, config: Mapping[str, Any], paths: Mapping[str, str]) -> "Origin":
        """Of a complete configuration as plain values, and the paths of a manifest, which are absolute."""
        return cls(
            Path(paths["language_model"]),
            Path(paths["vision_tower_weights"]),
            paths["vision_tower_config"],
            torch.float32 if config["train"]["precision"] == "fp32" else torch.bfloat16,
        )


def trained_parts(names: Mapping[str, Any] | set[str]) -> list[str]:
    """Which of the two parts have weights among the parameters `names` of a run."""
    found = {parameter_part(name) for name in names}
    return [part for part, title in _PART.items() if title in found]


def is_of_base(name: str) -> bool:
    """Whether a parameter belongs to language model or tower, not to adapter or projector."""
    return parameter_part(name) in _PART.values()


def base_name(name: str) -> str:
    """The name that a language model's parameter has in the model alone, without what PEFT puts around it."""
    return name.removeprefix("language_model.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def write_parts(
    directory: Path, state: Mapping[str, torch.Tensor], origin: Origin, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the trained parts below `directory`.

    Args:
        directory: Of a checkpoint that is being written.
        state: `{"master/<parameter>": float32 tensor}`; other keys are ignored. A `TrainerState` is read one tensor
            at a time.
        origin: Configuration, tokenizer and frozen weights come from there.
        fields: Of the manifest.

    Returns:
        `fingerprints` and `paths` of the manifest; those of the parts that were written are relative to the checkpoint.

    Raises:
        WeightsError: a weight is not finite, or the original files are gone or do not fit.
    """
    prefix = f"{MASTER}/"
    names = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    fingerprints, paths = dict(fields["fingerprints"]), dict(fields["paths"])
    if LANGUAGE_MODEL in trained_parts(set(names)):
        folder = directory / LANGUAGE_MODEL
        folder.mkdir()
        config = {k: v for k, v in read_object(origin.language_model / "config.json").items() if k != "torch_dtype"}
        write_object(folder / "config.json", {**config, "dtype": str(origin.dtype).removeprefix("torch.")})
        copy_tokenizer(origin.language_model, folder)
        own = [name for name in names if parameter_part(name) == _PART[LANGUAGE_MODEL]]
        size = sum(_size(state, prefix + name) for name in own) * origin.dtype.itemsize
        tensors = ((base_name(name), state[prefix + name].to(origin.dtype)) for name in own)
        write_shards(folder, tensors, "language model", size)
        fingerprints[LANGUAGE_MODEL] = fingerprint_language_model(folder)  # proves that names and shapes are right
        paths[LANGUAGE_MODEL] = LANGUAGE_MODEL
    if TOWER in trained_parts(set(names)):
        folder = directory / TOWER
        folder.mkdir()
        visual = dict(read_visual_state(origin.tower_weights))
        for name in names:
            if parameter_part(name) == _PART[TOWER]:
                visual[name.removeprefix("vision_tower.visual.")] = state[prefix + name]
        visual = {name: value.to(origin.dtype) for name, value in visual.items()}
        save_tensors(visual, folder / TOWER_WEIGHTS, "visual.")
        fingerprints[TOWER] = fingerprint(visual.items())
        paths["vision_tower_weights"] = f"{TOWER}/{TOWER_WEIGHTS}"
        if origin.tower_name.endswith(".json"):
            write_object(folder / TOWER_CONFIG, read_tower_config(origin.tower_name))
            paths["vision_tower_config"] = f"{TOWER}/{TOWER_CONFIG}"
    return {"fingerprints": fingerprints, "paths": paths}


def _size(state: Mapping[str, torch.Tensor], key: str) -> int:
    shapes = getattr(state, "shapes", None)
    return state[key].numel() if shapes is None else torch.Size(shapes[key]).numel()
