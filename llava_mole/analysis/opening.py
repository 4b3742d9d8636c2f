"""Opens what a meter looks at: a run, one of its checkpoints, or the start of a run that only has a configuration."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_mole.analysis.probe import Probe, Rows, routes_samples, samples_of
from llava_mole.common.errors import ConfigError
from llava_mole.common.files import read_json
from llava_mole.config import RunConfig, load_config, parse_run_config
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.model.adapters import peak_rates, trainable_parameters
from llava_mole.model.builder import (
    CONFIG_FILE,
    build_parts,
    configured_image_processor,
    load_pretrained_model,
    select_device,
)
from llava_mole.model.checkpoint import OPTIMIZER_FILE, PIECES, STATE_FILE, TRAINER_DIR, resolve_checkpoint
from llava_mole.model.language_model import set_recompute
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.packed_attention import enable_packing
from llava_mole.model.trainable import let_train, unfreeze
from llava_mole.mole import disable_finite_check, leave_balance_loss_to_caller

CHANGEABLE = ("data", "train")
"""Sections of a run's configuration that a measurement may change."""
ADAM_BETA2 = 0.999


@dataclass
class Subject:
    """A model with the data of its run."""

    name: str
    """For tables and figures."""
    path: Path
    """The checkpoint, or the configuration."""
    checkpoint: Path | None
    """None for the start of a run."""
    step: int
    """Optimizer steps done."""
    model: LlavaMole
    """In evaluation mode; what trains in the run requires gradients."""
    dataset: SupervisedDataset
    """The training set, with held-out samples if the run has some."""
    config: RunConfig
    given_data: bool
    """Whether the data are others than the run's own."""

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """What trains. Raises ConfigError for a model in which nothing does."""
        found = trainable_parameters(self.model)
        if not found:
            raise ConfigError(f"{self.path}: nothing trains in this model, so there are no gradients to measure")
        return found

    def probe(self, batches: int, batch_size: int, held_out: bool | None = None) -> Probe:
        """N batches of each source; `held_out` as in `samples_of`, whose errors it raises."""
        train = self.config.train
        rows = Rows.of(
            self.model,
            packed=train.batching == "packed",
            capacity=train.pack_length or self.config.data.max_length,
            pad_token_id=self.dataset.limits.tokenizer.pad_token_id,
        )
        dataset, unseen = samples_of(self.dataset, held_out)
        return Probe(dataset, batches, batch_size, rows, unseen)

    def origin(self, probe: Probe) -> str:
        """Where the samples of `probe` come from, for tables."""
        return "data given" if self.given_data else "held out" if probe.held_out else "training set"

    def rates(self) -> dict[str, float]:
        """Parameter name -> the run's peak learning rate."""
        return peak_rates(self.parameters, self.config.train)

    def second_moments(self) -> dict[str, torch.Tensor] | None:
        """Parameter name -> AdamW's second moment, bias-corrected; None if there is no optimizer state.

        Raises ConfigError if the state is in the pieces of several ranks.
        """
        from safetensors.torch import load_file

        if self.checkpoint is None:
            return None
        if not (self.checkpoint / OPTIMIZER_FILE).is_file():
            if any((self.checkpoint / TRAINER_DIR).glob(PIECES)):
                raise ConfigError(
                    f"{self.checkpoint} holds the optimizer's state in pieces (train.checkpoint_files sharded), and "
                    "the interference matrix needs it whole; measure the result of `llava-mole consolidate "
                    f"{self.checkpoint} --out DIR`, or give --no-interference"
                )
            return None
        state = read_json(self.checkpoint / STATE_FILE)
        correction = 1 - ADAM_BETA2 ** max(1, state["step"] - state["skipped_steps"])
        stored = load_file(self.checkpoint / OPTIMIZER_FILE)
        device = self.model.device
        return {name: stored[f"exp_avg_sq/{name}"].to(device) / correction for name in self.parameters}


