"""Expert surgery: export experts as plain LoRAs, build experts from LoRAs, add and remove experts.

docs/mole.md says which of these are exact. `from_loras`, `grow` and `prune` create new Parameters, so build the
optimizer afterwards.
"""

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_mole.mole.config import MoleConfig
from llava_mole.mole.discover import routed_experts
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer, MoleLinear
from llava_mole.mole.model import MoleModel, find_tuner
from llava_mole.mole.router import certain_weight

PLAIN = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "lora_bias": False,
    "layers_to_transform": None, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
    "use_qalora": False, "use_bdlora": None,
}  # fmt: skip
"""Values of a plain adapter; any other value means weights besides A and B, or a different computation."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract their
initial pairs from it, and PEFT does so again whenever such an adapter is loaded."""


def not_plain(config: Mapping[str, Any]) -> list[str]:
    """The values, as `key value`, that make an adapter more than pairs A `[r, in]` and B `[out, r]`; empty if plain."""
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
    """The value of `rank_pattern` or `alpha_pattern` for the module at `path`; the first key that matches counts."""
    for name, value in patterns.items():
        if path == name or path.endswith(f".{name}") or re.fullmatch(ending(name), path):
            return value
    return default


def ending(name: str) -> str:
    """PEFT's regular expression for a key of a pattern; it matches the end of a module's path."""
    return rf"(.*\.)?({name})"


_PREFIX = "base_model.model."


def to_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    expert: int | str,
    usage: Tensor | None = None,
    adapter_name: str = "default",
) -> Path:
    """Write a plain PEFT LoRA made of the experts of `model` to `directory`.

    The LoRA equals the mixture with every token routed to `expert` by a router that is certain of it, or the mean of
    such LoRAs with these weights (for `mix` `ffn_output` with one expert only; the shared expert has weight 1). With
    `expert_scale` `prob_times_k` the weight of such an expert is K. It only approximates a mixture that routes token by
    token.

    Args:
        model: a model with a MoLE adapter.
        directory: receives `adapter_config.json` and `adapter_model.safetensors`.
        expert: the number of one expert (rank r in the FFN); `uniform`, the mean of all (rank K r); `usage`, their
            mean weighted by `usage`.
        usage: for `usage`, the share of tokens by layer and expert, `[L, K]`, as `routing_load` returns it.
        adapter_name: which adapter.

    Raises:
        ValueError: no such expert or adapter, `usage` is missing or has the wrong shape, the adapter has
            `modules_to_save`, `trainable_token_indices` or (for more than one expert) `experts_by_layer`, or PEFT would
            load the LoRA into other modules (sparse base models).
    """
    tuner, config = _adapter(model, adapter_name)
    if config.experts_by_layer is not None and not (isinstance(expert, int) and expert < min(config.experts_by_layer)):
        raise ValueError(
            f"expert is {expert!r}, but the layers have {config.experts_by_layer} experts (experts_by_layer); only one "
            f"of the first {min(config.experts_by_layer)} is in all of them"
        )
    for option in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, option):
            raise ValueError(f"the adapter also trains {option} {value}, which a LoRA would lose")
    ffns = list(_layers(tuner.model, ExpertLayer, adapter_name))
    if usage is not None and config.router_scope == "model" and usage.shape == (1, config.num_experts):
        usage = usage.expand(len(ffns), -1)  # one router decides for all layers
    weights_LK = _expert_weights(expert, usage, len(ffns), config.num_experts)
    kept = weights_LK.any(dim=0).nonzero().flatten().tolist()  # the same in all layers: PEFT's ranks are by name ending
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    attention_r = config.attention_r or config.r
    by_layer = bool(config.rank_pattern or config.alpha_pattern)  # then names by ending are not enough
    for (name, ffn), weight_K in zip(ffns, weights_LK.tolist(), strict=True):
        for projection in ffn.projections:
            weight = certain_weight(ffn.configs[adapter_name])
            a_NI, b_NO = _fold(ffn, adapter_name, projection, {k: weight * weight_K[k] for k in kept})
            path = ffn.linear_path(name, projection)
            _put(tensors, path, a_NI, b_NO)
            key = path if by_layer else ".".join(path.split(".")[-2:])
            ranks[key], alphas[key] = a_NI.shape[0], ffn.scaling[adapter_name] * a_NI.shape[0]
    for name, linear in _layers(tuner.model, MoleLinear, adapter_name):
        pair = linear.pair(adapter_name)
        _put(tensors, name, pair.A.detach(), pair.B.detach())
        if by_layer:
            ranks[name], alphas[name] = linear.r[adapter_name], linear.scaling[adapter_name] * linear.r[adapter_name]
    targets = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    lora = LoraConfig(
        r=attention_r,
        lora_alpha=config.scaling * attention_r,  # type: ignore[arg-type]
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        fan_in_fan_out=any(hasattr(f.linear(f.projections[0]), "nf") for _, f in ffns),  # GPT-2's Conv1D
    )
    _check_peft_keeps_targets(lora, tuner.model)
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(out))
    return out


