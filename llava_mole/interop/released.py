"""The `.pt` file of the LLaVA-MoLE authors: experts as single LoRA pairs, one router with bias in each FFN.

Names in the file, after `llm_model.base_model.model.model.layers.<n>.`: `mlp.moe_gate|moe_up|moe_down.<k>.lora_A`
`[r, in]` and `.lora_B` `[out, r]`, `mlp.router.weight|bias`, `self_attn.<p>_proj.lora_A.default.weight`; and
`in_adaptor.projector.<i>`, `in_adaptor.visual_start_token|visual_end_token` `[1, 1, D]`. The file records neither
alpha nor whether it was trained sparse or dense; both are options.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError, value_errors_as
from llava_mole.common.text import count_of, shorten
from llava_mole.config import AdapterConfig
from llava_mole.interop.causal_lm import Skeleton
from llava_mole.interop.kinds import Found
from llava_mole.interop.lora import ADAPTER_FILES
from llava_mole.interop.names import BUFFERS, WRAPPER, Parts
from llava_mole.interop.sources import Source, numbered, projector_kind
from llava_mole.interop.tensors import Weights, check_finite, check_shapes, open_weights, save_tensors
from llava_mole.model.adapters import add_adapter
from llava_mole.model.multimodal_projector import ENDS

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_(gate|up|down)\.(\d+)\.lora_([AB])")
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp)\.router\.(weight|bias)")
_ATTENTION = re.compile(r"(model\.layers\.\d+\.self_attn\.(\w+))\.lora_([AB])(?:\.\w+)?\.weight")
_LLM, _ADAPTOR, _TOWER = "llm_model.", "in_adaptor.", "vit.vision_tower."


@dataclass
class ReleasedMole:
    """The content of the file, by part."""

    source: Source
    adapter: AdapterConfig
    """The configuration of our adapter for these weights: preset `released`."""
    experts: dict[str, torch.Tensor]
    """Named as in our adapter, without PEFT's prefix, and stacked: A `[K, r, in]`, B `[K, r, out]`."""
    base_names: dict[str, str]
    """Base weights that the file repeats: name in the language model -> name in `weights`."""
    weights: Weights


def read_released(found: Found, alpha: float | None = None, mode: str = "sparse") -> ReleasedMole:
    """Read the file. Raises WeightsError if tensors are missing or unexpected, and lists them. `alpha` None is 2 r."""
    weights = open_weights(found.path)
    parts = _sort_names(weights)
    parts.check(found.path)
    if not any(name.endswith("_proj_A") for name in parts.stacks):
        raise WeightsError(f"{found.path} has no expert (mlp.moe_gate.<k>.lora_A) in any layer")
    num_experts = 1 + max(int(k) for stack in parts.stacks.values() for k in stack)
    numbers = [str(k) for k in range(num_experts)]
    lost = [f"{n}, expert {k}" for n, stack in parts.stacks.items() for k in numbers if k not in stack]
    if lost:
        raise WeightsError(f"{found.path}: {count_of(len(lost), 'expert')} missing: {shorten(lost)}")
    experts = {n: _stack(weights, n, [stack[k] for k in numbers]) for n, stack in parts.stacks.items()}
    for name, there in parts.direct.items():
        if num_experts > 1 or ".mole_router." not in name:  # one expert needs no router: its weight is always 1
            experts[name] = weights[there].T if name.endswith("lora.B") else weights[there]
    experts = {n: value.clone(memory_format=torch.contiguous_format) for n, value in experts.items()}
    modules = sorted({n.split(".self_attn.")[1].split(".")[0] for n in experts if ".self_attn." in n})
    if not modules:
        raise WeightsError(f"{found.path} has no LoRA on the attention linears (self_attn.*.lora_A.default.weight)")
    rank = next(value.shape[1] for name, value in experts.items() if name.endswith("_proj_A"))
    adapter = AdapterConfig(
        method="mole",
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        num_experts=num_experts,
        preset="released",
        options={"mode": mode, "attention_modules": modules},
    )
    return ReleasedMole(_source(found, weights, parts), adapter, experts, parts.language_model, weights)


@dataclass
class _Names(Parts):
    """The tensor names of the file by part. `projector` holds all of the adaptor, `language_model` the base."""

    stacks: dict[str, dict[str, str]] = field(default_factory=dict)
    """FFN halves: our name -> expert -> name in the file."""
    direct: dict[str, str] = field(default_factory=dict)
    """Routers and attention LoRA: our name -> name in the file."""


