"""What PEFT's `adapter_config.json` says of a plain LoRA: whether it is one, and the scaling of each module."""

import re
from collections.abc import Mapping
from typing import Any

PLAIN = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "lora_bias": False,
    "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
    "use_qalora": False, "use_bdlora": None,
}  # fmt: skip
"""What a plain adapter has; another value means other weights than A and B, or another arithmetic."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take their first
pairs out of it, and PEFT does so again whenever such an adapter is loaded."""


def not_plain(config: Mapping[str, Any]) -> list[str]:
    """Every value, as `key value`, that makes the adapter more than pairs A `[r, in]` and B `[out, r]`."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')!r}"]
    odd = [f"{key} {config[key]!r}" for key, plain in PLAIN.items() if config.get(key, plain) not in (plain, [])]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        odd.append(f"init_lora_weights {config['init_lora_weights']!r}")
    return odd


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r of the module at `path` (alpha / sqrt(r) for rsLoRA)."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """What `rank_pattern` or `alpha_pattern` has for the module at `path`; the first key that fits counts."""
    for name, value in patterns.items():
        if path == name or path.endswith(f".{name}") or re.fullmatch(ending(name), path):
            return value
    return default


def ending(name: str) -> str:
    """PEFT's regular expression for a key of a pattern: it matches the end of a module's path."""
    return rf"(.*\.)?({name})"
