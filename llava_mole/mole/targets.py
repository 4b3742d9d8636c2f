"""Which modules of a model a configuration adapts: the FFNs that get experts, the linears that get plain LoRA.

Everything that can be wrong about them is found here, before the first module is replaced.
"""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from llava_mole.mole import discover, ffn
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer, MoleLinear, MoleMlp
from llava_mole.mole.linear import MoleExpertLinear
from llava_mole.mole.split import MoleSplitMlp


@dataclass(frozen=True)
class Size:
    """Rank and scaling of the adapters of one module."""

    r: int
    scaling: float


@dataclass(frozen=True)
class ExpertLinear:
    """A linear that gets experts by itself, for `router_scope` `linear` and `model`."""

    container: str | None
    """Path of the FFN it belongs to; None for a linear of the attention."""
    owns_router: bool
    """Whether it owns the router of the whole model."""


@dataclass(frozen=True)
class Ffn:
    """An FFN that gets experts: a module of its own, or linears of `container` that are wrapped one by one."""

    container: str
    """Path of the module that holds its linears."""
    layout: ffn.FfnLayout
    split: bool
    """Whether its linears are wrapped one by one."""

    @property
    def projections(self) -> list[str]:
        """Paths of its linears."""
        return [f"{self.container}.{name}" for name in self.layout.projections]

    @property
    def path(self) -> str:
        """Path of the module that is replaced: the first linear of an FFN in parts."""
        return self.projections[0] if self.split else self.container


@dataclass(frozen=True)
class Targets:
    """The modules to adapt, by their path in the model."""

    ffns: dict[str, Ffn]
    """FFNs with experts; empty if linears get them one by one."""
    experts: dict[str, ExpertLinear]
    """Linears with experts of their own."""
    sizes: dict[str, Size]
    """Of every target, FFN or linear."""
    counts: dict[str, int]
    """K of every FFN or linear with experts."""
    named: list[str] | str | None
    """What `target_modules` says."""

    @property
    def adapted(self) -> list[str]:
        """Paths of everything that is adapted, with the further linears of FFNs in parts."""
        return [*self.sizes, *(path for found in self.ffns.values() if found.split for path in found.projections[1:])]


def all_linears(config: MoleConfig, model: nn.Module) -> list[str]:
    """Paths of the linears that PEFT's `all-linear` means, with those inside wrapped FFNs."""
    asked: Any = copy.copy(config)
    asked.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
    _maybe_include_all_linear_layers(asked, model)
    names = set(asked.target_modules)
    for path, module in model.named_modules():
        if isinstance(module, ExpertLayer):
            names.update(module.linear_path(path, projection) for projection in module.projections)
    return sorted(names)


def find_targets(model: nn.Module, config: MoleConfig, paths: Collection[str] | None = None) -> Targets:
    """The modules of `model` that `config.target_modules` names, with their layouts, ranks and scalings.

    Args:
        model: the base model; parts of it may carry adapters already.
        config: its `attention_modules` and `ffn_modules` may decide which targets are linears and which FFNs. If they
            are None, the structure of each module decides.
        paths: the targets, if they do not come from the configuration.

    Raises:
        ValueError: a target is neither a linear nor an FFN of a known structure, an FFN would get adapters in some of
            its projections only, does not compute what `ffn_projections` says or carries plain LoRA of another
            adapter, or a pattern matches nothing or differs within an FFN.
    """
    search = _Search(model, config)
    matched = [
        path
        for path in search.modules
        if path and (check_target_module_exists(config, path) if paths is None else path in paths)
    ]
    if paths is not None and config.router_scope != "ffn":
        matched = list(dict.fromkeys(search.named_as(path) for path in matched))
    found = search.declared(matched) if config.ffn_modules is not None else search.by_structure(matched)
    ffns = {each.path: each for each in found if not search.excluded(each)}
    linears = [path for path in matched if path not in search.inside]
    if config.router_scope == "ffn":
        for each in ffns.values():
            search.check_free(each)
            if each.split and config.mix == "ffn_output":
                raise ValueError(
                    f"mix 'ffn_output': {each.container} computes its FFN in a way of its own, which cannot be "
                    "repeated for each expert; use mix 'projection'"
                )
        search.check_plain(linears)
        return Targets(
            ffns, {}, _sizes(config, ffns, linears), _counts(config, search.modules, ffns), config.target_modules
        )
    containers: dict[str, str | None] = {linear: f.container for f in ffns.values() for linear in f.projections}
    if config.attention_experts:
        containers.update(dict.fromkeys(linears))
    search.check_experts(list(containers))
    search.check_plain([path for path in linears if path not in containers])
    paths_in_order = [path for path in search.modules if path in containers or path in linears]
    first = next((path for path in paths_in_order if path in containers), None)
    experts = {
        path: ExpertLinear(containers[path], owns_router=config.router_scope == "model" and path == first)
        for path in paths_in_order
        if path in containers
    }
    sizes = _sizes(config, {}, paths_in_order, experts)
    return Targets({}, experts, sizes, _counts(config, search.modules, experts), config.target_modules)


