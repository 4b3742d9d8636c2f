"""The configuration of a run: dataclasses, filled from YAML files and `--a.b value` overrides by jsonargparse.

Every hyper-parameter has one home: a YAML file, or a default here with its source. The topology (nodes, GPUs,
addresses) comes from the launcher's environment. Relative paths start at the working directory; those of nested YAML
files start at the file that names them.

Each section checks its own values when it is built, and `RunConfig` checks the sections against each other. Values
assigned later are not checked. RANGES has the allowed values of every number, and PATHS the keys whose value is a path:
`~` and environment variables in them are expanded.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml

from llava_mole.common.errors import ConfigError
from llava_mole.common.files import write_text
from llava_mole.common.keys import ANY, explained
from llava_mole.common.log import get_logger
from llava_mole.common.text import HELP_WIDTH, count_of

AspectRatio = Literal["pad", "square", "anyres", "native"]
ImageModes = Literal["strict", "rescale", "llava"]
Quantization = Literal["none", "8bit", "4bit"]
TOWER_FILES = (
    ("config.json", "model.safetensors"),
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "open_clip_model.safetensors"),
)
"""Configuration and weights in the directory of a vision tower; the first pair that is there counts."""
SHARDED = ("zero3", "fsdp2")
"""Values of `train.distributed` that spread every weight over the ranks, frozen ones included."""
_SECTIONS = ("train", "model", "adapter", "data", "tracker", "check")

logger = get_logger(__name__)


DEFAULT_WARMUP = 500
ZERO2_FILE, ZERO3_FILE = "scripts/zero2.json", "scripts/zero3.json"
_OPENAI_TOWER = "playground/models/clip-vit-large-patch14-336/open_clip_model.safetensors"


class Range(NamedTuple):
    """The allowed values of a number: from `low` to `high`, as `rule` says in a message."""

    rule: str
    low: float
    high: float = 2.0**63


_ANY = Range("must be a number", -(2.0**63))
_FROM_0 = Range("must not be negative", 0)
_FROM_1 = Range("must be at least 1", 1)
_ABOVE_0 = Range("must be above 0", math.nextafter(0, 1))
_SHARE = Range("is a share, 0 to 1", 0, 1)
_BELOW_1 = Range("must be at least 0 and below 1", 0, math.nextafter(1, 0))

RANGES: dict[str, Range] = {
    "model.vision_tower.select_layer": _ANY,  # the tower knows how many blocks it has
    "model.train.tower_blocks": _FROM_1,
    "model.vision_tower.image_size": _FROM_1,
    "adapter.rank": _FROM_1,
    "adapter.alpha": _ABOVE_0,
    "adapter.dropout": _BELOW_1,
    "adapter.num_experts": _FROM_1,
    "data.max_length": _FROM_1,
    "data.validation_samples": _FROM_0,
    "data.max_bad_image_share": _SHARE,
    "data.cache_gb": _ABOVE_0,
    "data.remote_timeout": _ABOVE_0,
    "data.remote_retries": _FROM_0,
    "tracker.log_every": _FROM_1,
    "train.global_batch_size": _FROM_1,
    "train.pack_length": _FROM_1,
    "train.micro_batch_size": _FROM_1,
    "train.epochs": _FROM_1,
    "train.max_steps": _FROM_1,
    "train.learning_rate": _FROM_0,
    "train.projector_learning_rate": _FROM_0,
    "train.router_learning_rate": _FROM_0,
    "train.language_model_learning_rate": _FROM_0,
    "train.tower_learning_rate": _FROM_0,
    "train.tower_layer_decay": Range("must be above 0 and at most 1", math.nextafter(0, 1), 1),
    "train.min_learning_rate": _FROM_0,
    "train.warmup_steps": _FROM_0,
    "train.warmup_ratio": _SHARE,
    "train.weight_decay": _FROM_0,
    "train.max_grad_norm": _FROM_0,
    "train.checkpoint_every_n": _FROM_1,
    "train.num_workers": _FROM_0,
    "train.seed": _FROM_0,
    "train.save_every": _FROM_1,
    "train.keep_checkpoints": _FROM_1,
    "train.validate_every": _FROM_0,
    "train.validation_answers": _FROM_0,
    "train.conflict_every": _FROM_0,
    "train.max_bad_steps": _FROM_1,
    "train.check_ranks_every": _FROM_0,
    "check.max_bad_records": _SHARE,
    "check.max_missing_images": _SHARE,
    "check.max_bad_images": _SHARE,
    "check.max_truncated": _SHARE,
    "check.max_duplicates": _SHARE,
    "check.max_overlap": _SHARE,
    "check.huge_pixels": _FROM_1,
}
"""The allowed values of every number of a configuration, by key; `data.mixture` has `check_lambdas`."""

PATHS = (
    "model.language_model", "model.vision_tower.name", "model.vision_tower.weights", "data.sources.*.annotations",
    "data.sources.*.image_folder", "data.cache_dir", "train.output_dir", "train.deepspeed_config", "train.resume",
    "check.evaluation_images", "projector_weights", "init_from",
)  # fmt: skip
"""Keys whose value is a path or a list of paths."""
MAY_CHANGE = (
    "train.output_dir", "train.resume", "train.accept_changed", "train.break_lock", "train.num_workers",
    "train.batching", "train.pack_length", "train.micro_batch_size", "train.distributed", "train.deepspeed_config",
    "train.compile", "train.activation_checkpointing", "train.checkpoint_every_n", "train.save_every",
    "train.checkpoint_files",
    "train.keep_checkpoints", "train.validate_every", "train.validation_answers", "train.check_ranks_every",
    "train.conflict_every", "train.max_bad_steps", "data.max_bad_image_share", "model.attn_implementation", "device",
    "data.follow_links", "data.allow_remote", "data.cache_dir", "data.cache_gb", "data.remote_timeout",
    "data.remote_retries",
    "tracker.*", "check.*",
    # Paths: their contents are compared. Those that a run starts from are not read again.
    "model.language_model", "model.vision_tower.weights", "data.sources.*", "projector_weights", "init_from",
)  # fmt: skip
"""Configuration keys that a resumed run may change: they affect speed, memory, saving or reporting only, beyond the
rounding of float arithmetic. Every other key is compared, new ones included."""
_checks: ContextVar[bool] = ContextVar("checks", default=True)
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})")


PROTOCOLS = ("s3", "gs", "hf")
"""Kinds of remote paths that data may have."""
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as `s3://bucket/folder`."""
    return _ADDRESS.match(str(path)) is not None


