"""Vision towers on disk: Hugging Face's CLIP or open_clip's, read, converted and written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mole.common.errors import WeightsError
from llava_mole.interop.tensors import check_names, open_weights, read_json
from llava_mole.model.fingerprint import fingerprint
from llava_mole.model.multimodal_encoder import build_vision_tower, read_tower_config, read_visual_state

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


OPEN_CLIP_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIGS = ("config.json", "open_clip_config.json")
CLIP_TYPES = ("clip", "clip_vision_model")
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass
class Tower:
    """A tower in open_clip's form, on disk already or in memory."""

    config: dict[str, Any]
    """open_clip's configuration."""
    name: str | None = None
    """What `model.vision_tower.name` becomes, where the weights stay where they are."""
    weights: Path | None = None
    """Their file then."""
    state: dict[str, torch.Tensor] | None = None
    """Converted tensors, still to be written."""

    @property
    def activation(self) -> str:
        return "quick_gelu" if self.config.get("quick_gelu", False) else "gelu"

    @property
    def width(self) -> int:
        return self.config["vision_cfg"]["width"]

    def visual_state(self) -> dict[str, torch.Tensor]:
        """The tensors in open_clip's names."""
        if self.state is not None:
            return self.state
        assert self.weights is not None
        return read_visual_state(self.weights)


def is_open_clip_dir(path: Path) -> bool:
    """Whether a directory holds an open_clip configuration."""
    return find_open_clip_config(path) is not None


def find_open_clip_config(path: Path) -> Path | None:
    for name in OPEN_CLIP_CONFIGS:
        file = path / name
        if file.is_file():
            content = read_json(file)
            if "vision_cfg" in content.get("model_cfg", content):
                return file
    return None


def open_tower(path: Path, name: str | None = None) -> Tower:
    """A tower from an open_clip directory or weight file, or from a Hugging Face CLIP directory (converted in memory).

    Args:
        path: directory with a configuration and weights, or an open_clip weight file.
        name: open_clip model name or JSON file; needed for a weight file without a configuration beside it.

    Raises:
        WeightsError: it is none of these, or its tensors do not fit its configuration.
    """
    if path.is_file() or name is not None:
        config = path.parent / CONFIG_FILE
        if name is None and not (config.is_file() and is_open_clip_dir(path.parent)):
            raise WeightsError(
                f"{path} is a weight file without a configuration beside it; name the open_clip model with "
                "--vision-tower-name, as in ViT-L-14-336-quickgelu"
            )
        file = path if path.is_file() else _open_clip_weights(path)
        return Tower(read_tower_config(name or str(config)), name or str(config), file)
    if not path.is_dir():
        raise WeightsError(f"vision tower {path} does not exist (--vision-tower)")
    config_file = find_open_clip_config(path)
    if config_file is not None:
        return Tower(read_tower_config(str(config_file)), str(config_file), _open_clip_weights(path))
    if not (path / CONFIG_FILE).is_file() or read_json(path / CONFIG_FILE).get("model_type") not in CLIP_TYPES:
        raise WeightsError(f"{path} is no vision tower: it has neither a CLIP config.json nor an open_clip one")
    weights = open_weights(path)
    state = {name: weights[name] for name in weights if strip_hf_name(name) is not None}
    return Tower(read_hf_config(path), state=to_open_clip(state, path))


def read_hf_config(path: Path) -> dict[str, Any]:
    """open_clip's configuration of the Hugging Face CLIP in directory `path`."""
    from transformers import CLIPVisionConfig

    try:
        config = CLIPVisionConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a value that it cannot use
        raise WeightsError(f"{path} has no configuration of CLIP: {' '.join(str(error).split())[:200]}") from None
    return open_clip_config(config, path)


def tower_from_parts(state: Mapping[str, torch.Tensor], config: dict[str, Any], where: object) -> Tower:
    """A tower out of a larger checkpoint, whose tensors have Hugging Face's names."""
    return Tower(config, state=to_open_clip(state, where))


def write_open_clip(tower: Tower, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` as `model.vision_tower` takes them, and check that they load.

    Raises:
        WeightsError: the tensors do not fit the configuration or are not finite.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(tower.config, indent=1) + "\n", encoding="utf-8")
    state = {f"visual.{name}": value.contiguous() for name, value in tower.visual_state().items()}
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    build_vision_tower(str(directory / CONFIG_FILE), str(directory / WEIGHTS_FILE), tower.activation, -1)


def write_hugging_face(tower: Tower, directory: Path, aspect_ratio: str) -> None:
    """Write a tower as a Hugging Face CLIP directory, with its image processor.

    Without the projection of the image feature, which open_clip keeps, it is a `CLIPVisionModel`; so it is written.
    """
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig

    directory.mkdir(parents=True)
    values = clip_vision_config(tower.config, directory)
    config = CLIPVisionConfig(**values)
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(str(directory))
    state = hugging_face_state(tower)
    save_file({f"vision_model.{k}": v for k, v in state.items()}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    write_image_processor(directory, values["image_size"], aspect_ratio)


def hugging_face_state(tower: Tower) -> dict[str, torch.Tensor]:
    """The tensors in Hugging Face's names, without prefix and without projection."""
    state = to_hugging_face(tower.visual_state(), "vision tower")
    return {name: value for name, value in state.items() if name != PROJECTION}


def write_image_processor(directory: Path, image_size: int, aspect_ratio: str) -> None:
    """Write `preprocessor_config.json`: CLIP's processor, or for `pad` LLaVA's, which pads to a square first."""
    from llava_mole.constants import CLIP_MEAN, CLIP_STD

    pads = aspect_ratio == "pad"
    content = {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        **({"do_pad": True} if pads else {}),
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def tower_fingerprint(tower: Tower) -> str:
    """As `build_vision_tower` records it."""
    return fingerprint(tower.visual_state().items())


def _open_clip_weights(path: Path) -> Path:
    for name in OPEN_CLIP_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path} holds no open_clip weights; looked for {', '.join(OPEN_CLIP_WEIGHTS)}")
