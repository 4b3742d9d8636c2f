"""Adapters of the frozen language model: none, plain LoRA or the mixture of LoRA experts."""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_mole.common.errors import ConfigError
from llava_mole.common.text import shorten
from llava_mole.config import DataConfig, TrainConfig

if TYPE_CHECKING:
    from peft import PeftConfig


def adapter_config(
    method: str,
    *,
    rank: int,
    alpha: float | None,
    dropout: float | None,
    num_experts: int,
    preset: str,
    options: dict[str, Any],
) -> "PeftConfig | None":
    """The PEFT configuration of an adapter; None for method `none`. It needs no model.

    Args:
        method: `none`, `lora` (every linear of the decoder layers) or `mole` (LoRA on attention, experts in the FFN).
        rank: LoRA rank r of every adapter.
        alpha: LoRA alpha; None takes 2 * rank, or what the preset says for this rank.
        dropout: on the adapters' input; None takes the preset's, 0 for `lora`.
        num_experts: K (`mole` only), unless preset or options have `experts_by_layer`.
        preset: named MoLE options (`mole` only).
        options: MoLE options that differ from the preset.

    Raises:
        ConfigError: options that belong to another method or another key.
        ValueError: an unknown MoLE option, or options that cannot learn.
    """
    from peft import LoraConfig

    if method != "mole" and options:
        raise ConfigError(f"adapter.options {sorted(options)} need adapter.method 'mole', got {method!r}")
    if method == "none":
        return None
    if method == "lora":
        return LoraConfig(
            r=rank,
            lora_alpha=2.0 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # a float is as good
            lora_dropout=dropout or 0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    from llava_mole.mole import PRESETS, MoleConfig

    reserved = sorted(options.keys() & {"r", "alpha", "lora_alpha", "dropout", "lora_dropout", "num_experts"})
    if reserved:
        raise ConfigError(f"adapter.options {reserved}: set adapter.rank, alpha, dropout and num_experts instead")
    given = {"alpha": alpha, "dropout": dropout}
    options = {**options, **{key: value for key, value in given.items() if value is not None}}
    if {**PRESETS.get(preset, {}), **options}.get("experts_by_layer") is None:
        options = {**options, "num_experts": num_experts}
    return MoleConfig.from_preset(preset, r=rank, task_type="CAUSAL_LM", **options)


def check_sources(config: "PeftConfig | None", data: DataConfig) -> None:
    """Raise ConfigError if an adapter that numbers the sources of the mixture knows fewer of them than it has."""
    from llava_mole.mole import MoleConfig

    if not isinstance(config, MoleConfig) or config.numbered_input is None:
        return
    active = [name for name in data.sources if data.mixture.get(name, 1.0) > 0]
    needed, known = list(data.sources).index(active[-1]) + 1, config.numbered_input[1]
    if needed > known:
        way = {"task": "raise num_tasks"}.get(config.required_input or "", "raise num_experts")
        if config.required_input is None and config.balance_kind == "groups":
            way = "set balance_coef to 0 (balance_kind 'groups' knows two types of samples)"
        raise ConfigError(
            f"the adapter uses the sources of samples and can tell {known} apart, but the mixture has {needed} "
            f"({shorten(active, 8)}); {way}, or leave sources out"
        )


def add_adapter(language_model: nn.Module, method: str, **fields: Any) -> nn.Module:
    """Wrap a causal LM in a PEFT model; `method` and `fields` are the arguments of `adapter_config`.

    Returns:
        The model unchanged for `none`, else a `PeftModel` whose adapter parameters are float32 and trainable. The
        adapters are injected into `language_model` in place.

    Raises:
        ConfigError: as `adapter_config`.
        ValueError: as `adapter_config`, or the model has no place for the adapter.
    """
    from peft import get_peft_model

    config = adapter_config(method, **fields)
    return language_model if config is None else get_peft_model(language_model, config)


_CONTAINERS = {
    ".modules_to_save.": "modules_to_save",
    ".mole_router.": "router",
    ".mole_experts.": "experts",
    ".mole_lora.": "attention LoRA",
}
"""Container that PEFT or MoLE keeps a parameter in -> its part."""
DECAYED = ("projector", "attention LoRA", "FFN LoRA", "language model", "vision tower")
"""Parts whose matrices weight decay may pull towards zero. Experts and routers have steps without a gradient, and
`modules_to_save` are trained copies of the base, for which zero is not a neutral value."""
_ATTENTION = re.compile(r"attn|attention")
"""In the path of an attention linear: `self_attn` (Llama), `attn` (GPT-2), `attention` (GPT-NeoX, Falcon)."""


def parameter_part(name: str) -> str:
    """The part of the model that the parameter `name` of a `LlavaMole` belongs to, for reports and parameter groups.

    One of `vision tower`, `projector`, `router`, `experts`, `attention LoRA`, `FFN LoRA`, `modules_to_save`, `language
    model`. Plain LoRA's are told apart by the path of their linear, the others by the container that holds them.
    """
    if name.startswith("vision_tower."):
        return "vision tower"
    if name.startswith("projector."):
        return "projector"
    for container, part in _CONTAINERS.items():
        if container in name:
            return part
    linear, lora, _ = name.partition(".lora_")
    if lora:
        return "attention LoRA" if _ATTENTION.search(linear) else "FFN LoRA"
    return "language model"


OWN_RATES = {
    "projector_learning_rate": "projector",
    "router_learning_rate": "router",
    "language_model_learning_rate": "language model",
    "tower_learning_rate": "vision tower",
}
"""Key of `train` -> the part of the model, and group of the optimizer, that has a rate of its own."""
_BLOCK = re.compile(r"\.(?:resblocks|blocks|layers?)\.(\d+)\.")


def own_rate(part: str, config: TrainConfig) -> float:
    """The peak rate of a part of the model (`parameter_part`); of the tower that of its last block."""
    rate = next((getattr(config, key) for key, owner in OWN_RATES.items() if owner == part), None)
    return config.learning_rate if rate is None else rate


def peak_rates(names: Iterable[str], config: TrainConfig) -> dict[str, float]:
    """Parameter name -> the peak learning rate that training gives it.

    With `tower_layer_decay` the rate of a tower's block is that of the block above times the decay. What comes before
    the blocks counts as one more below.
    """
    parts = {name: parameter_part(name) for name in names}
    depths = {name: _depth(name) for name, part in parts.items() if part == "vision tower"}
    top = max(depths.values(), default=0)
    decay = config.tower_layer_decay
    return {name: own_rate(part, config) * decay ** (top - depths.get(name, top)) for name, part in parts.items()}


def _depth(name: str) -> int:
    """The block of a tower's parameter, from 0; -1 below the blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1


def weight_count(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for: bitsandbytes packs two of 4 bits into one element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def parameter_report(model: nn.Module) -> list[tuple[str, int, int]]:
    """`(part, trainable, total)` parameter counts, in the order of the model's parts."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(parameter_part(name), [0, 0])
        count = weight_count(parameter)
        entry[1] += count
        if parameter.requires_grad:
            entry[0] += count
    return [(part, trainable, total) for part, (trainable, total) in counts.items()]


def trainable_parameters(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter for everything that trains, in registration order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
