"""Foreign checkpoints as their parts: language model, tower, projector, adapter, and how they were trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.interop.causal_lm import Skeleton, language_model_config
from llava_mole.interop.kinds import NON_LORA_FILE, OUR_PROJECTOR, Found, find_kind
from llava_mole.interop.lora import Lora, is_adapter_dir, read_lora
from llava_mole.interop.names import HF_ADAPTER, Parts, split_llava, split_llava_hf
from llava_mole.interop.tensors import Weights, check_finite, open_weights, read_json, shorten
from llava_mole.interop.towers import open_clip_config

LLAVA_FLAT = {"mm_patch_merge_type": ("flat", None), "s2": (False, None), "mm_use_im_start_end": (False, None)}
"""Keys of LLaVA's config.json -> the values that mean LLaVA-1.5's architecture."""


@dataclass
class Source:
    """What a checkpoint brings. Absent parts are to be given beside it."""

    found: Found
    stage: str = "finetune"
    projector: dict[str, torch.Tensor] = field(default_factory=dict)
    projector_kind: str | None = None
    select_layer: int | None = None
    aspect_ratio: str | None = None
    language_model: "LanguageModelPart | None" = None
    tower_names: dict[str, str] = field(default_factory=dict)
    """Hugging Face's CLIP name -> name in `weights`."""
    tower_config: dict[str, Any] | None = None
    """open_clip's, where the checkpoint says it."""
    weights: Weights | None = None
    tower_hint: str | None = None
    """The tower's name as the checkpoint states it."""

    def tower_state(self) -> dict[str, torch.Tensor]:
        """The tower's tensors in Hugging Face's names; empty where the checkpoint has none."""
        return {} if self.weights is None else {name: self.weights[there] for name, there in self.tower_names.items()}


@dataclass
class LanguageModelPart:
    """A language model inside a larger checkpoint."""

    config: dict[str, Any]
    names: dict[str, str]
    """Name in the language model -> name in the checkpoint's weights."""
    weights: Weights
    directory: Path
    """Where its tokenizer is."""

    def skeleton(self) -> Skeleton:
        return Skeleton(self.config, self.directory)


def read_llava(found: Found) -> Source:
    """A full LLaVA-1.5 checkpoint. Raises WeightsError for another architecture or tensors that belong nowhere."""
    weights = open_weights(found.path)
    parts = split_llava(weights)
    parts.check(weights)
    source = _from_llava_config(found, parts, weights)
    config = language_model_config(found.config, found.path / "config.json")
    source.language_model = LanguageModelPart(config, parts.language_model, weights, found.path)
    source.weights, source.tower_names = weights, parts.tower
    return source


def read_llava_lora(found: Found) -> Source:
    """The projector and settings of a LLaVA-1.5 LoRA checkpoint; `read_adapter` gives the LoRA.

    Raises:
        WeightsError: no `non_lora_trainables.bin`, or it holds more than a projector.
    """
    file = found.path / NON_LORA_FILE
    if not file.is_file():
        raise WeightsError(
            f"{found.path} has no {NON_LORA_FILE}, which LLaVA writes at the end of training only; the projector of an "
            "intermediate save is lost"
        )
    if not found.config:
        raise WeightsError(f"{found.path} has no config.json of LLaVA")
    return _read_projector_file(found, open_weights(file))


def read_adapter(found: Found, linears: Mapping[str, tuple[int, int]]) -> Lora:
    """The LoRA of a LLaVA-1.5 LoRA checkpoint; see `lora.read_lora`."""
    return read_lora(found.path, linears)


def read_llava_projector(found: Found) -> Source:
    """`mm_projector.bin`, or a projector file of ours: the result of stage 1.

    Raises:
        WeightsError: it holds more than a projector.
    """
    weights = open_weights(found.files[0])
    source = _read_projector_file(found, weights)
    source.stage = "pretrain"
    return source


