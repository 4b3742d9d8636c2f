"""`python -m scripts.tiny_world.build --out playground/models/tiny`: build the small pre-trained models.

There are three stages, `tokenizer`, `tower` and `language_model`. Each can run alone after the stages before it. The
same seed, package versions and number of threads give the same files. The only input is the installed files of
easy-VQA and scikit-image. Run it from the root of the repository.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from llava_mole.common.errors import ConfigError, WeightsError, command
from llava_mole.common.files import read_json, sha256_of, write_json
from llava_mole.common.log import setup_logging

STAGES = ("tokenizer", "tower", "language_model")
PACKAGES = ("torch", "transformers", "tokenizers", "open_clip_torch", "easy-vqa", "scikit-image", "numpy", "pillow")
BUILT_FILES = (
    "vision_tower/config.json",
    "vision_tower/model.safetensors",
    "language_model/config.json",
    "language_model/generation_config.json",
    "language_model/model.safetensors",
    "language_model/tokenizer.json",
    "language_model/tokenizer_config.json",
)
MANIFEST = "manifest.json"


def build_tokenizer(out: Path, seed: int, quick: bool, checkpoints: Path | None) -> dict[str, float]:
    """Train and save the tokenizer. Returns measurements."""
    from scripts.tiny_world import language, tokenizer, tower

    started = time.perf_counter()
    samples = tower.training_samples(100 if quick else 1000, seed)
    Random(seed).shuffle(samples)
    trained = tokenizer.train(tokenizer.training_lines(samples, 500 if quick else 8000, seed))
    tokenizer.save(trained, out / "language_model", language.CONTEXT_LENGTH)
    return {"vocabulary": trained.get_vocab_size(), "seconds": time.perf_counter() - started}


def load_tokenizer(out: Path) -> Any:
    """Load the tokenizer of an earlier stage. Raises WeightsError if it is missing."""
    from transformers import AutoTokenizer

    from llava_mole.data.tokenization import HFTextTokenizer

    if not (out / "language_model" / "tokenizer.json").is_file():
        raise WeightsError(f"{out}/language_model/tokenizer.json does not exist; run the stage `tokenizer` first")
    return HFTextTokenizer(AutoTokenizer.from_pretrained(out / "language_model"))


def build_tower(out: Path, seed: int, quick: bool, checkpoints: Path | None) -> dict[str, float]:
    """Train and save the vision tower. Returns measurements."""
    from scripts.tiny_world import tower

    tokenizer = load_tokenizer(out)
    recipe = tower.QUICK if quick else tower.Recipe()
    checkpoint = checkpoints and checkpoints / "tower.pt"
    state, measured = tower.train(lambda text: tokenizer.encode_with_offsets(text)[0], recipe, seed, checkpoint)
    tower.save(state, out / "vision_tower")
    return measured


def build_language_model(out: Path, seed: int, quick: bool, checkpoints: Path | None) -> dict[str, float]:
    """Train and save the language model. Returns measurements."""
    from scripts.tiny_world import language

    recipe = language.QUICK if quick else language.Recipe()
    model, measured = language.train(load_tokenizer(out), recipe, seed, checkpoints and checkpoints / "language_model.pt")
    language.save(model, out / "language_model")
    return measured


BUILDERS = {"tokenizer": build_tokenizer, "tower": build_tower, "language_model": build_language_model}


def build(
    out: Path,
    stages: Sequence[str] = STAGES,
    seed: int = 0,
    quick: bool = False,
    threads: int = 2,
    checkpoints: Path | None = None,
) -> None:
    """Run `stages` in order and update `manifest.json`.

    `quick` trains each model for a few steps only. With `checkpoints`, a folder, an interrupted build goes on where it
    was: the same command gives the same files.
    """
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    measured = manifest.get("measured", {})
    for stage in stages:
        print(f"building {stage} ...", flush=True)
        numbers = BUILDERS[stage](out, seed, quick, checkpoints)
        measured[stage] = {key: round(value, 4) for key, value in numbers.items()}
        print(f"  {measured[stage]}", flush=True)
    manifest = {
        "command": "python -m scripts.tiny_world.build" + (" --quick" if quick else "") + f" --seed {seed}",
        "seed": seed,
        "threads": threads,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "measured": measured,
        "sha256": {name: sha256_of(out / name) for name in BUILT_FILES if (out / name).is_file()},
    }
    write_json(path, manifest, indent=1)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.tiny_world.build", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("playground/models/tiny"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, comma-separated (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="run a reduced version of every stage, for tests")
    parser.add_argument("--seed", type=int, default=0, help="determines everything (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder for checkpoints, from which an interrupted build goes on (none)"
    )
    given = parser.parse_args(arguments)
    setup_logging()
    stages = given.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"--stages {given.stages}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    build(given.out, stages, given.seed, given.quick, given.threads, given.checkpoints)
    return 0


if __name__ == "__main__":
    sys.exit(main())
