"""Several LoRAs as one, for given coefficients: the sum of their updates, or LoraHub's element-wise composition.

LoRA i has A_i `[r_i, in]` and B_i `[out, r_i]`, with its alpha / r folded into B_i, and the coefficient w_i.

- `sum` is exact: Delta W = sum_i w_i B_i A_i, a LoRA of rank sum_i r_i (A_i stacked, w_i B_i side by side).
- `product` is LoraHub's (Huang et al. 2023, arXiv 2307.13269): Delta W = (sum_i w_i B_i) (sum_i w_i A_i), a LoRA
  of the common rank r. It contains the products B_i A_j of different LoRAs and grows with the square of w.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from llava_mole.common.errors import WeightsError
from llava_mole.common.text import shorten
from llava_mole.interop.lora import Lora
from llava_mole.mole.surgery import scaling

Method = Literal["sum", "product"]
METHODS = get_args(Method)


class Composition:
    """LoRAs of one base model that are composed by coefficients.

    Args:
        loras: LoRAs that `read_lora` has checked against the base.
        method: `sum` or `product`.
        names: of the LoRAs, for messages.

    Raises:
        WeightsError: `product`, and the LoRAs adapt different modules or differ in rank.
    """

    def __init__(self, loras: Sequence[Lora], method: Method, names: Sequence[str]):
        self.method = method
        self.count = len(loras)
        if method == "product":
            _check_equal_ranks(loras, names)
        self._stacks: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        """Module path -> A_i stacked `[sum r_i, in]`, B_i `[out, sum r_i]` and the LoRA of each rank `[sum r_i]`."""
        paths = dict.fromkeys(path for lora in loras for path in lora.pairs)
        for path in paths:
            parts = [(n, lora.config, *lora.pairs[path]) for n, lora in enumerate(loras) if path in lora.pairs]
            a = torch.cat([a_RI.float() for _, _, a_RI, _ in parts])
            b = torch.cat([b_OR.float() * scaling(c, path, b_OR.shape[1]) for _, c, _, b_OR in parts], dim=1)
            owner = torch.cat([torch.full((a_RI.shape[0],), n) for n, _, a_RI, _ in parts])
            self._stacks[path] = a, b, owner

    def pair(self, path: str, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[r, in]` and B `[out, r]`, float32, of the module at `path`; its update is B A, without a further factor.

        `coefficients` are float32 `[number of LoRAs]`.
        """
        a_RI, b_OR, owner_R = self._stacks[path]
        weights_R = coefficients[owner_R]
        if self.method == "sum":
            return a_RI, b_OR * weights_R
        a, b = a_RI * weights_R.unsqueeze(1), b_OR * weights_R
        return a.view(self.count, -1, a.shape[1]).sum(0), b.view(b.shape[0], self.count, -1).sum(1)

    def lora(self, coefficients: Sequence[float]) -> Lora:
        """The composed LoRA; alpha equals r in every module. `sum` leaves out LoRAs with coefficient 0.

        Raises WeightsError if all coefficients are 0.
        """
        if not any(coefficients):
            raise WeightsError(
                "the search found no coefficients better than 0 for all LoRAs, so there is nothing to write: the "
                "LoRAs do not help with these examples"
            )
        weights = torch.tensor(coefficients, dtype=torch.float32)
        pairs = {}
        for path, (_, _, owner_R) in self._stacks.items():
            a_RI, b_OR = self.pair(path, weights)
            used = weights[owner_R] != 0 if self.method == "sum" else torch.ones(a_RI.shape[0], dtype=torch.bool)
            if used.any():
                pairs[path] = (a_RI[used].contiguous(), b_OR[:, used].contiguous())
        ranks = {path: a_RI.shape[0] for path, (a_RI, _) in pairs.items()}
        rank = max(ranks.values())
        others = {path: own for path, own in ranks.items() if own != rank}
        config: dict[str, Any] = {
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": list(pairs),
            "rank_pattern": others,
            "alpha_pattern": dict(others),
        }
        return Lora(config, pairs)

    def inject(self, causal_lm: nn.Module) -> "Injected":
        """Put the composition into a causal LM, as a PEFT LoRA whose weights `Injected.set` changes."""
        from peft import LoraConfig, get_peft_model

        lora = self.lora([1.0] * self.count)
        model = get_peft_model(causal_lm, LoraConfig(**lora.config, task_type="CAUSAL_LM"))
        model.requires_grad_(False).eval()
        return Injected(self, model)


class Injected:
    """A PEFT model that computes with the composition.

    Attributes:
        model: the PEFT model, in evaluation mode, without gradients.
    """

    def __init__(self, composition: Composition, model: Any):
        self.model = model
        self._composition = composition
        modules: Mapping[str, Any] = dict(model.get_base_model().named_modules())
        self._layers = {path: modules[path] for path in composition._stacks}

    @torch.no_grad()
    def set(self, coefficients: Sequence[float]) -> None:
        """Compute with these coefficients from now on."""
        weights = torch.tensor(coefficients, dtype=torch.float32)
        for path, layer in self._layers.items():
            a_RI, b_OR = self._composition.pair(path, weights)
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)


def _check_equal_ranks(loras: Sequence[Lora], names: Sequence[str]) -> None:
    first = {path: a_RI.shape[0] for path, (a_RI, _) in loras[0].pairs.items()}
    for lora, name in zip(loras[1:], names[1:], strict=True):
        ranks = {path: a_RI.shape[0] for path, (a_RI, _) in lora.pairs.items()}
        if ranks.keys() != first.keys():
            odd = sorted(ranks.keys() ^ first.keys())
            raise WeightsError(
                f"{names[0]} and {name} adapt different modules ({shorten(odd)}), and --method product adds their "
                "factors; take --method sum"
            )
        other = [f"{path} {first[path]} and {rank}" for path, rank in ranks.items() if rank != first[path]]
        if other:
            raise WeightsError(
                f"{names[0]} and {name} differ in rank ({shorten(other)}), and --method product adds their factors; "
                "take --method sum"
            )
