"""The vision tower: a ViT of open_clip or transformers whose block `select_layer` gives the patch features.

`select_layer` counts as Hugging Face's `hidden_states` does: with L blocks, -1 is the output of the last block and
LLaVA-1.5's -2 that of block L-2. Class and register tokens are dropped and no final norm is applied, so the features of
a CLIP tower equal `CLIPVisionModel(...).hidden_states[-2][:, 1:]`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.data.images import normalise_pixels
from llava_mole.model.checkpoint import fingerprint
from llava_mole.model.tower_files import FAMILIES, TowerSpec, read_tower, vit_spec

OPEN_CLIP_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TEXT_PART = ("text_model.", "text_projection.", "logit_scale", "logit_bias", "visual_projection.", "classifier.")
"""Tensors of a whole model of Hugging Face that are not the tower's."""
_PREFIXES = ("vision_model.", "dinov2.", "dinov2_with_registers.")


class VisionTower(nn.Module):
    """Images [N, 3, S, S] -> patch features [N, P, W], always in eval mode; frozen unless a run lets it train.

    `blocks` are those that run. Class and register tokens are dropped.
    """

    visual: Any  # a vision model of open_clip or transformers

    def __init__(self, visual: Any, select_layer: int, weights_fingerprint: str, spec: TowerSpec | None = None):
        """`spec` is what `read_tower` says; None stands for open_clip's own ViT with CLIP's pixels."""
        super().__init__()
        spec = spec or vit_spec(visual)
        block = spec.blocks + select_layer if select_layer < 0 else select_layer - 1
        if not 0 <= block < spec.blocks:
            raise ConfigError(
                f"model.vision_tower.select_layer {select_layer}: the tower has {spec.blocks} blocks; "
                f"allowed are -{spec.blocks}..-1 and 1..{spec.blocks}"
            )
        self.visual = visual
        self.spec = spec
        self.block = block
        self._drop_what_never_runs()
        self.image_size, self.grid, self.num_patches = spec.image_size, spec.grid, spec.num_patches
        self.hidden_size = spec.width
        self.image_mean, self.image_std = spec.pixels.mean, spec.pixels.std
        self.weights_fingerprint = weights_fingerprint
        self.requires_grad_(False)
        self.eval()

    def _drop_what_never_runs(self) -> None:
        """Delete blocks above the selected one, norms and heads behind them: it saves memory and start-up time."""
        visual = self.visual
        del self.blocks[self.block + 1 :]
        if self.spec.layout == "open_clip":
            visual.ln_post, visual.proj = nn.Identity(), None
        elif self.spec.layout == "timm":
            visual.trunk.prune_intermediate_layers([self.block], prune_norm=True, prune_head=True)
            visual.head = nn.Identity()
        else:
            setattr(visual, FAMILIES[self.spec.config.model_type].norm, nn.Identity())
            if hasattr(visual, "head"):  # SigLIP's pooling
                visual.use_head, visual.head = False, None

    @property
    def blocks(self) -> Any:
        """The transformer blocks that run, from below: a list module."""
        if self.spec.layout == "open_clip":
            return self.visual.transformer.resblocks
        if self.spec.layout == "timm":
            return self.visual.trunk.blocks
        return self.visual.get_submodule(FAMILIES[self.spec.config.model_type].layers)

    @property
    def patch_embedding(self) -> Any:
        """The convolution or linear layer that makes tokens of patches."""
        return next(module for module in self.visual.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in eval mode, whatever `mode` is: a tower has nothing that differs in training."""
        return super().train(False)

    @property
    def trains(self) -> bool:
        """Whether any of its weights train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images_NCHW: torch.Tensor, image_grids: torch.Tensor | None = None) -> torch.Tensor:
        """Patch features [N, P, W], in the tower's dtype, of uint8 pixels or normalised floats [N, 3, S, S].

        `image_grids` (int64 [N, 2]) says that the pixels are squares of patches, see `data.native`, and how many rows
        and columns of patches each image has; it is for towers that take any (`takes_any_grid`).
        """
        if images_NCHW.dtype == torch.uint8:
            images_NCHW = normalise_pixels(images_NCHW, self.image_mean, self.image_std)
        images_NCHW = images_NCHW.to(self.patch_embedding.weight.dtype)
        # A frozen tower needs no graph; in one that trains, the graph begins at the first weight that does.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            return self._features(images_NCHW, image_grids)

    def _features(self, images_NCHW: torch.Tensor, image_grids: torch.Tensor | None) -> torch.Tensor:
        if image_grids is not None and not self.spec.takes_any_grid:
            raise ValueError(f"{self.spec.kind} takes images of one size; image_grids are for NaFlex towers")
        if self.spec.layout == "hugging_face":
            takes_patches = self.spec.takes_any_grid
            inputs = self._naflex(images_NCHW, image_grids) if takes_patches else {"pixel_values": images_NCHW}
            # The norm behind the blocks is gone, so this is the output of the selected block.
            return self.visual(**inputs).last_hidden_state[:, self.spec.prefix_tokens :]
        out = self.visual.forward_intermediates(
            images_NCHW, indices=[self.block], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return out["image_intermediates"][0]

    def _naflex(self, images_NCHW: torch.Tensor, image_grids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Images as SigLIP2's NaFlex models take them: patches [N, P, p * p * 3], by default of a full grid."""
        count, (rows, columns), side = len(images_NCHW), self.grid, self.spec.config.patch_size
        cut = images_NCHW.reshape(count, 3, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        if image_grids is None:
            image_grids = torch.tensor([[rows, columns]], device=images_NCHW.device).expand(count, 2)
        places = torch.arange(rows * columns, device=images_NCHW.device)
        return {
            "pixel_values": cut.reshape(count, rows * columns, -1),
            "pixel_attention_mask": (places < image_grids.prod(dim=1, keepdim=True)).long(),
            "spatial_shapes": image_grids,
        }


def find_open_clip_weights(directory: Path) -> Path:
    """The open_clip weight file in a directory. Raises WeightsError if there is none."""
    for name in OPEN_CLIP_WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise WeightsError(f"{directory} holds no open_clip weights; looked for {', '.join(OPEN_CLIP_WEIGHTS)}")


def build_vision_tower(
    name: str,
    weights: str,
    activation: str,
    select_layer: int = -2,
    *,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> VisionTower:
    """Build the tower `name` and load `weights` into it, in the dtype they are stored in.

    Args:
        name, image_size, image_mean, image_std: as for `read_tower`.
        weights: `.safetensors` or `.pt`/`.bin` state dict of the whole model or of its visual part.
        activation: as the weights were trained, see `TowerSpec.activation`.
        select_layer: see the module docstring.

    Raises:
        WeightsError: The file is missing, its keys or shapes do not fit, or a value is not finite.
        ConfigError: The model uses another activation, or as `read_tower`.
    """
    spec = read_tower(name, image_size=image_size, image_mean=image_mean, image_std=image_std)
    if spec.activation != activation:
        hint = "; for OpenAI's weights take the name ending in '-quickgelu'" if spec.layout == "open_clip" else ""
        raise ConfigError(
            f"vision tower {name!r} is built with {spec.activation}, but its weights need {activation} "
            f"(model.vision_tower.activation){hint}"
        )
    state = read_visual_state(Path(weights))
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{weights}: {key} has values that are not finite; download or build the file again")
    identity = fingerprint(state.items())
    load = _load_transformers if spec.layout == "hugging_face" else _load_open_clip
    visual, problems = load(spec, state)
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise WeightsError(f"{weights} does not fit vision tower {name!r}: {len(problems)} problems: {shown}")
    return VisionTower(visual, select_layer, identity, spec)


def _load_open_clip(spec: TowerSpec, state: dict[str, torch.Tensor]) -> tuple[Any, list[str]]:
    """The module of open_clip with these tensors, and what does not fit."""
    with torch.device("meta"):
        visual: Any = spec.make()
    if spec.layout == "open_clip" and "proj" not in state:
        visual.proj = None  # never used here, and Hugging Face's CLIPVisionModel has none
    expected = visual.state_dict()
    problems = [f"missing {key}" for key in expected.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - expected.keys()]
    problems += [
        _mismatch(key, state[key].shape, expected[key].shape)
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if not problems:
        if any(name not in expected for name, _ in visual.named_buffers()):
            visual = spec.make()  # its buffers that no file holds have values only on a real device
        visual.load_state_dict(state, strict=True, assign=True)
    return visual, problems


def _load_transformers(spec: TowerSpec, state: dict[str, torch.Tensor]) -> tuple[Any, list[str]]:
    """The same of transformers, which maps the names of files to those of its present version."""
    import transformers

    dtypes = [value.dtype for value in state.values() if value.is_floating_point()]
    loaded: Any = getattr(transformers, spec.kind).from_pretrained(
        None,
        config=copy.deepcopy(spec.config),
        state_dict=dict(state),
        dtype=dtypes[0] if dtypes else torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, with their names
    )
    model, info = loaded
    problems = [f"missing {name}" for name in info["missing_keys"]]
    problems += [f"unexpected {name}" for name in info["unexpected_keys"]]
    problems += [_mismatch(*entry) for entry in info["mismatched_keys"]]
    return getattr(model, "vision_model", model), problems


def _mismatch(key: str, found: Any, needed: Any) -> str:
    return f"{key} is {tuple(found)}, the model needs {tuple(needed)}"


def read_visual_state(path: Path) -> dict[str, torch.Tensor]:
    """The visual part of a state dict of open_clip or Hugging Face, named as inside the vision model.

    Raises WeightsError, see `build_vision_tower`.
    """
    state = _read_state(path)
    if any(key.startswith("visual.") for key in state):
        return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return hugging_face_state(state)


def hugging_face_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a vision model of transformers without their prefix, without text tensors and constant buffers."""
    own = {}
    for name, value in state.items():
        short = name
        for prefix in _PREFIXES:
            short = short.removeprefix(prefix)
        if not short.startswith(_TEXT_PART) and not short.endswith("position_ids"):
            own[short] = value
    return own


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
