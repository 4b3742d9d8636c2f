"""What a run needs to go on exactly where it stopped, independent of how many ranks it had.

Optimizer state is kept by parameter name: float32 master weights and both Adam moments, gathered from ZeRO-2's
partitions and put back into them. Randomness needs no state: every step seeds its own generators (see `trainer`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from llava_mole.errors import CheckpointError

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


def gather_optimizer_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, uses_deepspeed: bool
) -> dict[str, torch.Tensor]:
    """`{"<kind>/<parameter>": float32 CPU tensor}` for master, exp_avg and exp_avg_sq, complete on every rank.

    A collective under DeepSpeed: every rank must call it, after at least one optimizer step.
    """
    state = {}
    for name, parameter in parameters.items():
        for kind, value in _full_state(parameter, optimizer, uses_deepspeed).items():
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
        step: optimizer steps done, Adam's bias-correction count.

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


def _full_state(parameter: torch.nn.Parameter, optimizer: Any, uses_deepspeed: bool) -> dict[str, torch.Tensor]:
    if uses_deepspeed:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        return {MASTER: safe_get_full_fp32_param(parameter), **moments}
    moments = {kind: _inner(optimizer).state[parameter][kind] for kind in MOMENTS}
    return {MASTER: parameter, **moments}


def _inner(optimizer: Any) -> Any:
    """The torch or ZeRO optimizer under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _fill_partitions(state, step, parameters, optimizer) -> None:
    zero = _inner(optimizer)
    buffers: dict[int, dict[str, torch.Tensor]] = {}
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        buffers[index] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **buffers[index]}
    group_of = {id(p): index for index, group in enumerate(zero.bit16_groups) for p in group}
    with torch.no_grad():
        for name, parameter in parameters.items():
            mapping = parameter._hp_mapping  # None where this rank's partition holds nothing of the parameter
            if mapping is None:
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            for kind in (MASTER, *MOMENTS):
                fragment = state[f"{kind}/{name}"].reshape(-1)[source.start : source.start + source.numel]
                if kind == MASTER:
                    mapping.hp_fragment.copy_(fragment)
                else:
                    buffers[group_of[id(parameter)]][kind][target.start : target.start + target.numel].copy_(fragment)
