"""The vision tower: an open_clip ViT whose block `select_layer` gives the patch features.

`select_layer` counts as Hugging Face's `hidden_states` does: with L blocks, -1 is the output of the last block and
LLaVA-1.5's -2 that of block L-2. The class token is dropped and no final norm is applied, so the features equal
`CLIPVisionModel(...).hidden_states[-2][:, 1:]`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.common.files import read_json
from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.data.images import normalise_pixels
from llava_mole.model.checkpoint import fingerprint

OPEN_CLIP_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIGS = ("config.json", "open_clip_config.json")
_VIT_KEYS = {"image_size", "patch_size", "width", "layers"}


class VisionTower(nn.Module):
    """Images [N, 3, S, S] -> patch features [N, P, W], always in eval mode; frozen unless a run lets it train."""

    visual: Any  # open_clip's VisionTransformer

    def __init__(self, visual: Any, select_layer: int, weights_fingerprint: str):
        super().__init__()
        num_blocks = len(visual.transformer.resblocks)
        block = num_blocks + select_layer if select_layer < 0 else select_layer - 1
        if not 0 <= block < num_blocks:
            raise ConfigError(
                f"model.vision_tower.select_layer {select_layer}: the tower has {num_blocks} blocks; "
                f"allowed are -{num_blocks}..-1 and 1..{num_blocks}"
            )
        # Blocks above the selected one never run; deleting them saves memory and start-up time.
        del visual.transformer.resblocks[block + 1 :]
        visual.ln_post = nn.Identity()
        visual.proj = None
        self.visual = visual
        self.block = block
        self.image_size: int = visual.image_size[0]
        self.num_patches: int = visual.grid_size[0] * visual.grid_size[1]
        self.hidden_size: int = visual.conv1.out_channels
        self.image_mean, self.image_std = CLIP_MEAN, CLIP_STD
        self.weights_fingerprint = weights_fingerprint
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in eval mode, whatever `mode` is: a tower has nothing that differs in training."""
        return super().train(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that run, from below."""
        return list(self.visual.transformer.resblocks)

    @property
    def trains(self) -> bool:
        """Whether any of its weights train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Patch features [N, P, W], in the tower's dtype, of uint8 pixels or normalised floats [N, 3, S, S]."""
        if images_NCHW.dtype == torch.uint8:
            images_NCHW = normalise_pixels(images_NCHW, self.image_mean, self.image_std)
        images_NCHW = images_NCHW.to(self.visual.conv1.weight.dtype)
        # A frozen tower needs no graph; in one that trains, the graph begins at the first weight that does.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            return self._features(images_NCHW)

    def _features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        out = self.visual.forward_intermediates(
            images_NCHW, indices=[self.block], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return out["image_intermediates"][0]


def read_tower_config(name: str) -> dict[str, Any]:
    """The open_clip model configuration called `name`, or read from the JSON file of that path."""
    import open_clip

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise WeightsError(f"vision tower config {name!r} does not exist (model.vision_tower.name)")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from None
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ConfigError(
                f"model.vision_tower.name {name!r} is no open_clip model; see open_clip.list_models(), "
                "or give a JSON file"
            )
    if isinstance(config, dict):
        config = config.get("model_cfg", config)  # nested in open_clip_config.json of the Hugging Face hub
    vision = config.get("vision_cfg") if isinstance(config, dict) and "embed_dim" in config else None
    if not isinstance(vision, dict) or not _VIT_KEYS <= vision.keys() or "timm_model_name" in vision:
        raise ConfigError(f"model.vision_tower.name {name!r}: only open_clip's own ViT towers are supported")
    return config


def find_open_clip_config(directory: Path) -> Path | None:
    """The open_clip configuration in a directory, or None. Raises DataError if a file there is not JSON."""
    for file in (directory / name for name in OPEN_CLIP_CONFIGS):
        content = read_json(file) if file.is_file() else None
        if isinstance(content, dict) and "vision_cfg" in content.get("model_cfg", content):
            return file
    return None


def find_open_clip_weights(directory: Path) -> Path:
    """The open_clip weight file in a directory. Raises WeightsError if there is none."""
    for name in OPEN_CLIP_WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise WeightsError(f"{directory} holds no open_clip weights; looked for {', '.join(OPEN_CLIP_WEIGHTS)}")


def build_vision_tower(name: str, weights: str, activation: str, select_layer: int = -2) -> VisionTower:
    """Build the tower `name` and load `weights` into it, in the dtype they are stored in.

    Args:
        name: open_clip model name or JSON config path.
        weights: `.safetensors` or `.pt`/`.bin` state dict of the CLIP model or of its visual part.
        activation: `quick_gelu` or `gelu`, as the weights were trained.
        select_layer: see the module docstring.

    Raises:
        WeightsError: The file is missing, its keys or shapes do not fit, or a value is not finite.
        ConfigError: The model of this name does not exist or uses another activation.
    """
    import open_clip

    config = read_tower_config(name)
    built_with = "quick_gelu" if config.get("quick_gelu", False) else "gelu"
    if built_with != activation:
        raise ConfigError(
            f"vision tower {name!r} is built with {built_with}, but its weights need {activation} "
            f"(model.vision_tower.activation); for OpenAI's weights take the name ending in '-quickgelu'"
        )
    state = read_visual_state(Path(weights))
    try:
        with torch.device("meta"):
            clip = open_clip.CLIP(
                embed_dim=config["embed_dim"],
                vision_cfg=config["vision_cfg"],
                text_cfg=open_clip.CLIPTextCfg(),
                quick_gelu=built_with == "quick_gelu",
            )
    except Exception as error:  # open_clip does not check its values: a wrong type or a zero can raise anything
        raise ConfigError(f"model.vision_tower.name {name!r}: no ViT can be built of it: {error}") from None
    visual: Any = clip.visual
    if "proj" not in state:
        visual.proj = None  # never used here, and Hugging Face's CLIPVisionModel has none
    expected = visual.state_dict()
    problems = [f"missing {key}" for key in expected.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the model needs {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise WeightsError(f"{weights} does not fit vision tower {name!r}: {len(problems)} problems: {shown}")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{weights}: {key} has values that are not finite; download or build the file again")
    identity = fingerprint(state.items())
    visual.load_state_dict(state, strict=True, assign=True)
    return VisionTower(visual, select_layer, identity)


def read_visual_state(path: Path) -> dict[str, torch.Tensor]:
    """The visual part of an open_clip state dict, names without `visual.`. Raises WeightsError, see above."""
    state = _read_state(path)
    if any(key.startswith("visual.") for key in state):
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return state


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(f"vision tower weights {str(path)!r} do not exist (model.vision_tower.weights)")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a readable safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means that the file holds more than tensors
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(
            f"{path} holds more than plain tensors (OpenAI's own .pt are TorchScript archives); use the open_clip "
            f"safetensors file instead ({reason})"
        ) from None
    return state.get("state_dict", state)