def _check_peft_keeps_targets(lora: LoraConfig, model: nn.Module) -> None:
    """Raise ValueError if PEFT, on loading, would apply the LoRA to the routed experts of a sparse base model."""
    if not routed_experts(model):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = copy.deepcopy(lora)
    convert_peft_config_for_transformers(read, model, conversions=None)
    moved = sorted(set(lora.target_modules or []) - set(read.target_modules or []))
    if moved:
        raise ValueError(
            f"a LoRA on {moved[0]} cannot be loaded by PEFT in {type(model).__name__}: PEFT takes these names for the "
            "routed experts. Keep the MoLE adapter"
        )


def from_loras(
    model: nn.Module,
    directories: Sequence[str | os.PathLike[str]],
    *,
    attention: str = "mean",
    **options: Any,
) -> PeftModel:
    """Add a MoLE adapter to `model` whose FFN experts are the LoRAs in `directories`, in their order.

    Expert k's update of every FFN linear is exactly that of LoRA k. The attention LoRA is shared, so a token routed
    to expert k sees LoRA k's FFN with the mean attention: an approximation of LoRA k. The router is new.

    Args:
        model: the base model the LoRAs were trained on.
        directories: saved PEFT LoRAs; their ranks may differ (padded with zeros), and their alphas (folded into B).
        attention: the shared attention LoRA: the `mean` of all (rank K r), the `first`, or `none`.
        options: further options of `MoleConfig`; `r` and `num_experts` follow from the LoRAs.

    Raises:
        ValueError: an unknown `attention`, a directory without a plain LoRA, or tensors that do not fit the model.
    """
    if attention not in ("mean", "first", "none"):
        raise ValueError(f"attention is {attention!r}; it must be mean, first or none")
    for option in ("shared_a", "experts_by_layer"):
        if options.get(option):
            raise ValueError(
                f"{option} is {options[option]!r}: every LoRA becomes an expert with its own A in every layer"
            )
    loras = [_read_lora(Path(directory)) for directory in directories]
    if not loras:
        raise ValueError("from_loras needs at least one directory")
    r = max(pair[0].shape[0] for lora in loras for pair in lora.values())
    count = len(loras)
    attention_r = r * count if attention == "mean" else r
    own = (
        {"r": r, "num_experts": count}
        if options.get("attention_experts")
        else {"r": r, "num_experts": count, "attention_r": attention_r}
    )
    config = MoleConfig(**{"alpha": float(r), **options, **own})
    mole = get_peft_model(model, config)
    tuner, _ = _adapter(mole, "default")
    used: set[str] = set()
    with torch.no_grad():
        for name, ffn in _layers(tuner.model, ExpertLayer, "default"):
            for projection in ffn.projections:
                path = ffn.linear_path(name, projection)
                used.add(path)
                a_KRI, b_KRO = ffn.experts("default").pair(projection)
                for k, lora in enumerate(loras):
                    if path in lora:
                        _fill(a_KRI[k], b_KRO[k], [lora[path]], 1 / ffn.scaling["default"], path)
        for name, linear in _layers(tuner.model, MoleLinear, "default"):
            used.add(name)
            pair = linear.pair("default")
            found = [lora[name] for lora in loras if name in lora]
            if found and attention != "none":
                chosen = found if attention == "mean" else found[:1]
                share = 1 / count if attention == "mean" else 1.0
                _fill(pair.A, pair.B, chosen, share / linear.scaling["default"], name)
    lost = sorted(set().union(*loras) - used)
    if lost:
        tuner.unload()
        raise ValueError(f"the LoRAs adapt {lost[0]}, which this MoLE does not; name it in attention_modules")
    return mole


