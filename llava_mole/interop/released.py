"""The `.pt` file of the LLaVA-MoLE authors: experts as single LoRA pairs, one router with bias in each FFN.

Names in the file, after `llm_model.base_model.model.model.layers.<n>.`: `mlp.moe_gate|moe_up|moe_down.<k>.lora_A`
`[r, in]` and `.lora_B` `[out, r]`, `mlp.router.weight|bias`, `self_attn.<p>_proj.lora_A.default.weight`; and
`in_adaptor.projector.<i>`, `in_adaptor.visual_start_token|visual_end_token` `[1, 1, D]`. The file records neither
alpha nor whether it was trained sparse or dense; both are options.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError, value_errors_as
from llava_mole.common.text import count_of, shorten
from llava_mole.config import AdapterConfig
from llava_mole.interop.causal_lm import Skeleton
from llava_mole.interop.kinds import Found
from llava_mole.interop.lora import ADAPTER_FILES
from llava_mole.interop.names import BUFFERS, WRAPPER
from llava_mole.interop.sources import Source, numbered, projector_kind
from llava_mole.interop.tensors import Weights, check_finite, check_shapes, open_weights, save_tensors, spelled_twice
from llava_mole.model.multimodal_projector import ENDS

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.moe_(gate|up|down)\.(\d+)\.lora_([AB])")
_ROUTER = re.compile(r"(model\.layers\.\d+\.mlp)\.router\.(weight|bias)")
_ATTENTION = re.compile(r"(model\.layers\.\d+\.self_attn\.(\w+))\.lora_([AB])(?:\.\w+)?\.weight")
_LLM, _ADAPTOR, _TOWER = "llm_model.", "in_adaptor.", "vit.vision_tower."


@dataclass
class ReleasedMole:
    """The content of the file, by part."""

    source: Source
    experts: dict[str, torch.Tensor]
    """Named as in our adapter, without PEFT's prefix, and stacked: A `[K, r, in]`, B `[K, r, out]`."""
    base_names: dict[str, str]
    """Base weights that the file repeats: name in the language model -> name in the file."""
    rank: int
    num_experts: int
    attention_modules: list[str]

    def adapter_config(self, alpha: float | None, mode: str) -> AdapterConfig:
        """The configuration of our adapter for these weights: preset `released`. `alpha` defaults to 2 r."""
        return AdapterConfig(
            method="mole",
            rank=self.rank,
            alpha=2.0 * self.rank if alpha is None else alpha,
            num_experts=self.num_experts,
            preset="released",
            options={"mode": mode, "attention_modules": self.attention_modules},
        )


def read_released(found: Found) -> ReleasedMole:
    """Read the file. Raises WeightsError if tensors are missing or unexpected, and lists them."""
    weights = open_weights(found.path)
    parts = _sort_names(weights, found.path)
    num_experts = 1 + max(k for stack in parts.stacks.values() for k in stack)
    lost = [f"{n}, expert {k}" for n, stack in parts.stacks.items() for k in range(num_experts) if k not in stack]
    if lost:
        raise WeightsError(f"{found.path}: {count_of(len(lost), 'expert')} missing: {shorten(lost)}")
    experts = {name: _stack(weights, name, stack) for name, stack in parts.stacks.items()}
    for name, there in parts.direct.items():
        if num_experts > 1 or ".mole_router." not in name:  # one expert needs no router: its weight is always 1
            experts[name] = weights[there].T if name.endswith("lora.B") else weights[there]
    experts = {n: value.clone(memory_format=torch.contiguous_format) for n, value in experts.items()}
    modules = sorted({n.split(".self_attn.")[1].split(".")[0] for n in experts if ".self_attn." in n})
    if not modules:
        raise WeightsError(f"{found.path} has no LoRA on the attention linears (self_attn.*.lora_A.default.weight)")
    rank = next(value.shape[1] for name, value in experts.items() if name.endswith("_proj_A"))
    source = _source(found, weights, parts.adaptor, parts.tower)
    return ReleasedMole(source, experts, parts.base, rank, num_experts, modules)


@dataclass
class _Names:
    """The tensor names of the file by part: our name -> name in the file."""

    stacks: dict[str, dict[int, str]]
    """FFN halves: our name -> expert -> name in the file."""
    direct: dict[str, str]
    """Routers and attention LoRA."""
    base: dict[str, str]
    tower: dict[str, str]
    adaptor: dict[str, str]


