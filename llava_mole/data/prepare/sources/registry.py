"""Names of the sources that `llava-mole prepare` converts; their modules are imported when one is asked for."""

import importlib

from llava_mole.common.errors import ConfigError
from llava_mole.data.prepare.drafts import Converter

MODULES = {
    "sharegpt4v-pt": "llava",
    "sharegpt4v-instruct": "llava",
    "mix665k": "llava",
    "pretrain-558k": "llava",
    "m3it": "m3it",
    "ureader": "ureader",
    "pathvqa": "pathvqa",
    "llava-json": "llava",
    "messages": "messages",
}
"""Source -> module of this package."""


def get_converter(name: str) -> Converter:
    """The converter called `name`. Raises ConfigError that lists the names."""
    if name not in MODULES:
        raise ConfigError(f"no source {name!r} to prepare; there are {', '.join(MODULES)}")
    module = importlib.import_module(f"llava_mole.data.prepare.sources.{MODULES[name]}")
    converters = getattr(module, "CONVERTERS", None) or (module.CONVERTER,)
    return next(converter for converter in converters if converter.name == name)
