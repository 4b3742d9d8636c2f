"""What a run needs to go on exactly where it stopped, independent of how many ranks it had.

Optimizer state is kept by parameter name: float32 master weights and both Adam moments, gathered from ZeRO-2's
partitions and put back into them. Randomness needs no state: every step seeds its own generators (see `trainer`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llava_mole.common.distributed import all_reduce_sum
from llava_mole.common.errors import CheckpointError

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
