"""Everything that differs between DeepSpeed ZeRO-2 and ZeRO-3, FSDP2, DDP and one process.

On CPU ranks two combinations of accelerate's switches train without DeepSpeed, or with every rank believing it is
alone, and neither reports it; `start_strategy` uses the one order that works, and `prepare` checks it at every start.

Shards of a parameter are slices of its flat values under every strategy (`Fragment`), so that gathering, loading and
writing them is the same code.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llava_mole.common.distributed import all_reduce_sum, is_main_process
from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.common.text import count_of
from llava_mole.config import TrainConfig, check_batch, deepspeed_config
from llava_mole.model.adapters import parameter_part, trainable_parameters
from llava_mole.model.flops import whole_shape
from llava_mole.model.language_model import decoder_layers
from llava_mole.model.llava_arch import LlavaMole

if TYPE_CHECKING:
    from accelerate import Accelerator

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
"""Kinds of optimizer state: float32 parameters and Adam's two moments."""


def launched_world_size() -> int | None:
    """Ranks that torchrun or deepspeed started, or None under plain `python`."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def check_launcher() -> None:
    """Raise ConfigError if `accelerate launch` has chosen a strategy, which is the configuration's choice."""
    for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if os.environ.get(key, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{key} is set in the environment; unset it, start with scripts/*.sh or torchrun, and choose "
                "train.distributed 'zero2', 'ddp', 'zero3' or 'fsdp2'"
            )


def start_strategy(train: TrainConfig, device: str) -> "Strategy":
    """Join the process group and choose the strategy. `device` is `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: the batch cannot be spread over the ranks, or the device or its precision is not available.
    """
    check_launcher()
    launched = launched_world_size()
    check_batch(train.batching, train.global_batch_size, train.micro_batch_size, launched or 1)
    on_cpu = check_device(device, train.precision)
    uses_deepspeed = launched is not None and train.distributed in ("zero2", "zero3")
    if uses_deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import Accelerator, PartialState  # reads the variables set above
    from accelerate.utils import DeepSpeedPlugin

    if on_cpu:
        PartialState(cpu=True)  # joins with gloo; must come before the Accelerator, which would ignore DeepSpeed
    plugin = None
    if uses_deepspeed:
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(train, launched or 1), zero3_init_flag=False)
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="no" if uses_deepspeed or train.precision == "fp32" else "bf16",
        cpu=None if uses_deepspeed else on_cpu,
    )
    if uses_deepspeed:
        # transformers must not know of ZeRO-3 while it reads the weights: it would spread them at once, before their
        # fingerprint is taken and adapters are placed. accelerate's flag alone does not prevent it.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    kinds = {"zero2": Zero2, "zero3": Zero3, "fsdp2": Fsdp2, "ddp": Strategy}
    return Strategy(accelerator) if launched is None else kinds[train.distributed](accelerator)


def check_device(device: str, precision: str) -> bool:
    """Whether a run with this `device` and `train.precision` is on the CPU. Raises ConfigError if it cannot be here."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    on_cpu = device == "cpu" or not has_gpu
    if on_cpu and precision == "bf16":
        raise ConfigError("train.precision 'bf16' needs a GPU; on a CPU use --train.precision fp32")
    return on_cpu


class Fragment(NamedTuple):
    """What a rank holds of a parameter; both slices are empty if that is nothing."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    inside: slice
    """Of the flat parameter."""
    holder: torch.Tensor
    """The float32 tensor that the torch optimizer steps; it may hold several parameters."""
    place: slice
    """Of the holder's flat local values."""


class Strategy:
    """One process, or DDP: every rank has all reduced gradients and the whole optimizer state.

    `prepare` must come before everything but the facts about the machine.
    """

    shards_gradients = False
    """Whether a rank keeps the reduced gradients of its own partition only."""
    shards_weights = False
    """Whether every forward pass gathers weights, so that all ranks must make the same passes of `engine`."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.world_size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer. Raises RuntimeError if the engine is not the one this strategy needs."""
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model)
        self.engine, wrapped = self._accelerator.prepare(model, optimizer)
        self.optimizer: Any = wrapped.optimizer  # torch's, or DeepSpeed's ZeRO optimizer, without accelerate's wrapper
        launched, kind = launched_world_size() or 1, type(self.engine).__name__
        if self.world_size != launched:
            counted = count_of(self.world_size, "rank")
            raise RuntimeError(f"the launcher started {count_of(launched, 'rank')}, but accelerate sees {counted}")
        expected = self._engine_name()
        if expected is not None and kind != expected:
            raise RuntimeError(f"the model must be wrapped in {expected}, but it is wrapped in {kind}")

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward pass; only the `last` of a step reduces gradients."""
        return nullcontext() if last or not hasattr(self.engine, "no_sync") else self.engine.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch, whose `loss` is its share of the step's loss.

        Gradients are averaged over ranks, so the loss is multiplied by their number first; micro-batches add up.
        """
        self._accelerator.backward(loss * self.world_size)

    def squared_gradients(self) -> torch.Tensor:
        """This rank's share of the squared global gradient norm: float64 [] on the device, without communication.

        The shares of all ranks add up to the square of the norm. A share is not finite if any gradient is not.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return self._squared_norm(gradients) / self.world_size

    def apply_gradients(self, max_norm: float) -> float:
        """Clip, update the parameters and clear the gradients. Returns the global norm before clipping."""
        norm = float(self._accelerator.clip_grad_norm_(list(self.parameters.values()), max_norm or math.inf))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def drop_gradients(self) -> None:
        """Discard the gradients of the step; parameters and moments stay as they are."""
        self.optimizer.zero_grad()

    def stepping_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that changes the parameters."""
        return self.optimizer

    def stepping_gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
        """`(parameter name, gradient)` that `optimizer` is about to use and this rank has."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def gather_state(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """`{"<kind>/<parameter>": float32 CPU tensor}` for master, exp_avg and exp_avg_sq; all of it on rank 0.

        Other ranks may get {}. A collective where gradients are sharded. Before the first update the moments are zeros.
        `wanted` says by name which parameters are taken, the same on all ranks.
        """
        state = {}
        for name, parameter in self.parameters.items():
            if not wanted(name):
                continue
            moments = self.optimizer.state[parameter]
            values = {MASTER: parameter, **{k: moments.get(k, torch.zeros_like(parameter)) for k in MOMENTS}}
            for kind, value in values.items():
                state[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        return state

    def fragments(self) -> Iterator[Fragment]:
        """What this rank would write of every trained parameter if all ranks write their own: rank 0 has it all."""
        for name, parameter in self.parameters.items():
            own = slice(0, parameter.numel() if self.rank == 0 else 0)
            yield Fragment(name, tuple(parameter.shape), own, parameter, own)

    def values(self, fragment: Fragment) -> Iterator[tuple[str, torch.Tensor]]:
        """`(kind, flat float32 values)` of a fragment for master, exp_avg and exp_avg_sq."""
        moments = self.stepping_optimizer().state[fragment.holder]
        flat = _flat(fragment.holder)
        yield MASTER, flat[fragment.place]
        for kind in MOMENTS:
            held = _flat(moments[kind]) if kind in moments else torch.zeros_like(flat)
            yield kind, held[fragment.place]

    def load_state(self, state: Mapping[str, torch.Tensor], updates: int) -> None:
        """Put a gathered state into parameters and optimizer; the number of ranks may have changed.

        Args:
            state: From `gather_state`, or a `TrainerState`, which reads one tensor at a time.
            updates: Updates done, Adam's bias-correction count.

        Raises:
            CheckpointError: parameters are missing, unexpected or of another shape; the message names the first ones.
        """
        kinds = (MASTER, *MOMENTS)
        expected = {f"{kind}/{name}": whole_shape(p) for name, p in self.parameters.items() for kind in kinds}
        found = getattr(state, "shapes", None) or {key: tuple(value.shape) for key, value in state.items()}
        if expected != found:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise CheckpointError(
                f"the trainer state does not fit this run's trainable parameters ({len(wrong)} differ, first: "
                f"{wrong[:3]}); resume with the configuration the checkpoint was written with"
            )
        with torch.no_grad():
            self._load_parameters(state)
            self._load_optimizer(state, torch.tensor(float(updates)))

    def _engine_name(self) -> str | None:
        return "DistributedDataParallel" if self.world_size > 1 else None

    def _squared_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.nn.utils.get_total_norm(gradients).double().square()

    def _load_parameters(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"{MASTER}/{name}"])

    def _load_optimizer(self, state: Mapping[str, torch.Tensor], step: torch.Tensor) -> None:
        for name, parameter in self.parameters.items():
            moments = {kind: state[f"{kind}/{name}"].to(parameter.device, copy=True) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": step.clone(), **moments}


class _Sharded(Strategy):
    """A rank keeps reduced gradients, float32 masters and moments of its own fragments only."""

    shards_gradients = True

    def fragments(self) -> Iterator[Fragment]:
        raise NotImplementedError

    def gather_state(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        state = {}
        for fragment in self.fragments():
            for kind, held in self.values(fragment) if wanted(fragment.name) else ():
                # Every element is in the fragment of exactly one rank, so the sum over ranks is the whole, exactly.
                whole = torch.zeros(math.prod(fragment.shape), dtype=torch.float32, device=held.device)
                whole[fragment.inside] = held.detach()
                all_reduce_sum(whole)
                if is_main_process():
                    state[f"{kind}/{fragment.name}"] = whole.reshape(fragment.shape).cpu()
        return state

    def stepping_gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for fragment in self.fragments():
            # DeepSpeed steps one group at a time.
            if id(fragment.holder) in stepping and fragment.place.stop > fragment.place.start:
                gradient = fragment.holder.grad
                if gradient is not None:
                    yield fragment.name, _flat(gradient)[fragment.place]

    def _load_optimizer(self, state: Mapping[str, torch.Tensor], step: torch.Tensor) -> None:
        moments = self.stepping_optimizer().state
        for holder in {id(fragment.holder): fragment.holder for fragment in self.fragments()}.values():
            moments[holder] = {"step": step.clone(), **{kind: torch.zeros_like(holder) for kind in MOMENTS}}
        for fragment in self.fragments():
            for kind, held in self.values(fragment) if fragment.inside.stop > fragment.inside.start else ():
                held.copy_(state[f"{kind}/{fragment.name}"].reshape(-1)[fragment.inside])


class Zero2(_Sharded):
    """DeepSpeed ZeRO-1 or 2: every rank has the whole model, and the optimizer's part of its own partition."""

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        # ZeRO-2 reduces in every micro-batch, because it keeps only its own partition.
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def squared_gradients(self) -> torch.Tensor:
        groups = self.optimizer.averaged_gradients.values()
        return self._squared_norm([gradient for group in groups for gradient in group or () if gradient is not None])

    def apply_gradients(self, max_norm: float) -> float:
        self.engine.step()  # clips by `gradient_clipping` of `deepspeed_config`
        return float(self.engine.get_global_grad_norm())

    def drop_gradients(self) -> None:
        # As DeepSpeed itself does with a step whose gradients overflow.
        zero = self.optimizer
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        release = getattr(zero, "_release_preflattened_grad_buffers", None)
        if release is not None:
            release()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None

    def stepping_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def fragments(self) -> Iterator[Fragment]:
        masters = self.optimizer.single_partition_of_fp32_groups
        group_of = {id(p): index for index, group in enumerate(self.optimizer.bit16_groups) for p in group}
        for name, parameter in self.parameters.items():
            mapping, inside, partition = getattr(parameter, "_hp_mapping"), slice(0, 0), slice(0, 0)  # noqa: B009  set by DeepSpeed
            if mapping is not None:
                source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
                inside = slice(source.start, source.start + source.numel)
                partition = slice(target.start, target.start + target.numel)
            yield Fragment(name, tuple(parameter.shape), inside, masters[group_of[id(parameter)]], partition)

    def _engine_name(self) -> str:
        return "DeepSpeedEngine"


class Zero3(Zero2):
    """DeepSpeed ZeRO-3: the model's weights are spread too; its hooks gather those of a module while it computes."""

    shards_weights = True

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        check_routers(model)
        super().prepare(model, optimizer)
        model.always_runs_tower = True  # type: ignore[assignment]  # of LlavaMole
        if type(self.optimizer).__name__ != "DeepSpeedZeroOptimizer_Stage3":
            raise RuntimeError(f"ZeRO-3 needs its own optimizer, but DeepSpeed made {type(self.optimizer).__name__}")

    def drop_gradients(self) -> None:
        zero = self.optimizer
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients = {}

    def fragments(self) -> Iterator[Fragment]:
        zero = self.optimizer
        for name, parameter in self.parameters.items():
            # Every parameter is cut into equal pieces, of which the last ones are padded.
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(size * self.rank, parameter.ds_numel)  # type: ignore[attr-defined]  # set by DeepSpeed
            stop = min(size * (self.rank + 1), parameter.ds_numel)  # type: ignore[attr-defined]
            place = slice(offset, offset + stop - start)
            yield Fragment(
                name, whole_shape(parameter), slice(start, stop), zero.fp32_partitioned_groups_flat[group], place
            )

    def _load_parameters(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing yet: the weights are copied from the masters, which `_load_optimizer` reads."""

    def _load_optimizer(self, state: Mapping[str, torch.Tensor], step: torch.Tensor) -> None:
        super()._load_optimizer(state, step)
        # What DeepSpeed does after a step: copy the masters to the pieces of the weights, and gather the small weights
        # that every rank keeps.
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class Fsdp2(_Sharded):
    """torch's `fully_shard`: decoder layers and trained tower blocks gather their weights while they compute.

    Embedding, head, norm and projector are one group, which stays gathered from the forward to the backward pass. A
    frozen vision tower is not spread.
    """

    shards_weights = True

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        assert isinstance(model, LlavaMole)
        check_routers(model)
        if self.world_size != (launched_world_size() or 1):
            raise RuntimeError(f"accelerate sees {count_of(self.world_size, 'rank')}, the launcher started others")
        model.to(self.device)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        name_of = {id(parameter): name for name, parameter in named.items()}
        low = torch.bfloat16 if self._accelerator.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        frozen_tower = set() if model.vision_tower.trains else set(model.vision_tower.parameters())
        blocks = [] if frozen_tower else list(model.vision_tower.blocks)
        model.always_runs_tower = not frozen_tower
        for layer in [*blocks, *decoder_layers(model.causal_lm)]:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy, ignored_params=frozen_tower)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo adds where it is asked for the average (pytorch issue 162338). Sums are right everywhere, and
                # `backward` does not multiply by the number of ranks.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        self.parameters = trainable_parameters(model)
        if self.parameters.keys() != named.keys():
            raise RuntimeError("fully_shard has renamed parameters")
        for group in optimizer.param_groups:
            group["params"] = [self.parameters[name_of[id(parameter)]] for parameter in group["params"]]
        self.engine, self.optimizer = model, optimizer

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        # Gradients are reduced in every micro-batch: a whole copy of them would be as large as the model.
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def squared_gradients(self) -> torch.Tensor:
        return self._squared_norm(self._gradients())

    def apply_gradients(self, max_norm: float) -> float:
        norm = float(all_reduce_sum(self.squared_gradients()).sqrt())
        if max_norm:
            for gradient in self._gradients():
                gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))  # as torch's clip_grad_norm_
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters.items():
            # `fully_shard` cuts the first dimension as torch.chunk does, so that a rank's rows are one slice.
            rows, width = parameter.shape[0], math.prod(parameter.shape[1:])
            size = -(-rows // self.world_size)
            start, stop = (min(size * rank, rows) * width for rank in (self.rank, self.rank + 1))
            yield Fragment(name, tuple(parameter.shape), slice(start, stop), parameter, slice(0, stop - start))

    def _gradients(self) -> list[torch.Tensor]:
        return [_flat(p.grad) for p in self.parameters.values() if p.grad is not None]

    def _load_parameters(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing: parameters are the masters, which `_load_optimizer` reads."""


def check_routers(model: nn.Module) -> None:
    """Raise ConfigError if the adapter's router is read outside of the layer that gathers its weights."""
    configs = getattr(getattr(model, "language_model", None), "peft_config", {}).values()
    if any(getattr(config, "router_scope", None) == "model" for config in configs):
        error = ConfigError(
            "the adapter has router_scope 'model', one router for all layers, which train.distributed 'zero3' and "
            "'fsdp2' do not gather in time; use 'zero2' or 'ddp', or another preset"
        )
        error.on_every_rank = True
        raise error


def _flat(tensor: Any) -> torch.Tensor:
    """The values that this rank holds of a tensor, flat; they share its memory."""
    tensor = tensor.detach()
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).reshape(-1)


class GradientNorms:
    """Gradient norms by part of the model, taken when the optimizer is about to use the gradients.

    Only then are gradients summed over ranks and still available under every strategy: DeepSpeed frees them part by
    part, and keeps only a rank's own partition.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._parts = {name: parameter_part(name) for name in strategy.parameters}
        self._names = list(dict.fromkeys(self._parts.values()))
        self._squares: dict[str, torch.Tensor] = {}
        strategy.stepping_optimizer().register_step_pre_hook(self._before_step)

    def collect(self, total: float) -> dict[str, float]:
        """Norms of the latest step by part, before clipping; a collective.

        Args:
            total: The global norm before clipping; the squares of the parts add up to its square.
        """
        device = next(iter(self._strategy.parameters.values())).device
        none = torch.zeros((), device=device)
        squares = torch.stack([self._squares.get(name, none).to(device, torch.float32) for name in self._names])
        self._squares = {}
        if self._strategy.shards_gradients:
            all_reduce_sum(squares)
        whole = float(squares.sum())
        scale = total / whole**0.5 if whole > 0 else 0.0  # undoes the clipping
        return dict(zip(self._names, (squares.sqrt() * scale).tolist(), strict=True))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        gradients: dict[str, list[torch.Tensor]] = {}
        for name, gradient in self._strategy.stepping_gradients(optimizer):
            gradients.setdefault(self._parts[name], []).append(gradient)
        for part, tensors in gradients.items():
            square = torch.nn.utils.get_total_norm(tensors).float().square()
            self._squares[part] = self._squares[part] + square if part in self._squares else square