def read_llava_hf(found: Found) -> Source:
    """A checkpoint of `LlavaForConditionalGeneration`, with old or new names.

    Raises:
        WeightsError: tensors that belong nowhere, or an architecture that is not LLaVA-1.5's.
    """
    from transformers import LlavaConfig

    where = found.path / "config.json"
    if is_adapter_dir(found.path / HF_ADAPTER):
        raise WeightsError(f"{found.path} has its LoRA unmerged in {HF_ADAPTER}/; merge it with PEFT first")
    try:
        config: Any = LlavaConfig.from_pretrained(str(found.path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a value that it cannot use
        raise WeightsError(f"{where} is no configuration of LLaVA: {' '.join(str(error).split())[:200]}") from None
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
        projector_kind="mlp2x_gelu",
        select_layer=config.vision_feature_layer,
        aspect_ratio=_hf_aspect_ratio(found.path),
        language_model=LanguageModelPart(text, parts.language_model, weights, found.path),
        tower_names=parts.tower,
        tower_config=open_clip_config(config.vision_config, where),
        weights=weights,
    )


def read_source(path: Path) -> Source:
    """Any checkpoint with a LLaVA projector in it. Raises WeightsError for other kinds."""
    found = find_kind(path)
    readers = {
        "llava": read_llava,
        "llava-lora": read_llava_lora,
        "llava-projector": read_llava_projector,
        "projector": read_llava_projector,
        "llava-hf": read_llava_hf,
    }
    if found.kind not in readers:
        raise WeightsError(f"{path} is {found.kind!r}; readable here are {', '.join(readers)}")
    return readers[found.kind](found)


def projector_kind(state: Mapping[str, torch.Tensor], where: object) -> str:
    """`linear` or `mlp<N>x_gelu`, from a projector's names. Raises WeightsError where they are neither's."""
    if set(state) == {"weight", "bias"}:
        return "linear"
    layers = [match[1] for name in state if (match := re.fullmatch(r"([0-9]+)\.weight", name))]
    numbers = range(0, 2 * len(layers), 2)
    if not layers or set(state) != {f"{n}.{kind}" for n in numbers for kind in ("weight", "bias")}:
        raise WeightsError(f"{where} holds no linear or mlp<N>x_gelu projector: {shorten(sorted(state))}")
    return "linear" if len(layers) == 1 else f"mlp{len(layers)}x_gelu"


def _read_projector_file(found: Found, weights: Weights) -> Source:
    parts = split_llava(weights)
    parts.check(weights)
    others = [*parts.language_model.values(), *parts.tower.values()]
    if others:
        raise WeightsError(
            f"{weights}: {len(others)} unexpected tensors beside the projector: {shorten(others)}; trained embeddings "
            "and towers belong to no adapter: convert a full checkpoint instead"
        )
    if not parts.projector:
        raise WeightsError(f"{weights} holds no projector")
    return _from_llava_config(found, parts, weights)


def _from_llava_config(found: Found, parts: Parts, weights: Weights) -> Source:
    config, where = found.config, found.path / "config.json"
    for key, allowed in LLAVA_FLAT.items():
        if config.get(key) not in allowed:
            raise WeightsError(
                f"{where}: {key} {config[key]!r}; LLaVA-1.5 has {allowed[0]!r}, others cannot be run here"
            )
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise WeightsError(
            f"{where}: mm_vision_select_feature {config['mm_vision_select_feature']!r}; needed is 'patch'"
        )
    aspect_ratio = config.get("image_aspect_ratio", "square" if config else None)
    if aspect_ratio not in ("pad", "square", None):
        raise WeightsError(f"{where}: image_aspect_ratio {aspect_ratio!r}; supported are 'pad' and 'square'")
    state = _read(weights, parts.projector)
    kind = projector_kind(state, weights)
    stated = config.get("mm_projector_type", "linear" if config else kind)
    if stated != kind:
        raise WeightsError(f"{where}: mm_projector_type {stated!r}, but {weights} holds a {kind!r}")
    if set(state) == {"weight", "bias"}:
        state = {f"0.{name}": value for name, value in state.items()}
    return Source(
        found,
        projector=state,
        projector_kind=kind,
        select_layer=config.get("mm_vision_select_layer"),
        aspect_ratio=aspect_ratio,
        tower_hint=config.get("mm_vision_tower"),
    )


def _read(weights: Weights, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = {name: weights[there].clone() for name, there in names.items()}
    check_finite(weights, state)
    return state


def _hf_aspect_ratio(path: Path) -> str | None:
    """What the directory's image processor does; None where there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            content = read_json(path / name)
            content = content.get("image_processor", content)
            if "image_mean" in content or "do_resize" in content:
                return "pad" if content.get("do_pad") else "square"
    return None


__all__ = ["OUR_PROJECTOR", "LanguageModelPart", "Source", "read_source"]
