"""Options that the meters share, without the libraries that take seconds to import."""

import argparse
from pathlib import Path

ORIGINS = {"auto": None, "held-out": True, "training": False}
"""Values of `--from` and what they mean to `samples_of`."""


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which samples are measured, and those that `open_subject` takes."""
    add = parser.add_argument
    add("--from", dest="origin", choices=ORIGINS, default="auto", help="which samples (default auto: held out if the "
        "run's data.validation_samples has some, else from the training set)")  # fmt: skip
    add("--model-base", metavar="DIR", help="language model, if it has moved since training")
    add("--vision-tower", metavar="DIR", help="open_clip vision tower, if it has moved since training")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default auto: the GPU if there is one")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen weights (default float32)")


def default_out(path: Path, name: str) -> Path:
    """Where results about `path` go: into its run directory, or below the working directory for a configuration."""
    if path.is_file():
        return Path(name)
    from llava_mole.model.checkpoint import MANIFEST

    if (path / MANIFEST).is_file():  # nothing is written into a checkpoint
        return path.parent / f"{name}-{path.name.removeprefix('checkpoint-')}"
    return path / name
