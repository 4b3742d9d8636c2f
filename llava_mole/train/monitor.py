"""What is measured beside the training step itself: gradient norms by part, use of the hardware, validation loss."""

import time
from pathlib import Path
from typing import Any, cast

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.config import RunConfig
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.inference.predictor import Predictor
from llava_mole.model.adapters import trainable_parameters
from llava_mole.model.builder import LoadedModel, context_length
from llava_mole.model.flops import gpu_of_device, model_shape, training_flops
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.strategy import GradientNorms, Runtime
from llava_mole.train.validation import AnswerCheck, Validator


class Monitor:
    """Adds to the entries of `metrics.jsonl`. All ranks call it alike: its sums go over all of them.

    Args:
        config, runtime, model, dataset, pad_token_id: of the run.
        optimizer: As accelerate has wrapped it.
        total_steps: Optimizer steps of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: LlavaMole,
        optimizer: Any,
        dataset: SupervisedDataset,
        pad_token_id: int,
        total_steps: int,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._model = model
        self._total_steps = total_steps
        self._shape = model_shape(model)
        self._norms = GradientNorms(trainable_parameters(model), optimizer, runtime.uses_deepspeed)
        self._peak = peak_flops(runtime.device, config.train.precision)
        self._validator = None
        if dataset.validation is not None:
            self._validator = Validator(
                dataset.validation,
                row_tokens=config.train.pack_length or config.data.max_length,
                pad_token_id=pad_token_id,
                num_workers=config.train.num_workers,
                routes=config.adapter.method == "mole",
            )
        self._answer_check = None
        if dataset.validation is not None and config.train.validation_answers:
            self._answer_check = AnswerCheck(
                dataset.validation,
                predictor_in_training(config, model, dataset),
                count=config.train.validation_answers,
                routes=config.adapter.method == "mole",
            )

    def due(self, step: int) -> bool:
        """Whether there is an entry after optimizer step `step` (from 1)."""
        every = self._config.tracker.log_every
        return step % every == 0 or step == self._total_steps or self._validates(step)

    def extend(self, entry: dict[str, Any], micro_batches: list[dict]) -> dict[str, Any]:
        """The entry with what is measured here.

        Args:
            entry: From `StepStats.entry`.
            micro_batches: This rank's of the step.
        """
        entry = dict(entry)
        entry["grad_norm_by_part"] = self._norms.collect(entry["grad_norm"])
        squares, images = all_reduce_sum(batch_sums(micro_batches).to(self._runtime.device)).tolist()
        flops = training_flops(self._shape, entry["tokens"], squares, entry["supervised_tokens"], images)
        entry["flops_per_s"] = flops / entry["step_s"]
        if self._peak is not None:
            entry["mfu"] = entry["flops_per_s"] / (self._peak * self._runtime.world_size)
        if self._validator is not None and self._validates(entry["step"]):
            started = time.perf_counter()
            entry["validation_loss"] = self._validator.losses(self._model)
            if self._answer_check is not None:
                scores = self._answer_check.scores()
                entry |= {"validation_exact": scores["exact"], "validation_f1": scores["f1"]}
            entry["validation_s"] = time.perf_counter() - started
        return entry

    def _validates(self, step: int) -> bool:
        every = self._config.train.validate_every
        return every > 0 and (step % every == 0 or step == self._total_steps)


def predictor_in_training(config: RunConfig, model: LlavaMole, dataset: SupervisedDataset) -> Predictor:
    """Answers prompts with the model as it is at the moment, in the template it is trained with."""
    tokenizer = cast(HFTextTokenizer, dataset.limits.tokenizer)
    context = context_length(model, config.data.max_length)
    path = Path(config.train.output_dir)
    return Predictor(LoadedModel(model, tokenizer, dataset.image_processor, config.data.template, context, path))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of a known GPU in bfloat16, FLOP/s; None on another device or in another precision."""
    if device.type != "cuda" or precision != "bf16":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16_flops


def batch_sums(micro_batches: list[dict]) -> torch.Tensor:
    """Sum of the squared lengths of the samples, and the number of images: float64 [2]."""
    squares = 0.0
    for batch in micro_batches:
        lengths = batch["sample_lengths"]
        if lengths is None:
            lengths = batch["attention_mask"].sum(dim=1).tolist()
        squares += sum(float(length) ** 2 for length in lengths) if batch["ids"] else 0.0  # a row may be empty
    images = sum(0 if batch["images"] is None else len(batch["images"]) for batch in micro_batches)
    return torch.tensor([squares, float(images)], dtype=torch.float64)
