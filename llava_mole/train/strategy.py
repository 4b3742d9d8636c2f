"""Where a run computes: device, process group, and DeepSpeed ZeRO-2 or DDP through accelerate.

On CPU ranks two combinations of accelerate's switches train without DeepSpeed, or with every rank believing it is
alone, and say nothing; `start_runtime` uses the one order that works and `check_engine` proves it at every start.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.config import SHARDED_REASON, RunConfig, check_batch, deepspeed_config
from llava_mole.model.adapters import parameter_part

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
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config.train, launched or 1))
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


def backward(runtime: Runtime, engine: Any, loss: torch.Tensor) -> None:
    """Add the gradients of a micro-batch, inside `runtime.micro_batch_context`.

    Args:
        loss: this micro-batch's share of the step's loss. Gradients are averaged over ranks, so it is scaled by their
            number first; micro-batches add up.
    """
    loss = loss * runtime.world_size
    if runtime.uses_deepspeed:
        engine.backward(loss, scale_wrt_gas=False)
    else:
        runtime.accelerator.backward(loss)


def squared_gradients(runtime: Runtime, optimizer: Any, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Sum of squares of the step's gradients that only this rank has: float64 [], on the device, no collective.

    Under ZeRO a rank keeps the reduced gradients of its partition, so the ranks' sums add up to the whole. Otherwise
    every rank has all of them, and each gives its share of the sum. It is not finite if any gradient is not.
    """
    if runtime.uses_deepspeed:
        groups = _zero(optimizer).averaged_gradients.values()
        gradients = [gradient for group in groups for gradient in group or () if gradient is not None]
        ranks = 1
    else:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ranks = runtime.world_size
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=runtime.device)
    return torch.nn.utils.get_total_norm(gradients).double().square() / ranks


def apply_gradients(
    runtime: Runtime, engine: Any, optimizer: Any, parameters: Iterable[nn.Parameter], max_norm: float
) -> float:
    """Clip, update the parameters and clear the gradients. Returns the global norm before clipping."""
    if runtime.uses_deepspeed:
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = float(runtime.accelerator.clip_grad_norm_(list(parameters), max_norm or math.inf))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def drop_gradients(runtime: Runtime, optimizer: Any) -> None:
    """Forget the step's gradients, as if it had not been computed: parameters and moments stay as they are."""
    if not runtime.uses_deepspeed:
        optimizer.zero_grad()
        return
    # What DeepSpeed itself does with a step whose gradients overflow.
    zero = _zero(optimizer)
    zero.micro_step_id = -1
    zero.zero_grad(set_to_none=True)
    release = getattr(zero, "_release_preflattened_grad_buffers", None)
    if release is not None:
        release()
    for group in zero.averaged_gradients:
        zero.averaged_gradients[group] = None
        zero.all_grad_tensors[group] = None


def _zero(optimizer: Any) -> Any:
    """The ZeRO optimizer under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


def gather_optimizer_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, uses_deepspeed: bool
) -> dict[str, torch.Tensor]:
    """`{"<kind>/<parameter>": float32 CPU tensor}` for master, exp_avg and exp_avg_sq, complete on every rank.

    A collective under DeepSpeed: every rank must call it. Before the first update the moments are zeros.
    """
    if uses_deepspeed:
        return _gather_partitions(parameters, optimizer)
    moments = _inner(optimizer).state
    state = {}
    for name, parameter in parameters.items():
        values = {MASTER: parameter, **{k: moments[parameter].get(k, torch.zeros_like(parameter)) for k in MOMENTS}}
        for kind, value in values.items():
            state[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True)
    return state


def load_optimizer_state(
    state: Mapping[str, torch.Tensor],
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Any,
    uses_deepspeed: bool,
) -> None:
    """Put a gathered state into the model's parameters and the optimizer, whatever the number of ranks is now.

    Args:
        state: from `gather_optimizer_state`.
        step: updates done, Adam's bias-correction count.

    Raises:
        CheckpointError: parameters missing, unexpected or of another shape, each named.
    """
    expected = {f"{kind}/{name}": tuple(p.shape) for name, p in parameters.items() for kind in (MASTER, *MOMENTS)}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise CheckpointError(
            f"the trainer state does not fit this run's trainable parameters ({len(wrong)} differ, first: "
            f"{wrong[:3]}); resume with the configuration the checkpoint was written with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"{MASTER}/{name}"])
    if uses_deepspeed:
        _fill_partitions(state, step, parameters, optimizer)
    else:
        for name, parameter in parameters.items():
            _inner(optimizer).state[parameter] = {
                "step": torch.tensor(float(step)),
                **{kind: state[f"{kind}/{name}"].to(parameter.device, copy=True) for kind in MOMENTS},
            }


def _inner(optimizer: Any) -> Any:
    """The torch or ZeRO optimizer under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def parameter_fragments(parameters: Mapping[str, torch.nn.Parameter], zero: Any) -> Iterator[tuple]:
    """`(name, parameter, group, slice of the flat parameter, slice of this rank's flat partition of the group)`.

    Both slices are empty where the partition holds nothing of the parameter.
    """
    group_of = {id(p): index for index, group in enumerate(zero.bit16_groups) for p in group}
    for name, parameter in parameters.items():
        mapping, inside, partition = getattr(parameter, "_hp_mapping"), slice(0, 0), slice(0, 0)  # noqa: B009  set by DeepSpeed
        if mapping is not None:
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            inside = slice(source.start, source.start + source.numel)
            partition = slice(target.start, target.start + target.numel)
        yield name, parameter, group_of[id(parameter)], inside, partition