def grow(
    model: nn.Module, num_experts: int, *, noise: float = 0.0, frozen: int | None = None, adapter_name: str = "default"
) -> None:
    """Add experts up to `num_experts`, as copies of the present ones in turn.

    `noise` is the standard deviation, relative to each tensor's own, of the noise added to the copies' B and router
    rows. Without noise the output does not change for sparse top-1 routing with weights that do not depend on K: the
    first expert wins a tie, so a copy stays unused until noise or training separates the two. An adapter of one expert
    gets a new router; its output does not change either, because the copies are equal.

    `frozen` experts, the first ones, do not train afterwards (`MoleConfig.frozen_experts`); None leaves that as it is.

    Raises:
        ValueError: not more experts than now, the options contradict the number, or nothing would choose among them.
    """
    tuner, config = _adapter(model, adapter_name)
    if num_experts <= config.num_experts:
        raise ValueError(f"grow to {num_experts} experts: the adapter has {config.num_experts} already; use prune")
    _check_one_k(config)
    frozen = config.frozen_experts if frozen is None else frozen
    grown = dataclasses.replace(config, num_experts=num_experts, frozen_experts=frozen)  # refuses contradictions
    if not grown.has_router or (config.num_experts == 1 and config.router_scope == "model"):
        raise ValueError(
            f"grow needs an adapter with a router, or one expert whose FFN can get one; this adapter has router "
            f"{config.router!r}, granularity {config.granularity!r} and router_scope {config.router_scope!r}"
        )
    index = torch.arange(num_experts) % config.num_experts
    for _, ffn in _layers(tuner.model, ExpertLayer, adapter_name):
        ffn.select_experts(adapter_name, index, first_new=config.num_experts, noise=noise)
        if config.num_experts == 1:
            ffn.add_router(adapter_name, grown, ffn.in_features)
    _replace_config(tuner, config, adapter_name, num_experts, frozen)


def prune(model: nn.Module, num_experts: int, usage: Tensor, *, adapter_name: str = "default") -> None:
    """Keep the `num_experts` most used experts of each layer; `usage` is `[L, K]`, as `routing_load` returns it.

    The output does not change for tokens whose expert stays (sparse top 1 with a constant weight); the other tokens
    go to the best remaining expert. `num_experts` must be at least 2, because one expert has no router. All of them
    train afterwards.

    Raises:
        ValueError: an impossible number of experts, or `usage` of the wrong shape.
    """
    tuner, config = _adapter(model, adapter_name)
    _check_one_k(config)
    ffns = list(_layers(tuner.model, ExpertLayer, adapter_name))
    if config.router_scope == "model" and usage.shape == (1, config.num_experts):
        usage = usage.expand(len(ffns), -1)  # one router decides for all layers
    if not 2 <= num_experts < config.num_experts:
        raise ValueError(f"prune to {num_experts} experts: it must be 2 to {config.num_experts - 1}")
    if usage.shape != (len(ffns), config.num_experts):
        raise ValueError(f"usage is {tuple(usage.shape)}; it must be [{len(ffns)}, {config.num_experts}]")
    dataclasses.replace(config, num_experts=num_experts, frozen_experts=0)  # refuses what contradicts other options
    for (_, ffn), used_K in zip(ffns, usage, strict=True):
        keep = used_K.argsort(descending=True, stable=True)[:num_experts].sort().values
        ffn.select_experts(adapter_name, keep.cpu(), first_new=num_experts, noise=0.0)
    _replace_config(tuner, config, adapter_name, num_experts)


def _adapter(model: nn.Module, adapter_name: str) -> tuple[MoleModel, MoleConfig]:
    tuner = find_tuner(model)
    if tuner is None:
        raise ValueError(f"{type(model).__name__} has no MoLE adapter")
    config = tuner.peft_config.get(adapter_name)
    if not isinstance(config, MoleConfig):
        raise ValueError(f"no adapter {adapter_name!r}; there are {', '.join(tuner.peft_config)}")
    return tuner, config


def _check_one_k(config: MoleConfig) -> None:
    if config.experts_by_layer is not None:
        raise ValueError(
            f"experts_by_layer is {config.experts_by_layer}: the number of experts cannot be changed where it differs "
            "by layer; train a new adapter"
        )


