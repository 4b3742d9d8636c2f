"""The PEFT tuner: places the layers in a Hugging Face causal LM, saves and loads them, and registers the method.

Below it: the functions that find the tuner in a model and pass routing inputs and results in and out.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_mole.mole import discover, ffn
from llava_mole.mole.config import PEFT_TYPE, MoleConfig
from llava_mole.mole.layer import AdaptedLayer, MoleLinear, MoleMlp
from llava_mole.mole.routing import Routing, RoutingInputs
from llava_mole.mole.split import MoleSplitMlp

logger = logging.getLogger(__name__)
_SAMPLE = 64
"""Values of each parameter that the fingerprint of a base model covers."""


def base_fingerprint(model: nn.Module) -> str | None:
    """sha256 (16 hex digits) over shapes and a sample of the embedding and of every one-dimensional float parameter.

    These stay unquantized in 4-bit and 8-bit models; their values are rounded to bfloat16 first. None if weights
    cannot be read (meta device, parameters partitioned over ranks).
    """
    digest = hashlib.sha256()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    named = [] if embedding is None else [("embedding", next(embedding.parameters(), None))]
    own = ("mole_", "modules_to_save.")
    named += [(n, p) for n, p in model.named_parameters() if p.dim() == 1 and not any(mark in n for mark in own)]
    for name, parameter in named:
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.device.type == "meta" or parameter.numel() == 0:
            return None
        name = name.replace("base_layer.", "").replace("original_module.", "")
        digest.update(f"{name}:{tuple(parameter.shape)[-1]}".encode())
        sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class MoleModel(BaseTuner):
    """A causal LM with LoRA experts in its FFNs and plain LoRA on its attention linears.

    `peft.get_peft_model(model, MoleConfig(...))` builds it.

    Raises:
        ValueError: no FFN of a known structure was found, a named module cannot be adapted, or an adapter is loaded
            that does not fit the model or was trained on another base.
    """

    prefix = "mole_"
    tuner_layer_cls = AdaptedLayer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "routing_inputs" not in self.__dict__:
            self.routing_inputs = RoutingInputs()
            self.batch_hooks: list[RemovableHandle] = []
            self.pending_counts: Tensor | None = None
            self.watches_cache = False

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, MoleConfig)
        if peft_config.granularity == "sequence" and not self.watches_cache:
            self.watches_cache = True
            model.register_forward_pre_hook(self._note_decoding, with_kwargs=True)

    def _note_decoding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell sequence routers whether this pass continues a cached prompt, and which positions are padding."""
        cache = kwargs.get("past_key_values")
        self.routing_inputs.decoding = cache is not None and int(cache.get_seq_length()) > 0
        mask = kwargs.get("attention_mask")
        self.routing_inputs.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, MoleConfig)
        names = [name for name, _ in self.model.named_modules() if name]
        if peft_config.attention_modules is None:
            peft_config.attention_modules = discover.find_attention(self.model)
        if peft_config.ffn_modules is None:
            peft_config.ffn_modules = discover.find_ffns(self.model)
            _report_routed_experts(self.model, peft_config)
        for key in ("attention_modules", "ffn_modules"):
            for name in getattr(peft_config, key):
                if not _any_matches(names, name):
                    raise ValueError(
                        f"{key} names {name!r}, but no module of {type(self.model).__name__} has that name"
                    )
        if not peft_config.ffn_modules and not discover.routed_experts(self.model):
            raise ValueError(_no_ffn(self.model))
        targets = [*peft_config.attention_modules, *peft_config.ffn_modules]
        if peft_config.target_modules not in (None, targets):
            raise ValueError(
                f"target_modules is {peft_config.target_modules!r}, but follows from other options: name linears with "
                "attention_modules and FFNs with ffn_modules"
            )
        peft_config.target_modules = targets
        _check_saved(peft_config.modules_to_save or [], targets, names)
        return peft_config

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls it around every forward pass and generation, with their arguments."""
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported: all rows of a batch use the one active adapter of a MoLE model; call "
                    "set_adapter and run the rows of each adapter in a batch of their own"
                )
        yield

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MoleConfig)
        assert peft_config.ffn_modules is not None
        layer: MoleMlp | MoleLinear
        if isinstance(target, MoleMlp | MoleLinear):
            layer = target
        elif any(_matches(current_key, name) for name in peft_config.ffn_modules):
            layer = self._ffn_layer(target, parent, peft_config, current_key)
        else:
            if ffn.linear_widths(target) is None:
                raise ValueError(f"attention_modules: {current_key} is a {type(target).__name__}, not a linear")
            layer = MoleLinear(target)
        layer.add_adapter(adapter_name, peft_config)
        if not isinstance(layer, MoleSplitMlp):  # it has put its parts in place itself
            setattr(parent, target_name, layer)

    def _ffn_layer(self, target: nn.Module, parent: nn.Module, config: MoleConfig, where: str) -> MoleMlp:
        """The layer for the FFN `target`, or for the FFN in `parent` whose first linear is `target`.

        One whose forward pass cannot be composed gets its layers in place; the layer of its first linear is returned.
        """
        named_by_linear = ffn.linear_widths(target) is not None
        container = parent if named_by_linear else target
        layout = ffn.find_layout(container) if config.ffn_projections is None else None
        if config.ffn_projections is not None:
            layout = ffn.layout_from_names(config.ffn_projections, container, where)
        if layout is None or (named_by_linear and getattr(container, layout.projections[0]) is not target):
            raise ValueError(_not_an_ffn(target, where))
        first = getattr(container, layout.projections[0])
        if isinstance(first, MoleSplitMlp):  # a further adapter, named by the FFN
            return first
        seen = any(type(m.base_layer) is type(container) for m in self.model.modules() if type(m) is MoleMlp)
        # Adapters of earlier versions name such an FFN by its module even if it has a dropout that is not composed.
        reason = None if seen or named_by_linear else ffn.composition_error(layout, container, in_training=False)
        if reason is not None and config.ffn_projections is not None:
            raise ValueError(
                f"{where} ({type(container).__name__}) {reason}, so experts cannot be placed in it; exclude it with "
                "exclude_modules"
            )
        layer: MoleMlp
        if named_by_linear or reason is not None:
            layer = MoleSplitMlp(container, layout, self.routing_inputs)
        else:
            layer = MoleMlp(container, layout, self.routing_inputs)
        self._watch_batch(layer, where, inside_layer=ffn.is_whole_layer(layout, container))
        return layer

    def _watch_batch(self, layer: MoleMlp, where: str, inside_layer: bool) -> None:
        """Tell an FFN that may read flattened tokens the batch size: inside a sparse block, or a decoder layer."""
        around = where.rpartition(".")[0]
        if inside_layer or not around.rpartition(".")[-1].isdigit():
            hook = self.model.get_submodule(around).register_forward_pre_hook(layer.note_batch, with_kwargs=True)
            self.batch_hooks.append(hook)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self.batch_hooks:
            hook.remove()
        return base

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` from the wrapped module, which an FFN does not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        next(m for m in self.model.modules() if isinstance(m, AdaptedLayer)).merge()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, MoleConfig)
        config.base_fingerprint = base_fingerprint(_base_model(model))
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, MoleConfig)
        found = base_fingerprint(_base_model(model)) if config.base_fingerprint else None
        if found is not None and found != config.base_fingerprint:
            raise ValueError(
                f"this adapter was trained on another base model (fingerprint {config.base_fingerprint}, this model "
                f"has {found}); load it on {config.base_model_name_or_path or 'its own base'}, or remove "
                "base_fingerprint from adapter_config.json if the two are the same"
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fits(model, adapter_name, remapped)
        return remapped


def _base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel or tuner."""
    tuner = find_tuner(model)
    return model if tuner is None else tuner.model