class _Search:
    """The modules of one model, and what was found out about them."""

    def __init__(self, model: nn.Module, config: MoleConfig) -> None:
        self.config = config
        self.modules = dict(discover.base_modules(model))
        self.wrapped = {path: module for path, module in model.named_modules() if isinstance(module, MoleMlp)}
        self.layers = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
        self.inside: set[str] = set()
        """Paths of FFNs and of their projections: they are not targets of plain LoRA."""
        self._errors: dict[tuple[type, bool], str | None] = {}

    def find(self, path: str, in_training: bool = False) -> Ffn | None:
        """The FFN that is, or whose linears are in, the module at `path`; None without one.

        Adapters of earlier versions name an FFN by its module even if it has a dropout that cannot be composed, so only
        `in_training` sees to that.
        """
        if path in self.wrapped and not isinstance(self.wrapped[path], MoleSplitMlp):
            return Ffn(path, self.wrapped[path].layout, split=False)
        module, names = self.modules[path], self.config.ffn_projections
        if names is None:
            layout = ffn.find_layout(module)
        else:
            has_parts = all(hasattr(module, name) for name in names.values())
            layout = ffn.layout_from_names(names, module, path) if has_parts else None
        if layout is None:
            return None
        if self.config.router_scope != "ffn":  # its linears are called one by one, whatever happens between them
            return Ffn(path, layout, split=False)
        if isinstance(self.wrapped.get(f"{path}.{layout.projections[0]}"), MoleSplitMlp):
            return Ffn(path, layout, split=True)
        return Ffn(path, layout, split=self._composition_error(path, layout, in_training) is not None)

    def _composition_error(self, path: str, layout: ffn.FfnLayout, in_training: bool) -> str | None:
        """Why the FFN's forward pass cannot be composed; one of each class is tried."""
        module = self.modules[path]
        key = type(module), in_training
        if key not in self._errors:
            known = any(
                type(layer.get_base_layer()) is type(module)
                for layer in self.wrapped.values()
                if not isinstance(layer, MoleSplitMlp)
            )
            self._errors[key] = None if known else ffn.composition_error(layout, module, in_training)
        error = self._errors[key]
        if error is not None and self.config.ffn_projections is not None:
            raise ValueError(
                f"ffn_projections: {path} ({type(module).__name__}) {error}, so experts cannot be placed in it; "
                "exclude it with exclude_modules"
            )
        return error

    def _around(self, path: str) -> Ffn | None:
        """The FFN of which the linear at `path` is a projection."""
        parent, _, name = path.rpartition(".")
        found = self.find(parent, in_training=True) if parent in self.modules else None
        return found if found is not None and name in found.layout.projections else None

    def named_as(self, path: str) -> str:
        """The path by which `ffn_modules` names the FFN around the linear at `path`; `path` itself outside of FFNs."""
        around, names = self._around(path), self.config.ffn_modules
        if around is None:
            return path
        known = (around.container, around.projections[0])
        return next((each for each in known if names is None or self._names(names, each)), path)

    def declared(self, matched: list[str]) -> list[Ffn]:
        """The FFNs among the matched modules where `ffn_modules` names them, or their first linears."""
        found = []
        for path in matched:
            if not any(path == name or path.endswith(f".{name}") for name in self.config.ffn_modules or []):
                self.check_linear(path, "attention_modules")
                continue
            each = self.find(path)
            if each is None and (around := self._around(path)) is not None and around.projections[0] == path:
                # Named by its first linear, it is wrapped linear by linear unless it is wrapped as a whole already.
                each = around if around.container in self.wrapped else Ffn(around.container, around.layout, split=True)
            if each is None:
                if self.config.ffn_projections is not None:
                    ffn.layout_from_names(self.config.ffn_projections, self.modules[path], path)  # says what is missing
                raise ValueError(_not_an_ffn(self.modules[path], path))
            found.append(each)
            self.inside.update([path, *each.projections])
        for path in matched:
            for each in found:
                within = path in each.projections if each.split else path.startswith(f"{each.container}.")
                if within and path != each.path:
                    raise ValueError(
                        f"attention_modules names {path}, but ffn_modules gives {each.path} experts in all its "
                        "projections; name it in one of them only"
                    )
        return found

    def by_structure(self, matched: list[str]) -> list[Ffn]:
        """The FFNs that are matched, or whose projections all are."""
        found, parts = dict[str, Ffn](), dict[str, tuple[Ffn, list[str]]]()
        for path in matched:
            is_linear = ffn.linear_widths(self.modules[path]) is not None
            each = None if is_linear else self.find(path)
            if each is not None:
                found[each.container] = each
                continue
            self.check_linear(path, "target_modules")
            around = self._around(path)
            if around is not None:
                parts.setdefault(around.container, (around, []))[1].append(path.rpartition(".")[-1])
        for container, (each, names) in parts.items():
            left = [name for name in each.layout.projections if name not in names]
            if left and container not in found:
                raise ValueError(
                    f"target_modules takes {', '.join(names)} of {container}, but not {', '.join(left)}: experts go "
                    "into all projections of an FFN. Take all of them or none; for plain LoRA on some, name these in "
                    "attention_modules, with ffn_modules=[]"
                )
            found[container] = each
        for each in found.values():
            self.inside.update([each.container, *each.projections])
        return list(found.values())

    def check_linear(self, path: str, option: str) -> None:
        """Raise ValueError unless the module at `path` is linear-like."""
        module = self.modules[path]
        if ffn.linear_widths(module) is None:
            known = "" if option == "attention_modules" else " and no FFN of a known structure"
            raise ValueError(f"{option}: {path} is a {type(module).__name__}, not a linear{known}")

    def excluded(self, each: Ffn) -> bool:
        """Whether `exclude_modules` names the FFN or all its projections. Raises ValueError if it names some."""
        if self._names(self.config.exclude_modules, each.container):
            return True
        named = [path for path in each.projections if self._names(self.config.exclude_modules, path)]
        if named and len(named) < len(each.projections):
            raise ValueError(
                f"exclude_modules takes {', '.join(path.rpartition('.')[-1] for path in named)} out of "
                f"{each.container}, but experts go into all projections of an FFN; exclude the FFN as a whole "
                f"({each.container.rpartition('.')[-1]!r})"
            )
        return bool(named)

    @staticmethod
    def _names(names: Collection[str] | str | None, path: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in names or ())

    def check_free(self, each: Ffn) -> None:
        """Raise ValueError for an FFN whose linears carry plain LoRA of another adapter."""
        if each.path in self.wrapped:
            return
        container = self.modules[each.container]
        parts = [(name, getattr(container, name)) for name in each.layout.projections]
        foreign = next(((name, part) for name, part in parts if isinstance(part, BaseTunerLayer)), None)
        if foreign is not None:
            what = "experts of its own" if isinstance(foreign[1], ExpertLayer) else "plain LoRA"
            raise ValueError(
                f"{each.container}.{foreign[0]} carries {what} of another adapter, so the FFN around it cannot get "
                "experts; exclude it with exclude_modules, or load the two adapters into two models"
            )

    def check_plain(self, linears: list[str]) -> None:
        """Raise ValueError for a linear that should get plain LoRA but has experts in another adapter."""
        self._check_kind(linears, MoleLinear, "plain LoRA")

    def check_experts(self, linears: list[str]) -> None:
        """Raise ValueError for a linear that should get experts of its own where another adapter has something else."""
        self._check_kind(linears, MoleExpertLinear, "experts of its own")

    def _check_kind(self, linears: list[str], kind: type[AdaptedLayer], what: str) -> None:
        for path in linears:
            around = next((p for p in self.wrapped if path.startswith(f"{p}.")), None)
            if around is not None:
                raise ValueError(
                    f"{around} carries the experts of another adapter with router_scope 'ffn', so {path} cannot get "
                    f"{what}; load the two adapters into two models"
                )
            if path in self.layers and not isinstance(self.layers[path], kind):
                raise ValueError(
                    f"{path} should get {what}, but another adapter has it adapted in another way (router_scope and "
                    "attention_experts decide); load the two adapters into two models"
                )