def _check_remote(key: str, path: str, allowed: bool) -> None:
    """Raise ConfigError for an address of a protocol that is not read, or if remote data are not allowed."""
    found = _ADDRESS.match(path)
    if found is None:
        return
    if found[1] not in PROTOCOLS:
        kinds = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ConfigError(f"{key} is {path!r}; remote data are read from {kinds}, else name a file or folder")
    if not allowed:
        raise ConfigError(
            f"{key} is {path!r}, and data.allow_remote is false; set it to true to read data from a server"
        )


def expand_path(path: str | os.PathLike[str], key: str) -> str:
    """`path` with `~` and environment variables replaced. Raises ConfigError, which names `key`, for an unknown one."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ConfigError(f"{key} is {path!r}; it must be a path")
    path = str(path)
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unknown := _VARIABLE.search(expanded):
        raise ConfigError(
            f"{key} is {path!r}, and the environment variable {unknown.group().strip('${}')!r} is not set; set it, or "
            "write the path out"
        )
    if expanded.startswith("~") and path.startswith("~"):
        raise ConfigError(f"{key} is {path!r}, and there is no such user; write the path out")
    return expanded


def _check_section(section: Any, prefix: str, pattern: str | None = None) -> None:
    """Expand the paths of a section, in place, and check its numbers; `load_config` turns this off.

    Args:
        section: One dataclass of the configuration.
        prefix: Its key with a final dot, for messages; empty for RunConfig.
        pattern: Its key in RANGES and PATHS if that differs.

    Raises:
        ConfigError: a number is outside its range or of another type, or a path has an unknown variable.
    """
    for option in dataclasses.fields(section) if _checks.get() else ():
        name, value = f"{prefix}{option.name}", getattr(section, option.name)
        key, kinds = f"{pattern or prefix}{option.name}", get_args(option.type) or (option.type,)
        if value is None and NoneType in kinds:
            continue
        if key in PATHS and isinstance(value, list):
            setattr(section, option.name, [expand_path(path, name) for path in value])
        elif key in PATHS:
            setattr(section, option.name, expand_path(value, name))
        elif key in RANGES:
            _check_number(name, value, RANGES[key], whole=float not in kinds)


def _check_number(key: str, value: Any, allowed: Range, *, whole: bool) -> None:
    rule = None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        rule = f"must be a {'whole ' * whole}number"
    elif not abs(value) < 2.0**63:
        rule = "must be a finite number below 2^63"
    elif not allowed.low <= value <= allowed.high:
        rule = allowed.rule
    if rule:
        raise ConfigError(f"{key} is {value!r}; it {rule}")


@dataclass(kw_only=True)
class VisionTowerConfig:
    """The image encoder: a ViT of open_clip (or of timm) or of Hugging Face, see docs/models.md."""

    name: str = "ViT-L-14-336-quickgelu"
    """An open_clip model name, a JSON config of open_clip or Hugging Face (`*.json`), or the directory of a tower."""
    weights: str = _OPENAI_TOWER
    """State dict of the whole model or of its visual part (`.safetensors`, or `.pt` with plain tensors). Where `name`
    is a directory, the default is the weight file in it."""
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh", "swiglu"] = "quick_gelu"
    """The activation the weights were trained with: `quick_gelu` (OpenAI), `gelu`, `gelu_pytorch_tanh` (SigLIP of
    Hugging Face) or `swiglu`. A model with another one is refused."""
    select_layer: int = -2
    """The block whose output is used, counted as in Hugging Face's `hidden_states` (LLaVA-1.5: -2)."""
    image_size: int | None = None
    """Side of an image in pixels. None takes the tower's own. DINOv2 takes any size, all others only their own."""
    image_mean: list[float] | None = None
    """Mean of the pixels (0 to 1) by colour. None takes what the tower's files say; a value that differs from theirs is
    refused."""
    image_std: list[float] | None = None
    """Standard deviation of the pixels, likewise."""

    def __post_init__(self) -> None:
        _check_section(self, "model.vision_tower.")
        folder = Path(self.name)
        if folder.is_dir():
            for config, weights in TOWER_FILES:
                if (folder / config).is_file() and (folder / weights).is_file():
                    self.name = str(folder / config)
                    self.weights = str(folder / weights) if self.weights == _OPENAI_TOWER else self.weights
                    break


