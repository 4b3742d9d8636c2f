"""The end of an optimizer step, apart: gradients are there, then they are used or dropped, under every strategy.

DeepSpeed's `engine.step()`, which accelerate calls inside `backward`, would clip and apply in one go; here the loop can
look at the gradients of all ranks first and leave parameters and optimizer untouched.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llava_mole.train.runtime import Runtime


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