def _sort_names(weights: Weights, path: Path) -> _Names:
    parts = _Names({}, {}, {}, {}, {})
    unknown = []

    def put(part: dict[Any, str], key: int | str, name: str) -> None:
        if key in part:
            raise WeightsError(f"{path}: {spelled_twice(part[key], name)}")
        part[key] = name

    for name in weights:
        short = name.removeprefix("module.")
        if short.endswith(BUFFERS):
            continue
        if short.startswith(_ADAPTOR):
            put(parts.adaptor, short.removeprefix(_ADAPTOR), name)
        elif short.startswith(_TOWER):
            put(parts.tower, short.removeprefix(_TOWER).removeprefix("vision_model."), name)
        elif not short.startswith(_LLM):
            unknown.append(name)
        else:
            inner = short.removeprefix(_LLM).removeprefix(WRAPPER)
            if match := _EXPERT.fullmatch(inner):
                mlp, projection, k, half = match.groups()
                put(parts.stacks.setdefault(f"{mlp}.mole_experts.{projection}_proj_{half}", {}), int(k), name)
            elif match := _ROUTER.fullmatch(inner):
                put(parts.direct, f"{match[1]}.mole_router.{match[2]}", name)
            elif match := _ATTENTION.fullmatch(inner):
                put(parts.direct, f"{match[1]}.mole_lora.{match[3]}", name)
            else:
                put(parts.base, inner.replace(".original_module.", ".").replace(".base_layer.", "."), name)
    if "text_embed.weight" in parts.adaptor:
        parts.base["model.embed_tokens.weight"] = parts.adaptor.pop("text_embed.weight")
    if unknown:
        raise WeightsError(f"{path}: {count_of(len(unknown), 'unexpected tensor')}: {shorten(unknown)}")
    if not any(name.endswith("_proj_A") for name in parts.stacks):
        raise WeightsError(f"{path} has no expert (mlp.moe_gate.<k>.lora_A) in any layer")
    return parts


def _stack(weights: Weights, name: str, stack: Mapping[int, str]) -> torch.Tensor:
    values = [weights[stack[k]] for k in range(len(stack))]
    if values[0].dim() != 2:
        raise WeightsError(f"{stack[0]} is {tuple(values[0].shape)}; needed are matrices")
    if len({value.shape for value in values}) > 1:
        raise WeightsError(f"{name}: experts of different shapes {sorted({tuple(v.shape) for v in values})}")
    return torch.stack([value.T if name.endswith("_B") else value for value in values])


def _source(found: Found, weights: Weights, adaptor: dict[str, str], tower: dict[str, str]) -> Source:
    projector = {n.removeprefix("projector."): weights[t].clone() for n, t in adaptor.items() if "projector." in n}
    kind = projector_kind(projector, found.path)
    projector = numbered(projector)
    ends = {n: t for n, t in adaptor.items() if n in ("visual_start_token", "visual_end_token")}
    strange = [t for n, t in adaptor.items() if n not in ends and "projector." not in n]
    if strange or len(ends) == 1:
        raise WeightsError(f"{found.path}: unexpected or incomplete: {shorten([*strange, *ends.values()])}")
    if ends:
        position = 1 + max(int(name.split(".")[0]) for name in projector)
        projector[f"{position}.start"] = weights[ends["visual_start_token"]].reshape(-1).clone()
        projector[f"{position}.end"] = weights[ends["visual_end_token"]].reshape(-1).clone()
        kind += ENDS
    return Source(
        found,
        projector=projector,
        projector_kind=kind,
        select_layer=-1,
        aspect_ratio="pad",
        weights=weights,
        tower_names=tower,
        tower_hint="openai/clip-vit-large-patch14-336",
    )


def check_experts(released: ReleasedMole, config: AdapterConfig, skeleton: Skeleton) -> None:
    """Raise WeightsError if tensors are missing, unexpected, of another shape or not finite.

    The adapter is put on the skeleton's model, in place, to find out which tensors it has there.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    file = released.source.found.path
    with value_errors_as(ConfigError), torch.device("meta"):
        model = get_peft_model(skeleton.model, _mole_config(released, config))
    needed = {n.removeprefix(WRAPPER): tuple(v.shape) for n, v in get_peft_model_state_dict(model).items()}
    check_shapes(file, {name: tuple(value.shape) for name, value in released.experts.items()}, needed)
    check_finite(file, {**released.experts, **released.source.projector})


def check_base_weights(released: ReleasedMole, base: Weights, where: Path) -> None:
    """Raise WeightsError if base weights that the file repeats differ from those of the given base.

    They are compared as bfloat16, to which the authors' code rounds them.
    """
    assert released.source.weights is not None
    file = released.source.found.path
    for name, there in released.base_names.items():
        if name not in base:
            raise WeightsError(f"{file} holds {there}, which {where} lacks; give the base it was trained on")
        ours, theirs = base[name], released.source.weights[there]
        if ours.shape != theirs.shape or not torch.equal(ours.bfloat16(), theirs.bfloat16()):
            raise WeightsError(
                f"{there} in {file} differs from {name} in {where}: it was trained on another base, or its base was "
                "trained too; give the base it was trained on (--model-base)"
            )


def write_experts(released: ReleasedMole, config: AdapterConfig, directory: Path, base: str) -> None:
    """Write a MoLE adapter as PEFT does. `base` is the language model's directory."""
    directory.mkdir(parents=True)
    mole = _mole_config(released, config)
    mole.base_model_name_or_path, mole.inference_mode = base, True
    mole.save_pretrained(str(directory))
    save_tensors(released.experts, directory / ADAPTER_FILES[0], WRAPPER)


def _mole_config(released: ReleasedMole, config: AdapterConfig) -> Any:
    from llava_mole.mole import MoleConfig

    return MoleConfig.from_preset(
        config.preset,
        r=config.rank,
        alpha=config.alpha,
        num_experts=config.num_experts,
        task_type="CAUSAL_LM",
        ffn_modules=["mlp"],
        target_modules=[*released.attention_modules, "mlp"],
        **config.options,
    )
