"""The PEFT tuner: places the layers in a Hugging Face causal LM, saves and loads them."""

import hashlib
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.mole import ffn
from llava_mole.mole.config import PEFT_TYPE, MoleConfig
from llava_mole.mole.layer import AdaptedLayer, FfnOptions, MoleLinear, MoleMlp
from llava_mole.mole.router import GateOptions
from llava_mole.mole.routing import RoutingInputs

_SAMPLE = 64


def base_fingerprint(model: nn.Module) -> str | None:
    """sha256 (16 hex digits) over shapes and a sample of the embedding and of every one-dimensional float parameter.

    Those stay unquantized in 4-bit and 8-bit models, and their values are compared after rounding to bfloat16.
    None where weights cannot be read (meta device, parameters partitioned over ranks).
    """
    digest = hashlib.sha256()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    named = [] if embedding is None else [("embedding", next(embedding.parameters(), None))]
    named += [(name, p) for name, p in model.named_parameters() if "mole_" not in name and p.dim() == 1]
    for name, parameter in named:
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.device.type == "meta" or parameter.numel() == 0:
            return None
        digest.update(f"{name.replace('base_layer.', '')}:{tuple(parameter.shape)[-1]}".encode())
        sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class MoleModel(BaseTuner):
    """A causal LM with LoRA experts in its FFNs and plain LoRA on its attention linears.

    Made by `peft.get_peft_model(model, MoleConfig(...))`.

    Raises:
        ConfigError: no FFN or attention linear of a known shape was found, or a named one cannot be adapted.
        WeightsError: an adapter is loaded that does not fit the model or was trained on another base.
    """

    prefix = "mole_"
    tuner_layer_cls = AdaptedLayer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "routing_inputs" not in self.__dict__:
            self.routing_inputs = RoutingInputs()
            self.pending_counts: Tensor | None = None
            self.watches_cache = False

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, MoleConfig)
        if peft_config.granularity == "sequence" and not self.watches_cache:
            self.watches_cache = True
            model.register_forward_pre_hook(self._note_decoding, with_kwargs=True)

    def _note_decoding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell sequence gates whether this pass continues a cached prompt, and which positions are padding."""
        cache = kwargs.get("past_key_values")
        self.routing_inputs.decoding = cache is not None and int(cache.get_seq_length()) > 0
        mask = kwargs.get("attention_mask")
        self.routing_inputs.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, MoleConfig)
        names = [name for name, _ in self.model.named_modules() if name]
        if peft_config.attention_modules is None:
            family = ffn.FAMILY_ATTENTION.get(str(model_config.get("model_type")), list(ffn.KNOWN_ATTENTION))
            peft_config.attention_modules = [name for name in family if _any_matches(names, name)]
        if peft_config.ffn_modules is None:
            peft_config.ffn_modules = _find_ffns(self.model)
        for key in ("attention_modules", "ffn_modules"):
            for name in getattr(peft_config, key):
                if not _any_matches(names, name):
                    raise ConfigError(
                        f"{key} names {name!r}, but no module of {type(self.model).__name__} is called so"
                    )
        if not peft_config.ffn_modules:
            raise ConfigError(
                f"no FFN of a known structure in {type(self.model).__name__}: name it with ffn_modules and its linears "
                "with ffn_projections (see docs/mole.md)"
            )
        peft_config.target_modules = [*peft_config.attention_modules, *peft_config.ffn_modules]
        return peft_config

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
        if isinstance(target, MoleMlp):
            add_experts(target, adapter_name, peft_config)
        elif isinstance(target, MoleLinear):
            _add_lora(target, adapter_name, peft_config)
        elif any(_matches(current_key, name) for name in peft_config.ffn_modules):
            mlp = MoleMlp(target, self._layout(target, peft_config, current_key), self.routing_inputs)
            add_experts(mlp, adapter_name, peft_config)
            setattr(parent, target_name, mlp)
        else:
            if ffn.linear_widths(target) is None:
                raise ConfigError(f"attention_modules: {current_key} is a {type(target).__name__}, not a linear")
            linear = MoleLinear(target)
            _add_lora(linear, adapter_name, peft_config)
            setattr(parent, target_name, linear)

    def _layout(self, module: nn.Module, config: MoleConfig, where: str) -> ffn.FfnLayout:
        if config.ffn_projections is not None:
            layout = ffn.layout_from_names(config.ffn_projections, module, where)
        else:
            found = ffn.find_layout(module)
            if found is None:
                raise ConfigError(
                    f"{where} ({type(module).__name__}) is no FFN of a known structure; name its parts with "
                    "ffn_projections, or leave it out with exclude_modules"
                )
            layout = found
        first = not any(isinstance(m, MoleMlp) and type(m.base_layer) is type(module) for m in self.model.modules())
        if first:
            ffn.check_composition(layout, module, where)
        return layout

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
            raise WeightsError(
                f"this adapter was trained on another base model (fingerprint {config.base_fingerprint}, this model "
                f"has {found}); load it on {config.base_model_name_or_path or 'its own base'}, or remove "
                "base_fingerprint from adapter_config.json if you know better"
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fits(model, adapter_name, remapped)
        return remapped


def _base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel or tuner."""
    tuner = next((m for m in model.modules() if isinstance(m, MoleModel)), None)
    return model if tuner is None else tuner.model


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _any_matches(keys: list[str], name: str) -> bool:
    return any(_matches(key, name) for key in keys)


