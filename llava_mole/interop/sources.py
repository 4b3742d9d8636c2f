"""Foreign LLaVA checkpoints taken apart: language model, vision tower, projector, and how they were trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.common.text import count_of, shorten
from llava_mole.data.anyres import Grid
from llava_mole.interop.causal_lm import LanguageModelPart, language_model_config
from llava_mole.interop.kinds import NON_LORA_FILE, Found, find_kind
from llava_mole.interop.lora import ADAPTER_CONFIG
from llava_mole.interop.names import Parts, split_llava, split_llava_hf
from llava_mole.interop.tensors import Weights, check_finite, open_weights, read_object
from llava_mole.interop.towers import open_clip_config
from llava_mole.model.builder import PROJECTOR_FILE, PROJECTOR_PREFIX
from llava_mole.model.multimodal_projector import NEWLINE

HF_ADAPTER = "adapter"
"""Folder of an unmerged LoRA in a `llava-hf` checkpoint that this package wrote."""
LLAVA_FLAT = {"mm_patch_merge_type": ("flat", None), "s2": (False, None), "mm_use_im_start_end": (False, None)}
"""Keys of LLaVA's config.json -> the values that mean LLaVA-1.5's architecture."""


@dataclass
class Source:
    """The parts of a checkpoint and its settings. Options supply what it lacks."""

    found: Found
    projector: dict[str, torch.Tensor]
    """Named as in `build_projector`."""
    projector_kind: str
    stage: str = "finetune"
    select_layer: int | None = None
    aspect_ratio: str | None = None
    pinpoints: list[list[int]] | None = None
    """For aspect ratio `anyres`: (height, width) in pixels."""
    language_model: LanguageModelPart | None = None
    tower: Weights | None = None
    """The tower in Hugging Face's names; None or empty if the checkpoint has none."""
    tower_config: dict[str, Any] | None = None
    """open_clip's configuration of the tower, if the checkpoint records one."""
    tower_hint: str | None = None
    """The tower's name, if the checkpoint records it."""


def read_source(path: Path) -> Source:
    """Read any checkpoint that holds a LLaVA projector. Raises WeightsError for other kinds."""
    found = find_kind(path)
    if found.kind == "llava":
        return _read_llava(found)
    if found.kind in ("llava-hf", "llava-next-hf"):
        return _read_llava_hf(found)
    if found.kind in ("llava-lora", "llava-projector", "projector"):
        return _read_projector_file(found)
    readable = "llava, llava-lora, llava-projector, projector, llava-hf, llava-next-hf"
    raise WeightsError(f"{path} is {found.kind!r}; readable here are {readable}")


def _read_llava(found: Found) -> Source:
    weights = open_weights(found.path)
    parts = split_llava(weights)
    parts.check(weights)
    source = _from_llava_config(found, parts, weights)
    config = language_model_config(found.config, found.path / "config.json")
    source.language_model = LanguageModelPart(config, weights.part(parts.language_model), found.path)
    source.tower = weights.part(parts.tower)
    return source


def _read_projector_file(found: Found) -> Source:
    """Projector and settings of stage 1 or of a LLaVA-1.5 LoRA checkpoint; `read_lora` reads the LoRA itself."""
    is_lora = found.kind == "llava-lora"
    file = found.path / NON_LORA_FILE if is_lora else found.files[0]
    if is_lora:
        if not file.is_file():
            raise WeightsError(
                f"{found.path} has no {NON_LORA_FILE}, which LLaVA writes only at the end of training; the projector "
                "of an intermediate save is lost"
            )
        if not found.config:
            raise WeightsError(f"{found.path} has no config.json of LLaVA")
    weights = open_weights(file)
    parts = split_llava(weights)
    parts.check(weights)
    if others := [*parts.language_model.values(), *parts.tower.values()]:
        raise WeightsError(
            f"{weights}: {count_of(len(others), 'unexpected tensor')} beside the projector: {shorten(others)}; trained "
            "embeddings and towers are not part of an adapter: convert a full checkpoint instead"
        )
    if not parts.projector:
        raise WeightsError(f"{weights} holds no projector")
    source = _from_llava_config(found, parts, weights)
    source.stage = "finetune" if is_lora else "pretrain"
    return source


def _from_llava_config(found: Found, parts: Parts, weights: Weights) -> Source:
    """Projector and settings. Raises WeightsError unless LLaVA's config.json describes LLaVA-1.5's architecture."""
    config, where = found.config, found.path / "config.json"
    for key, allowed in LLAVA_FLAT.items():
        if config.get(key) not in allowed:
            hint = "; for LLaVA-NeXT, import the checkpoint of llava-hf" if key == "mm_patch_merge_type" else ""
            raise WeightsError(
                f"{where}: {key} {config[key]!r}; only LLaVA-1.5's value {allowed[0]!r} is supported{hint}"
            )
    if (feature := config.get("mm_vision_select_feature", "patch")) != "patch":
        raise WeightsError(f"{where}: mm_vision_select_feature {feature!r}; needed is 'patch'")
    aspect_ratio = config.get("image_aspect_ratio", "square" if config else None)
    if aspect_ratio not in ("pad", "square", None):
        raise WeightsError(f"{where}: image_aspect_ratio {aspect_ratio!r}; supported are 'pad' and 'square'")
    state = _read(weights, parts.projector)
    kind = projector_kind(state, weights)
    stated = config.get("mm_projector_type", "linear" if config else kind)
    if stated != kind:
        raise WeightsError(f"{where}: mm_projector_type {stated!r}, but {weights} holds a {kind!r}")
    return Source(
        found,
        projector=numbered(state),
        projector_kind=kind,
        select_layer=config.get("mm_vision_select_layer"),
        aspect_ratio=aspect_ratio,
        tower_hint=config.get("mm_vision_tower"),
    )


