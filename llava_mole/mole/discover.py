"""Which modules of a model are adapted if the user names none: its FFNs and the linears of its attention.

Everything is found by structure. Of a model with several inputs (images, sound) only the language model is searched.
The routed experts of a sparse base model are left alone.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from llava_mole.mole.ffn import composition_error, find_layout, is_whole_layer, linear_widths
from llava_mole.mole.layer import ExpertLayer, MoleMlp

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def base_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a model as it was before PEFT wrapped parts of it."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        is_layer = isinstance(module, BaseTunerLayer)
        module = module.get_base_layer() if is_layer else module.original_module
    yield path, module
    for name, child in module.named_children():
        yield from base_modules(child, f"{path}.{name}" if path else name)


def language_model(model: nn.Module) -> str:
    """Path of the language model: the decoder of a model whose config has a `text_config`, else "", all of it.

    `get_decoder` and `text_config` are what transformers gives every model with several inputs.
    """
    get_decoder = getattr(model, "get_decoder", None)
    if get_decoder is None or getattr(getattr(model, "config", None), "text_config", None) is None:
        return ""
    decoder = get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def decoder(model: nn.Module) -> nn.Module:
    """The module that every forward pass of the language model goes through, with or without its head."""
    language = model.get_submodule(language_model(model))
    return cast(Any, language).get_decoder() if hasattr(language, "get_decoder") else language


def find_ffns(model: nn.Module) -> list[str]:
    """Name endings of the FFNs: of the module, or of its first linear if its forward pass cannot be composed."""
    found: list[str] = []
    composes: dict[type, bool] = {}
    wrapped = {path for path, module in model.named_modules() if isinstance(module, MoleMlp)}
    for path, module in _language_modules(model):
        if path in wrapped:
            found.append(path)
            continue
        layout = find_layout(module)
        if layout is None or f"{path}.{layout.projections[0]}" in wrapped:
            continue
        whole_layer = is_whole_layer(layout, module)
        if _is_listed_in_a_layer(path) and not whole_layer:
            continue  # one of the routed experts of a sparse base model
        if isinstance(getattr(module, layout.projections[0]), ExpertLayer):  # its linears have routers of their own
            found.append(f"{path}.{layout.projections[0]}" if whole_layer else path)
            continue
        if type(module) not in composes:
            composes[type(module)] = composition_error(layout, module) is None
        found.append(path if composes[type(module)] else f"{path}.{layout.projections[0]}")
    return name_endings(found, model)


def find_attention(model: nn.Module) -> list[str]:
    """Name endings of the linears of attention layers, which transformers calls `attn` or `attention` everywhere."""
    found = [
        path
        for path, module in _language_modules(model)
        if _ATTENTION.search(path.rpartition(".")[0]) and linear_widths(module) is not None
    ]
    return name_endings(found, model)


def name_endings(paths: list[str], model: nn.Module) -> list[str]:
    """The shortest endings of `paths` that no other module of `model` has, in the order of `paths`."""
    everywhere = Counter(ending for path, _ in base_modules(model) for ending in _endings(path))
    chosen = Counter(ending for path in paths for ending in _endings(path))
    return list(dict.fromkeys(next((e for e in _endings(p) if chosen[e] == everywhere[e]), p) for p in paths))


def routed_experts(model: nn.Module) -> list[int]:
    """The number of routed experts in each sparse FFN of the language model; empty for a dense model."""
    counts = []
    for path, module in _language_modules(model):
        if holds_routed_experts(module):
            counts.append(max(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3))
        elif isinstance(module, nn.ModuleList) and _is_listed_in_a_layer(f"{path}.0"):
            counts.append(sum(find_layout(child) is not None for child in module))
    return [count for count in counts if count > 0]


def holds_routed_experts(module: nn.Module) -> bool:
    """Whether `module` itself holds the weights of routed experts, stacked in three-dimensional parameters."""
    return "expert" in type(module).__name__.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _is_listed_in_a_layer(path: str) -> bool:
    """Whether `path` is an item of a list inside a layer, which is itself an item of a list: `layers.0.experts.3`."""
    *before, last = path.split(".")
    return last.isdigit() and any(part.isdigit() for part in before)


def _language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    root = language_model(model)
    return ((p, m) for p, m in base_modules(model) if p and (not root or f"{p}.".startswith(f"{root}.")))


def _endings(path: str) -> list[str]:
    """The endings of `path` that begin with a name rather than a number, shortest first."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1) if not parts[-n].isdigit() or n == len(parts)]
