"""Checks of a run before there are models and process groups; those of the command take a second."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava_mole.common.errors import ConfigError, WeightsError, command
from llava_mole.common.text import count_of
from llava_mole.config import AdapterConfig, DataConfig, ModelConfig, check_batch
from llava_mole.data.sources import has_folder, is_there
from llava_mole.model.quantization import require_bitsandbytes
from llava_mole.train.arguments import parse_arguments

TINY_CONFIGS = "configs/tiny/pretrain.yaml and configs/tiny/finetune_mole.yaml"


def missing_inputs(
    model: ModelConfig, data: DataConfig, projector_weights: str | None, init_from: str | None
) -> list[str]:
    """`key = path` for every missing file or folder of weights or data."""
    wanted = [
        ("model.language_model", model.language_model, Path(model.language_model).is_dir()),
        ("model.vision_tower.weights", model.vision_tower.weights, Path(model.vision_tower.weights).is_file()),
    ]
    if model.vision_tower.name.endswith(".json") or os.sep in model.vision_tower.name:
        name = model.vision_tower.name
        wanted.append(("model.vision_tower.name", name, Path(name).exists()))
    if projector_weights is not None:
        wanted.append(("projector_weights", projector_weights, Path(projector_weights).exists()))
    if init_from is not None:
        wanted.append(("init_from", init_from, Path(init_from).is_dir()))
    for name, source in data.sources.items():
        if data.mixture.get(name, 1.0) > 0:
            key = f"data.sources.{name}"
            wanted.append((f"{key}.annotations", source.annotations, is_there(source)))
            wanted.append((f"{key}.image_folder", source.image_folder, has_folder(source)))
    return [f"{key} = {path}" for key, path, there in wanted if not there]


def check_inputs(model: ModelConfig, data: DataConfig, *, projector_weights: str | None, init_from: str | None) -> None:
    """Check that the inputs of a run exist.

    Raises:
        WeightsError: an input is missing; the message names all of them, and configurations that need none.
        ConfigError: bitsandbytes is needed but not installed.
    """
    require_bitsandbytes(model.quantization)
    absent = missing_inputs(model, data, projector_weights, init_from)
    if absent:
        first = f"this run lacks {count_of(len(absent), 'input')}:"
        lines = [
            *([f"{first} {absent[0]}"] if len(absent) == 1 else [first, *(f"  {line}" for line in absent)]),
            "Put them there (docs/models.md and docs/data.md say where they come from; projector_weights is what",
            "scripts/pretrain.sh writes), or name other paths with --key PATH. What needs no download:",
            f"{TINY_CONFIGS},",
            "after `llava-mole prepare tiny --out playground/data/tiny`.",
        ]
        raise WeightsError("\n".join(lines))


def check_model(model: ModelConfig, data: DataConfig, adapter: AdapterConfig) -> None:
    """Check that adapter and lengths suit the language model. It imports transformers and PEFT, which takes seconds.

    Raises:
        ConfigError: an option of the adapter is wrong, or `data.max_length` exceeds the language model's positions.
            Every rank finds that, and only rank 0 prints it.
        WeightsError: the language model's configuration cannot be used.
    """
    from llava_mole.model.adapters import adapter_config, check_sources
    from llava_mole.model.language_model import check_max_length, read_config

    try:
        check_sources(adapter_config(**asdict(adapter)), data)
        check_max_length(read_config(model.language_model), data.max_length, model.language_model)
    except (ConfigError, ValueError) as error:
        found = ConfigError(str(error))
        found.on_every_rank = True
        raise found from error


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m llava_mole.train.preflight WORLD_SIZE CONFIG [overrides]`: exit code 2 if the run cannot start.

    What `check_model` finds is left to the ranks: it would make this command as slow as the start of a run.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or not arguments[0].isdigit():
        raise ConfigError("usage: python -m llava_mole.train.preflight WORLD_SIZE CONFIG [--key value ...]")
    config = parse_arguments(arguments[1:])
    train = config.train
    check_batch(train.batching, train.global_batch_size, train.micro_batch_size, int(arguments[0]))
    check_inputs(config.model, config.data, projector_weights=config.projector_weights, init_from=config.init_from)


if __name__ == "__main__":
    sys.exit(main())