def _read_llava_hf(found: Found) -> Source:
    """A checkpoint of `LlavaForConditionalGeneration` or of LLaVA-NeXT's class, in the old or new layout of names."""
    from transformers import LlavaConfig, LlavaNextConfig

    where = found.path / "config.json"
    if (found.path / HF_ADAPTER / ADAPTER_CONFIG).is_file():
        raise WeightsError(f"{found.path} has its LoRA unmerged in {HF_ADAPTER}/; merge it with PEFT first")
    tiled = found.kind == "llava-next-hf"
    try:
        kind = LlavaNextConfig if tiled else LlavaConfig
        config: Any = kind.from_pretrained(str(found.path), local_files_only=True)
    except Exception as error:  # transformers raises many types for an unusable value
        raise WeightsError(f"{where} is not a LLaVA configuration: {' '.join(str(error).split())[:200]}") from None
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            f"{where}: vision_feature_layer {config.vision_feature_layer!r} with strategy "
            f"{config.vision_feature_select_strategy!r}; needed are one layer and 'default' (no class token)"
        )
    if config.projector_hidden_act != "gelu" or not getattr(config, "multimodal_projector_bias", True):
        raise WeightsError(f"{where}: projector_hidden_act {config.projector_hidden_act!r}; needed is 'gelu' with bias")
    if config.vision_config.model_type != "clip_vision_model":
        raise WeightsError(f"{where}: vision_config {config.vision_config.model_type!r}; needed is CLIP's")
    weights = open_weights(found.path)
    parts = split_llava_hf(weights)
    parts.check(weights)
    text = {**config.text_config.to_dict(), "tie_word_embeddings": config.tie_word_embeddings}
    return Source(
        found,
        projector=_read(weights, parts.projector),
        projector_kind=f"mlp2x_gelu{NEWLINE if tiled else ''}",
        select_layer=config.vision_feature_layer,
        aspect_ratio="anyres" if tiled else _hf_aspect_ratio(found.path),
        pinpoints=_pinpoints(found.path, config) if tiled else None,
        language_model=LanguageModelPart(text, weights.part(parts.language_model), found.path),
        tower=weights.part(parts.tower),
        tower_config=open_clip_config(config.vision_config, where),
    )


def _hf_aspect_ratio(path: Path) -> str | None:
    """How the directory's image processor makes images square; None if there is no image processor."""
    for file in (path / "preprocessor_config.json", path / "processor_config.json"):
        if file.is_file():
            content = read_object(file)
            content = content.get("image_processor", content)
            if "image_mean" in content or "do_resize" in content:
                return "pad" if content.get("do_pad") else "square"
    return None


def _pinpoints(path: Path, config: Any) -> list[list[int]]:
    """The resolutions of a LLaVA-NeXT model's tiles.

    Raises:
        ConfigError: one is no multiple of the tower's image size.
        WeightsError: its image processor has others.
    """
    vision = config.vision_config
    found = [list(pair) for pair in config.image_grid_pinpoints]
    Grid.of_tower(vision.image_size, (vision.image_size // vision.patch_size) ** 2, found)
    for file in (path / "preprocessor_config.json", path / "processor_config.json"):
        content = read_object(file) if file.is_file() else {}
        others = content.get("image_processor", content).get("image_grid_pinpoints")
        if others is not None and [list(pair) for pair in others] != found:
            raise WeightsError(
                f"{file}: image_grid_pinpoints {others}, but config.json has {found}; model and processor must agree"
            )
    return found


def projector_kind(state: Mapping[str, torch.Tensor], where: object) -> str:
    """`linear` or `mlp<N>x_gelu`, from a projector's tensor names. Raises WeightsError for other names."""
    layers = [match[1] for name in state if (match := re.fullmatch(r"([0-9]+)\.weight", name))]
    numbers = range(0, 2 * len(layers), 2)
    if set(state) == {"weight", "bias"} or set(state) == {"0.weight", "0.bias"}:
        return "linear"
    if not layers or set(state) != {f"{n}.{kind}" for n in numbers for kind in ("weight", "bias")}:
        raise WeightsError(f"{where} holds no linear or mlp<N>x_gelu projector: {shorten(sorted(state))}")
    return f"mlp{len(layers)}x_gelu"


def numbered(projector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projector with names of `nn.Sequential`: those of a single linear get the prefix `0.`."""
    is_linear = set(projector) == {"weight", "bias"}
    return {f"0.{name}": value for name, value in projector.items()} if is_linear else projector


def read_projector(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's projector as stored, named without `mm_projector.`."""
    weights = open_weights(checkpoint / PROJECTOR_FILE)
    return {name.removeprefix(PROJECTOR_PREFIX): weights[name].clone() for name in weights}


def llava_projector(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projector in LLaVA's names, without prefix. Raises ConfigError for a kind that LLaVA lacks."""
    if "0.weight" not in state:
        raise ConfigError("the projector shuffles pixels (pixel_shuffle+), for which LLaVA has no place")
    if any(not name.endswith((".weight", ".bias")) for name in state):
        raise ConfigError("the projector has learned vectors for images, for which LLaVA-1.5 has no place")
    is_linear = set(state) == {"0.weight", "0.bias"}
    return {name.removeprefix("0."): value for name, value in state.items()} if is_linear else state


def _read(weights: Weights, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in weights.part(names).items()}
    check_finite(weights, state)
    return state
