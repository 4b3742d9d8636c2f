"""Optimizer groups and the learning-rate schedule."""

import math
from collections.abc import Mapping

import torch

from llava_mole.config import TrainConfig
from llava_mole.model.adapters import DECAYED, parameter_part


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over named parameters in up to three groups: `adapter`, `projector`, `router`.

    Each group stores its peak rate under `peak_lr`. Weight decay applies only to matrices of the parts in `DECAYED`.
    """
    own_rates = {"projector": config.projector_learning_rate, "router": config.router_learning_rate}
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part = parameter_part(name)
        group = part if part in ("projector", "router") else "adapter"
        decays = parameter.ndim >= 2 and part in DECAYED
        groups.setdefault((group, decays and config.weight_decay > 0), []).append(parameter)
    settings = []
    for (group, decays), members in groups.items():
        rate = own_rates.get(group)
        peak = config.learning_rate if rate is None else rate
        decay = config.weight_decay if decays else 0.0
        settings.append({"params": members, "name": group, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8)


def schedule_factor(step: int, total_steps: int, warmup_steps: int, floor: float) -> float:
    """Share of the peak rate at optimizer step `step` (from 0): linear warm-up, then cosine down to `floor`.

    The first step has 1 / `warmup_steps`, step `warmup_steps` has 1, and the last step has `floor`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer, step: int, total_steps: int, config: TrainConfig) -> dict[str, float]:
    """Set every group's rate for `step` and return the rates by group. The floor scales with a group's own peak."""
    floor = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0
    factor = schedule_factor(step, total_steps, config.warmup_steps, floor)
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"]] = group["lr"]
    return rates
