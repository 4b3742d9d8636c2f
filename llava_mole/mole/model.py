"""The PEFT tuner: places the layers in a Hugging Face causal LM, saves and loads them, and registers the method."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_mole.mole import discover, ffn
from llava_mole.mole.access import shared_inputs
from llava_mole.mole.config import PEFT_TYPE, MoleConfig
from llava_mole.mole.fingerprint import base_fingerprint, same_base
from llava_mole.mole.layer import AdaptedLayer, ExpertLayer, MoleLinear, MoleMlp
from llava_mole.mole.linear import MoleExpertLinear, route_whole_model
from llava_mole.mole.routing import RoutingInputs
from llava_mole.mole.snapshot import Snapshot
from llava_mole.mole.split import MoleSplitMlp
from llava_mole.mole.targets import Targets, all_linears, find_targets
from llava_mole.mole.training import unwatch_training, watch_training

logger = logging.getLogger(__name__)

_CLASSIFYING, _HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), ("classifier", "score", "qa_outputs")
"""Tasks for which PEFT adds these names to modules_to_save, whether the model has such modules or not."""


class MoleModel(BaseTuner):
    """A causal LM with LoRA experts in its FFNs and plain LoRA on its attention linears.

    `peft.get_peft_model(model, MoleConfig(...))` builds it.

    Raises:
        ValueError: no FFN of a known structure was found, a named module cannot be adapted, or an adapter is loaded
            that does not fit the model or, with `strict_base`, was trained on another base. The model is then as it
            was before, except if the tensors of an adapter do not fit: its layers are then in the model already.
    """

    prefix = "mole_"
    tuner_layer_cls = AdaptedLayer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "routing_inputs" not in self.__dict__:
            # Layers that another injection left behind keep their inputs, so new layers share them.
            self.routing_inputs = shared_inputs(model) or RoutingInputs()
            self.batch_hooks: list[RemovableHandle] = []
            self.targets: dict[str, Targets] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in PEFT; a refused adapter leaves the model as it was."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, MoleConfig)
        self._check_new(model, adapter_name)
        before, given, marker = Snapshot(model), vars(config).copy(), f".{self.prefix}"
        self.injecting = adapter_name
        self.listed: list[str] | None = (
            None if state_dict is None else sorted({key.rpartition(marker)[0] for key in state_dict})
        )
        try:
            _check_base(config, model)
            with warnings.catch_warnings():
                # Patterns may name projections, which PEFT does not see; `find_targets` has checked them.
                warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            before.restore()
            for layer in model.modules():
                if isinstance(layer, AdaptedLayer):
                    layer.forget_adapter(adapter_name)
            vars(config).update(given)
            self.peft_config.pop(adapter_name, None)
            raise
        # PEFT may have shortened a long list, which then would no longer agree with the options it came from.
        config.target_modules = self.targets[adapter_name].named
        watch_training(model)

    def _check_new(self, model: nn.Module, adapter_name: str) -> None:
        """Raise ValueError if the model has an adapter of that name, which would be overwritten in some layers only."""
        layers = (module for module in model.modules() if isinstance(module, AdaptedLayer))
        present = next((layer.configs[adapter_name] for layer in layers if adapter_name in layer.configs), None)
        if present is not None:
            by_layer = present.experts_by_layer  # the layer may hold a copy with its own K
            # PEFT has put the new configuration in its place.
            self.peft_config[adapter_name] = self._config_of(present, max(by_layer) if by_layer else None)
            raise ValueError(
                f"the model has an adapter {adapter_name!r} already; give the new one another adapter_name, or take "
                "the old one off with delete_adapter or unload"
            )

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, MoleConfig)
        if peft_config.granularity == "sequence" and self._note_decoding not in model._forward_pre_hooks.values():
            self.batch_hooks.append(model.register_forward_pre_hook(self._note_decoding, with_kwargs=True))
        if peft_config.router_scope == "model" and peft_config.has_router:
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                raise ValueError(
                    f"router_scope 'model': {type(model).__name__} has an encoder and a decoder, which read different "
                    "tokens; use router_scope 'linear'"
                )
            decoder = discover.decoder(model)
            if route_whole_model not in decoder._forward_pre_hooks.values():
                hook = decoder.register_forward_pre_hook(route_whole_model, with_kwargs=True)
                self.batch_hooks.append(hook)

    def _note_decoding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell sequence routers whether this pass continues a cached prompt, and which positions are padding."""
        cache = kwargs.get("past_key_values")
        self.routing_inputs.decoding = cache is not None and int(cache.get_seq_length()) > 0
        mask = kwargs.get("attention_mask")
        self.routing_inputs.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, MoleConfig)
        names = [name for name, _ in self.model.named_modules() if name]
        wanted = copy.copy(peft_config)
        if wanted.target_modules is None or wanted.attention_modules is not None or wanted.ffn_modules is not None:
            self._fill_in_modules(wanted, model_config, names)
        elif isinstance(wanted.target_modules, str) and wanted.target_modules.lower() == "all-linear":
            wanted.target_modules = all_linears(wanted, self.model)
        sought = copy.copy(wanted)
        if wanted.ffn_modules is not None:
            sought.modules_to_save = None  # PEFT would let it win over targets without a word
        targets = find_targets(self.model, sought, self.listed)
        heads = _HEADS if str(getattr(wanted.task_type, "value", wanted.task_type)) in _CLASSIFYING else ()
        _check_saved([n for n in wanted.modules_to_save or [] if n not in heads], targets.adapted, names)
        _check_tokens(wanted, self.model)
        if targets.sizes and not targets.counts and wanted.ffn_modules is None and wanted.num_experts > 1:
            warnings.warn(
                f"no FFN is among the target modules, so this adapter is plain LoRA without experts; num_experts "
                f"{wanted.num_experts} has no effect",
                stacklevel=2,
            )
        self.targets[self.injecting] = targets
        peft_config.attention_modules, peft_config.ffn_modules = wanted.attention_modules, wanted.ffn_modules
        peft_config.target_modules = wanted.target_modules
        return peft_config

    def _fill_in_modules(self, config: MoleConfig, model_config: dict, names: list[str]) -> None:
        """Complete `attention_modules`, `ffn_modules` and `target_modules`, and check that the model has them."""
        found_ffns = None
        if config.target_modules is not None:  # the two options were checked against it: one that is missing is empty
            config.attention_modules, config.ffn_modules = config.attention_modules or [], config.ffn_modules or []
        if config.attention_modules is None:
            config.attention_modules = discover.find_attention(self.model)
        if config.ffn_modules is None:
            config.ffn_modules = found_ffns = discover.find_ffns(self.model)
            _report_routed_experts(self.model, config)
        for key in ("attention_modules", "ffn_modules"):
            for name in getattr(config, key):
                if not _any_matches(names, name):
                    raise ValueError(
                        f"{key} names {name!r}, but no module of {type(self.model).__name__} has that name"
                    )
        if found_ffns == [] and not discover.routed_experts(self.model):
            raise ValueError(_no_ffn(self.model))
        config.target_modules = [*config.attention_modules, *config.ffn_modules]

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        """Whether the module `key` is adapted; PEFT tells excluded modules from others for its messages."""
        names = (self.injecting, *self.targets)  # several adapters may share one configuration
        if key in next(self.targets[name] for name in names if self.peft_config.get(name) is peft_config).sizes:
            return True
        result = super()._check_target_module_exists(peft_config, key)
        return result if isinstance(result, _ExcludedModule) else False

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
        targets = self.targets[adapter_name]
        layer: ExpertLayer | MoleLinear
        expert = targets.experts.get(current_key)
        if isinstance(target, ExpertLayer | MoleLinear):
            layer = target
        elif current_key in targets.ffns:
            found = targets.ffns[current_key]
            if found.split:
                layer = MoleSplitMlp(parent, found.layout, self.routing_inputs)
            else:
                layer = MoleMlp(target, found.layout, self.routing_inputs)
            self._watch_batch(layer, parent, current_key.rpartition(".")[0])
        elif expert is not None:
            layer = MoleExpertLinear(target, self.routing_inputs)
            if expert.container is not None:  # only an FFN may read flattened tokens
                in_layer = expert.container.rpartition(".")[-1].isdigit()  # OPT: the decoder layer holds the linears
                around = expert.container if in_layer else expert.container.rpartition(".")[0]
                self._watch_batch(layer, self.model.get_submodule(around), "" if in_layer else around)
        else:
            layer = MoleLinear(target)
        size = targets.sizes[current_key]
        config = self._config_of(peft_config, targets.counts.get(current_key))
        layer.add_adapter(adapter_name, config, size.r, size.scaling)
        if expert is not None and expert.owns_router and config.has_router:
            assert isinstance(layer, MoleExpertLinear)
            layer.add_model_router(adapter_name, config, self._embedding_width())
        if not isinstance(layer, MoleSplitMlp):  # it has put its parts in place itself
            setattr(parent, target_name, layer)

    @staticmethod
    def _config_of(config: MoleConfig, num_experts: int | None) -> MoleConfig:
        """The configuration of a layer with `num_experts`: the adapter's own, or a copy if its K is another one."""
        if num_experts is None or num_experts == config.num_experts:
            return config
        own = copy.copy(config)
        own.num_experts = num_experts
        return own

    def _embedding_width(self) -> int:
        """The width of what a router of the whole model reads."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        if weight is None:
            raise ValueError(
                f"router_scope 'model': {type(self.model).__name__} does not say which module embeds its tokens "
                "(get_input_embeddings); use router_scope 'linear'"
            )
        return weight.shape[-1]

    def _watch_batch(self, layer: ExpertLayer, parent: nn.Module, path: str) -> None:
        """Tell an FFN that may read flattened tokens the batch size: inside a sparse block or directly in a layer."""
        layout = getattr(layer, "layout", None)
        whole = layout is not None and ffn.is_whole_layer(layout, parent)
        if whole or not path.rpartition(".")[-1].isdigit():
            self.batch_hooks.append(parent.register_forward_pre_hook(layer.note_batch, with_kwargs=True))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` from the wrapped module, which an FFN does not have.
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT. Raises ValueError, before anything is changed, for a mixture of several experts."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        base: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for hook in self.batch_hooks:
            hook.remove()
        unwatch_training(base)
        return base

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, AdaptedLayer):
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    layer.check_mergeable(name)

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
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fits(model, adapter_name, remapped)
        return remapped


def _base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel or tuner."""
    tuner = find_tuner(model)
    return model if tuner is None else tuner.model


