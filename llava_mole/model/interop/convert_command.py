"""`llava-mole convert SOURCE --to FORMAT --out PATH`: other people's checkpoints in, ours out (docs/interop.md)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_mole.errors import command
from llava_mole.log import setup_logging
from llava_mole.model.interop.importing import ImportOptions, import_checkpoint


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llava-mole convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("--to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vision-tower", type=Path)
    parser.add_argument("--model-base", type=Path)
    a = parser.parse_args(argv)
    setup_logging()
    print(import_checkpoint(a.source, a.out, ImportOptions(vision_tower=a.vision_tower, model_base=a.model_base)))
    return 0
