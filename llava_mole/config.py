"""The configuration of a run: dataclasses, filled from YAML files and `--a.b value` overrides by jsonargparse.

Every hyper-parameter has exactly one home: a YAML file or a default here, with its source. Topology (nodes, GPUs,
addresses) is not configuration; it comes from the launcher's environment. Relative paths are relative to the
working directory, except the names of nested YAML files, which are relative to the file that names them.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from llava_mole.check_config import CheckConfig
from llava_mole.config_rules import check_run_config
from llava_mole.errors import ConfigError

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
