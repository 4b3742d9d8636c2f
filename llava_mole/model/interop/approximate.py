"""A mixture of LoRA experts as one plain LoRA: what other programs can load, and only an approximation of it."""

import json
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.model.interop.own import OwnCheckpoint
from llava_mole.model.language_model import load_language_model


def parse_expert(text: str) -> int | str:
    """`uniform`, `usage` or the number of an expert. Raises ConfigError for anything else."""
    if text in ("uniform", "usage"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--expert {text!r}: it must be the number of an expert, 'uniform' or 'usage'")
    return int(text)


def describe(own: OwnCheckpoint, expert: int | str) -> str:
    """What the approximation is, for labels."""
    what = {"uniform": "the mean of its experts", "usage": "the mean of its experts, weighted by their use"}.get(
        str(expert), f"its expert {expert}"
    )
    return (
        f"APPROXIMATION: a mixture of {own.config.adapter.num_experts} LoRA experts, each token routed to its own, "
        f"replaced by one plain LoRA: {what}. Outputs differ from the mixture's."
    )


def write_approximation(own: OwnCheckpoint, expert: int | str, usage_file: Path | None, directory: Path) -> str:
    """Write the plain LoRA to `directory`. Returns `describe`'s sentence. The language model is loaded.

    Raises:
        ConfigError: no such expert, or `usage` without any record of usage.
    """
    from peft import PeftModel

    from llava_mole.mole.surgery import to_lora

    base, _ = load_language_model(str(own.language_model))
    model = PeftModel.from_pretrained(base, str(own.adapter_dir))
    usage = _usage(model, usage_file) if expert == "usage" else None
    to_lora(model, directory, expert=expert, usage=usage)
    return describe(own, expert)


def _usage(model: torch.nn.Module, file: Path | None) -> torch.Tensor:
    """Share of tokens `[L, K]`: of a `routing.json` of `llava-mole eval`, or the adapter's counters."""
    if file is not None:
        return read_usage(file)
    from llava_mole.mole import MoleMlp

    counters: list[Any] = [m.mole_state["default"] for m in model.modules() if isinstance(m, MoleMlp) and m.mole_state]
    loads = [state.load.sum(dim=0).float() for state in counters]
    if not loads or not all(bool(load.any()) for load in loads):
        raise ConfigError(
            "--expert usage: this adapter has counted no tokens (it does with balance_group 'global_batch'); give the "
            "routing.json that `llava-mole eval` writes as --usage"
        )
    return torch.stack(loads)


def read_usage(file: Path) -> torch.Tensor:
    """Share of tokens `[L, K]` over all domains of a `routing.json`. Raises WeightsError for another file."""
    try:
        domains = json.loads(file.read_text(encoding="utf-8"))["domains"].values()
        parts = [domain["all"] for domain in domains]
        total = sum(part["tokens"] for part in parts)
        return sum((torch.tensor(p["share"]) * (p["tokens"] / total) for p in parts), torch.zeros(()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise WeightsError(f"--usage {file} is no routing.json of `llava-mole eval` ({error!r})") from None