@dataclass(kw_only=True)
class TrainedPartsConfig:
    """Which parts of the model train, beside what `adapter` adds to it."""

    language_model: Literal["full", "adapters", "none"] = "adapters"
    """`adapters`: only what `adapter` adds, the language model itself is frozen; `full`: all its weights, as in LLaVA's
    finetune.sh, together with the adapter if there is one; `none`: nothing, and an adapter is refused."""
    tower: Literal["none", "last_n", "all"] = "none"
    """The vision tower: frozen, its last `tower_blocks` blocks, or all of it. Blocks above
    model.vision_tower.select_layer do not run and do not count."""
    tower_blocks: int | None = None
    """n of `tower: last_n`."""
    projector: bool | None = None
    """Whether the projector trains; null takes train_projector."""

    def __post_init__(self) -> None:
        _check_section(self, "model.train.")
        if (self.tower == "last_n") != (self.tower_blocks is not None):
            raise ConfigError(
                f"model.train.tower is {self.tower!r} and model.train.tower_blocks is {self.tower_blocks}: 'last_n' "
                "needs the number of blocks, and nothing else takes one"
            )


@dataclass(kw_only=True)
class ModelConfig:
    """The parts of the multimodal model."""

    language_model: str = "playground/models/vicuna-7b-v1.5"
    """Directory of a Hugging Face causal LM with its tokenizer."""
    vision_tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    projector: str = "mlp2x_gelu"
    """`linear` or `mlp<N>x_gelu` (LLaVA-1.5: `mlp2x_gelu`). `pixel_shuffle+` before it makes one token of 2 x 2
    patches, a quarter of the tokens of an image. `+ends` behind it adds learned vectors around an image, `+newline` one
    that ends each row of tiles (`data.image_aspect_ratio: anyres`)."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel of the language model. Packed rows cannot use `eager`."""
    quantization: Quantization = "none"
    """Keep the language model's frozen linears (not its head) in 8 bits, or in 4 bits (NF4 with double quantisation, as
    in QLoRA and LLaVA), with bitsandbytes (extra `quant`). The directory holds the unquantised weights."""
    train: TrainedPartsConfig = field(default_factory=TrainedPartsConfig)

    def __post_init__(self) -> None:
        _check_section(self, "model.")
        if self.train.language_model == "full" and self.quantization != "none":
            raise ConfigError(
                f"model.train.language_model is 'full' and model.quantization is {self.quantization!r}: quantised "
                "weights are frozen; set --model.quantization none, or train an adapter (language_model 'adapters')"
            )


Preset = Literal[
    "paper", "released", "coupled", "best", "by-image", "by-source", "hydralora", "asymlora", "coin-moelora",
    "moelora-task", "loramoe", "mocle", "octavius", "mixlora", "mola", "molora",
]  # fmt: skip
"""Names of `PRESETS` of `llava_mole.mole`, which takes too long to import for a command's options."""
ROUTED_BY_TASK: tuple[Preset, ...] = ("moelora-task", "mocle")
"""Presets with granularity `task`: their routers need to know a sample's source."""


@dataclass(kw_only=True)
class AdapterConfig:
    """The adapter of the frozen language model: none, plain LoRA or MoLE."""

    method: Literal["none", "lora", "mole"] = "none"
    """`lora`: PEFT's plain LoRA on all linears (LLaVA-Mix); `mole`: LoRA on attention, K experts in the FFN."""
    rank: int = 32
    """LoRA rank r of every adapter (paper, section 4)."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / rank. None takes 2 * rank, as in LLaVA-1.5 and the released code; for
    presets of other methods, their alpha / rank."""
    dropout: float | None = None
    """Dropout on the adapters' input. None takes the preset's (0 for `lora` and `paper`)."""
    num_experts: int = 3
    """K, the experts of a router (paper: 3 for three domains, 2 for two). Preset `mola` and options with
    experts_by_layer do not read it."""
    preset: Preset = "paper"
    """Named set of MoLE options, see docs/mole.md; from `hydralora` on those of docs/related-methods.md."""
    options: dict[str, Any] = field(default_factory=dict)
    """MoLE options that differ from the preset, e.g. `{expert_scale: straight_through, balance_coef: 0.001}`."""

    def __post_init__(self) -> None:
        _check_section(self, "adapter.")


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of the mixture."""

    annotations: str
    """LLaVA JSON (one list), JSONL, or the directory of a prepared data set. Or what holds its images itself:
    WebDataset tar shards, parquet files (a file, a folder, a pattern such as `train-*.tar` or `{000..127}.tar`), or a
    folder that `datasets` saved."""
    image_folder: str = "playground/data"
    """Root of the records' image paths; images outside it are refused. Not read for images inside shards."""
    follow_links: bool = False
    """Whether symbolic links below image_folder may lead out of it."""


