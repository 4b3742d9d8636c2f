"""The sources of `llava-mole prepare`, one module for each kind of raw data."""

import importlib
from types import ModuleType

from llava_mole.common.errors import ConfigError
from llava_mole.data.prepare.samples import Source

MODULES = {
    "tiny": "tiny.world",
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
"""Source -> module of this package.

A module has `SOURCES`, a tuple of `Source`. One that generates its data has `main(argv)` and `SUMMARY` instead.
"""


def get_module(name: str) -> ModuleType:
    """Return the module of the source called `name`. Raises ConfigError that lists the names."""
    if name not in MODULES:
        raise ConfigError(f"no source {name!r} to prepare; there are {', '.join(MODULES)}")
    return importlib.import_module(f"llava_mole.data.prepare.sources.{MODULES[name]}")


def get_source(name: str) -> Source:
    """Return the source called `name`. Raises ConfigError that lists the names."""
    return next(source for source in get_module(name).SOURCES if source.name == name)
