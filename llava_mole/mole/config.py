"""`MoleConfig`: the options of a mixture of LoRA experts, the presets, and the combinations that are refused."""

import dataclasses
import enum
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from llava_mole.mole.card import write_card
from llava_mole.mole.lora_names import SPELLINGS, own_names, takes_lora_names
from llava_mole.mole.presets import PRESETS


class MolePeftType(str, enum.Enum):
    """MoLE's value of `peft_type`. PEFT and transformers read `.value` of it, and files hold the string."""

    MOLE = "MOLE"


PEFT_TYPE = MolePeftType.MOLE

_LARGEST = 2**16
_FROM_0 = (0, _LARGEST, f"a whole number from 0 to {_LARGEST}")
_FROM_1 = (1, _LARGEST, f"a whole number from 1 to {_LARGEST}")
_NOT_NEGATIVE = (0.0, 1e6, "a number that is not negative, at most 1e6")
_POSITIVE = (1e-6, 1e6, "a number from 1e-6 to 1e6")
_BELOW_1 = (0.0, math.nextafter(1, 0), "at least 0 and below 1")
RANGES: dict[str, tuple[int, int, str] | tuple[float, float, str]] = {
    "r": _FROM_1,
    "alpha": _POSITIVE,
    "attention_r": _FROM_1,
    "dropout": _BELOW_1,
    "init_std": _POSITIVE,
    "router_init_std": _POSITIVE,
    "num_experts": _FROM_1,
    "top_k": _FROM_1,
    "temperature": _POSITIVE,
    "jitter": _BELOW_1,
    "logit_noise": _NOT_NEGATIVE,
    "num_tasks": _FROM_0,
    "frozen_experts": _FROM_0,
    "task_dim": _FROM_0,
    "shared_r": _FROM_0,
    "balance_coef": _NOT_NEGATIVE,
    "group_delta": _BELOW_1,
    "source_coef": _NOT_NEGATIVE,
    "z_loss_coef": _NOT_NEGATIVE,
    "bias_update_rate": _NOT_NEGATIVE,
}
"""The lowest and highest value of every number, and its rule in a message. A lowest value of type int asks for whole
numbers."""
NONE_ALLOWED = ("attention_r", "init_std", "router_init_std")
"""Numbers that may be None; alpha has been filled in."""


