"""The PEFT tuner: places the layers in a Hugging Face causal LM, saves and loads them, and registers the method."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from llava_mole.mole import ffn
from llava_mole.mole.access import shared_inputs
from llava_mole.mole.config import PEFT_TYPE, MoleConfig
from llava_mole.mole.layer import AdaptedLayer, MoleLinear, MoleMlp
from llava_mole.mole.routing import RoutingInputs
from llava_mole.mole.training import watch_training

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
            # Each model.add_adapter of transformers makes a tuner of its own; they share what the layers share.
            self.routing_inputs = shared_inputs(model) or RoutingInputs()
            self.watches_cache = False

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Place an adapter's layers in `model`, as PEFT's does, and let its trainings be noticed."""
        result = super().inject_adapter(model, *args, **kwargs)
        watch_training(model)
        return result

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
            family = ffn.FAMILY_ATTENTION.get(str(model_config.get("model_type")), list(ffn.KNOWN_ATTENTION))
            peft_config.attention_modules = [name for name in family if _any_matches(names, name)]
        if peft_config.ffn_modules is None:
            peft_config.ffn_modules = _find_ffns(self.model)
        for key in ("attention_modules", "ffn_modules"):
            for name in getattr(peft_config, key):
                if not _any_matches(names, name):
                    raise ValueError(
                        f"{key} names {name!r}, but no module of {type(self.model).__name__} has that name"
                    )
        if not peft_config.ffn_modules:
            raise ValueError(
                f"no FFN of a known structure in {type(self.model).__name__}; name it with ffn_modules and its linears "
                "with ffn_projections (see docs/mole.md)"
            )
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
            layer = MoleMlp(target, self._layout(target, peft_config, current_key), self.routing_inputs)
        else:
            if ffn.linear_widths(target) is None:
                raise ValueError(f"attention_modules: {current_key} is a {type(target).__name__}, not a linear")
            layer = MoleLinear(target)
        layer.add_adapter(adapter_name, peft_config)
        setattr(parent, target_name, layer)

    def _layout(self, module: nn.Module, config: MoleConfig, where: str) -> ffn.FfnLayout:
        if config.ffn_projections is not None:
            layout = ffn.layout_from_names(config.ffn_projections, module, where)
        else:
            found = ffn.find_layout(module)
            if found is None:
                raise ValueError(
                    f"{where} ({type(module).__name__}) is not an FFN of a known structure: name its parts with "
                    "ffn_projections, or exclude it with exclude_modules"
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


def _find_ffns(model: nn.Module) -> list[str]:
    """Name endings of the modules that have an FFN's structure, without the experts of a sparse base model."""
    endings: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoleMlp) or (".base_layer" not in name and ffn.find_layout(module) is not None):
            ending = name.rpartition(".")[-1]
            if ending and not ending.isdigit():
                endings[ending] = None
    return list(endings)


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