def _not_an_ffn(module: nn.Module, path: str) -> str:
    if any(discover.holds_routed_experts(part) for part in module.modules()):
        return (
            f"ffn_modules: {path} ({type(module).__name__}) holds routed experts as stacked parameters, which cannot "
            "be adapted; leave ffn_modules at None for the FFNs outside them"
        )
    return (
        f"ffn_modules: {path} ({type(module).__name__}) is not an FFN of a known structure: name its first linear, "
        "name its parts with ffn_projections, or exclude it with exclude_modules"
    )


def _sizes(
    config: MoleConfig, ffns: dict[str, Ffn], linears: list[str], experts: Mapping[str, ExpertLinear] | None = None
) -> dict[str, Size]:
    """Rank and scaling of every target, from the patterns where they match; `experts` are among the linears."""
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

    experts, plain_r = experts or {}, config.attention_r or config.r
    sizes = {
        path: size(path, experts[path].container or path, config.r) if path in experts else size(path, path, plain_r)
        for path in linears
    }
    for path, found in ffns.items():
        each = {linear.rpartition(".")[-1]: size(linear, found.container, config.r) for linear in found.projections}
        if len(set(each.values())) > 1:
            given = ", ".join(f"{name} r {s.r} and scaling {s.scaling:g}" for name, s in each.items())
            raise ValueError(
                f"rank_pattern and alpha_pattern give the projections of {found.container} different values ({given}); "
                f"name the FFN ({found.container.rpartition('.')[-1]!r}) in them, or all its projections alike"
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


def _counts(config: MoleConfig, modules: Mapping[str, nn.Module], paths: Collection[str]) -> dict[str, int]:
    """K of the FFN or linear at each of `paths`, by `experts_by_layer` where it is set."""
    by_layer = config.experts_by_layer
    if by_layer is None:
        return dict.fromkeys(paths, config.num_experts)
    counts = {}
    for path in paths:
        found = re.match(r"(?:(.*?)\.)?(\d+)(?=\.|$)", path)
        if found is None:
            raise ValueError(f"experts_by_layer is {by_layer}, but {path} is in no numbered layer; use num_experts")
        layers = len(list(modules[found[1] or ""].children()))
        if layers < len(by_layer):
            raise ValueError(
                f"experts_by_layer has {len(by_layer)} entries, but {found[1]} has {layers} layers; shorten it"
            )
        counts[path] = by_layer[int(found[2]) * len(by_layer) // layers]
    return counts