def _not_an_ffn(module: nn.Module, where: str) -> str:
    if any(discover.holds_routed_experts(part) for part in module.modules()):
        return (
            f"ffn_modules: {where} ({type(module).__name__}) holds routed experts as stacked parameters, which cannot "
            "be adapted; leave ffn_modules at None for the FFNs outside them"
        )
    return (
        f"{where} ({type(module).__name__}) is not an FFN of a known structure: name its first linear, name its parts "
        "with ffn_projections, or exclude it with exclude_modules"
    )


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _any_matches(keys: list[str], name: str) -> bool:
    return any(_matches(key, name) for key in keys)


def _check_saved(saved: list[str], targets: list[str], keys: list[str]) -> None:
    """Raise ValueError for `modules_to_save` that PEFT would ignore, or would train instead of adapting them."""
    adapted = [key for key in keys if any(_matches(key, name) for name in targets)]
    for name in saved:
        found = [key for key in keys if key.endswith(name)]  # PEFT's rule
        if not found:
            raise ValueError(f"modules_to_save names {name!r}, but the name of no module ends so")
        clash = [k for k in adapted for f in found if f"{k}.".startswith(f"{f}.") or f"{f}.".startswith(f"{k}.")]
        if clash:
            raise ValueError(
                f"modules_to_save names {name!r}, but attention_modules and ffn_modules adapt {clash[0]}; name it in "
                "one of them only"
            )


def _report_routed_experts(model: nn.Module, config: MoleConfig) -> None:
    """Say once which part of a sparse base model is left alone, and that some models keep nothing for experts."""
    counts = discover.routed_experts(model)
    if not counts:
        return
    assert config.ffn_modules is not None
    found = f"The experts of this adapter go to the FFNs outside them: {', '.join(config.ffn_modules)}"
    none = "There is no FFN outside them, so this adapter is plain LoRA on the attention, without experts and a router"
    logger.warning(
        "%s has %d routed experts of its own (%d sparse FFNs), which are not adapted. %s",
        type(model).__name__, sum(counts), len(counts), found if config.ffn_modules else none,
    )  # fmt: skip