def _gather_partitions(parameters: Mapping[str, torch.nn.Parameter], optimizer: Any) -> dict[str, torch.Tensor]:
    zero = _inner(optimizer)
    state = {}
    for name, parameter, group, inside, partition in parameter_fragments(parameters, zero):
        master = zero.single_partition_of_fp32_groups[group]
        for kind in (MASTER, *MOMENTS):
            held = master if kind == MASTER else zero.optimizer.state[master].get(kind, torch.zeros_like(master))
            # Every element is in the partition of exactly one rank, so the sum over ranks is the whole, exactly.
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=master.device)
            whole[inside] = held.detach()[partition]
            state[f"{kind}/{name}"] = all_reduce_sum(whole).reshape(parameter.shape).cpu()
    return state


def _fill_partitions(
    state: Mapping[str, torch.Tensor], step: int, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any
) -> None:
    zero = _inner(optimizer)
    for master in zero.single_partition_of_fp32_groups:
        moments = {kind: torch.zeros_like(master) for kind in MOMENTS}
        zero.optimizer.state[master] = {"step": torch.tensor(float(step)), **moments}
    with torch.no_grad():
        for name, _, group, inside, partition in parameter_fragments(parameters, zero):
            master = zero.single_partition_of_fp32_groups[group]
            for kind in (MASTER, *MOMENTS):
                held = master if kind == MASTER else zero.optimizer.state[master][kind]
                held[partition] = state[f"{kind}/{name}"].reshape(-1)[inside].to(held.device)


class GradientNorms:
    """Looks at the gradients when the optimizer is about to use them.

    That is the one moment at which they are summed over ranks and still there under every strategy: DeepSpeed frees
    them part by part, and keeps only a rank's own partition.

    Args:
        parameters: What trains, by name.
        optimizer: As accelerate has wrapped it.
        uses_deepspeed: Whether it shards.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, uses_deepspeed: bool) -> None:
        self._parts = {name: parameter_part(name) for name in parameters}
        self._names = list(dict.fromkeys(self._parts.values()))
        self._parameters = parameters
        self._zero = getattr(optimizer, "optimizer", optimizer) if uses_deepspeed else None
        self._squares: dict[str, torch.Tensor] = {}
        inner = getattr(optimizer, "optimizer", optimizer) if self._zero is None else self._zero.optimizer
        inner.register_step_pre_hook(self._before_step)

    def collect(self, total: float) -> dict[str, float]:
        """Norms of the latest step by part; a collective.

        Args:
            total: The global norm before clipping, which the parts' squares then add up to.
        """
        device = next(iter(self._parameters.values())).device
        none = torch.zeros((), device=device)
        squares = torch.stack([self._squares.get(name, none).to(device, torch.float32) for name in self._names])
        self._squares = {}
        if self._zero is not None:
            all_reduce_sum(squares)
        whole = float(squares.sum())
        scale = total / whole**0.5 if whole > 0 else 0.0  # clipping came before
        return dict(zip(self._names, (squares.sqrt() * scale).tolist(), strict=True))

    def _before_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        gradients: dict[str, list[torch.Tensor]] = {}
        if self._zero is None:
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    gradients.setdefault(self._parts[name], []).append(parameter.grad)
        else:
            masters = self._zero.single_partition_of_fp32_groups
            stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, _, group, _, partition in parameter_fragments(self._parameters, self._zero):
                # DeepSpeed steps one group at a time.
                if id(masters[group]) in stepping and partition.stop > partition.start:
                    gradients.setdefault(self._parts[name], []).append(masters[group].grad[partition])
        for part, tensors in gradients.items():
            square = torch.nn.utils.get_total_norm(tensors).float().square()
            self._squares[part] = self._squares[part] + square if part in self._squares else square
