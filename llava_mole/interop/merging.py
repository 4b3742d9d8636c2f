"""LoRA merged into the language model with its effect measured, and a mixture of experts replaced by one LoRA."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError, value_errors_as
from llava_mole.interop.own import OwnCheckpoint
from llava_mole.model.language_model import load_language_model

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed difference of a logit after the merge, relative to the largest logit (at least 1): half precision rounds
each merged weight. Other dtypes are allowed `EXACT`."""
EXACT = 1e-5
PROBE_TOKENS = 24


def merge_lora(own: OwnCheckpoint, lora: Path, dtype: torch.dtype | None) -> tuple[dict[str, torch.Tensor], float]:
    """Merge a plain LoRA into the language model with PEFT.

    The model is held in float32 (4 bytes a parameter). It reads the same random tokens with the adapter and after the
    merge, whose weights are then rounded as they will be written.

    Args:
        own: the checkpoint.
        lora: directory of the LoRA, saved by PEFT.
        dtype: dtype of the weights to be written, or None for the stored dtype of each.

    Returns:
        The adapted weights by name, rounded but still in float32, and the largest absolute difference of a logit.

    Raises:
        WeightsError: the logits differ by more than the dtype's rounding explains.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    loaded, _ = load_language_model(str(own.language_model))
    base = loaded.float().eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    model = PeftModel.from_pretrained(base, str(lora)).eval()
    expected = logits(model)
    adapted = [f"{name}.weight" for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    merged: Any = model.merge_and_unload()
    state = merged.state_dict()
    written = dtype or next(iter(own.weights.values())).dtype
    for name, value in state.items():
        value.copy_(value.to(dtype or own.weights[own.skeleton.source(name, own.weights)].dtype))
    difference = float((logits(merged) - expected).abs().max())
    allowed = TOLERANCE.get(written, EXACT) * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise WeightsError(
            f"the merged model's logits differ from the unmerged by {difference:.2e}; at most {allowed:.2e} is allowed "
            f"for {written}. Nothing was written; use --dtype float32 if half precision is the reason"
        )
    return {name: state[name] for name in adapted}, difference


@dataclass(frozen=True)
class StaticMixture:
    """A mixture in the form of `mole.static`, by names of the language model."""

    experts: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    """Weights of the linears with plain LoRA, merged, float32."""
    layout: dict[str, dict[str, Any]]


def read_static(own: OwnCheckpoint, dtype: torch.dtype) -> StaticMixture:
    """The mixture of a checkpoint in static form, its experts in `dtype`. This loads the language model in float32.

    Raises ConfigError for an adapter without a static form, and WeightsError if it does not fit.
    """
    from peft import PeftModel

    from llava_mole.mole.static import is_router, merged_linears, static_layout, static_tensors

    base, _ = load_language_model(str(own.language_model))
    with value_errors_as(WeightsError):
        model = PeftModel.from_pretrained(base.float(), str(own.adapter_dir), strict_base=True)
    with value_errors_as(ConfigError):
        layout, experts = static_layout(model), dict(static_tensors(model))
    # Routers stay in float32: rounded logits would choose other experts.
    experts = {n: t if is_router(n) else t.to(dtype) for n, t in experts.items()}
    return StaticMixture(experts, dict(merged_linears(model)), layout)


def parse_expert(text: str) -> int | str:
    """`uniform`, `usage` or the number of an expert. Raises ConfigError for anything else."""
    if text in ("uniform", "usage"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--expert {text!r}: it must be the number of an expert, 'uniform' or 'usage'")
    return int(text)


def write_approximation(own: OwnCheckpoint, expert: int | str, usage_file: Path | None, directory: Path) -> str:
    """Write a plain LoRA in place of the mixture to `directory`, and return a note on the approximation.

    This loads the language model. Raises ConfigError if there is no such expert or no record of usage, and WeightsError
    if `usage_file` cannot be used.
    """
    from peft import PeftModel

    from llava_mole.mole.surgery import to_lora

    base, _ = load_language_model(str(own.language_model))
    with value_errors_as(WeightsError):
        model = PeftModel.from_pretrained(base, str(own.adapter_dir), strict_base=True)
    usage = None
    if expert == "usage":
        usage = _counted_usage(model) if usage_file is None else _read_usage(usage_file)
    with value_errors_as(ConfigError):
        to_lora(model, directory, expert=expert, usage=usage)
    means = {"uniform": "the mean of its experts", "usage": "the mean of its experts, weighted by their use"}
    return (
        f"APPROXIMATION: a mixture of {own.config.adapter.num_experts} LoRA experts, each token routed to its own, "
        f"replaced by one plain LoRA: {means.get(str(expert), f'its expert {expert}')}. Outputs differ from the "
        "mixture's."
    )


def _counted_usage(model: torch.nn.Module) -> torch.Tensor:
    """Tokens per layer and expert `[L, K]` that the adapter's counters hold."""
    from llava_mole.mole import ExpertLayer

    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    counters: list[Any] = [layer.mole_state["default"] for layer in layers if layer.mole_state]
    loads = [state.load.sum(dim=0).float() for state in counters]
    if not loads or not all(bool(load.any()) for load in loads):
        raise ConfigError(
            "--expert usage: this adapter has counted no tokens (it does with balance_group 'global_batch'); give the "
            "routing.json that `llava-mole eval` writes as --usage"
        )
    return torch.stack(loads)


def _read_usage(file: Path) -> torch.Tensor:
    """Share of tokens per layer and expert `[L, K]`, over all domains of a `routing.json`."""
    try:
        domains = json.loads(file.read_text(encoding="utf-8"))["domains"].values()
        parts = [domain["all"] for domain in domains]
        total = sum(part["tokens"] for part in parts)
        return sum((torch.tensor(p["share"]) * (p["tokens"] / total) for p in parts), torch.zeros(()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise WeightsError(f"--usage {file} is not a routing.json of `llava-mole eval` ({error!r})") from None
