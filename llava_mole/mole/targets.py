"""Which modules of a model a configuration adapts: the FFNs that get experts, the linears that get plain LoRA.

Everything that can be wrong about them is found here, before the first module is replaced.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from llava_mole.mole import ffn
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import MoleMlp


@dataclass(frozen=True)
class Size:
    """Rank and scaling of the adapters of one module."""

    r: int
    scaling: float


@dataclass(frozen=True)
class Targets:
    """The modules to adapt, by their path in the model."""

    ffns: dict[str, ffn.FfnLayout]
    sizes: dict[str, Size]
    """Of every target, FFN or linear."""
    named: list[str] | str | None
    """What `target_modules` says."""

    @property
    def linears(self) -> list[str]:
        """Paths of the linears with plain LoRA."""
        return [key for key in self.sizes if key not in self.ffns]


def base_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a model as it was before PEFT wrapped parts of it."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        is_layer = isinstance(module, BaseTunerLayer)
        module = module.get_base_layer() if is_layer else module.original_module
    yield path, module
    for name, child in module.named_children():
        yield from base_modules(child, f"{path}.{name}" if path else name)


def all_linears(config: MoleConfig, model: nn.Module) -> list[str]:
    """Paths of the linears that PEFT's `all-linear` means, with those inside wrapped FFNs."""
    asked: Any = copy.copy(config)
    asked.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
    _maybe_include_all_linear_layers(asked, model)
    names = set(asked.target_modules)
    for path, module in model.named_modules():
        if isinstance(module, MoleMlp):
            names.update(f"{path}.{projection}" for projection in module.layout.projections)
    return sorted(names)


def find_targets(model: nn.Module, config: MoleConfig, paths: Collection[str] | None = None) -> Targets:
    """The modules of `model` that `config.target_modules` names, with their layouts, ranks and scalings.

    Args:
        model: the base model; parts of it may carry adapters already.
        config: its `attention_modules` and `ffn_modules` may decide which targets are linears and which FFNs. If they
            are None, the structure of each module decides.
        paths: the targets, if something else than the configuration names them.

    Raises:
        ValueError: a target is neither a linear nor an FFN of a known structure, an FFN would get adapters in some of
            its projections only, or a pattern matches nothing or differs within an FFN.
    """
    search = _Search(model, config)
    matched = [
        path
        for path in search.modules
        if path and (check_target_module_exists(config, path) if paths is None else path in paths)
    ]
    ffns = search.declared(matched) if config.ffn_modules is not None else search.by_structure(matched)
    ffns = {path: layout for path, layout in ffns.items() if not search.excluded(path, layout)}
    search.check_composition(ffns)
    linears = [path for path in matched if path not in search.inside]
    return Targets(ffns, _sizes(config, ffns, linears), config.target_modules)