@takes_lora_names
@dataclass
class MoleConfig(PeftConfig):
    """A sparse mixture of K LoRA experts in every FFN, with plain LoRA on the attention linears.

    The field defaults are the preset `paper`. docs/mole.md explains every option and gives its source. All layers of
    an adapter share this object and it does not change (those with a K of their own have a copy); `surgery` replaces it
    in all of them. The names `lora_alpha`, `lora_dropout` and `init_lora_weights` of PEFT's `LoraConfig` are accepted
    for `alpha`, `dropout` and `init_weights`.

    Raises:
        ValueError: an unknown option, a value that is not allowed, or a combination that contradicts itself or cannot
            learn; the message gives the reason.
    """

    r: int = 32
    """LoRA rank of every expert and of the attention adapters."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / r. None takes 2 * r."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    attention_r: int | None = None
    """LoRA rank on attention linears, at the same alpha / r. None takes r."""
    dropout: float = 0.0
    """Dropout on the adapters' input, shared by gate and up."""
    init_weights: bool | Literal["gaussian"] = True
    """Start of the LoRA pairs, as in PEFT. True: A uniform, B zero; `gaussian`: A normal, B zero; False: both uniform,
    so that a new adapter changes the output (for tests)."""
    init_std: float | None = None
    """Start A from a normal distribution with this standard deviation, and B from zero. None: `init_weights`."""
    router_init_std: float | None = None
    """Start the routers' weights from a normal distribution with this standard deviation. None: PyTorch's linear."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or regular expression -> its r, as in PEFT. All projections of an FFN have one r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name or regular expression -> its alpha, likewise."""
    num_experts: int = 3
    """K, experts in each FFN. 1 is plain LoRA without a router."""
    experts_by_layer: list[int] | None = None
    """K by decoder layer, the list stretched evenly over all layers; `num_experts` becomes the largest. None: the
    same K everywhere."""
    frozen_experts: int = 0
    """The first so many experts, and their rows of the router, do not train: those of finished tasks."""
    top_k: int = 1
    """Experts a token uses in mode `sparse`."""
    mode: Literal["sparse", "dense"] = "sparse"
    """`sparse`: the top_k experts; `dense`: all, weighted by softmax."""
    granularity: Literal["token", "sequence", "task", "given"] = "token"
    """What is routed; `given`: the caller names the experts."""
    sequence_tokens: Literal["prompt", "image"] = "prompt"
    """For granularity `sequence`: the positions whose logits are averaged; a sample without an image takes its
    prompt."""
    router_scope: Literal["ffn", "linear", "model"] = "ffn"
    """Who owns a router: every FFN, every linear with experts, or the model, which then routes its token embeddings or
    tasks once for all layers."""
    attention_experts: bool = False
    """Experts instead of plain LoRA on the attention linears; for `router_scope` `linear` and `model`."""
    shared_a: bool = False
    """One A for all experts of a projection; each expert has its own B."""
    mix: Literal["projection", "ffn_output"] = "projection"
    """Where the experts of a token are summed: in every projection, or at the output of the FFN, which is then computed
    once for each of them."""
    router: Literal["learned", "random", "hash", "oracle"] = "learned"
    """`learned`, or a control (`oracle`: the expert is the sample's source)."""
    expert_scale: Literal["none", "straight_through", "prob", "prob_squared", "prob_times_k", "topk_renorm"] = "none"
    """Factor on an expert's output: `none` (Eq. 4), `straight_through` (value 1, gradient of p), `prob` (p),
    `prob_squared` (p^2), `prob_times_k` (K p), `topk_renorm` (p over the sum of the chosen)."""
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
    logit_noise: float = 0.0
    """In training, noise of this standard deviation is added to the logits, before the temperature."""
    num_tasks: int = 0
    """Number of task ids, for granularity `task`."""
    task_dim: int = 0
    """Width of a learned embedding of every task, from which a linear computes the logits; 0: a table of logits."""
    shared_r: int = 0
    """Rank of an expert that every token uses; 0: none."""
    shared_scale: Literal["one", "complement"] = "one"
    """Weight of the shared expert; `complement`: 1 - p of the chosen one."""
    balance_coef: float = 1e-2
    """Coefficient of the balance loss (paper: 1e-2)."""
    balance_scale: Literal["mean", "switch", "raw"] = "mean"
    """`mean`: sum f P; `switch`: K sum f P; `raw`: Eq. 7-8 read literally."""
    balance_kind: Literal["load", "groups"] = "load"
    """`load`: the losses of the options below; `groups`: LoRAMoE's, in which the first K / 2 experts serve samples of
    `source` 1 and the others those of `source` 0."""
    group_delta: float = 0.0
    """How much more a group serves its own samples, for `groups`."""
    balance_layers: Literal["mean_of_layers", "pooled", "blocks"] = "mean_of_layers"
    """`mean_of_layers` (paper), `pooled` (released code), or `blocks`: pooled over the routers of a decoder layer, and
    summed over the layers."""
    balance_group: Literal["sample", "micro_batch", "global_batch"] = "sample"
    """Tokens balanced together."""
    balance_tokens: Literal["all", "text", "supervised", "stratified"] = "all"
    """Which tokens count; `stratified`: by modality."""
    source_coef: float = 0.0
    """Coefficient of the cross-entropy between the router's probabilities and the sample's `source`, in training."""
    z_loss_coef: float = 0.0
    """Coefficient of mean(logsumexp(logits)^2)."""
    bias_update_rate: float = 0.0
    """Loss-free balancing: step of the selection bias per optimizer step; 0: off."""
    add_balance_loss: bool = True
    """Add balance loss and z-loss to the loss of every training pass, so that any Trainer trains the router. False: the
    training loop adds `mole_auxiliary_loss` itself."""
    backend: Literal["auto", "masked", "grouped", "loop"] = "auto"
    """How experts are computed; `auto` follows docs/mole.md."""
    target_modules: list[str] | str | None = None
    """Modules to adapt, by PEFT's rules: name endings, one regular expression, or `all-linear`. An FFN, or all of its
    projections, gets experts; other linears get plain LoRA. None: filled in from the two options below."""
    attention_modules: list[str] | None = None
    """Linears with plain LoRA, by name ending. None: those of the attention layers; []: none."""
    ffn_modules: list[str] | None = None
    """FFNs with experts, by the name ending of the module or its first linear. None: found by their structure; []:
    none."""
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
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embeddings are trained and saved, as in PEFT; a dict names the embedding modules."""
    strict_base: bool = False
    """Loading on another base model than that of training is an error instead of a warning."""
    base_fingerprint: str | None = None
    """Filled in on saving: identifies the base model the adapter was trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_parameters = None  # PEFT's matcher reads it
        self.trained_on = self.base_fingerprint
        """The fingerprint this configuration was loaded with. Saving sets `base_fingerprint`, not this."""
        if self.alpha is None:
            self.alpha = 2.0 * self.r if _is_number(self.r) else None
        if self.experts_by_layer is not None:
            _check_experts_by_layer(self)
            self.num_experts = max(self.experts_by_layer)
        _check_values(self)
        _check_modules(self)
        _check_choice(self)
        _check_structure(self)
        if self.frozen_experts:
            _check_frozen(self)
        _check_balance(self)
        _check_router_learns(self)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MoleConfig":
        """The preset `name` (see `PRESETS`), changed by `overrides`. Another `r` keeps the preset's alpha / r.

        Raises:
            ValueError: unknown preset, unknown option, or a refused combination.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown MoLE preset {name!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[name]
        changes = own_names(overrides, [option.name for option in dataclasses.fields(cls)])
        if changes.get("alpha") is None and "alpha" in preset and _is_number(changes.get("r")):
            changes["alpha"] = preset["alpha"] / preset["r"] * changes["r"]
        return cls(**{**preset, **changes})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **options: Any) -> Any:
        """The configuration of a saved adapter, as in PEFT; MoLE options among the keywords replace the saved values.

        `PeftModel.from_pretrained(model, directory, strict_base=True)` passes its keywords on to here.

        Raises:
            ValueError: no such file, or a value that is not allowed.
        """
        own = {option.name for option in dataclasses.fields(cls)} - {
            option.name for option in dataclasses.fields(PeftConfig)
        }
        changes = {key: options.pop(key) for key in list(options) if key in own or key in SPELLINGS}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)
        return dataclasses.replace(config, **own_names(changes, own)) if changes else config

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write adapter_config.json, as in PEFT, and complete the model card of an adapter that is saved there."""
        auto_mapping = options.get("auto_mapping_dict")
        super().save_pretrained(save_directory, **options)
        directory = Path(save_directory)
        if any((directory / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            write_card(directory, self, PRESETS, auto_mapping)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; sets, which PEFT may put in place of lists, as sorted lists."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `use_rslora`: the factor on the update of adapters without a pattern."""
        assert self.alpha is not None
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def has_router(self) -> bool:
        """Whether the adapter has routers with parameters."""
        return self.num_experts > 1 and self.granularity != "given" and self.router in ("learned", "hash")

    @property
    def router_trains(self) -> bool:
        """Whether the router's parameters receive updates."""
        return self.has_router and self.router == "learned" and self.train_router

    @property
    def loss_needs_graph(self) -> bool:
        """Whether a loss of the router's logits trains anything, so that they must carry the forward pass's graph.

        It trains the router or, through its input, the adapters of earlier layers.
        """
        reaches = self.has_router and self.router == "learned" and (self.train_router or not self.router_detach_input)
        return reaches and (self.balance_coef > 0 or self.z_loss_coef > 0 or self.source_coef > 0)

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

    @property
    def numbered_input(self) -> tuple[str, int] | None:
        """The routing input by which training tells samples apart, and n, the number of its values (0 to n - 1).

        Besides `required_input` these are the samples' sources that a loss of the router uses.
        """
        if (name := self.required_input) is not None:
            return name, self.num_tasks if name == "task" else self.num_experts
        if self.balance_kind == "groups" and self.balance_coef > 0:
            return "source", 2
        return ("source", self.num_experts) if self.source_coef > 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_values(c: MoleConfig) -> None:
    """Raise ValueError for an option outside its range."""
    for option in dataclasses.fields(c):
        value, allowed = getattr(c, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in allowed:
            raise ValueError(f"{option.name} is {value!r}; it must be one of {', '.join(allowed)}")
        if option.type is bool and not isinstance(value, bool):
            raise ValueError(f"{option.name} is {value!r}; it must be True or False")
    for key, (low, high, rule) in RANGES.items():
        value = getattr(c, key)
        whole = not isinstance(low, float)
        if value is None and key in NONE_ALLOWED:
            continue
        if not _is_number(value) or (whole and not isinstance(value, int)) or not low <= value <= high:
            raise ValueError(f"{key} is {value!r}; it must be {rule}{', or None' if key in NONE_ALLOWED else ''}")
    if c.top_k > c.num_experts:
        raise ValueError(f"top_k is {c.top_k} but num_experts is {c.num_experts}; top_k cannot be larger")
    if not isinstance(c.init_weights, bool) and c.init_weights != "gaussian":
        raise ValueError(
            f"init_weights is {c.init_weights!r}; it must be True, False or 'gaussian': the other initialisations of "
            "LoRA change the base model or need data"
        )
    _check_pattern("rank_pattern", c.rank_pattern, "r")
    _check_pattern("alpha_pattern", c.alpha_pattern, "alpha")


def _check_pattern(key: str, pattern: object, option: str) -> None:
    low, high, text = RANGES[option]
    if not isinstance(pattern, dict):
        raise ValueError(f"{key} is {pattern!r}; it must map module names to numbers")
    for name, value in pattern.items():
        whole = isinstance(value, int) or isinstance(low, float)
        if not isinstance(name, str) or not _is_number(value) or not whole or not low <= value <= high:
            raise ValueError(f"{key} maps {name!r} to {value!r}; it must map a module name to {text}")
        _check_expression(key, name)


def _check_expression(key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{key} holds {text!r}, which is not a regular expression: {error}") from None


_NAMES = ("attention_modules", "ffn_modules", "modules_to_save")
_NAMES_OR_EXPRESSION = ("target_modules", "exclude_modules")


def _check_modules(c: MoleConfig) -> None:
    """Raise ValueError for an option about modules that has the wrong type or contradicts another."""
    for key in (*_NAMES, *_NAMES_OR_EXPRESSION, "layers_pattern"):
        value = getattr(c, key)
        if isinstance(value, str) and key not in _NAMES:
            _check_expression(key, value)
        elif value is not None and not _is_list(value, str):
            more = "" if key in _NAMES else " or one regular expression"
            raise ValueError(f"{key} is {value!r}; it must be a list of names{more}")
    if isinstance(c.target_modules, str) and c.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform is {c.layers_to_transform!r}, but target_modules is {c.target_modules!r}: PEFT "
            "applies it to a list of names only; give such a list, or drop layers_to_transform"
        )
    if c.base_fingerprint is not None and not isinstance(c.base_fingerprint, str):
        raise ValueError(
            f"base_fingerprint is {c.base_fingerprint!r}; it must be a string written by save_pretrained, or None"
        )
    layers = c.layers_to_transform
    if layers is not None and not _is_list([layers] if isinstance(layers, int) else layers, int):
        raise ValueError(f"layers_to_transform is {layers!r}; it must be a whole number or a list of them")
    if c.layers_pattern and layers is None:
        raise ValueError(f"layers_pattern is {c.layers_pattern!r} without layers_to_transform, which it belongs to")
    parts = c.ffn_projections
    if parts is not None and not (isinstance(parts, dict) and _is_list([*parts, *parts.values()], str)):
        raise ValueError(f"ffn_projections is {parts!r}; it must map roles to attribute names")
    tokens = c.trainable_token_indices
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if tokens is not None and not all(_is_list(ids, int) and ids and min(ids) >= 0 for ids in lists):
        raise ValueError(
            f"trainable_token_indices is {tokens!r}; it must be a list of token ids, or a dict from embedding modules "
            "to such lists"
        )
    if c.attention_modules == [] and c.ffn_modules == []:
        raise ValueError("attention_modules and ffn_modules are both empty: nothing would be adapted")
    if c.target_modules is None or (c.attention_modules is None and c.ffn_modules is None):
        return
    named = {*(c.attention_modules or []), *(c.ffn_modules or [])}
    if isinstance(c.target_modules, str) or set(c.target_modules) != named:
        raise ValueError(
            f"target_modules is {c.target_modules!r}, but attention_modules and ffn_modules name {sorted(named)}: give "
            "either target_modules or the other two"
        )


def _is_list(value: object, kind: type) -> bool:
    """Whether `value` is a list, set or tuple of `kind` (where numbers are not bools)."""
    if not isinstance(value, list | set | tuple):
        return False
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _check_choice(c: MoleConfig) -> None:
    """Raise ValueError if options contradict each other about the experts a token uses or their weights."""
    if c.mode == "dense" and c.expert_scale in ("straight_through", "prob_squared", "topk_renorm"):
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
    if c.sequence_tokens == "image" and c.granularity != "sequence":
        raise ValueError(
            f"sequence_tokens 'image' with granularity {c.granularity!r}: it says what a decision for a whole sample "
            "reads; set granularity 'sequence', or leave it at 'prompt'"
        )
    if c.granularity == "given" and c.expert_scale != "none":
        raise ValueError("granularity 'given' brings its own weights; expert_scale must be 'none'")
    if c.shared_scale == "complement" and (c.mode != "sparse" or c.top_k != 1 or not c.has_router):
        raise ValueError("shared_scale 'complement' is 1 - p of the chosen expert: it needs a sparse top-1 router")
    if c.shared_scale == "complement" and c.shared_r == 0:
        raise ValueError("shared_scale 'complement' needs a shared expert: set shared_r")


def _check_experts_by_layer(c: MoleConfig) -> None:
    """Raise ValueError for an `experts_by_layer` that no model can have."""
    counts = c.experts_by_layer
    if not counts or not isinstance(counts, list) or not _is_list(counts, int) or not 2 <= min(counts) <= _LARGEST:
        raise ValueError(f"experts_by_layer is {counts!r}; it must be a list of whole numbers of at least 2")
    if c.num_experts not in (type(c).num_experts, max(counts)):
        raise ValueError(
            f"num_experts is {c.num_experts!r}, but experts_by_layer {counts} says the number of every layer; give one"
        )
    if c.top_k > min(counts):
        raise ValueError(f"top_k is {c.top_k}, but experts_by_layer has a layer with {min(counts)}; lower top_k")
    if c.granularity == "given" or c.router == "oracle":
        option = "granularity 'given'" if c.granularity == "given" else "router 'oracle'"
        raise ValueError(f"{option} numbers the experts alike in all layers; experts_by_layer must be None")


def _check_structure(c: MoleConfig) -> None:
    """Raise ValueError if options contradict each other about where experts and routers are."""
    if c.attention_experts and c.router_scope == "ffn":
        raise ValueError(
            "attention_experts with router_scope 'ffn': an FFN's router does not see the attention; use router_scope "
            "'linear' or 'model'"
        )
    if c.attention_experts and (c.attention_r is not None or c.attention_modules == []):
        option = "attention_modules []" if c.attention_r is None else f"attention_r {c.attention_r}"
        raise ValueError(f"attention_experts with {option}: there is no plain LoRA on attention; leave one of them out")
    if c.router_scope == "model" and (c.granularity not in ("sequence", "task") or c.router != "learned"):
        raise ValueError(
            f"router_scope 'model' with router {c.router!r} and granularity {c.granularity!r}: one decision for all "
            "layers needs a learned router and granularity 'sequence' or 'task'"
        )
    if c.mix == "ffn_output":
        for option, needed in (("router_scope", "ffn"), ("mode", "sparse"), ("shared_a", False)):
            if getattr(c, option) != needed:
                raise ValueError(f"mix 'ffn_output' needs {option} {needed!r}, not {getattr(c, option)!r}")
        if c.num_experts > 1 and c.expert_scale != "topk_renorm":
            raise ValueError(
                f"mix 'ffn_output' with expert_scale {c.expert_scale!r}: the weights multiply the whole FFN, so they "
                "must add up to 1; use expert_scale 'topk_renorm' and top_k of at least 2"
            )
    if c.task_dim > 0 and c.granularity != "task":
        raise ValueError(
            f"task_dim is {c.task_dim} with granularity {c.granularity!r}; it belongs to granularity 'task'"
        )
    if c.logit_noise > 0 and (c.granularity == "given" or c.router in ("random", "oracle")):
        raise ValueError(f"logit_noise is {c.logit_noise}, but this configuration has no logits; set it to 0")
    if c.init_std is not None and c.init_weights is not True:
        raise ValueError(f"init_std {c.init_std} and init_weights {c.init_weights!r} both say how A starts; give one")


def _check_frozen(c: MoleConfig) -> None:
    """Raise ValueError if no expert would train, or if frozen experts would change all the same."""
    fewest = min(c.experts_by_layer or [c.num_experts])
    if c.frozen_experts >= fewest:
        raise ValueError(
            f"frozen_experts is {c.frozen_experts} of {fewest}: no expert would train; freeze fewer, or add experts"
        )
    if c.frozen_experts and c.shared_a:
        raise ValueError(f"frozen_experts {c.frozen_experts} with shared_a: the A that trains is that of all experts")
    if c.frozen_experts and c.granularity == "task":
        raise ValueError(
            f"frozen_experts {c.frozen_experts} with granularity 'task': a router of tasks has no rows of experts; use "
            "granularity 'token' or 'sequence'"
        )


def _check_balance(c: MoleConfig) -> None:
    """Raise ValueError if the options of the balance loss contradict each other."""
    if c.balance_layers == "pooled" and len(set(c.experts_by_layer or [])) > 1:
        raise ValueError(
            "balance_layers 'pooled' adds up the loads of all layers, whose numbers of experts differ by "
            "experts_by_layer; use 'blocks' or 'mean_of_layers'"
        )
    if c.balance_kind == "load":
        if c.group_delta > 0:
            raise ValueError(f"group_delta is {c.group_delta} with balance_kind 'load'; it belongs to 'groups'")
        return
    needed = {
        "mode": "dense",
        "balance_group": "micro_batch",
        "balance_scale": "mean",
        "balance_layers": "mean_of_layers",
    }
    for option, value in needed.items():
        if getattr(c, option) != value:
            raise ValueError(f"balance_kind 'groups' needs {option} {value!r}, not {getattr(c, option)!r}")
    if not c.has_router or any(count % 2 for count in c.experts_by_layer or [c.num_experts]):
        raise ValueError(
            f"balance_kind 'groups' divides the experts of a router into two halves, but num_experts is "
            f"{c.num_experts} (experts_by_layer {c.experts_by_layer}, router {c.router!r}); use even numbers and a "
            "learned router"
        )


def _check_router_learns(c: MoleConfig) -> None:
    """Raise ValueError if nothing would train the router, or if balancing would work against it."""
    if c.balance_group == "sample" and c.granularity in ("sequence", "task") and c.balance_coef > 0 and c.router_trains:
        raise ValueError(
            f"balance_group 'sample' with granularity {c.granularity!r}: all tokens of a sample share one expert, so "
            "balancing within the sample only flattens the router's probabilities; use 'micro_batch' or "
            "'global_batch', or balance_coef 0"
        )
    if c.source_coef > 0 and not c.router_trains:
        raise ValueError(
            f"source_coef is {c.source_coef}, but this configuration has no router that trains; set it to 0, or use a "
            "learned router with train_router=True"
        )
    if c.source_coef > 0 and len(set(c.experts_by_layer or [])) > 1:
        raise ValueError(
            "source_coef numbers the experts alike in all layers, but experts_by_layer gives them different numbers; "
            "leave one of them out"
        )
    losses = c.balance_coef > 0 or c.source_coef > 0
    if c.router_trains and c.mode == "sparse" and c.expert_scale == "none" and not losses:
        raise ValueError(
            "expert_scale 'none' with balance_coef 0: nothing gives the router a gradient; use 'straight_through', a "
            "balance_coef or source_coef above 0, or train_router=False for a fixed random router"
        )
    if c.bias_update_rate > 0 and not (c.has_router and c.mode == "sparse"):
        raise ValueError("bias_update_rate shifts a sparse router's choice; this configuration has none")
