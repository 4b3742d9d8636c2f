"""What a vision tower's own files say about it, before its weights are read.

Three layouts are read. Which one a file has follows from its content:

- open_clip's own ViT: a model name, or a JSON file with `embed_dim` and `vision_cfg`.
- timm trunks of open_clip (SigLIP, SigLIP2, EVA02, ...): the same, with `timm_model_name` in `vision_cfg`.
- Hugging Face: `config.json` of a model in `FAMILIES`, with `preprocessor_config.json` beside it.

No code of a directory is run, and nothing is downloaded.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.common.files import read_json
from llava_mole.config import TOWER_FILES
from llava_mole.constants import CLIP_MEAN, CLIP_STD

Layout = Literal["open_clip", "timm", "hugging_face"]
OPEN_CLIP_CONFIGS = ("config.json", "open_clip_config.json")
PREPROCESSOR_FILE = "preprocessor_config.json"
RESAMPLING = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Filters by open_clip's name -> Pillow's number, which Hugging Face writes as `resample`."""
_VIT_KEYS = {"image_size", "patch_size", "width", "layers"}
_KEY = "model.vision_tower"


@dataclass(frozen=True)
class Family:
    """A vision model of transformers whose output is a grid of patch tokens."""

    model_class: str
    layers: str
    """Name of the list of blocks inside the model."""
    norm: str
    """Name of the norm behind the last block, which the features do not pass."""
    class_tokens: int
    any_size: bool = False
    """Whether it interpolates its position embeddings, so that the image size is free."""
    any_grid: bool = False
    """Whether the images of a batch may have grids of any shape (NaFlex)."""


FAMILIES = {
    "clip_vision_model": Family("CLIPVisionModel", "encoder.layers", "post_layernorm", 1),
    "siglip_vision_model": Family("SiglipVisionModel", "encoder.layers", "post_layernorm", 0),
    "siglip2_vision_model": Family(
        "Siglip2VisionModel", "encoder.layers", "post_layernorm", 0, any_size=True, any_grid=True
    ),
    "dinov2": Family("Dinov2Model", "encoder.layer", "layernorm", 1, any_size=True),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "encoder.layer", "layernorm", 1, any_size=True),
}
"""`model_type` of a config.json -> its family."""
WHOLE_MODELS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
"""`model_type` of a model with a text part -> that of its vision part."""


@dataclass(frozen=True)
class Pixels:
    """How pixels become a tower's input."""

    mean: tuple[float, ...]
    """Per channel, from 0 to 1."""
    std: tuple[float, ...]
    resample: int = RESAMPLING["bicubic"]
    """Filter of the resize, as a value of `RESAMPLING`."""

    def described(self, image_size: int) -> dict[str, Any]:
        """All of it as plain values, which a checkpoint records."""
        return {"size": image_size, "mean": list(self.mean), "std": list(self.std), "resample": self.resample}


