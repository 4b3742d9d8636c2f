"""`llava-mole inspect PATH`: prints what a directory or weight file is and holds, and whether our own is intact."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import EXIT_USER_ERROR, command, one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole inspect",
        allow_abbrev=False,
        description="Print what a directory or weight file is and holds. Its content decides, not its name.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="run, checkpoint, model, adapter, tower or data set")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Describe a path. The exit code is 0 only if everything in it is intact."""
    path = _parser().parse_args(argv).path
    from llava_mole.interop.inspect.describe import describe  # takes seconds

    with one_line("`inspect` must be able to read what it describes"):
        lines, intact = describe(path)
    print("\n".join(lines))
    return 0 if intact else EXIT_USER_ERROR


if __name__ == "__main__":
    raise SystemExit(main())
