"""The configuration of a run: dataclasses, filled from YAML files and `--a.b value` overrides by jsonargparse.

Every hyper-parameter has exactly one home: a YAML file or a default here, with its source. Topology (nodes, GPUs,
addresses) is not configuration; it comes from the launcher's environment. Relative paths are relative to the
working directory, except the names of nested YAML files, which are relative to the file that names them.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from llava_mole.common.errors import ConfigError


@dataclass(kw_only=True)
class CheckConfig:
    """What `llava-mole check-data` lets pass. Shares are of a source's records, or of its image files."""

    evaluation_images: list[str] = field(default_factory=list)
    """Folders of images and question files (`.jsonl`) whose images must not be trained on."""
    max_bad_records: float = 0.0
    """Records that training refuses: unknown roles, markers that do not fit, no answer, nothing left to supervise, too
    long where data.max_length_policy is `error`."""
    max_missing_images: float = 0.0
    """Images that are not there or lead out of the image folder; training does not start with one."""
    max_bad_images: float = 0.001
    """Images that do not decode; training replaces such samples, see data.max_bad_image_share."""
    max_truncated: float = 0.2
    """Records that are longer than data.max_length and cut, shortened or dropped, see data.max_length_policy."""
    max_duplicates: float = 0.5
    """Records that are there again, word for word; up-sampling makes them."""
    max_overlap: float = 0.0
    """Share of the evaluation images that are trained on, by content."""
    huge_pixels: int = 50_000_000
    """Images of more pixels are listed; they take memory and seconds in a data loader."""


def check_limits(config: CheckConfig) -> None:
    """Raise ConfigError for a limit that is no share."""
    for key, value in dataclasses.asdict(config).items():
        if key.startswith("max_") and not 0 <= value <= 1:
            raise ConfigError(f"check.{key} is {value}; it is a share, 0 to 1")


SHARDED = ("zero3", "fsdp")
SHARDED_REASON = (
    "ZeRO stage 3 and FSDP shard the frozen model too, which this trainer's checkpoints do not gather; all that trains "
    "takes about 2 GB of memory, which ZeRO-2 shards"
)


def check_run_config(config: "RunConfig") -> None:
    """Refuse values that no run could use. Raises ConfigError naming the key, its value and what is allowed."""
    check_lambdas(config.data.sources, config.data.mixture)
    if config.stage == "pretrain" and config.adapter.method != "none":
        raise ConfigError(
            f"adapter.method is {config.adapter.method!r} in stage 'pretrain', which trains the projector only; "
            "use 'none'"
        )
    if config.stage == "pretrain" and not config.train_projector:
        raise ConfigError("train_projector is false in stage 'pretrain': nothing would train")
    if config.init_from is not None and config.projector_weights is not None:
        raise ConfigError("init_from brings its own projector; leave projector_weights out (null)")
    if not 0 <= config.data.max_bad_image_share <= 1:
        raise ConfigError(f"data.max_bad_image_share is {config.data.max_bad_image_share}; it is a share, 0 to 1")
    check_limits(config.check)
    train = config.train
    if train.distributed in SHARDED:
        raise ConfigError(f"train.distributed is {train.distributed!r}; use 'zero2' or 'ddp'. {SHARDED_REASON}")
    positive = (
        "global_batch_size",
        "micro_batch_size",
        "epochs",
        "save_every",
        "keep_checkpoints",
        "checkpoint_every_n",
        "max_bad_steps",
    )
    for key in positive:
        if getattr(train, key) < 1:
            raise ConfigError(f"train.{key} is {getattr(train, key)}; it must be at least 1")
    rates = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    for key in (*rates, "check_ranks_every"):
        if getattr(train, key) < 0:
            raise ConfigError(f"train.{key} is {getattr(train, key)}; it must not be negative")
    if train.pack_length is not None and train.pack_length < config.data.max_length:
        raise ConfigError(
            f"train.pack_length {train.pack_length} is below data.max_length {config.data.max_length}: the longest "
            "samples would not fit into a row"
        )
    if train.min_learning_rate > train.learning_rate:
        raise ConfigError(
            f"train.min_learning_rate {train.min_learning_rate} is above train.learning_rate {train.learning_rate}"
        )
    if not 0 <= train.validation_answers <= config.data.validation_samples:
        raise ConfigError(
            f"train.validation_answers is {train.validation_answers}; it must be 0 to data.validation_samples "
            f"({config.data.validation_samples}), of which it takes the first"
        )
    blind = {"router": ("oracle",), "granularity": ("task", "given")}
    for key, values in blind.items():
        if train.validation_answers and config.adapter.options.get(key) in values:
            raise ConfigError(
                f"train.validation_answers cannot be used with adapter.options.{key} {config.adapter.options[key]!r}: "
                "that gate needs to be told a sample's source, which a prompt does not have; set it to 0"
            )
    if (config.data.validation_samples > 0) != (train.validate_every > 0) or config.data.validation_samples < 0:
        raise ConfigError(
            f"data.validation_samples is {config.data.validation_samples} and train.validate_every is "
            f"{train.validate_every}: set both above 0, or neither"
        )
    if config.adapter.rank < 1:
        raise ConfigError(f"adapter.rank is {config.adapter.rank}; it must be at least 1")
    if config.adapter.num_experts < 1:
        raise ConfigError(f"adapter.num_experts is {config.adapter.num_experts}; it must be at least 1")


