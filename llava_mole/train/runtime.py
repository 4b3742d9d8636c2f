"""Where a run computes: device, process group, and DeepSpeed ZeRO-2 or DDP through accelerate.

On CPU ranks two combinations of accelerate's switches train without DeepSpeed, or with every rank believing it is
alone, and say nothing; `start_runtime` uses the one order that works and `check_engine` proves it at every start.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_mole.common.errors import ConfigError
from llava_mole.config import SHARDED_REASON, RunConfig, check_batch, deepspeed_config

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Runtime:
    """What the loop needs to know of the machine it runs on."""

    accelerator: "Accelerator"
    uses_deepspeed: bool

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index


def launched_world_size() -> int | None:
    """Ranks that torchrun or deepspeed started, or None under plain `python`."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def check_launcher() -> None:
    """Raise ConfigError where `accelerate launch` has chosen a strategy; the configuration does."""
    for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if os.environ.get(key, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{key} is set in the environment; unset it, start with scripts/*.sh or torchrun, and choose "
                f"train.distributed 'zero2' or 'ddp'. {SHARDED_REASON}"
            )


def start_runtime(config: RunConfig) -> Runtime:
    """Join the process group and set up accelerate.

    Raises:
        ConfigError: a batch that cannot be spread over the ranks, or a device that is not there.
    """
    check_launcher()
    launched = launched_world_size()
    train = config.train
    check_batch(train.batching, train.global_batch_size, train.micro_batch_size, launched or 1)
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    on_cpu = config.device == "cpu" or not has_gpu
    if on_cpu and config.train.precision == "bf16":
        raise ConfigError("train.precision 'bf16' needs a GPU; on a CPU use --train.precision fp32")
    uses_deepspeed = launched is not None and config.train.distributed == "zero2"
    if uses_deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    if on_cpu:
        PartialState(cpu=True)  # joins with gloo; must come before the Accelerator, which would ignore DeepSpeed
    plugin = None
    if uses_deepspeed:
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, launched or 1))
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="no" if uses_deepspeed or config.train.precision == "fp32" else "bf16",
        cpu=None if uses_deepspeed else on_cpu,
    )
    return Runtime(accelerator, uses_deepspeed)


def micro_batch_context(runtime: Runtime, engine: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of one micro-batch; gradients are reduced over ranks in the `last` one of a step.

    DeepSpeed's ZeRO-2 reduces in each, because it keeps only its own partition.
    """
    if runtime.uses_deepspeed:
        engine.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()
    return nullcontext() if last or not hasattr(engine, "no_sync") else engine.no_sync()  # type: ignore[operator]


def prepare(runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Wrap model and optimizer for the run's strategy and check that it is the one asked for."""
    engine, prepared = runtime.accelerator.prepare(model, optimizer)
    check_engine(runtime, engine)
    return engine, prepared


def check_engine(runtime: Runtime, engine: nn.Module) -> None:
    """Raise RuntimeError unless the engine and the number of ranks are what was asked for."""
    launched = launched_world_size() or 1
    kind = type(engine).__name__
    if runtime.world_size != launched:
        raise RuntimeError(f"{launched} ranks were launched, but accelerate counts {runtime.world_size}")
    if runtime.uses_deepspeed and kind != "DeepSpeedEngine":
        raise RuntimeError(f"ZeRO-2 was asked for, but the model is wrapped in {kind}")
    if not runtime.uses_deepspeed and launched > 1 and kind != "DistributedDataParallel":
        raise RuntimeError(f"DDP was asked for, but the model is wrapped in {kind}")
