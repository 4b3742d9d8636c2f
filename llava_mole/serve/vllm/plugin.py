"""What vLLM finds through the entry point `vllm.general_plugins`: it registers the model, without importing it.

vLLM calls `register` in each of its processes, so this module imports nothing heavy.
"""

import importlib.util

from llava_mole.common.errors import ConfigError

ARCHITECTURE = "LlavaMoleForConditionalGeneration"
"""In `architectures` of an export's config.json (`llava-mole convert RUN --to vllm`)."""


def register() -> None:
    """Tell vLLM which class serves `ARCHITECTURE`. Raises ConfigError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed: pip install vllm (it needs a GPU); `llava-mole serve` serves mixtures without it"
        )
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"llava_mole.serve.vllm.model:{ARCHITECTURE}")