def _check_base(config: MoleConfig, model: nn.Module) -> None:
    """Warn, or with `strict_base` raise ValueError, if the adapter of `config` was trained on another base."""
    if config.trained_on is None or same_base(config.trained_on, model):
        return
    message = (
        f"this adapter was trained on another base model than the one given; load it on "
        f"{config.base_model_name_or_path or 'its own base'}"
    )
    if config.strict_base:
        raise ValueError(f"{message}, or set strict_base=False if the two are the same")
    warnings.warn(f"{message}, or ignore this if the two are the same", stacklevel=2)


def _check_tokens(config: MoleConfig, model: nn.Module) -> None:
    """Raise ValueError for `trainable_token_indices` that an embedding does not have."""
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    if not isinstance(tokens, dict):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is None:
            raise ValueError(
                f"trainable_token_indices is a list, but {type(model).__name__} does not say which module embeds its "
                "tokens; give {name: token ids}"
            )
        found = [("the input embedding", embedding, tokens)]
    else:
        named = list(model.named_modules())
        found = []
        for name, ids in tokens.items():
            modules = [module for key, module in named if key.endswith(name)]  # PEFT's rule
            if not modules:
                raise ValueError(f"trainable_token_indices names {name!r}, but no module name ends with it")
            found += [(name, module, ids) for module in modules]
    for name, module, ids in found:
        size = getattr(getattr(module, "weight", None), "shape", [0])[0]
        if max(ids) >= size:
            raise ValueError(f"trainable_token_indices holds {max(ids)}, but {name} has {size} rows")


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
            raise ValueError(f"modules_to_save names {name!r}, but no module name ends with it")
        clash = [k for k in adapted for f in found if f"{k}.".startswith(f"{f}.") or f"{f}.".startswith(f"{k}.")]
        if clash:
            raise ValueError(
                f"modules_to_save names {name!r}, but {clash[0]} gets adapters; take it out of modules_to_save or "
                "of the modules to adapt"
            )


def _report_routed_experts(model: nn.Module, config: MoleConfig) -> None:
    """Say once which part of a sparse base model is left alone, and that some models keep nothing for experts."""
    counts = discover.routed_experts(model)
    if not counts:
        return
    assert config.ffn_modules is not None
    found = f"The experts of this adapter go to the FFNs outside them: {', '.join(config.ffn_modules)}"
    none = "There is no FFN outside them, so this adapter is plain LoRA on the attention, without experts and a router"
    if config.attention_experts:
        none = "There is no FFN outside them, so the experts of this adapter go to the attention alone"
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
        "docs/mole.md), or set ffn_modules=[] for plain LoRA on the attention alone"
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