@dataclass(kw_only=True)
class DataConfig:
    """The training data, and how a record becomes tokens."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> dataset (`annotations` and `image_folder`)."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Name -> lambda, the sampling frequency (default 1: each sample once an epoch; 0.5: half of them; 2: twice)."""
    template: str = "vicuna_v1"
    """Conversation template; `plain` for stage `pretrain`."""
    image_aspect_ratio: AspectRatio = "pad"
    """`pad`: to a square with the CLIP mean colour (LLaVA stage 2); `square`: centre crop (LLaVA stage 1); `anyres`:
    the whole image and tiles of it at a higher resolution, as in LLaVA-NeXT; `native`: the image in its own shape, for
    SigLIP2's NaFlex towers (docs/any_resolution.md)."""
    image_grid_pinpoints: list[list[int]] | None = None
    """For `anyres`: the resolutions that an image may be tiled at, pairs of height and width in pixels, multiples of
    the tower's image size. None takes LLaVA-NeXT's: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 tiles."""
    image_modes: ImageModes = "llava"
    """How images that are not 8-bit, opaque and upright become RGB, in training and inference. `llava`: as in LLaVA
    (more bits are clipped, alpha is dropped, EXIF rotation is ignored), logged once per source; `rescale`: as in an
    image viewer (values stretched to 0..255, white background, upright); `strict`: upright, and unreadable if deep or
    transparent."""
    image_draft: bool = False
    """Decode large JPEGs at a half, quarter or eighth of their size if the shorter side keeps twice the tower's. It is
    faster, but pixels differ by up to 3/255 on average; evaluation never does it."""
    max_length: int = 4096
    """Longest sample in tokens, image tokens included."""
    max_length_policy: Literal["truncate", "error", "drop", "truncate_history"] = "truncate"
    """What happens to longer samples; their numbers are reported by source. `truncate`: cut at the end, as in LLaVA;
    `error`: refuse to start; `drop`: leave out; `truncate_history`: remove the oldest rounds, except the last one and
    those with an image, and drop the sample if it still does not fit."""
    special_tokens: Literal["escape", "keep", "refuse"] = "keep"
    """Control tokens inside texts: the tokenizer's special tokens (`</s>`), and bracketed markers of the template
    (`[INST]`). `keep`: they act as such, as in LLaVA; `escape`: a space after the first character makes them ordinary
    text, the safe choice for data of unknown origin; `refuse`: training does not start."""
    validation_samples: int = 0
    """Samples of each source held out of training for the validation loss; 0 turns it off."""
    max_bad_image_share: float = 0.001
    """Share of a source's samples whose image may be unreadable. Such samples are replaced and counted; the run stops
    when they exceed this share and 10 samples. 0 stops at the first."""
    follow_links: bool = False
    """`follow_links` of every source."""
    allow_remote: bool = False
    """Whether sources may be read from servers: `s3://`, `gs://` and `hf://` (extra `remote`)."""
    cache_dir: str = ".cache/llava_mole"
    """Folder for the indexes of shards, the token counts of JSON files, and the cache of remote data; best a fast local
    disk, or a shared one."""
    cache_gb: float = 50.0
    """Most gigabytes (10^9 bytes) of data in the cache; what was not used for longest is removed. Indexes do not
    count."""
    remote_timeout: float = 60.0
    """Seconds after which a request to a server counts as failed."""
    remote_retries: int = 6
    """How often a failed request is tried again, after pauses of 0.5, 1, 2, ... up to 30 seconds, before the run stops.
    Refusals (credentials, no such bucket) are not tried again."""

    def __post_init__(self) -> None:
        if self.sources or self.mixture:  # `RunConfig` refuses data without sources
            check_lambdas(self.sources, self.mixture)
        _check_section(self, "data.")
        self._check_tiles()
        for name, source in self.sources.items():
            _check_section(source, f"data.sources.{name}.", "data.sources.*.")
            for key in ("annotations", "image_folder") if _checks.get() else ():
                _check_remote(f"data.sources.{name}.{key}", getattr(source, key), self.allow_remote)

    def _check_tiles(self) -> None:
        pinpoints, tiled = self.image_grid_pinpoints, self.image_aspect_ratio == "anyres"
        for pair in pinpoints or ():
            if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
                raise ConfigError(
                    f"data.image_grid_pinpoints has {pair!r}; give pairs of height and width in pixels, such as "
                    "[[336, 672], [672, 336]]"
                )
        if pinpoints is not None and not tiled:
            raise ConfigError(
                f"data.image_grid_pinpoints is for data.image_aspect_ratio 'anyres', which is "
                f"{self.image_aspect_ratio!r} here; leave it out (null)"
            )
        if self.image_draft and self.image_aspect_ratio in ("anyres", "native"):
            raise ConfigError(
                f"data.image_draft reduces images, on whose size the tokens of data.image_aspect_ratio "
                f"{self.image_aspect_ratio!r} depend; set it to false"
            )


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`."""

    wandb_project: str | None = None
    """Weights & Biases project; None turns it off."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` needs no account; upload later with `wandb sync`."""
    tensorboard: bool = False
    """Also write `tensorboard/` in the run directory (extra `tensorboard`); `tensorboard --logdir RUN` shows it."""
    log_every: int = 1
    """Optimizer steps between two entries."""

    def __post_init__(self) -> None:
        _check_section(self, "tracker.")


@dataclass(kw_only=True)
class TrainConfig:
    """Optimization, checkpoints and ranks."""

    output_dir: str
    """Run directory: config.yaml, metrics.jsonl, environment.json and the checkpoints."""
    global_batch_size: int = 64
    """Samples per optimizer step over all ranks."""
    batching: Literal["packed", "padded", "grouped"] = "packed"
    """How the samples of a step become rows. `packed`: several in a row, spread over ranks by cost; the same result as
    `padded` for a fraction of the work. `padded`: one a row. `grouped`: padded, in LLaVA's modality-length order."""
    pack_length: int | None = None
    """Most tokens of a packed row, which bounds memory. None takes data.max_length."""
    micro_batch_size: int = 1
    """Samples per forward pass on one rank (`padded`, `grouped`). micro_batch_size x ranks must divide
    global_batch_size; the quotient is the number of accumulation steps."""
    epochs: int = 1
    """Passes over the mixture."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the learning-rate schedule spans them. None sets no limit."""
    learning_rate: float = 2e-5
    """Peak learning rate of adapters and projector (paper, Table 1)."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; its floor scales with it. None takes learning_rate."""
    router_learning_rate: float | None = None
    """Peak learning rate of the routers; its floor scales with it. None takes learning_rate."""
    language_model_learning_rate: float | None = None
    """Peak learning rate of the language model's own weights (`model.train.language_model: full`). None takes
    learning_rate."""
    tower_learning_rate: float | None = None
    """Peak learning rate of the vision tower's last block (`model.train.tower`). None takes learning_rate."""
    tower_layer_decay: float = 1.0
    """Factor between the rates of a tower block and the one above it (layer-wise decay); 1 gives all the same rate."""
    min_learning_rate: float = 2e-6
    """Floor of the cosine schedule (paper, Table 1)."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up. None takes 500 (paper, Table 1), unless warmup_ratio is given. More steps than
    the data lasts are refused, and more than a fifth of the run gives a warning."""
    warmup_ratio: float | None = None
    """The warm-up as a share of the optimizer steps (LLaVA: 0.03), in place of warmup_steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay; LLaVA uses 0."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 turns it off."""
    loss_reduction: Literal["sample_mean", "token_mean"] = "sample_mean"
    """`sample_mean`: every sample weighs the same (the paper's one sample a GPU); `token_mean`: every token does."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; optimizer state is always float32."""
    activation_checkpointing: Literal["none", "every_n", "all"] = "none"
    """Recompute the activations of no decoder layer, of every n-th or of all in the backward pass: less memory, up to a
    third more time. `llava-mole plan` recommends one for a GPU."""
    checkpoint_every_n: int = 2
    """n of `activation_checkpointing: every_n`."""
    compile: bool = False
    """Compile each decoder layer with torch.compile; the first steps take minutes."""
    distributed: Literal["zero2", "ddp", "zero3", "fsdp2"] = "zero2"
    """How ranks share the work. `zero2` (DeepSpeed) and `ddp` (torch) keep the whole model on every rank; `zero3`
    (DeepSpeed) and `fsdp2` (torch) spread its weights too, for a language model that trains as a whole. One process
    without a launcher uses none of them."""
    deepspeed_config: str = ZERO2_FILE
    """DeepSpeed's settings for `zero2` and `zero3` (scripts/zero3.json, which `zero3` takes by itself); "auto" values
    are filled from this configuration."""
    num_workers: int = 4
    """Data loader processes per rank, at most the cores of the machine; 0 loads in the training process."""
    seed: int = 42
    """Seed of the initialisation and the sample order."""
    save_every: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    checkpoint_files: Literal["whole", "sharded"] = "whole"
    """`whole`: rank 0 gathers everything and writes files that load anywhere. `sharded`: every rank writes what it
    holds, where the whole (12 bytes a trained parameter) does not fit into the memory of rank 0's machine; the run
    resumes on any number of ranks, and `llava-mole consolidate` makes the checkpoint whole."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; an older one is deleted after a newer one is complete."""
    validate_every: int = 0
    """Optimizer steps between validation losses; the last step always has one. 0 turns it off."""
    validation_answers: int = 0
    """Held-out samples of each source that every validation also answers greedily and compares with the reference
    (`validation_exact`, `validation_f1`)."""
    conflict_every: int = 0
    """Optimizer steps between measurements of the conflict between sources, written to `conflict.jsonl`
    (docs/meters.md); the last step always has one. Each costs about a step for every source. 0 turns it off."""
    resume: str | None = None
    """`auto`: the newest valid checkpoint of output_dir, if any; or the directory of a checkpoint."""
    accept_changed: list[str] = field(default_factory=list)
    """Keys that may differ from the checkpoint's run when resuming, e.g. `[train.max_steps, data.sources.NAME]`. Any
    other change that affects the result is refused."""
    break_lock: bool = False
    """Take over output_dir from a process on another machine that has ended without releasing it."""
    max_bad_steps: int = 3
    """Consecutive steps with a loss or gradient that is not finite before the run stops; each of them is skipped."""
    check_ranks_every: int = 500
    """Optimizer steps between comparisons of the ranks' trainable parameters; 0 compares only before saving."""

    def __post_init__(self) -> None:
        _check_section(self, "train.")
        if self.distributed in SHARDED:
            self._check_sharded()
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps} and train.warmup_ratio is {self.warmup_ratio}: give one, "
                "and set the other to null"
            )
        if self.warmup_ratio is None and self.warmup_steps is None:
            self.warmup_steps = DEFAULT_WARMUP
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"train.min_learning_rate {self.min_learning_rate} is above train.learning_rate {self.learning_rate}"
            )

    def _check_sharded(self) -> None:
        """Raise ConfigError for options that read whole weights outside of a step's forward pass."""
        if self.distributed == "zero3" and self.deepspeed_config == ZERO2_FILE:
            self.deepspeed_config = ZERO3_FILE
        reasons = {
            "train.validation_answers": (self.validation_answers, 0, "ranks would wait for each other at every token"),
            "train.conflict_every": (self.conflict_every, 0, "the meter differentiates the model beside the engine"),
            "train.compile": (self.compile, False, "compiled layers would not gather their weights"),
        }
        for key, (value, allowed, reason) in reasons.items():
            if value != allowed:
                raise ConfigError(
                    f"{key} is {str(value).lower()} and train.distributed is {self.distributed!r}, which spreads the "
                    f"weights over the ranks: {reason}; set --{key} {str(allowed).lower()}, or use 'zero2' or 'ddp'"
                )


