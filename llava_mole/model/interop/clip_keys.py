"""CLIP's vision tower in Hugging Face's names and in open_clip's: names, fused matrices and configurations.

Hugging Face's names are taken without the prefix `vision_model.`, which transformers 4 has and 5 has not. open_clip's
are those of the visual part, without `visual.`. The mapping is exact: tensors are renamed, joined or transposed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llava_mole.common.errors import WeightsError
from llava_mole.model.interop.tensors import check_names

PROJECTION = "visual_projection.weight"
"""CLIPModel's projection of the image feature; a plain CLIPVisionModel has none, and LLaVA does not use it."""

OUTER = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
"""open_clip -> Hugging Face (whose `layrnorm` is spelled so)."""

BLOCK = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in (
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    )
    for kind in ("weight", "bias")
}
FUSED = {f"attn.in_proj_{kind}": tuple(f"self_attn.{p}_proj.{kind}" for p in "qkv") for kind in ("weight", "bias")}
"""open_clip keeps query, key and value below each other in one matrix."""


def name_pairs(layers: int) -> dict[str, tuple[str, ...]]:
    """open_clip name -> the Hugging Face names it is made of, for a tower of `layers` blocks, without projection."""
    pairs: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in OUTER.items()}
    for n in range(layers):
        ours, theirs = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
        pairs |= {ours + key: (theirs + value,) for key, value in BLOCK.items()}
        pairs |= {ours + key: tuple(theirs + value for value in values) for key, values in FUSED.items()}
    return pairs


def strip_hf_name(name: str) -> str | None:
    """The name without prefixes; None for what belongs to CLIP's text half or is a constant buffer."""
    name = name.removeprefix("vision_model.")
    if name.startswith(("text_model.", "text_projection.", "logit_scale")) or name.endswith("position_ids"):
        return None
    return name


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Blocks in a list of names `<prefix><n>.`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def to_open_clip(state: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Hugging Face's tensors in open_clip's names. Raises WeightsError that lists names missing or unexpected."""
    state = {short: value for name, value in state.items() if (short := strip_hf_name(name)) is not None}
    pairs = name_pairs(count_layers(state, "encoder.layers."))
    needed = dict.fromkeys(name for names in pairs.values() for name in names)
    check_names(where, {name: None for name in state if name != PROJECTION}, needed)
    result = {ours: torch.cat([state[name] for name in names]) for ours, names in pairs.items()}
    if PROJECTION in state:
        result["proj"] = state[PROJECTION].T.contiguous()
    return result


def to_hugging_face(state: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """open_clip's visual tensors in Hugging Face's names. Raises WeightsError that lists names that do not fit."""
    pairs = name_pairs(count_layers(state, "transformer.resblocks."))
    check_names(where, {name: None for name in state if name != "proj"}, pairs)
    result: dict[str, Tensor] = {}
    for ours, names in pairs.items():
        parts = state[ours].chunk(3) if len(names) == 3 else (state[ours],)
        result |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    return result


def open_clip_config(vision: Any, where: object) -> dict[str, Any]:
    """open_clip's configuration of a tower, from a `CLIPVisionConfig`.

    Raises:
        WeightsError: the tower computes something that open_clip's does not.
    """
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{where}: hidden_act {vision.hidden_act!r}; a CLIP tower has 'quick_gelu' or 'gelu'")
    if abs(vision.layer_norm_eps - 1e-5) > 1e-12:
        raise WeightsError(f"{where}: layer_norm_eps {vision.layer_norm_eps}; open_clip's towers have 1e-05")
    return {
        "embed_dim": vision.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {},
    }


def clip_vision_config(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Arguments of `CLIPVisionConfig` for an open_clip configuration. Raises WeightsError for other kinds of ViT."""
    cfg = config["vision_cfg"]
    plain = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    strange = sorted(key for key, value in cfg.items() if key not in plain and value)
    if strange or isinstance(cfg["layers"], list):
        raise WeightsError(f"{where}: vision_cfg has {', '.join(strange) or 'stages'}, which CLIPVisionModel lacks")
    width = cfg["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": width // cfg.get("head_width", 64),
        "image_size": cfg["image_size"],
        "patch_size": cfg["patch_size"],
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu", False) else "gelu",
        "layer_norm_eps": 1e-5,
    }