@dataclass(frozen=True)
class TowerSpec:
    """A vision tower without its weights."""

    name: str
    """As in the configuration."""
    layout: Layout
    kind: str
    """What is built: the class of transformers, or open_clip's or timm's model name."""
    activation: str
    """Of the feed-forward layers: `quick_gelu`, `gelu`, `gelu_pytorch_tanh` or `swiglu`; else what the files say."""
    image_size: int
    """Side S of the input in pixels."""
    grid: tuple[int, int]
    """Rows and columns of the patch tokens."""
    width: int
    """Hidden size."""
    blocks: int
    prefix_tokens: int
    """Class and register tokens, which stand before the patch tokens."""
    pixels: Pixels
    make: Callable[[], nn.Module]
    """Builds the module on the current default device, its values unset or random."""
    config: Any
    """open_clip's configuration as a dict, or that of transformers."""
    takes_any_grid: bool = False
    """Whether it takes images as patches of any grid, so that they can keep their shape."""

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def read_tower(
    name: str,
    *,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> TowerSpec:
    """What the files of a tower say.

    Args:
        name: an open_clip model name, or a JSON file of open_clip or of Hugging Face.
        image_size, image_mean, image_std: what the run's configuration says. They complete files that do not say it.
            The image size of a DINOv2 or SigLIP2 NaFlex tower is free. In all other cases a value that differs from
            the files' is an error.

    Raises:
        WeightsError: the file does not exist.
        ConfigError: there is no such model, it has no patch tokens, its files contradict each other or the arguments,
            or they do not say how pixels are normalised.
    """
    config = _read_config(name)
    if isinstance(config, dict) and "model_type" in config and "vision_cfg" not in config.get("model_cfg", config):
        spec, said = _hugging_face(name, config, image_size)
    else:
        spec, said = _open_clip(name, read_tower_config(name), _preprocessing(config))
    if image_size not in (None, spec.image_size):
        raise ConfigError(
            f"{_KEY}.image_size is {image_size}, but {name} has {spec.image_size}; remove the key, or name a tower of "
            "that size"
        )
    given = {"image_mean": image_mean, "image_std": image_std}
    values = {}
    for key, own in (("image_mean", said.get("mean")), ("image_std", said.get("std"))):
        wanted = given[key]
        if wanted is None:
            if own is None:
                raise ConfigError(
                    f"the files of vision tower {name} do not say how pixels are normalised (no {PREPROCESSOR_FILE} "
                    f"beside it); put that file there, or set {_KEY}.image_mean and {_KEY}.image_std"
                )
            wanted = own
        elif own is not None and not said.get("assumed") and not _close(wanted, own):
            raise ConfigError(
                f"{_KEY}.{key} is {list(wanted)}, but the files of {name} say {list(own)}; remove the key, or correct "
                "the files"
            )
        values[key] = _channels(f"{_KEY}.{key}", wanted, above_0=key == "image_std")
    pixels = Pixels(values["image_mean"], values["image_std"], said.get("resample", RESAMPLING["bicubic"]))
    return replace(spec, pixels=pixels)


def read_tower_config(name: str) -> dict[str, Any]:
    """The open_clip model configuration called `name`, or read from the JSON file of that path.

    Raises WeightsError or ConfigError: there is none, it is not open_clip's, or it describes no tower.
    """
    config = _read_config(name)
    if isinstance(config, dict):
        config = config.get("model_cfg", config)  # nested in open_clip_config.json of the Hugging Face hub
    vision = config.get("vision_cfg") if isinstance(config, dict) and "embed_dim" in config else None
    if not isinstance(vision, dict):
        raise ConfigError(
            f"{_KEY}.name {name!r}: only towers of open_clip and Hugging Face's {', '.join(sorted(FAMILIES))} are "
            "supported"
        )
    if "timm_model_name" not in vision and (not _VIT_KEYS <= vision.keys() or isinstance(vision["layers"], list)):
        what = "a ResNet" if isinstance(vision.get("layers"), list) else "no ViT"
        raise ConfigError(
            f"{_KEY}.name {name!r} is {what}, which has no patch tokens; needed is a ViT, such as "
            "ViT-L-14-336-quickgelu"
        )
    return config


def _read_config(name: str) -> Any:
    if not name.endswith(".json"):
        if Path(name).is_dir():
            pairs = ", ".join(f"{config} with {weights}" for config, weights in TOWER_FILES)
            raise WeightsError(f"{_KEY}.name {name!r} is a directory without a vision tower; looked for {pairs}")
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise ConfigError(
                f"{_KEY}.name {name!r} is no open_clip model; see open_clip.list_models(), "
                "or give a JSON file or the directory of a tower"
            )
        return config
    path = Path(name)
    if not path.is_file():
        raise WeightsError(f"vision tower config {name!r} does not exist ({_KEY}.name)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from None


def find_open_clip_config(directory: Path) -> Path | None:
    """The open_clip configuration in a directory, or None. Raises DataError if a file there is not JSON."""
    for file in (directory / name for name in OPEN_CLIP_CONFIGS):
        content = read_json(file) if file.is_file() else None
        if isinstance(content, dict) and "vision_cfg" in content.get("model_cfg", content):
            return file
    return None


def is_hugging_face(name: str) -> bool:
    """Whether `model.vision_tower.name` is the config.json of a family of transformers."""
    content = read_json(Path(name)) if name.endswith(".json") and Path(name).is_file() else None
    if not isinstance(content, dict) or "vision_cfg" in content:
        return False
    return content.get("model_type") in (*FAMILIES, *WHOLE_MODELS)


# open_clip


def _preprocessing(config: Any) -> dict[str, Any]:
    """`preprocess_cfg` of an open_clip_config.json; empty if there is none."""
    found = config.get("preprocess_cfg") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _open_clip(name: str, config: dict[str, Any], said: dict[str, Any]) -> tuple[TowerSpec, dict[str, Any]]:
    """The tower of an open_clip configuration, and what its files say about pixels."""
    vision = config["vision_cfg"]
    is_timm = "timm_model_name" in vision
    make = _timm_maker(name, config) if is_timm else _vit_maker(name, config)
    with torch.device("meta"):
        visual: Any = make()
    spec = _timm_spec(name, visual, vision["timm_model_name"]) if is_timm else vit_spec(visual, name)
    stated = {"vision_cfg.image_size": vision.get("image_size"), "preprocess_cfg.size": said.get("size")}
    for key, value in stated.items():
        side = None if value is None else _square(f"{name}: {key}", value)
        if side not in (None, spec.image_size):
            raise ConfigError(
                f"{name}: {key} is {side}, but the tower is built for {spec.image_size} pixels; correct the file"
            )
    activation = spec.activation if is_timm else "quick_gelu" if config.get("quick_gelu", False) else "gelu"
    spec = replace(spec, activation=activation, make=make, config=config)
    return spec, _open_clip_pixels(name, said, visual)


def vit_spec(visual: Any, name: str = "open_clip") -> TowerSpec:
    """The specification of open_clip's own ViT, a module that exists, with CLIP's pixels."""
    return TowerSpec(
        name=name,
        layout="open_clip",
        kind="VisionTransformer",
        activation="gelu",
        image_size=_square(name, visual.image_size),
        grid=(int(visual.grid_size[0]), int(visual.grid_size[1])),
        width=visual.conv1.out_channels,
        blocks=len(visual.transformer.resblocks),
        prefix_tokens=1,
        pixels=Pixels(CLIP_MEAN, CLIP_STD),
        make=lambda: visual,
        config={},
    )


def _timm_spec(name: str, visual: Any, kind: str) -> TowerSpec:
    trunk = visual.trunk
    stem: Any = getattr(trunk, "patch_embed", None)
    if not hasattr(trunk, "blocks") or getattr(stem, "grid_size", None) is None:
        raise ConfigError(
            f"{_KEY}.name {name!r}: timm's {kind} has no patch tokens (it is no ViT); choose a ViT, such as "
            "ViT-SO400M-14-SigLIP-384"
        )
    return TowerSpec(
        name=name,
        layout="timm",
        kind=kind,
        activation=_timm_activation(trunk),
        image_size=_square(name, stem.img_size),
        grid=(int(stem.grid_size[0]), int(stem.grid_size[1])),
        width=trunk.embed_dim,
        blocks=len(trunk.blocks),
        prefix_tokens=trunk.num_prefix_tokens,
        pixels=Pixels(CLIP_MEAN, CLIP_STD),
        make=lambda: visual,
        config={},
    )


def _open_clip_pixels(name: str, said: dict[str, Any], visual: Any) -> dict[str, Any]:
    """Mean, std and filter: of the file, of open_clip's table of weights, of timm's, or CLIP's as an assumption."""
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    found: dict[str, Any]
    if {"mean", "std"} <= said.keys():
        found = {key: said[key] for key in ("mean", "std", "interpolation") if key in said}
    else:
        keys = ("mean", "std", "interpolation")
        entries = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
        published = {tuple(entry[key] for key in keys) for entry in entries}
        defaults = getattr(getattr(visual, "trunk", None), "default_cfg", {})
        if len(published) == 1:
            found = dict(zip(keys, published.pop(), strict=True))
        elif {"mean", "std"} <= defaults.keys():
            found = {key: defaults[key] for key in keys if key in defaults} | {"assumed": True}
        else:
            found = {"mean": CLIP_MEAN, "std": CLIP_STD, "assumed": True}
    filter_name = found.pop("interpolation", "bicubic")
    if filter_name not in RESAMPLING:
        raise ConfigError(f"{name}: images are resized by {filter_name!r}; supported are {', '.join(RESAMPLING)}")
    return found | {"resample": RESAMPLING[filter_name]}


def _vit_maker(name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import open_clip

        try:
            clip = open_clip.CLIP(
                embed_dim=config["embed_dim"],
                vision_cfg=config["vision_cfg"],
                text_cfg=open_clip.CLIPTextCfg(width=8, layers=1, heads=1, vocab_size=8, context_length=8),
                quick_gelu=config.get("quick_gelu", False),
            )
        except Exception as error:  # open_clip does not check its values: a wrong type or a zero can raise anything
            raise ConfigError(f"{_KEY}.name {name!r}: no ViT can be built of it: {error}") from None
        return clip.visual

    return make


def _timm_maker(name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip import CLIPVisionCfg
        from open_clip.timm_model import TimmModel

        try:
            cfg = CLIPVisionCfg(**config["vision_cfg"])
            return TimmModel(
                cfg.timm_model_name,
                embed_dim=config["embed_dim"],
                image_size=cfg.image_size,
                pool=cfg.timm_pool,
                proj=cfg.timm_proj,
                proj_bias=cfg.timm_proj_bias,
                pretrained=False,
            )
        except Exception as error:  # timm raises many types, for an unknown name among others
            raise ConfigError(f"{_KEY}.name {name!r}: timm cannot build it: {error}") from None

    return make


def _timm_activation(trunk: Any) -> str:
    mlp = getattr(trunk.blocks[0], "mlp", None)
    if "glu" in type(mlp).__name__.lower():
        return "swiglu"
    act = getattr(mlp, "act", None)
    name = type(act).__name__
    tanh = name == "GELUTanh" or (isinstance(act, nn.GELU) and act.approximate == "tanh")
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu", "QuickGELUActivation": "quick_gelu"}
    return "gelu_pytorch_tanh" if tanh else known.get(name, name)


# Hugging Face


def vision_config(content: Mapping[str, Any], where: object) -> Any:
    """The transformers configuration of the vision model that a config.json describes.

    Raises ConfigError: `content` belongs to no family, or transformers cannot use a value.
    """
    from transformers import CONFIG_MAPPING

    model_type = content.get("model_type")
    if model_type not in FAMILIES and model_type not in WHOLE_MODELS:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is no vision tower that is known; known are "
            f"{', '.join(sorted([*FAMILIES, *WHOLE_MODELS]))}"
        )
    try:
        config: Any = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(content)))
    except Exception as error:  # transformers raises many types for an unusable value
        raise ConfigError(f"{where} is no usable configuration: {' '.join(str(error).split())[:200]}") from None
    return config if model_type in FAMILIES else config.vision_config


def _hugging_face(name: str, content: Mapping[str, Any], wanted_size: int | None) -> tuple[TowerSpec, dict[str, Any]]:
    config = vision_config(content, name)
    family = FAMILIES[config.model_type]
    said = _read_preprocessor(Path(name).parent / PREPROCESSOR_FILE)
    patch = config.patch_size
    if not isinstance(patch, int) or patch < 1:
        raise ConfigError(f"{name}: patch_size is {patch!r}; it must be a whole number above 0")
    if family.any_grid:  # its files know a number of patches; it has a size only as a square of them
        side = round(config.num_patches**0.5)
        if side * side != config.num_patches:
            raise ConfigError(f"{name}: num_patches {config.num_patches} is no square, so there is no fixed image size")
        own = side * patch
    else:
        own = _square(name, config.image_size)
    size = own
    if family.any_size:
        size = wanted_size or said.get("size") or own
        if size < patch:
            raise ConfigError(f"{_KEY}.image_size is {size}, below the patch of {patch} pixels of {name}")
        if family.any_grid and size % patch:
            raise ConfigError(
                f"{_KEY}.image_size is {size}, but {name} takes whole patches of {patch} pixels; give "
                f"{size // patch * patch} or {-(-size // patch) * patch}"
            )
    elif said.get("size") not in (None, own):
        raise ConfigError(
            f"{name}: image_size is {own}, but {PREPROCESSOR_FILE} makes images of {said['size']} pixels; "
            "correct the file that is wrong"
        )

    def make() -> nn.Module:
        import transformers
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = getattr(transformers, family.model_class)(copy.deepcopy(config))
        return getattr(model, "vision_model", model)

    spec = TowerSpec(
        name=name,
        layout="hugging_face",
        kind=family.model_class,
        activation="swiglu" if getattr(config, "use_swiglu_ffn", False) else str(config.hidden_act),
        image_size=size,
        grid=(size // patch, size // patch),
        width=config.hidden_size,
        blocks=config.num_hidden_layers,
        prefix_tokens=family.class_tokens + (getattr(config, "num_register_tokens", 0) or 0),
        pixels=Pixels(CLIP_MEAN, CLIP_STD),
        make=make,
        config=config,
        takes_any_grid=family.any_grid,
    )
    return spec, said


def _read_preprocessor(path: Path) -> dict[str, Any]:
    """Size, mean, std and filter that a preprocessor_config.json names; empty without the file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    found: dict[str, Any] = {}
    if "image_mean" in content and "image_std" in content:
        found = {"mean": content["image_mean"], "std": content["image_std"]}
    if not content.get("do_normalize", True):
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    factor = content.get("rescale_factor", 1 / 255)
    if not content.get("do_rescale", True) or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{path}: pixels are scaled by {factor!r}; supported is 1/255")
    resample = content.get("resample", RESAMPLING["bicubic"])
    if resample not in RESAMPLING.values():
        allowed = ", ".join(f"{number} ({name})" for name, number in RESAMPLING.items())
        raise ConfigError(f"{path}: resample is {resample!r}; supported are {allowed}")
    found["resample"] = resample
    crops = content.get("do_center_crop", "crop_size" in content) and content.get("crop_size") is not None
    size = content.get("crop_size") if crops else content.get("size")
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
        size = sides.pop() if len(sides) == 1 else None
    if type(size) is int:
        found["size"] = size
    return found


# Values


def _square(where: str, size: Any) -> int:
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1 or type(sides[0]) is not int:
        raise ConfigError(f"{where}: the image size is {size}; supported are squares")
    return sides[0]


def _channels(key: str, values: Any, *, above_0: bool) -> tuple[float, ...]:
    is_list = isinstance(values, list | tuple) and len(values) == 3
    if not is_list or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ConfigError(f"{key} is {values!r}; it must be three numbers, one for each colour")
    if above_0 and min(values) <= 0:
        raise ConfigError(f"{key} is {list(values)}; its numbers must be above 0")
    return tuple(float(value) for value in values)


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(abs(a - b) < 1e-4 for a, b in zip(first, second, strict=True))
