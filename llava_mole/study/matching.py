"""The rank at which plain LoRA has as many parameters, or as much computation, as another adapter."""

import dataclasses
import functools
import json

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import AdapterConfig, ModelConfig


def matching_rank(model: ModelConfig, adapter: AdapterConfig, kind: str) -> int:
    """The rank of a plain LoRA on all linears that comes closest to an adapter.

    Args:
        model: The frozen model; its architecture is enough.
        adapter: The adapter to match.
        kind: `parameters_of`: trained parameters, routers included; `compute_of`: adapter weights that one token uses,
            each of which costs 2 FLOPs in a forward pass.

    Raises:
        ConfigError: the architecture is neither on disk nor known.
    """
    measure = 0 if kind == "parameters_of" else 1
    one = AdapterConfig(method="lora", rank=1)
    # LoRA's parameters and its work are both proportional to its rank.
    return max(1, round(_sizes(_key(model), _key(adapter))[measure] / _sizes(_key(model), _key(one))[measure]))


def _key(section: ModelConfig | AdapterConfig) -> str:
    return json.dumps(dataclasses.asdict(section), sort_keys=True)


@functools.cache
def _sizes(model: str, adapter: str) -> tuple[float, float]:
    """Trained parameters of an adapter, and those that one token uses. Arguments are the sections as JSON."""
    from llava_mole.analysis.plan.architecture import build_meta_model
    from llava_mole.config import TrainedPartsConfig, VisionTowerConfig
    from llava_mole.model.flops import model_shape

    values = json.loads(model)
    tower = VisionTowerConfig(**values["vision_tower"])
    sections = ModelConfig(**{**values, "vision_tower": tower, "train": TrainedPartsConfig()})  # only adapters count
    try:
        built = build_meta_model(sections, AdapterConfig(**json.loads(adapter)), train_projector=False).model
    except WeightsError as error:
        raise ConfigError(f"the rank cannot be computed: {error}") from None
    return sum(p.numel() for p in built.parameters() if p.requires_grad), model_shape(built).adapter_parameters
