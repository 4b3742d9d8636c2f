"""Counters of one router that outlive a step: the load of the last optimizer step, and the loss-free bias."""

import torch
from torch import Tensor, nn


class RouterState(nn.Module):
    """Integer buffers, saved with the adapter.

    They are integers because `model.to(bfloat16)` and DeepSpeed's bf16 mode cast every float buffer, which would
    round a bias of many small steps to nothing. `bias_steps` `[K]`: how many steps up minus down each expert's
    selection bias has taken. `load` `[M, K]`: tokens each expert got in the last optimizer step, over all ranks, in
    each of M token sets (one, or image and text); all zero before the first.
    """

    def __init__(self, num_experts: int, num_sets: int, rate: float, device: torch.device) -> None:
        super().__init__()
        self.rate = rate
        self.bias_steps: Tensor
        self.load: Tensor
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.register_buffer("load", torch.zeros(num_sets, num_experts, dtype=torch.int64, device=device))

    def selection_bias(self) -> Tensor | None:
        """float32 `[K]`, added to the logits for the choice only; None where loss-free balancing is off."""
        return self.bias_steps.to(torch.float32) * self.rate if self.rate > 0 else None

    def step(self, counts_MK: Tensor) -> None:
        """Take over the counts of a finished optimizer step and move the bias towards experts below the mean load."""
        self.load.copy_(counts_MK)
        if self.rate > 0:
            total_K = counts_MK.sum(dim=0).double()
            self.bias_steps += torch.sign(total_K.mean() - total_K).to(torch.int64)
