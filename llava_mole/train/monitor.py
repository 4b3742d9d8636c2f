"""Measurements besides the training step: gradient norms by part, use of the hardware, validation."""

import time
from typing import Any

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.common.errors import StorageError
from llava_mole.common.log import get_logger
from llava_mole.model.flops import gpu_of_device, model_shape, training_flops
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.strategy import GradientNorms, Strategy
from llava_mole.train.validation import AnswerCheck, AnswerLog, Validator

logger = get_logger(__name__)


class Monitor:
    """Extends the entries of `metrics.jsonl`. All ranks must make the same calls, because it sums over them.

    Args:
        strategy: After `prepare`.
        model: The model in training.
        validator, answer_check: Validation; None turns it off.
        answer_log: Where the answers go.
        precision: `train.precision`.
        log_every, validate_every: Optimizer steps between entries and between validations.
        total_steps: Optimizer steps of the run.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: LlavaMole,
        validator: Validator | None,
        answer_check: AnswerCheck | None,
        *,
        answer_log: AnswerLog | None = None,
        precision: str,
        log_every: int,
        validate_every: int,
        total_steps: int,
    ) -> None:
        self._strategy = strategy
        self._model = model
        self._validator = validator
        self._answer_check = answer_check
        self._answer_log = answer_log
        self._log_every = log_every
        self._validate_every = validate_every
        self._total_steps = total_steps
        self._shape = model_shape(model)
        self._norms = GradientNorms(strategy)
        self._peak = peak_flops(strategy.device, precision)

    def due(self, step: int) -> bool:
        """Whether there is an entry after optimizer step `step` (from 1)."""
        return step % self._log_every == 0 or step == self._total_steps or self._validates(step)

    def extend(self, entry: dict[str, Any], micro_batches: list[dict]) -> dict[str, Any]:
        """The entry of `StepStats.entry` with the measurements added; a collective.

        Args:
            micro_batches: Those of this rank in the step.
        """
        entry = dict(entry)
        entry["grad_norm_by_part"] = self._norms.collect(entry["grad_norm"])
        squares, images = all_reduce_sum(batch_sums(micro_batches).to(self._strategy.device)).tolist()
        flops = training_flops(self._shape, entry["tokens"], squares, entry["supervised_tokens"], images)
        entry["flops_per_s"] = flops / entry["step_s"]
        if self._peak is not None:
            entry["mfu"] = entry["flops_per_s"] / (self._peak * self._strategy.world_size)
        if self._validator is not None and self._validates(entry["step"]):
            try:
                entry |= self._validation(self._validator, entry["step"])
            except StorageError as error:  # training goes on as long as its own samples can be read
                logger.warning("no validation after step %d: %s", entry["step"], error)
        return entry

    def _validation(self, validator: Validator, step: int) -> dict[str, Any]:
        """What the entry of `step` says about the held-out samples. Raises StorageError on every rank."""
        started = time.perf_counter()
        engine = self._strategy.engine if self._strategy.shards_weights else None
        found: dict[str, Any] = {"validation_loss": validator.losses(self._model, engine)}
        if self._answer_check is not None:
            scores = self._answer_check.scores()
            found |= {"validation_exact": scores["exact"], "validation_f1": scores["f1"]}
            if self._answer_log is not None:
                self._answer_log.add(step, self._answer_check.answers)
        return found | {"validation_s": time.perf_counter() - started}

    def _validates(self, step: int) -> bool:
        every = self._validate_every
        return every > 0 and (step % every == 0 or step == self._total_steps)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of a known GPU in bfloat16, FLOP/s; None for another device or precision."""
    if device.type != "cuda" or precision != "bf16":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16_flops


def batch_sums(micro_batches: list[dict]) -> torch.Tensor:
    """Sum of the samples' squared lengths, and number of images: float64 [2]."""
    squares = 0.0
    for batch in micro_batches:
        lengths = batch["sample_lengths"]
        if lengths is None:
            lengths = batch["attention_mask"].sum(dim=1).tolist()
        squares += sum(float(length) ** 2 for length in lengths) if batch["ids"] else 0.0  # a row may be empty
    images = sum(0 if batch["images"] is None else len(batch["images"]) for batch in micro_batches)
    return torch.tensor([squares, float(images)], dtype=torch.float64)