def _no_ffn(model: nn.Module) -> str:
    """Why `model` has no FFN for experts, and what to do."""
    name, kind = type(model).__name__, getattr(getattr(model, "config", None), "model_type", None)
    if not discover.find_attention(model):
        return (
            f"{name}{f' ({kind})' if kind else ''} has neither an FFN nor attention of a known structure, as is the "
            "case for state-space models such as Mamba: experts have no place in it. Use a transformer, or PEFT's LoRA"
        )
    return (
        f"no FFN of a known structure in {name}; name it with ffn_modules and its linears with ffn_projections (see "
        "docs/mole.md)"
    )


def _check_fits(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError for the first tensor of an adapter that is missing, unexpected or of the wrong shape."""
    own = {
        key: value
        for key, value in model.state_dict().items()
        if ".mole_" in key and f".{adapter_name}." in key[key.index(".mole_") :]
    }
    for key, value in own.items():
        if key not in state_dict:
            raise ValueError(f"the adapter has no tensor {key}; its files are incomplete or its config was changed")
        if state_dict[key].shape != value.shape:
            raise ValueError(
                f"{key} is {tuple(state_dict[key].shape)} in the adapter's file but {tuple(value.shape)} in this "
                "model: hidden size, rank or number of experts differ"
            )
    for key in state_dict:
        if ".mole_" in key and key not in own:
            raise ValueError(f"the adapter has a tensor {key}, but this model does not; is it another base model?")


def find_tuner(model: nn.Module) -> MoleModel | None:
    """The MoLE tuner inside `model` (a PeftModel, or anything that contains one), or None."""
    return next((module for module in model.modules() if isinstance(module, MoleModel)), None)


def active_config(model: nn.Module) -> MoleConfig | None:
    """The configuration of the active adapter; None without MoLE."""
    tuner = find_tuner(model)
    if tuner is None:
        return None
    names = tuner.active_adapters
    config = tuner.peft_config.get(names[0]) if names else None
    return config if isinstance(config, MoleConfig) else None


def set_routing_inputs(model: nn.Module, **values: Tensor | None) -> None:
    """Set the facts about a batch that the routers need; `RoutingInputs` lists them.

    Call it before the forward pass. The values hold for later passes too, until the next call. Without MoLE it does
    nothing.

    Raises:
        ValueError: unknown name, or an expert, source or task id outside its range.
    """
    tuner, config = find_tuner(model), active_config(model)
    if tuner is None or config is None:
        return
    name = config.required_input
    value = None if name is None else values.get(name)
    if value is not None and not value.is_floating_point() and value.numel() > 0:
        limit = config.num_tasks if name == "task" else config.num_experts
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low if low < 0 else high}; this adapter knows 0 to {limit - 1}")
    tuner.routing_inputs.update(**values)


def missing_input(model: nn.Module) -> str | None:
    """The routing input (`experts`, `source` or `task`) that the active adapter needs and that is not set, or None."""
    tuner, config = find_tuner(model), active_config(model)
    name = None if config is None else config.required_input
    return name if tuner is not None and name is not None and getattr(tuner.routing_inputs, name) is None else None


def disable_finite_check(model: nn.Module) -> None:
    """Let NaN and infinity in a router's logits reach the loss, as they do on a GPU, instead of raising.

    For training loops that check the loss: an exception in the forward pass of one rank would leave the other ranks
    waiting for its gradients.
    """
    tuner = find_tuner(model)
    if tuner is not None:
        tuner.routing_inputs.check_finite = False


def collect_routing(model: nn.Module, part: str | None = None) -> Routing:
    """The routing of every FFN with experts in the latest forward pass; empty without MoLE or with adapters disabled.

    Call it once after a forward pass. The logits carry their graph, so a loss computed from them trains the router.
    `part` names a module, such as `encoder` or `decoder`, and selects the FFNs in it: the two stacks of an
    encoder-decoder model route different tokens, so each is read and balanced by itself, with its own `token_mask`.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoleMlp) and module.routing.logits is not None
        if part is None or part in name.split(".")
    ]
    return Routing(
        names=tuple(name for name, _ in layers),
        logits=tuple(module.routing.logits for _, module in layers if module.routing.logits is not None),
        index=tuple(module.routing.index for _, module in layers if module.routing.index is not None),
        layers=tuple(module for _, module in layers),
    )


_TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": MoleConfig,
    "PEFT_TYPE_TO_TUNER_MAPPING": MoleModel,
    "PEFT_TYPE_TO_PREFIX_MAPPING": MoleModel.prefix,
}


def register_mole() -> None:
    """Enter MoLE in PEFT's tables; calling it again changes nothing.

    PEFT's own `register_peft_method` accepts only members of its `PeftType` enumeration. Those are strings, so its
    tables find a plain string just as well.

    Raises:
        ImportError: this version of PEFT has no such tables.
    """
    import peft.mapping

    for table, value in _TABLES.items():
        mapping = getattr(peft.mapping, table, None)
        if not isinstance(mapping, dict):
            raise ImportError(
                f"peft {peft.__version__} has no table peft.mapping.{table}, in which MoLE registers itself; install "
                "another version, such as 0.21"
            )
        mapping[PEFT_TYPE] = value
