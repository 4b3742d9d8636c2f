"""`MoleConfig`: the options of a mixture of LoRA experts, the presets, and the combinations that are refused."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from peft import PeftConfig

PEFT_TYPE = "MOLE"

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"router_bias": True, "dropout": 0.05, "balance_layers": "pooled"},
    "coupled": {"expert_scale": "straight_through", "balance_scale": "switch", "balance_group": "global_batch"},
    "best": {"shared_r": 8},
}
"""What each preset changes in the field defaults, which follow the paper's text. `released`: the authors' code."""


_LARGEST = 2**63 - 1
_FROM_0 = (0, _LARGEST, "a whole number of at least 0")
_FROM_1 = (1, _LARGEST, "a whole number of at least 1")
_NOT_NEGATIVE = (0.0, sys.float_info.max, "a finite number that is not negative")
_BELOW_1 = (0.0, math.nextafter(1, 0), "at least 0 and below 1")
RANGES: dict[str, tuple[int, int, str] | tuple[float, float, str]] = {
    "r": _FROM_1,
    "alpha": _NOT_NEGATIVE,
    "attention_r": _FROM_1,
    "dropout": _BELOW_1,
    "num_experts": _FROM_1,
    "top_k": _FROM_1,
    "temperature": (math.nextafter(0, 1), sys.float_info.max, "a finite number above 0"),
    "jitter": _BELOW_1,
    "num_tasks": _FROM_0,
    "shared_r": _FROM_0,
    "balance_coef": _NOT_NEGATIVE,
    "z_loss_coef": _NOT_NEGATIVE,
    "bias_update_rate": _NOT_NEGATIVE,
}
"""The lowest and highest value of every number, and its rule in a message. A lowest value of type int asks for whole
numbers."""
NONE_ALLOWED = ("attention_r",)
"""Numbers that may be None; alpha has been filled in."""


@dataclass
class MoleConfig(PeftConfig):
    """A sparse mixture of K LoRA experts in every FFN, with plain LoRA on the attention linears.

    The field defaults are the preset `paper`. docs/mole.md explains every option and gives its source. All layers of
    an adapter share this object and it does not change; `surgery` replaces it in all of them.

    Raises:
        ValueError: a value is not allowed, or a combination cannot learn; the message gives the reason.
    """

    r: int = 32
    """LoRA rank of every expert and of the attention adapters."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / r. None takes 2 * r."""
    attention_r: int | None = None
    """LoRA rank on attention linears, at the same alpha / r. None takes r."""
    dropout: float = 0.0
    """Dropout on the adapters' input, shared by gate and up."""
    num_experts: int = 3
    """K, experts in each FFN. 1 is plain LoRA without a router."""
    top_k: int = 1
    """Experts a token uses in mode `sparse`."""
    mode: Literal["sparse", "dense"] = "sparse"
    """`sparse`: the top_k experts; `dense`: all, weighted by softmax."""
    granularity: Literal["token", "sequence", "task", "given"] = "token"
    """What is routed; `given`: the caller names the experts."""
    router: Literal["learned", "random", "hash", "oracle"] = "learned"
    """`learned`, or a control (`oracle`: the expert is the sample's source)."""
    expert_scale: Literal["none", "straight_through", "prob", "prob_times_k", "topk_renorm"] = "none"
    """Factor on an expert's output: `none` (Eq. 4), `straight_through` (value 1, gradient of p), `prob` (p),
    `prob_times_k` (K p), `topk_renorm` (p over the sum of the chosen)."""
    router_bias: bool = False
    """Bias in the router."""
    train_router: bool = True
    """False freezes the router at its initialisation."""
    router_detach_input: bool = False
    """Stop the router's gradient from reaching earlier layers."""
    temperature: float = 1.0
    """Divides the router's logits."""
    jitter: float = 0.0
    """In training the router's input is multiplied by uniform(1 - j, 1 + j)."""
    num_tasks: int = 0
    """Number of task ids, for granularity `task`."""
    shared_r: int = 0
    """Rank of an expert that every token uses; 0: none."""
    shared_scale: Literal["one", "complement"] = "one"
    """Weight of the shared expert; `complement`: 1 - p of the chosen one."""
    balance_coef: float = 1e-2
    """Coefficient of the balance loss (paper: 1e-2)."""
    balance_scale: Literal["mean", "switch", "raw"] = "mean"
    """`mean`: sum f P; `switch`: K sum f P; `raw`: Eq. 7-8 read literally."""
    balance_layers: Literal["mean_of_layers", "pooled"] = "mean_of_layers"
    """`mean_of_layers` (paper) or `pooled` (released code)."""
    balance_group: Literal["sample", "micro_batch", "global_batch"] = "sample"
    """Tokens balanced together."""
    balance_tokens: Literal["all", "text", "supervised", "stratified"] = "all"
    """Which tokens count; `stratified`: by modality."""
    z_loss_coef: float = 0.0
    """Coefficient of mean(logsumexp(logits)^2)."""
    bias_update_rate: float = 0.0
    """Loss-free balancing: step of the selection bias per optimizer step; 0: off."""
    backend: Literal["auto", "masked", "grouped", "loop"] = "auto"
    """How experts are computed; `auto` follows docs/mole.md."""
    attention_modules: list[str] | None = None
    """Linears with plain LoRA, by name ending. None: those of the attention layers."""
    ffn_modules: list[str] | None = None
    """FFNs with experts, by the name ending of the module or its first linear. None: found by their structure."""
    ffn_projections: dict[str, str] | None = None
    """Attribute names of an unknown FFN by role: up, down, activation and, if it is gated, gate."""
    exclude_modules: list[str] | str | None = None
    """Modules never adapted: name endings, or one regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Only these layer indices."""
    layers_pattern: list[str] | str | None = None
    """Name of the layer list."""
    modules_to_save: list[str] | None = None
    """Further modules that are trained and saved."""
    target_modules: list[str] | None = None
    """Filled in: attention_modules and ffn_modules together."""
    base_fingerprint: str | None = None
    """Filled in on saving: identifies the base model the adapter was trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_parameters = None  # PEFT's matcher reads it
        if self.alpha is None:
            self.alpha = 2.0 * self.r if _is_number(self.r) else None
        _check_values(self)
        _check_choice(self)
        _check_router_learns(self)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MoleConfig":
        """The preset `name` (see `PRESETS`), changed by `overrides`.

        Raises:
            ValueError: unknown preset, unknown option, or a refused combination.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown MoLE preset {name!r}; there are {', '.join(PRESETS)}")
        known = {option.name for option in dataclasses.fields(cls)}
        for key in overrides:
            if key not in known:
                raise ValueError(f"unknown MoLE option {key!r}; the options are {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on every adapter's update."""
        assert self.alpha is not None
        return self.alpha / self.r

    @property
    def has_router(self) -> bool:
        """Whether FFNs own router parameters."""
        return self.num_experts > 1 and self.granularity != "given" and self.router in ("learned", "hash")

    @property
    def router_trains(self) -> bool:
        """Whether the router's parameters receive updates."""
        return self.has_router and self.router == "learned" and self.train_router

    @property
    def counts_load(self) -> bool:
        """Whether expert counts outlive a step; `mole_after_step` must then follow every optimizer step."""
        balances_globally = self.balance_group == "global_batch" and self.balance_coef > 0
        return self.has_router and (self.bias_update_rate > 0 or balances_globally)

    @property
    def required_input(self) -> str | None:
        """The routing input that every forward pass needs: `experts`, `task`, `source`, or None."""
        if self.num_experts == 1:
            return None
        by_granularity = {"given": "experts", "task": "task"}.get(self.granularity)
        return by_granularity or ("source" if self.router == "oracle" else None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_values(c: MoleConfig) -> None:
    """Raise ValueError for an option outside its range."""
    for option in dataclasses.fields(c):
        value, allowed = getattr(c, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in allowed:
            raise ValueError(f"{option.name} is {value!r}; it must be one of {', '.join(allowed)}")
    for key, (low, high, rule) in RANGES.items():
        value = getattr(c, key)
        whole = not isinstance(low, float)
        if value is None and key in NONE_ALLOWED:
            continue
        if not _is_number(value) or (whole and not isinstance(value, int)) or not low <= value <= high:
            raise ValueError(f"{key} is {value!r}; it must be {rule}{', or None' if key in NONE_ALLOWED else ''}")
    if c.top_k > c.num_experts:
        raise ValueError(f"top_k is {c.top_k} but num_experts is {c.num_experts}; top_k cannot be larger")


def _check_choice(c: MoleConfig) -> None:
    """Raise ValueError if options contradict each other about the experts a token uses or their weights."""
    if c.mode == "dense" and c.expert_scale in ("straight_through", "topk_renorm"):
        raise ValueError(
            f"expert_scale {c.expert_scale!r} has no meaning in mode 'dense', where the softmax already weighs every "
            "expert; use 'none', 'prob' or 'prob_times_k'"
        )
    if c.mode == "dense" and c.top_k != 1:
        raise ValueError(f"top_k is {c.top_k} in mode 'dense', which uses all experts; leave it at 1")
    if c.mode == "sparse" and c.expert_scale == "topk_renorm" and c.top_k == 1 and c.num_experts > 1:
        raise ValueError(
            "expert_scale 'topk_renorm' with top_k 1 makes the weight exactly 1 and the router's gradient exactly 0; "
            "use 'straight_through' (same output, real gradient), 'prob', or top_k >= 2"
        )
    if c.granularity == "task" and c.num_tasks < 1 and c.router == "learned":
        raise ValueError("granularity 'task' needs num_tasks, the number of task ids")
    if c.router != "learned" and c.granularity != "token":
        raise ValueError(
            f"router {c.router!r} is a control that replaces token routing; granularity must be 'token', "
            f"not {c.granularity!r}"
        )
    if c.router != "learned" and (c.mode == "dense" or c.expert_scale != "none"):
        raise ValueError(f"router {c.router!r} has no probabilities; use mode 'sparse' and expert_scale 'none' with it")
    if c.router not in ("learned", "hash") and c.top_k != 1:
        raise ValueError(f"router {c.router!r} chooses one expert; top_k must be 1, not {c.top_k}")
    if c.granularity == "given" and c.expert_scale != "none":
        raise ValueError("granularity 'given' brings its own weights; expert_scale must be 'none'")
    if c.shared_scale == "complement" and (c.mode != "sparse" or c.top_k != 1 or not c.has_router):
        raise ValueError("shared_scale 'complement' is 1 - p of the chosen expert: it needs a sparse top-1 router")
    if c.shared_scale == "complement" and c.shared_r == 0:
        raise ValueError("shared_scale 'complement' needs a shared expert: set shared_r")


def _check_router_learns(c: MoleConfig) -> None:
    """Raise ValueError if nothing would train the router, or if balancing would work against it."""
    if c.balance_group == "sample" and c.granularity in ("sequence", "task") and c.balance_coef > 0 and c.router_trains:
        raise ValueError(
            f"balance_group 'sample' with granularity {c.granularity!r}: all tokens of a sample share one expert, so "
            "balancing within the sample only flattens the router's probabilities; use 'micro_batch' or "
            "'global_batch', or balance_coef 0"
        )
    if c.router_trains and c.mode == "sparse" and c.expert_scale == "none" and c.balance_coef == 0:
        raise ValueError(
            "expert_scale 'none' with balance_coef 0: nothing gives the router a gradient; use 'straight_through', a "
            "balance_coef above 0, or train_router=False for a fixed random router"
        )
    if c.bias_update_rate > 0 and not (c.has_router and c.mode == "sparse"):
        raise ValueError("bias_update_rate shifts a sparse router's choice; this configuration has none")
