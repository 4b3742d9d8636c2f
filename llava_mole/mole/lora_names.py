"""The names of PEFT's `LoraConfig` in a `MoleConfig`: accepted where they mean the same, else refused with a reason."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from peft import LoraConfig

SPELLINGS = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}
"""LoRA's name of an option -> ours; both mean the same."""

REASONS = {
    "bias": "base biases stay frozen; name their modules in modules_to_save to train them",
    "fan_in_fan_out": "MoLE reads the layout of a weight from its layer; leave it out",
    "layer_replication": "MoLE does not copy layers",
    "lora_bias": "the experts have no bias",
    "target_parameters": "MoLE adapts modules; name them in target_modules",
    "use_dora": "MoLE has no weight-decomposed variant",
}
"""Why an option of `LoraConfig` is refused, where the general reason would not help."""

_HABITS = {
    "aux_loss_coef": "balance_coef", "router_aux_loss_coef": "balance_coef", "balance_loss_coef": "balance_coef",
    "experts": "num_experts", "n_experts": "num_experts", "num_local_experts": "num_experts", "K": "num_experts",
    "num_experts_per_tok": "top_k", "lora_r": "r", "lora_rank": "r", "rank": "r",
}  # fmt: skip
"""Names of other libraries -> the option that is meant; a comparison of letters would not find it."""

T = TypeVar("T")


class UnknownOption(ValueError, TypeError):
    """A keyword that is no option of MoLE.

    It is a TypeError as well, as for every other constructor: PEFT tells by it that a method lacks an option, and that
    a file comes from a newer version, whose unexpected keywords it leaves out with a warning.
    """


def own_names(options: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """`options` with LoRA's spellings replaced by ours, without LoRA options at their defaults.

    Args:
        options: keywords as given.
        known: the names of MoLE's options.

    Raises:
        UnknownOption: no option has that name, and the message names the nearest one; or it is an option of LoRA that
            MoLE does not have.
        ValueError: two spellings of one option have different values.
    """
    known, defaults = set(known), LoraConfig()
    result = {key: value for key, value in options.items() if key in known}
    for key, value in options.items():
        if key in known:
            continue
        if key in SPELLINGS:
            own = SPELLINGS[key]
            if result.get(own) is not None and result[own] != value:
                raise ValueError(f"{key} is {value!r} and {own} is {result[own]!r}: they are one option; give one")
            result[own] = value
        elif not hasattr(defaults, key):
            raise UnknownOption(
                f"unknown MoLE option {key!r}: MoleConfig got an unexpected keyword argument; {_advice(key, known)}"
            )
        elif value != getattr(defaults, key):
            reason = REASONS.get(key, "this option of LoRA does not exist in MoLE; leave it out")
            raise UnknownOption(f"{key} is {value!r}: {reason}")
    return result


def _advice(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, [*known, *SPELLINGS], n=1, cutoff=0.5)
    meant = _HABITS.get(key) or (near[0] if near else None)
    return f"did you mean {meant!r}?" if meant else f"the options are {', '.join(sorted(known))}"


def takes_lora_names(config: type[T]) -> type[T]:
    """Class decorator: the constructor of a dataclass takes what `own_names` accepts."""
    construct = config.__init__
    known = [option.name for option in dataclasses.fields(config)]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **own_names(options, known))

    config.__init__ = __init__  # type: ignore[method-assign]
    return config
