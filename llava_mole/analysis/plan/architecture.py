"""A run's model without its weights: the real classes on the meta device, with exact parameter counts.

If a weight directory is missing, the architecture comes from a table of known models, and the plan reports that.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import AdapterConfig, ModelConfig
from llava_mole.data.tokenization import load_tokenizer
from llava_mole.model.builder import attach_adapter
from llava_mole.model.language_model import check_vocabulary, load_errors, read_config
from llava_mole.model.llava_arch import LlavaMole

_LLAMA = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
KNOWN_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # From the config.json of each; Vicuna v1.5 has the architecture of Llama 2, the default of `model_type`.
    "vicuna-7b-v1.5": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "vicuna-13b-v1.5": {
        **_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "Qwen3-8B-Base": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip
"""Configurations by the name of the directory that holds the model."""
_LAST = re.compile(r"last_([1-9]\d*)")


@dataclass(frozen=True)
class Trained:
    """Which of the model's own weights train, besides adapters and projector."""

    language_model: Literal["full", "adapters", "none"] = "adapters"
    """`full`: all its weights; `adapters`: only the adapters; `none`: not even these."""
    tower: str = "none"
    """`none`, `all` or `last_<n>`: the last n blocks that run."""

    def __post_init__(self) -> None:
        if self.language_model not in ("full", "adapters", "none"):
            raise ConfigError(f"--train-language-model is {self.language_model!r}; allowed are full, adapters and none")
        if self.tower not in ("none", "all") and not _LAST.fullmatch(self.tower):
            raise ConfigError(f"--train-tower is {self.tower!r}; allowed are none, all and last_<n>, such as last_12")

    def apply(self, model: LlavaMole) -> int:
        """Make exactly these weights trainable; returns how many of the tower's blocks train."""
        if self.language_model == "full":
            model.language_model.requires_grad_(True)
        elif self.language_model == "none":
            model.language_model.requires_grad_(False)
        tower, count = model.vision_tower, 0
        blocks = list(tower.blocks)
        if self.tower == "all":
            tower.requires_grad_(True)
            count = len(blocks)
        elif self.tower != "none":
            count = int(self.tower.removeprefix("last_"))
            if count > len(blocks):
                raise ConfigError(f"--train-tower {self.tower}: only {len(blocks)} blocks of the tower run; use all")
            for block in blocks[len(blocks) - count :]:
                block.requires_grad_(True)
        return count


@dataclass(frozen=True)
class MetaModel:
    """A model without weights."""

    model: LlavaMole
    assumptions: tuple[str, ...]
    """One sentence for each part taken from a table because its path does not exist."""
    tower_blocks_trained: int = 0


def build_meta_model(
    config: ModelConfig, adapter: AdapterConfig, *, train_projector: bool, trained: Trained | None = None
) -> MetaModel:
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
    return MetaModel(model, tuple(assumptions), (trained or Trained()).apply(model))


def language_model_config(path: str) -> tuple[Any, str]:
    """The transformers configuration of the model in `path`, and the assumption made if it is missing (else empty).

    Raises:
        WeightsError: The directory is missing and its name is not in `KNOWN_LANGUAGE_MODELS`, or as `read_config`.
    """
    from transformers import AutoConfig

    if (Path(path) / "config.json").is_file():
        return read_config(path), ""
    name = Path(path).name
    if name not in KNOWN_LANGUAGE_MODELS:
        raise WeightsError(
            f"language model {path!r} is absent and its name is not known (known: {', '.join(KNOWN_LANGUAGE_MODELS)}); "
            "put its config.json there, which is enough for a plan"
        )
    assumption = f"language model {name} from the table of known models; {path} is absent"
    return AutoConfig.for_model(**{"model_type": "llama", **KNOWN_LANGUAGE_MODELS[name]}), assumption
