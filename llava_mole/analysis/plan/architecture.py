"""A run's model without its weights: the real classes on the meta device, with exact parameter counts.

If a weight directory is missing, the architecture comes from a table of known models, and the plan reports that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.config import AdapterConfig, ModelConfig
from llava_mole.data.tokenization import load_tokenizer
from llava_mole.model.builder import attach_adapter
from llava_mole.model.language_model import check_vocabulary, load_errors, read_config
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.trainable import unfreeze

_LLAMA = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
KNOWN_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # From the config.json of each; Vicuna v1.5 has the architecture of Llama 2.
    "vicuna-7b-v1.5": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "vicuna-13b-v1.5": {
        **_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
}  # fmt: skip
"""Llama configurations by the name of the directory that holds the model."""


@dataclass(frozen=True)
class MetaModel:
    """A model without weights."""

    model: LlavaMole
    assumptions: tuple[str, ...]
    """One sentence for each part taken from a table because its path does not exist."""


def build_meta_model(config: ModelConfig, adapter: AdapterConfig, *, train_projector: bool) -> MetaModel:
    """The run's model on the meta device with its adapter; the parameters that train are those of the run.

    Raises:
        ConfigError, WeightsError: The architecture is neither on disk nor known, or an option is wrong.
    """
    from transformers import AutoModelForCausalLM

    from llava_mole.model.multimodal_encoder import VisionTower
    from llava_mole.model.multimodal_projector import build_projector
    from llava_mole.model.tower_files import read_tower

    lm_config, assumption = language_model_config(config.language_model)
    assumptions = [assumption] if assumption else []
    tower = config.vision_tower
    spec = read_tower(tower.name, image_size=tower.image_size, image_mean=tower.image_mean, image_std=tower.image_std)
    if not Path(tower.weights).is_file():
        definer = "its config.json" if spec.layout == "hugging_face" else "open_clip"
        assumptions.append(f"vision tower {tower.name} as {definer} defines it; {tower.weights} is absent")
    with torch.device("meta"):
        with load_errors(config.language_model):
            language_model = AutoModelForCausalLM.from_config(lm_config)
        language_model.requires_grad_(False)
        vision = VisionTower(spec.make(), tower.select_layer, "", spec)
        width = language_model.config.get_text_config().hidden_size
        projector = build_projector(config.projector, vision.hidden_size, width, vision.grid)
        model = LlavaMole(vision, projector, language_model)
        if (Path(config.language_model) / "tokenizer_config.json").is_file():
            check_vocabulary(language_model, load_tokenizer(config.language_model), config.language_model)
        attach_adapter(model, adapter)
    model.projector.requires_grad_(train_projector)
    unfreeze(model, config.train)
    return MetaModel(model, tuple(assumptions))


def language_model_config(path: str) -> tuple[Any, str]:
    """The transformers configuration of the model in `path`, and the assumption made if it is missing (else empty).

    Raises:
        WeightsError: The directory is missing and its name is not in `KNOWN_LANGUAGE_MODELS`, or as `read_config`.
    """
    from transformers import LlamaConfig

    if (Path(path) / "config.json").is_file():
        return read_config(path), ""
    name = Path(path).name
    if name not in KNOWN_LANGUAGE_MODELS:
        raise WeightsError(
            f"language model {path!r} is absent and its name is not known (known: {', '.join(KNOWN_LANGUAGE_MODELS)}); "
            "put its config.json there, which is enough for a plan"
        )
    assumption = f"language model {name} from the table of known models; {path} is absent"
    return LlamaConfig(**KNOWN_LANGUAGE_MODELS[name]), assumption