def _sort_names(weights: Weights) -> _Names:
    parts = _Names()
    for name in weights:
        short = name.removeprefix("module.")
        inner = short.removeprefix(_LLM).removeprefix(WRAPPER)
        if short.endswith(BUFFERS):
            continue
        if short.startswith(_ADAPTOR):
            parts.put(parts.projector, short.removeprefix(_ADAPTOR), name)
        elif short.startswith(_TOWER):
            parts.put(parts.tower, short.removeprefix(_TOWER).removeprefix("vision_model."), name)
        elif not short.startswith(_LLM):
            parts.unknown.append(name)
        elif match := _EXPERT.fullmatch(inner):
            mlp, projection, k, half = match.groups()
            stack = parts.stacks.setdefault(f"{mlp}.mole_experts.{projection}_proj_{half}", {})
            parts.put(stack, str(int(k)), name)
        elif match := _ROUTER.fullmatch(inner):
            parts.put(parts.direct, f"{match[1]}.mole_router.{match[2]}", name)
        elif match := _ATTENTION.fullmatch(inner):
            parts.put(parts.direct, f"{match[1]}.mole_lora.{match[3]}", name)
        else:
            base_name = inner.replace(".original_module.", ".").replace(".base_layer.", ".")
            parts.put(parts.language_model, base_name, name)
    if "text_embed.weight" in parts.projector:
        parts.language_model["model.embed_tokens.weight"] = parts.projector.pop("text_embed.weight")
    return parts


def _stack(weights: Weights, name: str, stored: list[str]) -> torch.Tensor:
    """One half of all experts. `stored` are the names in the file, by expert."""
    values = [weights[there] for there in stored]
    if values[0].dim() != 2:
        raise WeightsError(f"{stored[0]} is {tuple(values[0].shape)}; needed are matrices")
    if len({value.shape for value in values}) > 1:
        raise WeightsError(f"{name}: experts of different shapes {sorted({tuple(v.shape) for v in values})}")
    return torch.stack([value.T if name.endswith("_B") else value for value in values])


def _source(found: Found, weights: Weights, parts: Parts) -> Source:
    stored = parts.projector
    projector = {n.removeprefix("projector."): weights[t].clone() for n, t in stored.items() if "projector." in n}
    kind = projector_kind(projector, found.path)
    projector = numbered(projector)
    ends = [stored[name] for name in ("visual_start_token", "visual_end_token") if name in stored]
    strange = [t for n, t in stored.items() if t not in ends and "projector." not in n]
    if strange or len(ends) == 1:
        raise WeightsError(f"{found.path}: unexpected or incomplete: {shorten([*strange, *ends])}")
    if ends:
        position = 1 + max(int(name.split(".")[0]) for name in projector)
        start, end = (weights[there].reshape(-1).clone() for there in ends)
        projector |= {f"{position}.start": start, f"{position}.end": end}
        kind += ENDS
    return Source(
        found,
        projector=projector,
        projector_kind=kind,
        select_layer=-1,
        aspect_ratio="pad",
        tower=weights.part(parts.tower),
        tower_hint="openai/clip-vit-large-patch14-336",
    )


def adapt(released: ReleasedMole, skeleton: Skeleton) -> Any:
    """Put the adapter on the skeleton's model, in place, and return the adapter's PEFT configuration.

    Raises WeightsError if tensors of the file are missing, unexpected, of another shape or not finite.
    """
    from peft import get_peft_model_state_dict

    file = released.source.found.path
    with value_errors_as(ConfigError), torch.device("meta"):
        model: Any = add_adapter(skeleton.model, **asdict(released.adapter))
    needed = {n.removeprefix(WRAPPER): v.shape for n, v in get_peft_model_state_dict(model).items()}
    check_shapes(file, {name: value.shape for name, value in released.experts.items()}, needed)
    check_finite(file, {**released.experts, **released.source.projector})
    return model.peft_config["default"]


def check_base_weights(released: ReleasedMole, base: Weights, where: Path) -> None:
    """Raise WeightsError if base weights in the file differ from `base` as bfloat16, to which the authors round."""
    file = released.source.found.path
    for name, there in released.base_names.items():
        if name not in base:
            raise WeightsError(f"{file} holds {there}, which {where} lacks; give the base it was trained on")
        ours, theirs = base[name], released.weights[there]
        if ours.shape != theirs.shape or not torch.equal(ours.bfloat16(), theirs.bfloat16()):
            raise WeightsError(
                f"{there} in {file} differs from {name} in {where}: it was trained on another base, or its base was "
                "trained too; give the base it was trained on (--model-base)"
            )


def write_experts(released: ReleasedMole, config: Any, directory: Path, base: str) -> None:
    """Write a MoLE adapter of this PEFT configuration as PEFT does. `base` is the language model's directory."""
    directory.mkdir(parents=True)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(directory))
    save_tensors(released.experts, directory / ADAPTER_FILES[0], WRAPPER)
