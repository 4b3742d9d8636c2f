"""What trains in a model, from which weights it starts, and in which dtypes."""

from pathlib import Path
from typing import Literal

import torch

from llava_mole.common.errors import ConfigError
from llava_mole.common.text import count_of
from llava_mole.config import AdapterConfig, Quantization, TrainedPartsConfig
from llava_mole.model.adapters import parameter_part
from llava_mole.model.builder import (
    attach_adapter,
    load_adapter_state,
    load_projector,
    start_from,
    starting_adapter,
)
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.packed_attention import enable_packing
from llava_mole.model.quantization import quantize_linears


def let_train(
    model: LlavaMole,
    adapter: AdapterConfig,
    device: torch.device,
    fingerprints: dict[str, str],
    *,
    quantization: Quantization,
    precision: Literal["bf16", "fp32"],
    packed: bool,
    train_projector: bool,
    parts: TrainedPartsConfig,
    projector_weights: str | None = None,
    init_from: str | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Quantise the model, add its adapter, load the weights that it starts from and freeze the rest, in place.

    Args:
        model: From `build_parts`, on the CPU.
        adapter: Section `adapter`.
        device: Where quantised weights go.
        fingerprints: Of the frozen parts, from `build_parts`.
        quantization: Of the language model.
        precision: Compute precision.
        packed: Whether rows will hold several samples; the model is tested for it.
        parts: Section `model.train`.
        train_projector, projector_weights, init_from: As in `RunConfig`.
        checkpoint: A checkpoint of the same run, whose adapter replaces the others.

    Raises:
        ConfigError: wrong options of the adapter, the model lets packed samples see each other, or the tower has fewer
            blocks than are to train.
        WeightsError: the projector's weights are missing or do not fit.
        CheckpointError: `init_from` or `checkpoint` does not fit.
    """
    if projector_weights is not None:
        load_projector(model.projector, projector_weights, start=True)
    if packed:
        enable_packing(model.causal_lm)
    quantize_linears(model.causal_lm, quantization, device, frozen_dtype(precision))
    attach_adapter(model, adapter if init_from is None else starting_adapter(init_from, adapter))
    if init_from is not None:
        start_from(model, init_from, adapter, fingerprints)
    if checkpoint is not None:
        load_adapter_state(model, checkpoint)
    model.projector.requires_grad_(train_projector)
    unfreeze(model, parts)
    cast_for_training(model, precision)


def unfreeze(model: LlavaMole, parts: TrainedPartsConfig) -> None:
    """Let language model and tower train as `parts` says, in place; adapters are there already.

    Raises ConfigError if the tower has fewer blocks than `parts.tower_blocks`, or a form in which it is not saved.
    """
    if parts.tower != "none" and model.vision_tower.spec.layout == "hugging_face":
        raise ConfigError(
            f"model.train.tower is {parts.tower!r}, but a tower in a directory of Hugging Face stays frozen, because "
            "checkpoints hold trained towers as open_clip's files; take such a one, or set model.train.tower to 'none'"
        )
    if parts.language_model == "full":
        for name, parameter in model.language_model.named_parameters():
            if parameter_part(f"language_model.{name}") == "language model":
                parameter.requires_grad_(True)
    blocks = model.vision_tower.blocks
    if parts.tower == "all":
        model.vision_tower.requires_grad_(True)
    elif parts.tower == "last_n":
        assert parts.tower_blocks is not None  # `TrainedPartsConfig` has checked it
        if parts.tower_blocks > len(blocks):
            raise ConfigError(
                f"model.train.tower_blocks is {parts.tower_blocks}, but {count_of(len(blocks), 'block')} of the tower "
                "run (model.vision_tower.select_layer); give at most that many"
            )
        for block in blocks[-parts.tower_blocks :]:
            block.requires_grad_(True)


def frozen_dtype(precision: str) -> torch.dtype:
    """Dtype of frozen weights, and the compute dtype of quantised ones, under `train.precision`."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def cast_for_training(model: torch.nn.Module, precision: str) -> None:
    """Cast frozen weights to the compute dtype and trainable ones to float32, in place.

    DeepSpeed keeps float32 masters of its own. Quantised weights are integers and stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype(precision))
