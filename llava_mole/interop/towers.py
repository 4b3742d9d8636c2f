"""Vision towers on disk: Hugging Face's or open_clip's, read and written; CLIP's also converted into each other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mole.common.errors import WeightsError
from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.data.anyres import Grid
from llava_mole.interop.names import BUFFERS
from llava_mole.interop.tensors import check_names, open_weights, read_object, save_tensors, write_object
from llava_mole.model.checkpoint import fingerprint
from llava_mole.model.multimodal_encoder import build_vision_tower, find_open_clip_weights, read_visual_state
from llava_mole.model.tower_files import (
    FAMILIES,
    WHOLE_MODELS,
    Pixels,
    TowerSpec,
    find_open_clip_config,
    is_hugging_face,
    read_tower,
    read_tower_config,
    vision_config,
)

CLIP_TYPES = ("clip", "clip_vision_model")
OTHER_TYPES = tuple(sorted({*FAMILIES, *WHOLE_MODELS} - set(CLIP_TYPES)))
"""`model_type`s of the towers that open_clip's own ViT cannot hold."""
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

PROJECTION = "visual_projection.weight"
"""CLIPModel's projection of the image feature. A CLIPVisionModel has none, and LLaVA does not use it."""
OUTER = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
"""open_clip's name -> Hugging Face's name (`layrnorm` is their spelling), outside the blocks."""
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""The same inside a block, for layers with weight and bias. open_clip also stacks query, key and value."""
CONFIG_NAMES = {
    "image_size": "image_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "patch_size": "patch_size",
}
"""open_clip's `vision_cfg` key -> attribute of `CLIPVisionConfig`, for equal values."""


@dataclass
class Tower:
    """A tower: either a file on disk (`name`, `weights`), or tensors of open_clip in memory (`state`)."""

    config: dict[str, Any]
    """open_clip's configuration, or that of a vision model of transformers, which has a `model_type`."""
    name: str | None = None
    """Value for `model.vision_tower.name`."""
    weights: Path | None = None
    state: dict[str, Tensor] | None = None
    """Converted tensors that have not been written yet."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What a run's configuration says of image size, mean and std, as for `read_tower`."""

    @property
    def kind(self) -> str:
        """A `model_type` of transformers, or `timm ...`. open_clip's own ViT is a `clip_vision_model`."""
        timm = self.config.get("vision_cfg", {}).get("timm_model_name")
        return f"timm {timm}" if timm else self.config.get("model_type", "clip_vision_model")

    @property
    def is_plain_clip(self) -> bool:
        """Whether it is open_clip's own ViT, which has a twin in transformers."""
        return "vision_cfg" in self.config and "timm_model_name" not in self.config["vision_cfg"]

    def spec(self) -> TowerSpec:
        """What `read_tower` says of a tower on disk."""
        assert self.name is not None
        return read_tower(self.name, **self.settings)

    @property
    def activation(self) -> str:
        """As `TowerSpec.activation`."""
        if not self.is_plain_clip:
            return self.spec().activation
        return "quick_gelu" if self.config.get("quick_gelu", False) else "gelu"

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.config["vision_cfg"]["width"] if self.is_plain_clip else self.spec().width

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config["vision_cfg"]["layers"] if self.is_plain_clip else self.spec().blocks

    def pixels(self) -> tuple[int, Pixels]:
        """Side of an image and how its pixels are normalised."""
        if self.name is None:
            return self.config["vision_cfg"]["image_size"], Pixels(CLIP_MEAN, CLIP_STD)
        spec = self.spec()
        return spec.image_size, spec.pixels

    def transformers_config(self, where: object) -> dict[str, Any]:
        """Configuration of the vision model of transformers, `model_type` included. Raises WeightsError for timm's."""
        if self.is_plain_clip:
            return {**clip_vision_config(self.config, where), "model_type": "clip_vision_model"}
        if self.kind.startswith("timm "):
            raise WeightsError(f"{where}: the vision tower is {self.kind!r}, for which transformers has no class here")
        return self.config

    def as_open_clip(self) -> "Tower":
        """The tower as open_clip's own ViT. Raises WeightsError if it is no CLIP."""
        if self.is_plain_clip:
            return self
        if self.kind != "clip_vision_model":
            raise WeightsError(f"{self.name}: a tower of kind {self.kind!r} cannot be converted; use it as it is")
        config = vision_config(self.config, self.name)
        return tower_from_hugging_face(self.visual_state(), open_clip_config(config, self.name), self.name)

    def visual_state(self) -> dict[str, Tensor]:
        """The tensors as stored, named as in `read_visual_state`."""
        if self.state is not None:
            return self.state
        assert self.weights is not None
        return read_visual_state(self.weights)

    def hugging_face_state(self) -> dict[str, Tensor]:
        """The tensors in Hugging Face's names, without prefix and without the projection of the image feature."""
        if not self.is_plain_clip:
            return self.visual_state()
        state = {name: value for name, value in self.visual_state().items() if name != "proj"}
        pairs = _name_pairs(_count_layers(state, "transformer.resblocks."))
        check_names("vision tower", state, pairs)
        result: dict[str, Tensor] = {}
        for ours, names in pairs.items():
            parts = state[ours].chunk(3) if len(names) == 3 else (state[ours],)
            result |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
        return result

    def fingerprint(self) -> str:
        """The fingerprint that `build_vision_tower` records."""
        return fingerprint(self.visual_state().items())


