"""The trainable parts: stacked LoRA experts of an FFN, and a plain LoRA pair for a linear.

The experts of one projection are one Parameter each for A and B. With a module per expert, ZeRO-1/2 reduces wrong
gradients without an error as soon as ranks use different experts, because its buckets follow the order in which
autograd reaches the parameters; a stacked Parameter always receives its whole gradient.

Shape legend: K experts, r rank, I input width, O output width.
"""

import math

import torch
from torch import Tensor, nn


def _pair(lead: tuple[int, ...], in_width: int, out_width: int, device, dtype) -> tuple[nn.Parameter, nn.Parameter]:
    a = nn.Parameter(torch.empty(*lead, in_width, device=device, dtype=dtype))
    b = nn.Parameter(torch.zeros(*lead, out_width, device=device, dtype=dtype))
    # The bound of kaiming_uniform_(a=sqrt(5)) over fan-in `in_width`, PEFT's initialisation of lora_A; the function
    # itself would take r * in_width for the fan-in of a stacked tensor.
    nn.init.uniform_(a, -1 / math.sqrt(in_width), 1 / math.sqrt(in_width))
    return a, b


class LoraPair(nn.Module):
    """Plain LoRA of one linear: `A` `[r, I]`, `B` `[r, O]` (PEFT's lora_B transposed); B starts at zero."""

    def __init__(self, in_width: int, out_width: int, r: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.A, self.B = _pair((r,), in_width, out_width, device, dtype)


class ExpertStack(nn.Module):
    """K LoRA experts for each projection of one FFN: `<name>_A` `[K, r, I]` and `<name>_B` `[K, r, O]`.

    With `shared_r` there is one more pair a projection that every token uses: `<name>_shared_A` `[shared_r, I]`,
    `<name>_shared_B` `[shared_r, O]`.
    """

    def __init__(
        self,
        widths: dict[str, tuple[int, int]],
        num_experts: int,
        r: int,
        *,
        shared_r: int = 0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.r = r
        self.shared_r = shared_r
        for name, (in_width, out_width) in widths.items():
            a, b = _pair((num_experts, r), in_width, out_width, device, dtype)
            self.register_parameter(f"{name}_A", a)
            self.register_parameter(f"{name}_B", b)
            if shared_r:
                a, b = _pair((shared_r,), in_width, out_width, device, dtype)
                self.register_parameter(f"{name}_shared_A", a)
                self.register_parameter(f"{name}_shared_B", b)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`(A, B)` of projection `name`."""
        return getattr(self, f"{name}_A"), getattr(self, f"{name}_B")

    def shared_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`(A, B)` of the shared expert of projection `name`."""
        return getattr(self, f"{name}_shared_A"), getattr(self, f"{name}_shared_B")