def _replace_config(tuner: MoleModel, config: MoleConfig, adapter_name: str, num_experts: int, frozen: int = 0) -> None:
    """Give the tuner and its layers a copy of `config` with `num_experts`, the first `frozen` of which do not train."""
    changed = copy.copy(config)
    changed.num_experts, changed.frozen_experts = num_experts, frozen
    tuner.peft_config[adapter_name] = changed
    for _, layer in _layers(tuner.model, AdaptedLayer, adapter_name):
        layer.configs[adapter_name] = changed
        if isinstance(layer, ExpertLayer):
            for part in (layer.experts(adapter_name), layer.router(adapter_name)):
                if part is not None:
                    part.frozen = frozen


def _layers(model: nn.Module, kind: type[AdaptedLayer], adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, kind) and adapter_name in module.configs:
            yield name, module


def _expert_weights(expert: int | str, usage: Tensor | None, layers: int, num_experts: int) -> Tensor:
    """Weights `[L, K]` of the experts in the exported LoRA."""
    if expert == "uniform":
        return torch.full((layers, num_experts), 1 / num_experts)
    if expert == "usage":
        if usage is None or usage.shape != (layers, num_experts):
            shape = None if usage is None else tuple(usage.shape)
            raise ValueError(f"expert='usage' needs usage of shape [{layers}, {num_experts}], not {shape}")
        total = usage.float().sum(dim=-1, keepdim=True)
        if not (torch.isfinite(usage).all() and (usage >= 0).all() and (total > 0).all()):
            raise ValueError("expert='usage' needs usage of at least 0, and in every layer an expert that was used")
        return usage.float() / total
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
        raise ValueError(f"expert is {expert!r}; it must be 0 to {num_experts - 1}, 'uniform' or 'usage'")
    return torch.nn.functional.one_hot(torch.full((layers,), expert), num_experts).float()


def _fold(ffn: ExpertLayer, adapter_name: str, projection: str, weights: dict[int, float]) -> tuple[Tensor, Tensor]:
    """The experts in `weights` stacked along the rank, the weight in B: `[N, I]`, `[N, O]`; the shared expert last."""
    experts = ffn.experts(adapter_name)
    pairs = {k: experts.expert_pair(projection, k) for k in weights}
    parts = [(pairs[k][0].detach(), pairs[k][1].detach() * w) for k, w in weights.items()]
    if ffn.configs[adapter_name].shared_r:
        a, b = experts.shared_pair(projection)
        parts.append((a.detach(), b.detach()))
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


def _put(tensors: dict[str, Tensor], name: str, a_RI: Tensor, b_RO: Tensor) -> None:
    tensors[f"{_PREFIX}{name}.lora_A.weight"] = a_RI.cpu().contiguous()
    tensors[f"{_PREFIX}{name}.lora_B.weight"] = b_RO.T.cpu().contiguous()


def _read_lora(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A `[r, I]`, B `[r, O]` with alpha / r folded in) of a saved PEFT LoRA."""
    files = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; from_loras reads directories in which PEFT saved a LoRA")
    try:
        raw = json.loads(files[0].read_text(encoding="utf-8"))
        odd = not_plain(raw)
        tensors = load_file(files[1])
        pairs = {}
        for key, a in tensors.items():
            if not odd and key.endswith(".lora_A.weight"):
                path = key.removesuffix(".lora_A.weight")
                b = tensors[f"{path}.lora_B.weight"]
                path = path.removeprefix(_PREFIX)
                pairs[path] = (a, b.T * scaling(raw, path, a.shape[0]))
    except (ValueError, KeyError, TypeError, AttributeError, re.error, SafetensorError) as error:
        raise ValueError(f"{directory} does not hold a LoRA as PEFT saves it ({error!r}); save it again") from None
    if odd:
        raise ValueError(f"{files[0]}: {', '.join(odd)}; experts are made of plain LoRA pairs")
    return pairs


def _fill(a_RI: Tensor, b_RO: Tensor, pairs: list[tuple[Tensor, Tensor]], factor: float, where: str) -> None:
    """Write LoRA pairs, stacked along the rank, into A and B. The remaining rows of B are 0, so they add nothing."""
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    if a.shape[1] != a_RI.shape[1] or b.shape[1] != b_RO.shape[1] or a.shape[0] > a_RI.shape[0]:
        raise ValueError(f"{where}: the LoRA is {tuple(a.shape)} and {tuple(b.shape)}, which does not fit the model")
    b_RO.zero_()
    a_RI[: a.shape[0]].copy_(a)
    b_RO[: b.shape[0]].copy_(b * factor)
