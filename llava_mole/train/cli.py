"""`llava-mole train`: refuses a wrong configuration in a second, before the libraries of training are imported."""

import sys
from collections.abc import Sequence

from llava_mole.common.errors import command
from llava_mole.train.arguments import parse_arguments


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the configuration, or print its help, and start the training."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parse_arguments(arguments)
    from llava_mole.train.train import main as start  # takes seconds

    return start(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
