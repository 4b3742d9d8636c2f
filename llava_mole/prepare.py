"""`llava-mole prepare SOURCE`: writes a data set to disk, by the module that knows the source."""

import importlib
import sys
from collections.abc import Sequence

from llava_mole.errors import ConfigError, command

SOURCES = {"tiny": ("llava_mole.tiny.data", "the embedded default: three small domains, --out playground/data/tiny")}
"""Name -> module with `main(argv)`, and its line in the help."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the module of the source that `argv[0]` names with the rest of the arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<9}{text}" for name, (_, text) in SOURCES.items()]
        print("\n".join(["usage: llava-mole prepare SOURCE [ARGUMENTS]", "", "sources:", *lines]))
        return 0
    if arguments[0] not in SOURCES:
        raise ConfigError(f"no source {arguments[0]!r} to prepare; there are {', '.join(SOURCES)}")
    return int(importlib.import_module(SOURCES[arguments[0]][0]).main(arguments[1:]) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