@dataclass(kw_only=True)
class CheckConfig:
    """Limits of `llava-mole check-data`, as shares of a source's records or of its image files."""

    evaluation_images: list[str] = field(default_factory=list)
    """Folders of images and question files (`.jsonl`) whose images must not be trained on."""
    max_bad_records: float = 0.0
    """Records that training refuses: unknown roles, markers that do not fit, no answer, nothing left to supervise, or
    too long under the data.max_length_policy `error`."""
    max_missing_images: float = 0.0
    """Images that are missing or outside the image folder; training does not start with one."""
    max_bad_images: float = 0.001
    """Images that do not decode; training replaces such samples (data.max_bad_image_share)."""
    max_truncated: float = 0.2
    """Records longer than data.max_length that are cut, shortened or dropped (data.max_length_policy)."""
    max_duplicates: float = 0.5
    """Records that repeat another one word for word, as after up-sampling."""
    max_overlap: float = 0.0
    """Share of the evaluation images that are also trained on, compared by content."""
    huge_pixels: int = 50_000_000
    """List images with more pixels than this; they take memory and seconds in a data loader."""

    def __post_init__(self) -> None:
        _check_section(self, "check.")


@dataclass(kw_only=True)
class RunConfig:
    """A complete run."""

    stage: Literal["pretrain", "finetune"]
    """`pretrain` trains the projector on captions; `finetune` trains adapters and projector on conversations. Both
    train what else `model.train` names."""
    train: TrainConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    projector_weights: str | None = None
    """Projector to start from: a run or checkpoint directory of stage `pretrain`, or a `.safetensors` file."""
    init_from: str | None = None
    """Run or checkpoint directory whose adapter and projector this run starts from, with a new optimizer and its own
    data (task fine-tuning). The adapter must be configured as it was there."""
    train_projector: bool = True
    """Whether the projector trains, as in both stages of LLaVA-1.5."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""

    def __post_init__(self) -> None:
        _check_section(self, "")
        check_lambdas(self.data.sources, self.data.mixture)
        if self.stage == "pretrain" and self.adapter.method != "none":
            raise ConfigError(
                f"adapter.method is {self.adapter.method!r} in stage 'pretrain', which has no adapter; use 'none'"
            )
        self._check_trained_parts()
        if self.stage == "pretrain" and not self.train_projector:
            raise ConfigError("train_projector is false in stage 'pretrain': nothing would train")
        tiled, ends_rows = self.data.image_aspect_ratio == "anyres", self.model.projector.endswith("+newline")
        if tiled != ends_rows:
            plain = self.model.projector.partition("+")[0]
            raise ConfigError(
                f"data.image_aspect_ratio is {self.data.image_aspect_ratio!r} and model.projector is "
                f"{self.model.projector!r}; "
                + (
                    f"'anyres' ends each row of tiles with a learned vector: set model.projector to '{plain}+newline'"
                    if tiled
                    else f"'+newline' is for 'anyres': set model.projector to {plain!r}, or the ratio to 'anyres'"
                )
            )
        if self.data.image_aspect_ratio == "native" and "+" in self.model.projector:
            raise ConfigError(
                f"model.projector is {self.model.projector!r}, but with data.image_aspect_ratio 'native' each patch is "
                "a token and nothing stands beside them; set it to 'mlp2x_gelu' or another kind without '+'"
            )
        if self.init_from is not None and self.projector_weights is not None:
            raise ConfigError("init_from brings its own projector; leave projector_weights out (null)")
        if self.train.pack_length is not None and self.train.pack_length < self.data.max_length:
            raise ConfigError(
                f"train.pack_length {self.train.pack_length} is below data.max_length {self.data.max_length}: the "
                "longest samples would not fit into a row"
            )
        active = [name for name in self.data.sources if self.data.mixture.get(name, 1.0) > 0]
        if self.train.conflict_every and len(active) < 2:
            raise ConfigError(
                f"train.conflict_every is {self.train.conflict_every}, and the mixture has one source ({active[0]}): "
                "there is nothing to compare; set it to 0"
            )
        self._check_validation()

    def _check_trained_parts(self) -> None:
        parts, adapter, train = self.model.train, self.adapter, self.train
        if parts.projector is not None:
            if parts.projector and not self.train_projector and _checks.get():
                raise ConfigError("model.train.projector is true and train_projector is false; leave one of them out")
            self.train_projector = parts.projector
        if parts.language_model == "none" and adapter.method != "none":
            raise ConfigError(
                f"model.train.language_model is 'none' and adapter.method is {adapter.method!r}: use 'adapters', or "
                "leave the adapter out"
            )
        own = parts.language_model == "full" or parts.tower != "none"
        if self.stage == "pretrain" and not self.train_projector and not own:
            raise ConfigError("train_projector is false in stage 'pretrain': nothing would train")
        if parts.language_model == "full" and adapter.options.get("modules_to_save"):
            raise ConfigError(
                f"adapter.options.modules_to_save is {adapter.options['modules_to_save']} and "
                "model.train.language_model is 'full', which trains these modules already; leave the option out"
            )
        for key, part, trains in (
            ("language_model_learning_rate", "language_model", parts.language_model == "full"),
            ("tower_learning_rate", "tower", parts.tower != "none"),
        ):
            if getattr(train, key) is not None and not trains and _checks.get():
                raise ConfigError(
                    f"train.{key} is {getattr(train, key)}, but model.train.{part} is {getattr(parts, part)!r}, so "
                    "nothing would use it; leave it out"
                )
        if train.distributed in SHARDED and self.model.quantization != "none":
            raise ConfigError(
                f"train.distributed is {train.distributed!r} and model.quantization is {self.model.quantization!r}: "
                "quantised weights cannot be spread over ranks; use 'zero2' or 'ddp', which hold them once a rank"
            )

    def _check_validation(self) -> None:
        held_out = self.data.validation_samples
        every, answers = self.train.validate_every, self.train.validation_answers
        if not 0 <= answers <= held_out:
            raise ConfigError(
                f"train.validation_answers is {answers}; it must be 0 to data.validation_samples ({held_out}), of "
                "which it takes the first"
            )
        options = self.adapter.options
        if self.adapter.method == "mole" and self.adapter.preset in ROUTED_BY_TASK:
            options = {"granularity": "task", **options}
        for key, value in (("router", "oracle"), ("granularity", "task"), ("granularity", "given")):
            if answers and options.get(key) == value:
                raise ConfigError(
                    f"train.validation_answers cannot be used with adapter.options.{key} {value!r}: that router needs "
                    "to be told a sample's source, which a prompt does not have; set it to 0"
                )
        if (held_out > 0) != (every > 0):
            raise ConfigError(
                f"data.validation_samples is {held_out} and train.validate_every is {every}: set both above 0, or "
                "neither"
            )


class Option(NamedTuple):
    """One key of a configuration."""

    key: str
    """With a `*` for the name of a source."""
    kind: Any
    """Its type."""
    section: type
    """The dataclass that it belongs to."""

    @property
    def meaning(self) -> str:
        """The text under the field in its dataclass, as one line."""
        return _meanings(self.section).get(self.key.rpartition(".")[2], "")


@functools.cache
def _meanings(section: type) -> dict[str, str]:
    """Field -> the text under it."""
    from docstring_parser import parse_from_object

    found = parse_from_object(section).params
    return {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in found}


def options(section: type = RunConfig, prefix: str = "") -> Iterator[Option]:
    """Every key below a section of the configuration, in order."""
    for option in dataclasses.fields(section):
        key, kinds = f"{prefix}{option.name}", get_args(option.type) or (option.type,)
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if isinstance(nested, type):
            yield from options(nested, f"{key}.{ANY}." if get_origin(option.type) is dict else f"{key}.")
        else:
            yield Option(key, option.type, section)


def parse_run_config(
    arguments: Sequence[str], prog: str = "llava-mole train", *, flags: Mapping[str, str] | None = None
) -> RunConfig:
    """Build a `RunConfig` from `[CONFIG.yaml] [--key.sub value ...]`; later arguments win.

    `--SECTION FILE.yaml` replaces only the keys that FILE has; which others CONFIG still gives is logged.

    Args:
        arguments: Of the command line.
        prog: The command, for its help.
        flags: Options without a value that the command reads itself, with their help.

    Raises:
        ConfigError: unknown key, wrong type, value that is not allowed, or unreadable file; the message names it.
    """
    _log_merged_files(arguments)
    # Importing it takes half a second, which commands that only name a section need not wait for.
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of every option
    arguments = [re.sub(r"^--init-from(?==|$)", "--init_from", argument) for argument in arguments]
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--config", expand_path(arguments[0], "the config file")]
    if arguments[:1] == ["--config"] and len(arguments) > 1 and not Path(arguments[1]).is_file():
        raise ConfigError(f"config file {arguments[1]!r} does not exist; the shipped ones are in configs/")
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} CONFIG.yaml [--key.sub VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Train one stage; see configs/ for examples. A value on the command line replaces the one in "
        "CONFIG, and --SECTION FILE.yaml the keys that FILE has.",
        formatter_class=functools.partial(DefaultHelpFormatter, width=HELP_WIDTH),  # type: ignore[arg-type]
    )
    parser.add_argument("--config", action="config", help="YAML file; may come first without the option name")
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_class_arguments(RunConfig, as_group=False)
    if {"-h", "--help"} & set(arguments):
        actions = {action.dest: action for action in parser._actions}
        for key in ("adapter.preset", "model.vision_tower.activation"):
            actions[key].metavar = "NAME"  # its text lists the names
        actions["data.image_grid_pinpoints"].metavar = "PAIRS"  # its own name, twice, is wider than a line
        keys = [f"--data.sources.NAME.{option.key}: {option.meaning}" for option in options(SourceConfig)]
        actions["data.sources"].help = " ".join([f"{actions['data.sources'].help}", *keys])
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, yaml.YAMLError) as error:
        file = Path(arguments[1]) if arguments[:1] == ["--config"] and len(arguments) > 1 else None
        problem = explained(str(error), file, arguments, [option.key for option in options()])
        raise ConfigError(f"{problem} (see `llava-mole train --help` for the keys)") from None
    return RunConfig(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)})


def _log_merged_files(arguments: Sequence[str]) -> None:
    """Log which keys of CONFIG stay under `CONFIG --SECTION FILE`: FILE replaces only the keys that it has."""
    if not arguments or arguments[0].startswith("-"):
        return
    split = [part for argument in arguments[1:] for part in argument.split("=", 1)]
    for option, file in itertools.pairwise(split):
        section = option.removeprefix("--")
        if option == f"--{section}" and section in _SECTIONS and os.path.isfile(file):
            kept = sorted(_section_of(Path(arguments[0]), section).keys() - _mapping_in(Path(file)).keys())
            if kept:
                keys = ", ".join(f"{section}.{key}" for key in kept)
                logger.info("--%s %s is merged into %s, which still gives %s", section, file, arguments[0], keys)


def _section_of(config: Path, section: str) -> Mapping[str, Any]:
    """A section in a YAML file, or in the file that it names; empty if it is neither."""
    value = _mapping_in(config).get(section)
    return _mapping_in(config.parent / value) if isinstance(value, str) else value if isinstance(value, dict) else {}


def _mapping_in(file: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; empty if there is none, which the parser reports."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), prog: str = "llava-mole train"
) -> RunConfig:
    """Read the configuration that a run has saved, with `--key.sub value` overrides.

    Numbers and paths were checked when it started and are taken as they are: an earlier version allowed more, and what
    it trained must still load. With overrides all are checked.
    """
    reset = _checks.set(bool(overrides))
    try:
        return parse_run_config(["--config", str(path), *overrides])
    finally:
        _checks.reset(reset)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Every field as nested plain values, as in `config.yaml`."""
    return dataclasses.asdict(config)