def _find_ffns(model: nn.Module) -> list[str]:
    """Name endings of the modules that have an FFN's structure; experts of a sparse base model are none."""
    endings: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoleMlp) or (".base_layer" not in name and ffn.find_layout(module) is not None):
            ending = name.rpartition(".")[-1]
            if ending and not ending.isdigit():
                endings[ending] = None
    return list(endings)


def add_experts(mlp: MoleMlp, adapter_name: str, config: MoleConfig) -> None:
    gate = GateOptions(
        num_experts=config.num_experts,
        mode=config.mode,
        top_k=config.top_k,
        granularity=config.granularity,
        router=config.router,
        expert_scale=config.expert_scale,
        temperature=config.temperature,
        jitter=config.jitter,
        detach_input=config.router_detach_input,
    )
    options = FfnOptions(
        gate=gate,
        r=config.r,
        scaling=config.scaling,
        dropout=config.dropout,
        shared_r=config.shared_r,
        shared_scale=config.shared_scale,
        backend=config.backend,
    )
    mlp.add_adapter(
        adapter_name,
        options,
        router_bias=config.router_bias,
        num_tasks=config.num_tasks,
        has_router=config.has_router,
        router_trains=config.router_trains,
        count_sets=2 if config.balance_tokens == "stratified" else 1,
        counts=config.counts_load,
        bias_update_rate=config.bias_update_rate,
    )


def _add_lora(linear: MoleLinear, adapter_name: str, config: MoleConfig) -> None:
    linear.add_adapter(adapter_name, r=config.attention_r or config.r, scaling=config.scaling, dropout=config.dropout)


def _check_fits(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise WeightsError for the first tensor of an adapter that is missing, unexpected or of another shape."""
    own = {
        key: value
        for key, value in model.state_dict().items()
        if ".mole_" in key and f".{adapter_name}." in key[key.index(".mole_") :]
    }
    for key, value in own.items():
        if key not in state_dict:
            raise WeightsError(f"the adapter has no tensor {key}; its files are incomplete or its config was changed")
        if state_dict[key].shape != value.shape:
            raise WeightsError(
                f"{key} is {tuple(state_dict[key].shape)} in the adapter's file but {tuple(value.shape)} in this "
                "model: hidden size, rank or number of experts differ"
            )
    for key in state_dict:
        if ".mole_" in key and key not in own:
            raise WeightsError(f"the adapter holds {key}, which this model has no place for; is it another base model?")


_TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": MoleConfig,
    "PEFT_TYPE_TO_TUNER_MAPPING": MoleModel,
    "PEFT_TYPE_TO_PREFIX_MAPPING": MoleModel.prefix,
}


def register_mole() -> None:
    """Enter MoLE in PEFT's tables; calling it again changes nothing.

    PEFT's own `register_peft_method` accepts only names in its `PeftType` enumeration. That is a string enumeration,
    so its tables look a plain string up just as well.

    Raises:
        ImportError: PEFT keeps no such tables any more.
    """
    import peft.mapping

    for table, value in _TABLES.items():
        mapping = getattr(peft.mapping, table, None)
        if not isinstance(mapping, dict):
            raise ImportError(
                f"peft {peft.__version__} has no table peft.mapping.{table}, where MoLE registers itself; "
                "install a version of peft that this package names in its dependencies"
            )
        mapping[PEFT_TYPE] = value


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