def check_lambdas(names: Collection[str], lambdas: Mapping[str, float]) -> None:
    """Raise ConfigError for a lambda below 0 or not finite, one without its source, or if no source takes part."""
    for name, value in lambdas.items():
        if name not in names:
            raise ConfigError(f"data.mixture.{name}: no such source; there are {', '.join(names) or 'none'}")
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"data.mixture.{name} is {value}; lambda must be a finite number >= 0 (0 leaves it out)")
    if not any(lambdas.get(name, 1.0) for name in names):
        raise ConfigError("data.mixture is empty: give data.sources at least one dataset with lambda > 0")


def check_batch(batching: str, global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise ConfigError where a global batch cannot be spread over `world_size` ranks."""
    per_pass = micro_batch_size * world_size
    if batching == "packed" and global_batch_size < world_size:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is smaller than the {world_size} ranks: some would never "
            "have a sample; use fewer ranks or a larger batch"
        )
    if batching != "packed" and global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {world_size} ranks = {per_pass}; change one of them or the number of ranks, or use "
            "train.batching 'packed'"
        )


Quantization = Literal["none", "8bit", "4bit"]


@dataclass(kw_only=True)
class VisionTowerConfig:
    """The frozen image encoder, an open_clip model."""

    name: str = "ViT-L-14-336-quickgelu"
    """An open_clip model name, or the path of an open_clip JSON config (`*.json`)."""
    weights: str = "playground/models/clip-vit-large-patch14-336/open_clip_model.safetensors"
    """State dict of the whole CLIP model or of its visual part (`.safetensors`, or `.pt` with plain tensors)."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """The activation the weights were trained with (OpenAI: quick_gelu). A model built otherwise is an error."""
    select_layer: int = -2
    """Which block's output is used, counted as in Hugging Face's `hidden_states`; -2 is LLaVA-1.5's."""


@dataclass(kw_only=True)
class ModelConfig:
    """The parts that make up the multimodal model."""

    language_model: str = "playground/models/vicuna-7b-v1.5"
    """Directory of a Hugging Face causal LM with its tokenizer."""
    vision_tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    projector: str = "mlp2x_gelu"
    """`linear` or `mlp<N>x_gelu`; `mlp2x_gelu` is LLaVA-1.5's. `+ends` adds learned vectors around an image."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel of the language model; packed rows need another than `eager`."""
    quantization: Quantization = "none"
    """The language model's frozen linears (not its head) in 8 bits or in 4 (NF4 with double quantisation, as QLoRA and
    LLaVA), through bitsandbytes (extra `quant`). The directory holds the weights unquantised."""


@dataclass(kw_only=True)
class AdapterConfig:
    """What is added to the frozen language model: nothing, plain LoRA, or the mixture of LoRA experts (MoLE)."""

    method: Literal["none", "lora", "mole"] = "none"
    """`lora`: PEFT's plain LoRA on all linears (LLaVA-Mix); `mole`: LoRA on attention, K experts in the FFN."""
    rank: int = 32
    """LoRA rank r of every adapter (paper, section 4)."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / rank. None takes 2 * rank, as LLaVA-1.5 and the released code do."""
    dropout: float | None = None
    """Dropout on the adapters' input. None takes the preset's (0 for `lora` and `paper`)."""
    num_experts: int = 3
    """K, experts in each FFN (paper: 3 for three domains, 2 for two)."""
    preset: Literal["paper", "released", "coupled", "best"] = "paper"
    """Named set of MoLE options, see docs/mole.md."""
    options: dict[str, Any] = field(default_factory=dict)
    """MoLE options that differ from the preset, e.g. `{expert_scale: straight_through, balance_coef: 0.001}`."""


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of the mixture."""

    annotations: str
    """LLaVA JSON (one list), JSONL, or the directory of a prepared data set."""
    image_folder: str = "playground/data"
    """Root of the records' image paths; nothing outside it is read."""


@dataclass(kw_only=True)
class DataConfig:
    """The training data and how a record becomes tokens."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> dataset."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Name -> lambda, the sampling frequency (1: each sample once an epoch; 0.5: half of them; 2: twice). A source
    without an entry has lambda 1."""
    template: str = "vicuna_v1"
    """Conversation template; `plain` for stage `pretrain`."""
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    """`pad`: to a square with the CLIP mean colour (LLaVA stage 2); `square`: centre crop (LLaVA stage 1)."""
    image_draft: bool = False
    """Decode large JPEGs at a half, quarter or eighth of their size, as long as the shorter side keeps twice the
    tower's. Faster for large images, but the pixels differ, by up to 3/255 on average; evaluation never does it."""
    max_length: int = 4096
    """Longest sample in tokens, image tokens included."""
    max_length_policy: Literal["truncate", "error", "drop", "truncate_history"] = "truncate"
    """What becomes of longer samples, counted by source. `truncate`: cut at the end, which is what LLaVA does and so
    the default; `error`: refused at the start; `drop`: left out; `truncate_history`: the oldest rounds go until it
    fits, not those of an image nor the last one, and where that is not enough the sample does."""
    validation_samples: int = 0
    """Samples of each source that are held out of training, for the validation loss; 0 turns it off."""
    max_bad_image_share: float = 0.001
    """Share of a source's samples whose image may be unreadable: such a sample is replaced and counted, beyond this
    share (and 10 samples) the run stops. 0 stops at the first."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`."""

    wandb_project: str | None = None
    """Weights & Biases project; None turns it off."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` needs no account; upload later with `wandb sync`."""
    log_every: int = 1
    """Optimizer steps between two entries."""


@dataclass(kw_only=True)
class TrainConfig:
    """The optimization."""

    output_dir: str
    """Run directory: config.yaml, metrics.jsonl, environment.json and the checkpoints."""
    global_batch_size: int = 64
    """Samples per optimizer step over all ranks."""
    batching: Literal["packed", "padded", "grouped"] = "packed"
    """How a step's samples become rows. `packed`: several in a row, spread over ranks by cost; the same result as
    `padded` at a fraction of the work. `padded`: one a row. `grouped`: padded, in LLaVA's modality-length order."""
    pack_length: int | None = None
    """Most tokens of a packed row, which bounds memory. None takes data.max_length."""
    micro_batch_size: int = 1
    """Samples per forward pass on one rank (`padded`, `grouped`); accumulation follows and must come out whole."""
    epochs: int = 1
    """Passes over the mixture."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (the schedule then spans these steps)."""
    learning_rate: float = 2e-5
    """Peak learning rate of adapters and projector (paper, Table 1)."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector, if another; its floor scales alike."""
    router_learning_rate: float | None = None
    """Peak learning rate of the routers, if another; its floor scales alike."""
    min_learning_rate: float = 2e-6
    """Floor of the cosine schedule (paper, Table 1)."""
    warmup_steps: int = 500
    """Linear warm-up (paper, Table 1)."""
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
    third more time. `llava-mole plan` says which one a GPU needs."""
    checkpoint_every_n: int = 2
    """n of `activation_checkpointing: every_n`."""
    compile: bool = False
    """Compile each decoder layer with torch.compile; the first steps take minutes."""
    distributed: Literal["zero2", "ddp", "zero3", "fsdp"] = "zero2"
    """DeepSpeed ZeRO stage 2 or torch DDP; `zero3` and `fsdp` are refused with the reason. Plain `python` without a
    launcher runs one process without either."""
    deepspeed_config: str = "scripts/zero2.json"
    """DeepSpeed's settings; its "auto" values are filled from this configuration."""
    num_workers: int = 4
    """Data loader processes per rank; 0 loads in the training process."""
    seed: int = 42
    """Seeds initialisation and the sample order."""
    save_every: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted after a newer one is complete."""
    validate_every: int = 0
    """Optimizer steps between two validation losses; the last step always has one. 0 turns it off."""
    validation_answers: int = 0
    """Held-out samples of each source that every validation also answers, greedily, and compares with the reference:
    `validation_exact` and `validation_f1` by source."""
    resume: str | None = None
    """`auto`: newest valid checkpoint of output_dir, if any; or the directory of one."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite before the run gives up; each one is skipped."""
    check_ranks_every: int = 500
    """Optimizer steps between two comparisons of the ranks' trainable parameters; 0 compares before saving only."""


@dataclass(kw_only=True)
class RunConfig:
    """One run, complete."""

    stage: Literal["pretrain", "finetune"]
    """`pretrain` trains the projector only; `finetune` trains adapters and projector."""
    train: TrainConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    projector_weights: str | None = None
    """Projector to start from: a run or checkpoint directory of stage `pretrain`, or a `.safetensors` file."""
    init_from: str | None = None
    """A run or checkpoint directory whose adapter and projector this run starts from, with a new optimizer and its own
    data (task fine-tuning). The adapter must be configured as it was there."""
    train_projector: bool = True
    """Whether the projector trains. True in both stages of LLaVA-1.5."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""


def parse_run_config(arguments: Sequence[str], prog: str = "llava-mole train") -> RunConfig:
    """Build a `RunConfig` from `[CONFIG.yaml] [--key.sub value ...]`; later arguments win.

    Raises:
        ConfigError: unknown key, wrong type or unreadable file; the message names the key or file.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    arguments = [re.sub(r"^--init-from(?==|$)", "--init_from", argument) for argument in arguments]
    if arguments and not arguments[0].startswith("-"):
        if not Path(arguments[0]).is_file():
            raise ConfigError(f"config file {arguments[0]!r} does not exist; the shipped ones are in configs/")
        arguments[:1] = ["--config", arguments[0]]
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, allow_abbrev=False, description="Train one stage; see configs/ for examples."
    )
    parser.add_argument("--config", action="config", help="YAML file; may stand first without the option name")
    parser.add_class_arguments(RunConfig, as_group=False)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error, arguments)) from None
    config = RunConfig(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)})
    check_run_config(config)
    return config


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
    where = f"{arguments[1]}: " if arguments[:1] == ["--config"] else ""
    return where + " ".join(str(error).split()) + " (see `llava-mole train --help` for the keys)"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict of every field, as written to `config.yaml`."""
    return dataclasses.asdict(config)


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the complete, resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a configuration file written by hand or by `save_config`."""
    return parse_run_config([str(path)])


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """`train.deepspeed_config` with every "auto" replaced by the run's own value.

    Raises:
        ConfigError: the file is absent, is no JSON, asks for another ZeRO stage or repeats a number of the run.
    """
    path = Path(config.train.deepspeed_config)
    if not path.is_file():
        raise ConfigError(f"train.deepspeed_config {str(path)!r} does not exist; the shipped one is scripts/zero2.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ConfigError(
            f"{path}: zero_optimization.stage is {stage!r}; allowed are 1 and 2 (without ZeRO: train.distributed "
            f"'ddp'). {SHARDED_REASON}"
        )
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer is set; leave it out. The optimizer's state takes about 2 GB "
            "over all GPUs, and the check for gradients that are not finite looks for them on the GPU"
        )
    # Sizes of DeepSpeed's own bookkeeping, which has to add up but scales nothing here: the trainer marks the last
    # micro-batch of a step itself, because packed steps differ in their number.
    values = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
    }
    for key, value in values.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f'{path}: {key} is {settings[key]}, the run has {value}; write "auto"')
        settings[key] = value
    precision = settings.setdefault("bf16", {})
    if precision.get("enabled", "auto") == "auto":
        precision["enabled"] = config.train.precision == "bf16"
    return settings
