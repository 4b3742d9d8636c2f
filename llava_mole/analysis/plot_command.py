"""`llava-mole plot RUN`: a run's losses, learning rate, throughput and expert load as PNG, from its metrics."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw a run, finished or not, and print the files' paths."""
    parser = argparse.ArgumentParser(prog="llava-mole plot", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory (train.output_dir)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (default: RUN/plots)")
    arguments = parser.parse_args(argv)
    from llava_mole.analysis.plots import draw_run

    for path in draw_run(arguments.run, arguments.out or arguments.run / "plots"):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
