"""How much arithmetic training takes: pure functions of a model's shape and of sums over a batch.

Only what must be computed counts. A frozen linear needs its forward product and the gradient of its input, 4 FLOPs a
weight and token; a trainable one also the gradient of its weight, 6; recomputed activations and padding are nobody's
aim and are counted apart. So a rate from `training_flops` compares runs that recompute, pad or pack differently.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.multimodal_encoder import VisionTower

Amount = TypeVar("Amount", float, npt.NDArray[np.float64])
"""One number, or an array of them."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its arithmetic and memory follow from."""

    hidden_size: int
    ffn_size: int
    layers: int
    attention_heads: int
    attention_width: int
    """Attention heads times their width."""
    key_value_width: int
    vocab_size: int
    linear_parameters: int
    """Weights of the frozen matrix products of all decoder layers; each is used once a token."""
    head_parameters: int
    adapter_parameters: float
    """Adapter weights that one token uses: those of its experts, not of the others."""
    experts_used: int
    """Experts whose rank activations are kept of a token: 1 without experts."""
    has_router: bool
    projector_parameters: int
    projector_trains: bool
    tower_width: int
    image_tokens: int
    """Positions of an image in the sequence."""
    tower_flops: float
    """Forward pass of the vision tower on one image; it has no backward pass."""

    @property
    def quadratic_length(self) -> float:
        """Length at which attention costs as much as everything else in the decoder layers."""
        per_token = 4.0 * self.linear_parameters + 6.0 * self.adapter_parameters
        return per_token / (6.0 * self.layers * self.attention_width)


def training_flops(
    shape: ModelShape, tokens: Amount, squared_tokens: Amount, supervised: Amount, images: Amount
) -> Amount:
    """FLOPs of forward and backward pass, without recomputation.

    Args:
        shape: of the model.
        tokens: Sum of the sequences' lengths.
        squared_tokens: Sum of their squares: causal attention within each sequence.
        supervised: Positions whose logits are computed.
        images: Images encoded.
    """
    language_model = (4.0 * shape.linear_parameters + 6.0 * shape.adapter_parameters) * tokens
    # Scores and their product with the values take 4 s^2 w FLOPs, half of it under a causal mask; backward twice that.
    attention = 3.0 * 2.0 * shape.layers * shape.attention_width * squared_tokens
    head = 4.0 * shape.head_parameters * supervised
    projector = (6.0 if shape.projector_trains else 2.0) * shape.projector_parameters * shape.image_tokens
    return language_model + attention + head + (shape.tower_flops + projector) * images


def recompute_flops(shape: ModelShape, tokens: Amount, squared_tokens: Amount, layers: int) -> Amount:
    """FLOPs of running `layers` decoder layers forward once more in the backward pass; arguments as above."""
    whole = 2.0 * (shape.linear_parameters + shape.adapter_parameters) * tokens
    whole = whole + 2.0 * shape.layers * shape.attention_width * squared_tokens
    return whole * (layers / shape.layers)


def model_shape(model: LlavaMole) -> ModelShape:
    """The shape of a model with its adapter, on any device, meta included."""
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
        projector_parameters=sum(p.numel() for p in projector if p.ndim == 2),
        projector_trains=any(p.requires_grad for p in projector),
        tower_width=model.vision_tower.hidden_size,
        image_tokens=model.num_image_tokens,
        tower_flops=tower_flops(model.vision_tower),
    )


def tower_flops(tower: VisionTower) -> float:
    """Forward FLOPs of the tower on one image: patch embedding and the blocks up to the selected one."""
    tokens = tower.num_patches + 1  # with the class token
    blocks = tower.visual.transformer.resblocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    attention = 4.0 * tokens * tokens * tower.hidden_size * len(blocks)
    return 2.0 * tower.visual.conv1.weight.numel() * tower.num_patches + 2.0 * weights * tokens + attention


def _weights(linear: Any) -> int:
    """Weights of a linear from its widths, which hold for quantised ones too."""
    from llava_mole.mole.ffn import linear_widths

    widths = linear_widths(linear)
    return widths[0] * widths[1] if widths is not None else 0


def _linear_parameters(lm: nn.Module, head: nn.Module) -> int:
    """Weights of the base model's linears; a wrapper is passed over for what it wraps, and adapters are no base."""
    return sum(
        _weights(module)
        for name, module in lm.named_modules()
        if module is not head
        and not hasattr(module, "base_layer")
        and not any(part.startswith(("lora_", "mole_")) for part in name.split("."))
    )


def _adapter_parameters(language_model: nn.Module) -> float:
    """Adapter weights that a token meets: all, but of stacked experts only those it is sent to."""
    used = _experts_used(language_model)
    total = 0.0
    for name, parameter in language_model.named_parameters():
        if ".lora_" in name or ".mole_" in name:
            stacked = ".mole_experts." in name and "_shared_" not in name
            total += parameter.numel() * (used / len(parameter) if stacked else 1.0)
    return total


def _experts_used(language_model: nn.Module) -> int:
    config: Any = next(iter(getattr(language_model, "peft_config", {}).values()), None)
    experts = getattr(config, "num_experts", 1)
    return experts if getattr(config, "mode", "dense") == "dense" else config.top_k