def open_subject(path: Path, overrides: Sequence[str], options: argparse.Namespace) -> Subject:
    """Open a run, checkpoint or configuration.

    Args:
        path: A run directory (its newest valid checkpoint), a checkpoint, or a YAML configuration, whose model is built
            as a run would start with it.
        overrides: `--key.sub value` of the configuration; for a run only in `CHANGEABLE`.
        options: From `add_subject_arguments`.

    Raises:
        UserError: a file is missing or does not fit, or an override is not allowed.
    """
    if path.is_file():
        return _start_of_run(path, overrides, options)
    checkpoint = resolve_checkpoint(path)
    for key in re.findall(r"^--([\w.]+)", "\n".join(overrides), flags=re.MULTILINE):
        if key == "data.validation_samples":
            raise ConfigError(
                "--data.validation_samples cannot be changed for a run: what it did not hold out it has trained on. "
                "Name other data with --data.sources.NAME.annotations FILE"
            )
        if key.partition(".")[0] not in CHANGEABLE:
            raise ConfigError(
                f"--{key} cannot change a model that is trained; {' and '.join(CHANGEABLE)} can be changed for a "
                "measurement. For a start with other settings give a configuration file"
            )
    given = any(text.startswith("--data.sources.") for text in overrides)
    if given:  # what the run holds out of its own data says nothing of others
        overrides = [*overrides, "--data.validation_samples", "0", "--train.validate_every", "0"]
    config = load_config(checkpoint / CONFIG_FILE, overrides)
    loaded = load_pretrained_model(
        checkpoint,
        model_base=options.model_base,
        vision_tower=options.vision_tower,
        device=options.device,
        dtype=options.dtype,
        trainable=True,
    )
    unfreeze(loaded.model, config.model.train)
    for parameter in trainable_parameters(loaded.model).values():
        parameter.data = parameter.data.float()
    if config.train.batching == "packed" and not routes_samples(loaded.model):
        enable_packing(loaded.model.causal_lm)
    step = int(checkpoint.name.removeprefix("checkpoint-")) if re.fullmatch(r"checkpoint-\d+", checkpoint.name) else 0
    folder = checkpoint.parent.resolve()
    if folder.name == "run":  # of a study's cell, whose name says which run it is
        folder = folder.parent
    name = folder.name if path != checkpoint else f"{folder.name}/{checkpoint.resolve().name}"
    return _subject(name, checkpoint, checkpoint, step, loaded.model, loaded.tokenizer, config, given)


def _start_of_run(path: Path, overrides: Sequence[str], options: argparse.Namespace) -> Subject:
    config = parse_run_config([str(path), *overrides])
    if options.model_base is not None or options.vision_tower is not None:
        raise ConfigError("--model-base and --vision-tower are for runs; a configuration names its parts itself")
    device = select_device(options.device)
    torch.manual_seed(config.train.seed)
    model, hf_tokenizer, fingerprints = build_parts(config.model)
    let_train(
        model,
        config.adapter,
        device,
        fingerprints,
        quantization=config.model.quantization,
        precision="fp32" if options.dtype == "float32" else "bf16",
        packed=config.train.batching == "packed",
        train_projector=config.train_projector,
        parts=config.model.train,
        projector_weights=config.projector_weights,
        init_from=config.init_from,
    )
    model.to(device)
    tokenizer = HFTextTokenizer(hf_tokenizer, config.data.special_tokens)
    return _subject(path.stem, path, None, 0, model, tokenizer, config, False)


def _subject(
    name: str,
    path: Path,
    checkpoint: Path | None,
    step: int,
    model: LlavaMole,
    tokenizer: HFTextTokenizer,
    config: RunConfig,
    given_data: bool,
) -> Subject:
    model.eval()
    set_recompute(model.causal_lm, config.train.activation_checkpointing, config.train.checkpoint_every_n)
    disable_finite_check(model.language_model)
    leave_balance_loss_to_caller(model.language_model)
    dataset = build_dataset(
        config.data,
        tokenizer,
        configured_image_processor(model, config.data),
        model.num_image_tokens,
        seed=config.train.seed,
        epochs=1,
        batching="packed",
    )
    return Subject(name, path, checkpoint, step, model, dataset, config, given_data)