class _Search:
    """The modules of one model, and what was found out about them."""

    def __init__(self, model: nn.Module, config: MoleConfig) -> None:
        self.config = config
        self.modules = dict(base_modules(model))
        self.wrapped = {path: module for path, module in model.named_modules() if isinstance(module, MoleMlp)}
        self.inside: set[str] = set()
        """Paths of FFNs and of their projections: they are no targets of plain LoRA."""

    def layout(self, path: str) -> ffn.FfnLayout | None:
        """The layout of the FFN at `path`; None if the module there is none."""
        if path in self.wrapped:
            return self.wrapped[path].layout
        module, names = self.modules[path], self.config.ffn_projections
        if names is None:
            return ffn.find_layout(module)
        has_parts = all(hasattr(module, name) for name in names.values())
        return ffn.layout_from_names(names, module, path) if has_parts else None

    def declared(self, matched: list[str]) -> dict[str, ffn.FfnLayout]:
        """The FFNs among the matched modules where `ffn_modules` names them."""
        found = {}
        for path in matched:
            module = self.modules[path]
            if not any(path == name or path.endswith(f".{name}") for name in self.config.ffn_modules or []):
                self.check_linear(path, "attention_modules")
                continue
            if self.config.ffn_projections is not None and path not in self.wrapped:
                layout = ffn.layout_from_names(self.config.ffn_projections, module, path)
            else:
                known = self.layout(path)
                if known is None:
                    raise ValueError(
                        f"ffn_modules: {path} ({type(module).__name__}) is not an FFN of a known structure: name its "
                        "parts with ffn_projections, or exclude it with exclude_modules"
                    )
                layout = known
            found[path] = layout
            self.inside.add(path)
        for path in matched:
            around = next((f for f in found if path.startswith(f"{f}.")), None)
            if around is not None:
                raise ValueError(
                    f"attention_modules names {path}, but ffn_modules gives {around} experts in all its projections; "
                    "name it in one of them only"
                )
        return found

    def by_structure(self, matched: list[str]) -> dict[str, ffn.FfnLayout]:
        """The FFNs that are matched, or whose projections all are."""
        found, parts = {}, dict[str, tuple[ffn.FfnLayout, list[str]]]()
        for path in matched:
            layout = self.layout(path)
            if layout is not None:
                found[path] = layout
                continue
            self.check_linear(path, "target_modules")
            parent, _, name = path.rpartition(".")
            around = self.layout(parent) if parent in self.modules else None
            if around is not None and name in around.projections:
                parts.setdefault(parent, (around, []))[1].append(name)
        for path, (layout, names) in parts.items():
            left = [name for name in layout.projections if name not in names]
            if left and path not in found:
                raise ValueError(
                    f"target_modules takes {', '.join(names)} of {path}, but not {', '.join(left)}: experts go into "
                    "all projections of an FFN. Take all of them or none; for plain LoRA on some, name these in "
                    "attention_modules, with ffn_modules=[]"
                )
            found[path] = layout
        for path, layout in found.items():
            self.inside.update([path, *(f"{path}.{name}" for name in layout.projections)])
        return found

    def check_linear(self, path: str, option: str) -> None:
        """Raise ValueError unless the module at `path` is linear-like."""
        module = self.modules[path]
        if ffn.linear_widths(module) is None:
            known = "" if option == "attention_modules" else " and no FFN of a known structure"
            raise ValueError(f"{option}: {path} is a {type(module).__name__}, not a linear{known}")

    def excluded(self, path: str, layout: ffn.FfnLayout) -> bool:
        """Whether `exclude_modules` names the FFN or all its projections. Raises ValueError if it names some."""
        if self._names(self.config.exclude_modules, path):
            return True
        named = [n for n in layout.projections if self._names(self.config.exclude_modules, f"{path}.{n}")]
        if named and len(named) < len(layout.projections):
            raise ValueError(
                f"exclude_modules takes {', '.join(named)} out of {path}, but experts go into all projections of an "
                f"FFN; exclude the FFN as a whole ({path.rpartition('.')[-1]!r})"
            )
        return bool(named)

    @staticmethod
    def _names(names: Collection[str] | str | None, path: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in names or ())

    def check_composition(self, ffns: dict[str, ffn.FfnLayout]) -> None:
        """Raise ValueError for an FFN that computes something else than its layout says; one of each class is tried."""
        known = {type(layer.get_base_layer()) for layer in self.wrapped.values()}
        for path, layout in ffns.items():
            module = self.modules[path]
            foreign = next((n for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)), None)
            if foreign is not None:
                raise ValueError(
                    f"{path}.{foreign} carries plain LoRA of another adapter, so the FFN around it cannot get experts; "
                    "exclude it with exclude_modules, or load the two adapters into two models"
                )
            if type(module) not in known:
                try:
                    ffn.check_composition(layout, module, path)
                except ValueError as error:
                    option = "" if self.config.ffn_projections is None else "ffn_projections: "
                    raise ValueError(f"{option}{error}") from None
                known.add(type(module))


def _sizes(config: MoleConfig, ffns: dict[str, ffn.FfnLayout], linears: list[str]) -> dict[str, Size]:
    """Rank and scaling of every target, from the patterns where they match."""
    patterns: dict[str, Mapping[str, float]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    used: dict[str, set[str]] = {"rank_pattern": set(), "alpha_pattern": set()}

    def size(path: str, within: str, default_r: int) -> Size:
        """Of the module at `path`, for which a pattern may also name the module at `within`."""
        values = {}
        for option, pattern in patterns.items():
            keys = _pattern_keys(pattern, path) or _pattern_keys(pattern, within)
            used[option].update(keys)
            if not keys:
                continue
            values[option] = pattern[keys[0]]
            if values[option] != pattern[min(keys)]:  # a saved pattern comes back with its keys sorted
                raise ValueError(
                    f"{option} names {path} by {keys[0]!r} and, with another value, by {min(keys)!r}; the order of "
                    "keys is lost on saving, so let one key exclude the other"
                )
        if not values:
            return Size(default_r, config.scaling)
        assert config.alpha is not None
        r, alpha = int(values.get("rank_pattern", default_r)), values.get("alpha_pattern", config.alpha)
        return Size(r, alpha / (r**0.5 if config.use_rslora else r))

    sizes = {path: size(path, path, config.attention_r or config.r) for path in linears}
    for path, layout in ffns.items():
        each = {name: size(f"{path}.{name}", path, config.r) for name in layout.projections}
        if len(set(each.values())) > 1:
            given = ", ".join(f"{name} r {s.r} and scaling {s.scaling:g}" for name, s in each.items())
            raise ValueError(
                f"rank_pattern and alpha_pattern give the projections of {path} different values ({given}); name the "
                f"FFN ({path.rpartition('.')[-1]!r}) in them, or all its projections alike"
            )
        sizes[path] = next(iter(each.values()))
    if sizes:
        for option, pattern in patterns.items():
            lost = [key for key in pattern if key not in used[option]]
            if lost:
                raise ValueError(f"{option} names {lost[0]!r}, but no adapted module has that name")
    return sizes


def _pattern_keys(pattern: Collection[str], path: str) -> list[str]:
    """The keys of a pattern that name the module at `path`, by PEFT's rule. The first one counts."""
    return [key for key in pattern if re.match(rf"(.*\.)?({key})$", path)]
