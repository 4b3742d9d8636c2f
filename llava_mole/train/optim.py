"""Optimizer groups and the learning-rate schedule."""

import math
from collections.abc import Mapping

import torch

from llava_mole.common.errors import ConfigError
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.config import TrainConfig
from llava_mole.model.adapters import DECAYED, OWN_RATES, parameter_part, peak_rates

LONG_WARMUP = 0.2
"""Share of a run's steps above which a warm-up is warned about."""

logger = get_logger(__name__)


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over named parameters in groups: `adapter`, and the parts of `OWN_RATES`.

    Each group stores its peak rate under `peak_lr`. Weight decay applies only to matrices of the parts in `DECAYED`.
    With `tower_layer_decay` every block of the tower has a group, whose peak is that of the block above times the
    decay; what comes before the blocks counts as one more below.
    """
    rates = peak_rates(parameters, config)
    groups: dict[tuple[str, bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part = parameter_part(name)
        group = part if part in OWN_RATES.values() else "adapter"
        decays = parameter.ndim >= 2 and part in DECAYED
        groups.setdefault((group, decays and config.weight_decay > 0, rates[name]), []).append(parameter)
    settings = []
    for (group, decays, peak), members in groups.items():
        decay = config.weight_decay if decays else 0.0
        settings.append({"params": members, "name": group, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(settings, betas=(0.9, 0.999), eps=1e-8)


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps of warm-up in a run of `total_steps`; a share is rounded up, as in transformers."""
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total_steps)
    assert config.warmup_steps is not None
    return config.warmup_steps


def schedule_factor(step: int, total_steps: int, warmup_steps: int, floor: float) -> float:
    """Share of the peak rate at optimizer step `step` (from 0): linear warm-up, then cosine down to `floor`.

    The first step has 1 / `warmup_steps`, step `warmup_steps` has 1, and the last step has `floor`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def floor_factor(config: TrainConfig) -> float:
    """The floor of the schedule as a share of the peak rate."""
    return config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0


def set_learning_rates(optimizer, step: int, total_steps: int, config: TrainConfig) -> dict[str, float]:
    """Set every group's rate for `step` and return the rates by name, of the tower that of its last block.

    The floor scales with a group's own peak.
    """
    factor = schedule_factor(step, total_steps, warmup_steps(config, total_steps), floor_factor(config))
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"]] = max(group["lr"], rates.get(group["name"], 0.0))
    return rates


def announce_schedule(config: TrainConfig, total_steps: int, *, begun: bool) -> None:
    """Log the steps, warm-up, highest and last rate of a run, and warn about a warm-up above LONG_WARMUP of it.

    Raises:
        ConfigError: the warm-up is longer than the data lasts, so that the rate would never reach its peak. A run that
            `train.max_steps` cuts short (a trial), or that has already begun, is only warned about.
    """
    warmup, floor = warmup_steps(config, total_steps), floor_factor(config)
    # The rate rises until step `warmup`, or until the run ends.
    highest, last = (
        schedule_factor(step, total_steps, warmup, floor) for step in (min(warmup, total_steps - 1), total_steps - 1)
    )
    own = {part: getattr(config, key) for key, part in OWN_RATES.items()}
    peaks = {"": config.learning_rate, **{f"{name} ": rate for name, rate in own.items() if rate is not None}}
    rates = ", ".join(f"{name}{peak * highest:.3g} down to {peak * last:.3g}" for name, peak in peaks.items())
    steps = count_of(total_steps, "step")
    advice = (
        f"set --train.warmup_steps to at most {max(1, int(LONG_WARMUP * total_steps))}, or --train.warmup_steps null "
        "--train.warmup_ratio 0.03"
    )
    if warmup > total_steps and total_steps != config.max_steps and not begun:
        raise ConfigError(
            f"train.warmup_steps is {warmup}, but the run has {steps} and its rate would end at "
            f"{highest:.0%} of the peak; {advice}"
        )
    rising = min(warmup, total_steps)
    share = 100 * rising / total_steps
    logger.info("schedule: %s, %d of them warm-up (%.1f%%), rate %s", steps, rising, share, rates)
    if warmup > max(1, LONG_WARMUP * total_steps):
        logger.warning(
            "the warm-up takes %d of %s, and the rate reaches %.0f%% of its peak; %s",
            rising, steps, 100 * highest, advice,
        )  # fmt: skip
