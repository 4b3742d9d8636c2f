"""FLOPs of training, from a model's shape and sums over a batch, and the peaks of known GPUs.

A frozen linear needs its forward product and the gradient of its input, 4 FLOPs per weight and token; a trainable one
also needs the gradient of its weight, 6 in all. Blocks of the tower that train need the same 6, the others 2.
Recomputation and padding are excluded, so that rates from `training_flops` are comparable between runs that recompute,
pad or pack differently.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from llava_mole.common.errors import ConfigError
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import VisionTower

Amount = TypeVar("Amount", float, npt.NDArray[np.float64])
"""One number, or an array of them."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine a model's FLOPs and memory."""

    hidden_size: int
    ffn_size: int
    layers: int
    attention_heads: int
    attention_width: int
    """Attention heads times their width."""
    key_value_width: int
    vocab_size: int
    linear_parameters: int
    """Weights of all decoder layers' linears without adapters; each is used once per token."""
    head_parameters: int
    adapter_parameters: float
    """Adapter weights that one token uses, including only the experts it is routed to."""
    experts_used: int
    """Experts per token whose rank activations are kept; 1 without experts."""
    has_router: bool
    projector_parameters: int
    projector_trains: bool
    tower_width: int
    """Width of the projector's input: the tower's, or four times that behind a pixel shuffle."""
    image_tokens: int
    """Positions that an image takes in the sequence."""
    tower_flops: float
    """Forward pass of the vision tower on one image."""
    image_size: int = 336
    """Side of an image in pixels."""
    trained_linear_parameters: int = 0
    """Those of `linear_parameters` that train."""
    head_trains: bool = False
    tower_trained_share: float = 0.0
    """Share of `tower_flops` in blocks that train, the last ones: what is below them has no backward pass."""

    @property
    def quadratic_length(self) -> float:
        """Length at which attention costs as much as everything else in the decoder layers."""
        per_token = 4.0 * self.linear_parameters + 2.0 * self.trained_linear_parameters + 6.0 * self.adapter_parameters
        return per_token / (6.0 * self.layers * self.attention_width)


def training_flops(
    shape: ModelShape, tokens: Amount, squared_tokens: Amount, supervised: Amount, images: Amount
) -> Amount:
    """FLOPs of the forward and backward pass, without recomputation.

    Args:
        shape: The model's.
        tokens: Sum of the sequences' lengths.
        squared_tokens: Sum of their squares: causal attention within each sequence.
        supervised: Positions whose logits are computed.
        images: Images encoded.
    """
    linears = 4.0 * shape.linear_parameters + 2.0 * shape.trained_linear_parameters
    language_model = (linears + 6.0 * shape.adapter_parameters) * tokens
    # Scores and their product with the values take 4 s^2 w FLOPs, half of it under a causal mask; backward twice that.
    attention = 3.0 * 2.0 * shape.layers * shape.attention_width * squared_tokens
    head = (6.0 if shape.head_trains else 4.0) * shape.head_parameters * supervised
    projector = (6.0 if shape.projector_trains else 2.0) * shape.projector_parameters * shape.image_tokens
    tower = (1.0 + 2.0 * shape.tower_trained_share) * shape.tower_flops
    return language_model + attention + head + (tower + projector) * images


def recompute_flops(shape: ModelShape, tokens: Amount, squared_tokens: Amount, layers: int) -> Amount:
    """FLOPs of running `layers` decoder layers forward once more in the backward pass; arguments as above."""
    whole = 2.0 * (shape.linear_parameters + shape.adapter_parameters) * tokens
    whole = whole + 2.0 * shape.layers * shape.attention_width * squared_tokens
    return whole * (layers / shape.layers)


def model_shape(model: LlavaMole) -> ModelShape:
    """The shape of a model with its adapter; the model may be on any device, including meta."""
    lm = model.causal_lm
    config = lm.config.get_text_config()
    head = lm.get_output_embeddings()
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    projector = list(model.projector.parameters())
    return ModelShape(
        hidden_size=config.hidden_size,
        ffn_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        attention_heads=heads,
        attention_width=heads * head_width,
        key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        vocab_size=config.vocab_size,
        linear_parameters=_linear_parameters(lm, head),
        head_parameters=_weights(head),
        adapter_parameters=_adapter_parameters(model.language_model),
        experts_used=_experts_used(model.language_model),
        has_router=any(".mole_router" in name for name, _ in model.language_model.named_parameters()),
        projector_parameters=sum(math.prod(whole_shape(p)) for p in projector if len(whole_shape(p)) == 2),
        projector_trains=any(p.requires_grad for p in projector),
        tower_width=model.projector_input_width,
        image_tokens=model.num_image_tokens,
        tower_flops=tower_flops(model.vision_tower),
        trained_linear_parameters=_linear_parameters(lm, head, trained=True),
        head_trains=any(p.requires_grad for p in head.parameters()),
        tower_trained_share=_trained_share(model.vision_tower),
        image_size=model.vision_tower.image_size,
    )


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has spread over the ranks, which leaves none in itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _trained_share(tower: nn.Module) -> float:
    """Share of the tower's matrices that train."""
    sizes = [(math.prod(shape), p.requires_grad) for p in tower.parameters() if len(shape := whole_shape(p)) >= 2]
    return sum(size for size, trains in sizes if trains) / max(1, sum(size for size, _ in sizes))