def save_config(config: RunConfig | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a configuration, or the result of `config_to_dict`, as YAML."""
    values = dict(config) if isinstance(config, Mapping) else config_to_dict(config)
    write_text(Path(path), yaml.safe_dump(values, sort_keys=False))


def check_lambdas(names: Collection[str], lambdas: Mapping[str, float]) -> None:
    """Raise ConfigError if a lambda is negative, not finite or of an unknown source, or if every source's is 0."""
    for name, value in lambdas.items():
        if name not in names:
            raise ConfigError(f"data.mixture.{name}: no such source; there are {', '.join(names) or 'none'}")
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"data.mixture.{name} is {value}; lambda must be a finite number >= 0 (0 leaves it out)")
    if not any(lambdas.get(name, 1.0) for name in names):
        raise ConfigError("data.mixture is empty: give data.sources at least one dataset with lambda > 0")


def check_batch(batching: str, global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise ConfigError if a global batch cannot be spread over `world_size` ranks."""
    per_pass = micro_batch_size * world_size
    if batching == "packed" and global_batch_size < world_size:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is smaller than the {count_of(world_size, 'rank')}: some "
            "would never have a sample; use fewer ranks or a larger batch"
        )
    if batching != "packed" and global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {count_of(world_size, 'rank')} = {per_pass}; change one of them or the number of "
            "ranks, or use train.batching 'packed'"
        )


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The file `train.deepspeed_config` with every "auto" replaced by the run's own value.

    Raises:
        ConfigError: the file is missing or not JSON, asks for another ZeRO stage or offload, or contradicts the run.
    """
    path = Path(train.deepspeed_config)
    shipped = Path(__file__).parents[1] / path  # the default, for a run that starts outside the repository
    if not path.is_file() and shipped.is_file():
        path = shipped
    if not path.is_file():
        raise ConfigError(f"train.deepspeed_config {str(path)!r} does not exist; the shipped one is scripts/zero2.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    zero, stages = settings.get("zero_optimization", {}), (3,) if train.distributed == "zero3" else (1, 2)
    if zero.get("stage") not in stages:
        raise ConfigError(
            f"{path}: zero_optimization.stage is {zero.get('stage')!r}; train.distributed {train.distributed!r} takes "
            f"{' and '.join(map(str, stages))} ('zero2' 1 and 2, 'zero3' 3; without ZeRO: 'ddp' or 'fsdp2')"
        )
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise ConfigError(
                f"{path}: zero_optimization.{key} is set; leave it out. The check for gradients that are not finite "
                "and the checkpoints look for weights and optimizer state on the GPU; more ranks hold less each"
            )
    plain = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}
    for key, allowed in plain.items():
        if zero.get(key, allowed) != allowed:
            raise ConfigError(
                f"{path}: zero_optimization.{key} is {zero[key]!r}; leave it out: ZeRO++ is not supported"
            )
    # DeepSpeed requires consistent batch sizes, but these scale nothing: the trainer marks the last micro-batch of a
    # step itself, because the number of micro-batches differs between packed steps.
    values = {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    for key, value in {**values, "gradient_clipping": train.max_grad_norm}.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f'{path}: {key} is {settings[key]}, the run has {value}; write "auto"')
        settings[key] = value
    precision = settings.setdefault("bf16", {})
    if precision.get("enabled", "auto") == "auto":
        precision["enabled"] = train.precision == "bf16"
    return settings
