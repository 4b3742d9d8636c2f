"""`python -m scripts.tiny_world.build --out playground/models/tiny`: build the small pre-trained models.

There are three stages, `tokenizer`, `tower` and `language_model`. Each can run alone after the stages before it. The
same seed, package versions and number of threads give the same files, also when the build was interrupted and goes on
from `--checkpoints`. The only input is the installed files of easy-VQA and scikit-image. Run it from the root of the
repository.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Options:
    """How to build."""

    out: Path
    seed: int = 0
    quick: bool = False
    """Train each model for a few steps only."""
    checkpoints: Path | None = None
    """Folder of checkpoints: an interrupted build goes on where it was, and the same command gives the same files."""
    tower_from: Path | None = None
    """Weights of an earlier tower; they take the place of the tower's contrastive steps."""

    language_model_from: Path | None = None
    """Folder of an earlier language model, from which training goes on; it takes the place of the drills alone."""

    def checkpoint(self, stage: str) -> Path | None:
        """Return the stage's file of checkpoints, if any are wanted."""
        return self.checkpoints / f"{stage}.pt" if self.checkpoints else None


def build_tokenizer(options: Options) -> dict[str, float]:
    """Train and save the tokenizer. Returns measurements."""
    from scripts.tiny_world import language, tokenizer, tower

    started = time.perf_counter()
    images = 100 if options.quick else 1000
    samples = tower.training_samples(images, images, options.seed)
    Random(options.seed).shuffle(samples)
    lines = tokenizer.training_lines(samples, 500 if options.quick else 8000, options.seed)
    trained = tokenizer.train(lines)
    tokenizer.save(trained, options.out / "language_model", language.CONTEXT_LENGTH)
    return {"vocabulary": trained.get_vocab_size(), "seconds": time.perf_counter() - started}


def load_tokenizer(out: Path) -> Any:
    """Load the tokenizer of an earlier stage. Raises WeightsError if it is missing."""
    from transformers import AutoTokenizer

    from llava_mole.data.tokenization import HFTextTokenizer

    if not (out / "language_model" / "tokenizer.json").is_file():
        raise WeightsError(f"{out}/language_model/tokenizer.json does not exist; run the stage `tokenizer` first")
    return HFTextTokenizer(AutoTokenizer.from_pretrained(out / "language_model"))


def build_tower(options: Options) -> dict[str, float]:
    """Train and save the vision tower. Returns measurements."""
    from scripts.tiny_world import tower

    tokenizer = load_tokenizer(options.out)
    state, measured = tower.train(
        lambda text: tokenizer.encode_with_offsets(text)[0],
        tower.QUICK if options.quick else tower.Recipe(),
        options.seed,
        options.checkpoint("tower"),
        options.tower_from,
    )
    tower.save(state, options.out / "vision_tower")
    return measured


def build_language_model(options: Options) -> dict[str, float]:
    """Train and save the language model. Returns measurements."""
    from scripts.tiny_world import language

    recipe = language.QUICK if options.quick else language.Recipe()
    tokenizer = load_tokenizer(options.out)
    checkpoint = options.checkpoint("language_model")
    model, measured = language.train(tokenizer, recipe, options.seed, checkpoint, options.language_model_from)
    language.save(model, options.out / "language_model")
    return measured


BUILDERS = {"tokenizer": build_tokenizer, "tower": build_tower, "language_model": build_language_model}


def build(options: Options, stages: Sequence[str] = STAGES, threads: int = 2) -> None:
    """Run `stages` in order and update `manifest.json`."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    measured = manifest.get("measured", {})
    for stage in stages:
        print(f"building {stage} ...", flush=True)
        numbers = BUILDERS[stage](options)
        measured[stage] = {key: round(value, 4) for key, value in numbers.items()}
        print(f"  {measured[stage]}", flush=True)
    manifest = {
        "command": "python -m scripts.tiny_world.build"
        + (" --quick" if options.quick else "")
        + f" --seed {options.seed}",
        "seed": options.seed,
        "threads": threads,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "measured": measured,
        "sha256": {name: sha256_of(options.out / name) for name in BUILT_FILES if (options.out / name).is_file()},
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
    parser.add_argument(
        "--tower-from", type=Path, help="weights of an earlier tower, to refine instead of training one anew (none)"
    )
    parser.add_argument(
        "--language-model-from",
        type=Path,
        help="folder of an earlier language model with this tokenizer, to train on instead of one anew (none)",
    )
    given = parser.parse_args(arguments)
    setup_logging()
    stages = given.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"--stages {given.stages}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if given.tower_from is not None and not given.tower_from.is_file():
        raise ConfigError(f"--tower-from {given.tower_from}: no such file; give a vision_tower/model.safetensors")
    if given.language_model_from is not None and not (given.language_model_from / "model.safetensors").is_file():
        raise ConfigError(f"--language-model-from {given.language_model_from}: holds no model.safetensors")
    options = Options(
        given.out, given.seed, given.quick, given.checkpoints, given.tower_from, given.language_model_from
    )
    build(options, stages, given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