def tower_flops(tower: VisionTower) -> float:
    """Forward FLOPs of the tower on one image: patch embedding and the blocks up to the selected one."""
    tokens, blocks = tower.num_patches + tower.spec.prefix_tokens, tower.blocks
    weights = sum(math.prod(whole_shape(p)) for p in blocks.parameters() if len(whole_shape(p)) == 2)
    attention = 4.0 * tokens * tokens * tower.hidden_size * len(blocks)
    patches = 2.0 * math.prod(whole_shape(tower.patch_embedding.weight)) * tower.num_patches
    return patches + 2.0 * weights * tokens + attention


def _weights(linear: Any) -> int:
    """Weights of a linear, computed from its widths because quantised weights are packed."""
    from llava_mole.mole.ffn import linear_widths

    widths = linear_widths(linear)
    return widths[0] * widths[1] if widths is not None else 0


def _linear_parameters(lm: nn.Module, head: nn.Module, *, trained: bool = False) -> int:
    """Weights of the base model's linears, without the head, adapters and PEFT's wrappers around linears.

    With `trained`, only of those that train.
    """
    return sum(
        _weights(module)
        for name, module in lm.named_modules()
        if module is not head
        and (not trained or any(p.requires_grad for p in module.parameters(recurse=False)))
        and not hasattr(module, "base_layer")
        and not any(part.startswith(("lora_", "mole_")) for part in name.split("."))
    )


def _adapter_parameters(language_model: nn.Module) -> float:
    """Adapter weights that a token uses: all, except that of stacked experts only those it is routed to count."""
    used = _experts_used(language_model)
    total = 0.0
    for name, parameter in language_model.named_parameters():
        if ".lora_" in name or ".mole_" in name:
            shape = whole_shape(parameter)
            stacked = ".mole_experts." in name and len(shape) == 3
            total += math.prod(shape) * (min(1.0, used / shape[0]) if stacked else 1.0)
    return total


def _experts_used(language_model: nn.Module) -> int:
    config: Any = next(iter(getattr(language_model, "peft_config", {}).values()), None)
    experts = getattr(config, "num_experts", 1)
    return experts if getattr(config, "mode", "dense") == "dense" else config.top_k


GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    bf16_flops: float
    """Dense bfloat16 peak, FLOP/s."""
    memory_bytes: int
    device: str
    """Regular expression that matches torch's name of the device."""


def _gpu(name: str, teraflops: float, gibibytes: int, device: str) -> Gpu:
    return Gpu(name, teraflops * 1e12, gibibytes * GIB, device)


# Ordered: the first entry whose `device` matches torch's name wins.
_TABLE = (
    _gpu("a100-40g", 312.0, 40, r"A100.*40GB"),  # A100 Tensor Core GPU data sheet (2021)
    _gpu("a100-80g", 312.0, 80, r"A100|A800"),  # as above; A800 differs in its links only
    _gpu("h100-pcie", 756.0, 80, r"H100 PCIe"),  # H100 Tensor Core GPU data sheet (2022)
    _gpu("h100-nvl", 835.5, 94, r"H100 NVL"),  # H100 Tensor Core GPU data sheet (2024)
    _gpu("h200", 989.4, 141, r"H200"),  # H200 Tensor Core GPU data sheet (2024)
    _gpu("h100", 989.4, 80, r"H100|H800"),  # SXM5; H100 architecture white paper, table 2
    _gpu("b200", 2250.0, 180, r"B200"),  # DGX B200 data sheet (2024), an eighth of it
    _gpu("l40s", 362.05, 48, r"L40S"),  # L40S data sheet (2023)
    _gpu("l40", 181.05, 48, r"L40"),  # L40 data sheet (2022)
    _gpu("a10", 125.0, 24, r"A10(?!\w)"),  # A10 data sheet (2021)
    _gpu("rtx-a6000", 154.8, 48, r"RTX A6000"),  # GA102 architecture white paper, appendix
    _gpu("rtx-3090", 71.2, 24, r"RTX 3090(?! Ti)"),  # GA102 architecture white paper
    _gpu("rtx-4090", 165.2, 24, r"RTX 4090(?! D)"),  # Ada architecture white paper, appendix A
    _gpu("rtx-5090", 209.5, 32, r"RTX 5090(?! D)"),  # RTX Blackwell architecture white paper, appendix A
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}
"""Known GPUs by name."""


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises ConfigError, listing the known ones, if there is none."""
    gpu = GPUS.get(name.lower().replace("_", "-"))
    if gpu is None:
        raise ConfigError(f"unknown GPU {name!r}; known are {', '.join(sorted(GPUS))}")
    return gpu


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that torch calls `device_name` (`torch.cuda.get_device_name()`), or None for an unknown one."""
    return next((gpu for gpu in _TABLE if re.search(gpu.device, device_name)), None)