def open_tower(path: Path, name: str | None = None) -> Tower:
    """A tower from a directory or weight file. A directory with a CLIP of Hugging Face is converted in memory.

    Args:
        path: directory with a configuration and weights, or a weight file.
        name: open_clip model name or JSON file; needed for a weight file without a configuration beside it.

    Raises:
        WeightsError: `path` is none of these, or its tensors do not fit its configuration.
    """
    if path.is_file() or name is not None:
        config_file = path.parent / CONFIG_FILE
        if is_hugging_face(name or str(config_file)):
            return _open_hugging_face(Path(name or config_file), path if path.is_file() else path / WEIGHTS_FILE)
        if name is None and not (config_file.is_file() and find_open_clip_config(path.parent)):
            raise WeightsError(
                f"{path} is a weight file without a configuration beside it; name the open_clip model with "
                "--vision-tower-name, as in ViT-L-14-336-quickgelu"
            )
        file = path if path.is_file() else find_open_clip_weights(path)
        name = name or str(config_file)
        return Tower(read_tower_config(name), name, file)
    if not path.is_dir():
        raise WeightsError(f"vision tower {path} does not exist (--vision-tower)")
    if found := find_open_clip_config(path):
        return Tower(read_tower_config(str(found)), str(found), find_open_clip_weights(path))
    model_type = read_object(path / CONFIG_FILE).get("model_type") if (path / CONFIG_FILE).is_file() else None
    if model_type in OTHER_TYPES:
        return _open_hugging_face(path / CONFIG_FILE, path / WEIGHTS_FILE)
    if model_type not in CLIP_TYPES:
        raise WeightsError(f"{path} is not a vision tower: it has neither a CLIP config.json nor an open_clip one")
    from transformers import CLIPVisionConfig

    weights = open_weights(path)
    try:
        config = CLIPVisionConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many types for an unusable value
        raise WeightsError(f"{path} has no CLIP configuration: {' '.join(str(error).split())[:200]}") from None
    return tower_from_hugging_face(weights, open_clip_config(config, path), path)


def _open_hugging_face(config: Path, weights: Path) -> Tower:
    """A tower that stays in Hugging Face's layout."""
    if not weights.is_file():
        raise WeightsError(f"vision tower {config.parent} has no {weights.name}")
    return Tower(vision_config(read_object(config), config).to_dict(), str(config), weights)


def tower_from_hugging_face(state: Mapping[str, Tensor], config: dict[str, Any], where: object) -> Tower:
    """A tower converted from tensors with Hugging Face's names.

    Args:
        state: the tensors, with or without the prefix `vision_model.`; text tensors and constant buffers are skipped.
        config: open_clip's configuration.
        where: what WeightsError calls the tensors if names are missing or unexpected.
    """
    state = {name.removeprefix("vision_model."): state[name] for name in state if not _is_skipped(name)}
    pairs = _name_pairs(_count_layers(state, "encoder.layers."))
    needed = dict.fromkeys(name for names in pairs.values() for name in names)
    check_names(where, {name: None for name in state if name != PROJECTION}, needed)
    result = {ours: torch.cat([state[name] for name in names]) for ours, names in pairs.items()}
    if PROJECTION in state:
        result["proj"] = state[PROJECTION].T.contiguous()
    return Tower(config, state=result)


def _is_skipped(name: str) -> bool:
    """Whether a tensor of a CLIPModel is not the tower's, or is a constant buffer."""
    name = name.removeprefix("vision_model.")
    return name.startswith(("text_model.", "text_projection.", "logit_scale")) or name.endswith(BUFFERS)


def _name_pairs(layers: int) -> dict[str, tuple[str, ...]]:
    """open_clip's name -> the Hugging Face names it is made of, for a tower of `layers` blocks; no projection."""
    pairs: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in OUTER.items()}
    for n in range(layers):
        ours, theirs = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
        both = [(key, value, kind) for key, value in BLOCK.items() for kind in ("weight", "bias")]
        pairs |= {f"{ours}{key}.{kind}": (f"{theirs}{value}.{kind}",) for key, value, kind in both}
        for kind in ("weight", "bias"):
            pairs[f"{ours}attn.in_proj_{kind}"] = tuple(f"{theirs}self_attn.{p}_proj.{kind}" for p in "qkv")
    return pairs


def _count_layers(names: Iterable[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def open_clip_config(vision: Any, where: object) -> dict[str, Any]:
    """open_clip's configuration for a `CLIPVisionConfig`. Raises WeightsError if open_clip has no such tower."""
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{where}: hidden_act {vision.hidden_act!r}; a CLIP tower has 'quick_gelu' or 'gelu'")
    if abs(vision.layer_norm_eps - 1e-5) > 1e-12:
        raise WeightsError(f"{where}: layer_norm_eps {vision.layer_norm_eps}; open_clip's towers have 1e-05")
    return {
        "embed_dim": vision.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            **{ours: getattr(vision, theirs) for ours, theirs in CONFIG_NAMES.items()},
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {},
    }


def clip_vision_config(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Arguments of `CLIPVisionConfig` for an open_clip configuration. Raises WeightsError for other kinds of ViT."""
    cfg, width = config["vision_cfg"], config["vision_cfg"]["width"]
    strange = sorted(k for k, value in cfg.items() if value and k not in (*CONFIG_NAMES, "head_width", "mlp_ratio"))
    if strange or isinstance(cfg["layers"], list):
        raise WeightsError(f"{where}: vision_cfg has {', '.join(strange) or 'stages'}, which CLIPVisionModel lacks")
    return {
        **{theirs: cfg[ours] for ours, theirs in CONFIG_NAMES.items()},
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "num_attention_heads": width // cfg.get("head_width", 64),
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu", False) else "gelu",
        "layer_norm_eps": 1e-5,
    }


def write_open_clip(tower: Tower, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` for `model.vision_tower`. Raises WeightsError if they do not load."""
    tower = tower.as_open_clip()
    directory.mkdir(parents=True)
    write_object(directory / CONFIG_FILE, tower.config)
    save_tensors(tower.visual_state(), directory / WEIGHTS_FILE, "visual.")
    build_vision_tower(str(directory / CONFIG_FILE), str(directory / WEIGHTS_FILE), tower.activation, -1)


def write_hugging_face(tower: Tower, directory: Path, aspect_ratio: str) -> None:
    """Write a tower as a Hugging Face `CLIPVisionModel` with its image processor, without open_clip's projection.

    Raises WeightsError if it is no CLIP.
    """
    if tower.kind != "clip_vision_model":
        raise WeightsError(
            f"a tower of kind {tower.kind!r} cannot become a CLIPVisionModel; its own directory is usable"
        )
    config = vision_config(tower.transformers_config(directory), directory)
    directory.mkdir(parents=True)
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(str(directory))
    save_tensors(tower.hugging_face_state(), directory / WEIGHTS_FILE, "vision_model.")
    image_processor(tower, aspect_ratio).save_pretrained(str(directory))


def image_processor(tower: Tower, aspect_ratio: str, grid: Grid | None = None) -> Any:
    """CLIP's image processor; for `pad` LLaVA's, which first pads the image to a square; with a grid LLaVA-NeXT's."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor

    size, pixels = tower.pixels()
    values: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    values |= {"image_mean": list(pixels.mean), "image_std": list(pixels.std), "resample": pixels.resample}
    if grid is not None:
        return LlavaNextImageProcessor(image_grid_pinpoints=[list(pair) for pair in grid.pinpoints], **values)
    return LlavaImageProcessor(do_pad=True, **values) if aspect_ratio == "pad" else CLIPImageProcessor(**values)
