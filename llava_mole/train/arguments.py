"""The command line of `llava-mole train`: a configuration, and an answer to the flags of LLaVA's training scripts."""

from collections.abc import Sequence
from typing import NamedTuple

from llava_mole.common.errors import ConfigError
from llava_mole.config import RunConfig, parse_run_config

DRY_RUN = "--dry-run"
DRY_RUN_LOAD = "--dry-run-load"
FLAGS = {
    DRY_RUN: "do everything up to the first step, print what would be trained, and write nothing; the model has its "
    "shape only, without weights",
    DRY_RUN_LOAD: "the same with the weights, which takes as long as the start of the run",
}
"""Options of the command that no configuration has."""


class Flag(NamedTuple):
    """What takes the place of a flag of LLaVA's training scripts."""

    ours: str
    """Our key, with a value where the flag means one; empty if there is none."""
    note: str = ""
    """How the value is translated, or why there is no key."""


LLAVA_FLAGS = {
    # The model
    "model_name_or_path": Flag("model.language_model", "a local directory"),
    "version": Flag("data.template", "`v1` is `vicuna_v1`; `plain` stays"),
    "vision_tower": Flag("model.vision_tower.weights", "an open_clip file, and `model.vision_tower.name`; "
        "`llava-mole convert CLIP --to open-clip --out DIR` makes one"),
    "mm_projector_type": Flag("model.projector"),
    "mm_vision_select_layer": Flag("model.vision_tower.select_layer"),
    "mm_vision_select_feature": Flag("", "patches only, as in LLaVA-1.5; the class token is not used"),
    "mm_use_im_start_end": Flag("", "the vocabulary never grows; `+ends` in `model.projector` adds learned vectors "
        "around an image"),
    "mm_use_im_patch_token": Flag("", "the vocabulary never grows; an image takes placeholder ids"),
    "pretrain_mm_mlp_adapter": Flag("projector_weights", "a run of stage `pretrain`, or `llava-mole convert "
        "mm_projector.bin --to projector --out FILE.safetensors`"),
    "tune_mm_mlp_adapter": Flag("stage: pretrain"),
    "freeze_mm_mlp_adapter": Flag("train_projector: false"),
    "freeze_backbone": Flag("model.train.language_model", "true is `adapters`, the default; false is `full`"),
    "mpt_attn_impl": Flag("model.attn_implementation"),
    "attn_implementation": Flag("model.attn_implementation"),
    "cache_dir": Flag("", "models are local directories"),
    # LoRA and quantisation
    "lora_enable": Flag("adapter.method: lora", "or `mole`, the mixture of LoRA experts"),
    "lora_r": Flag("adapter.rank"),
    "lora_alpha": Flag("adapter.alpha"),
    "lora_dropout": Flag("adapter.dropout"),
    "lora_bias": Flag("", "biases are frozen, as with LLaVA's `none`"),
    "lora_weight_path": Flag("init_from", "a run or checkpoint; `llava-mole convert` imports LLaVA's"),
    "bits": Flag("model.quantization", "4 is `4bit`, 8 is `8bit`, 16 is `none`"),
    "quant_type": Flag("", "`4bit` is NF4"),
    "double_quant": Flag("", "`4bit` quantises its constants too"),
    # The data
    "data_path": Flag("data.sources.NAME.annotations", "one source for each file"),
    "image_folder": Flag("data.sources.NAME.image_folder"),
    "image_aspect_ratio": Flag("data.image_aspect_ratio", "`pad`, `square`, `anyres` or `native`"),
    "image_grid_pinpoints": Flag("data.image_grid_pinpoints", "for `anyres`; pairs of height and width, where LLaVA "
        "has width and height"),
    "is_multimodal": Flag("", "a record with an image is recognised"),
    "lazy_preprocess": Flag("", "samples are always made when they are needed"),
    "model_max_length": Flag("data.max_length"),
    "group_by_modality_length": Flag("train.batching: grouped", "the default `packed` needs no grouping"),
    "dataloader_num_workers": Flag("train.num_workers"),
    "remove_unused_columns": Flag("", "records have no columns to remove"),
    # Optimization
    "num_train_epochs": Flag("train.epochs"),
    "max_steps": Flag("train.max_steps"),
    "per_device_train_batch_size": Flag("train.global_batch_size", "the product of it, "
        "`--gradient_accumulation_steps` and the GPUs; with `padded` rows also `train.micro_batch_size`"),
    "gradient_accumulation_steps": Flag("train.global_batch_size", "follows from it"),
    "learning_rate": Flag("train.learning_rate"),
    "mm_projector_lr": Flag("train.projector_learning_rate"),
    "weight_decay": Flag("train.weight_decay"),
    "max_grad_norm": Flag("train.max_grad_norm"),
    "warmup_ratio": Flag("train.warmup_ratio"),
    "warmup_steps": Flag("train.warmup_steps"),
    "lr_scheduler_type": Flag("", "always a cosine, down to `train.min_learning_rate` (LLaVA: 0)"),
    "optim": Flag("", "always AdamW"),
    "seed": Flag("train.seed"),
    # Hardware
    "deepspeed": Flag("train.deepspeed_config", "such as scripts/zero2.json, or with `train.distributed: "
        "zero3` scripts/zero3.json"),
    "local_rank": Flag("", "the launcher sets it; see scripts/_launch.sh"),
    "bf16": Flag("train.precision: bf16", "the default"),
    "fp16": Flag("", "`train.precision` is `bf16` or `fp32`"),
    "tf32": Flag("", "`train.precision: bf16` needs none; `fp32` is exact"),
    "gradient_checkpointing": Flag("train.activation_checkpointing: all", "or `every_n`"),
    # Saving, evaluation and logging
    "output_dir": Flag("train.output_dir"),
    "save_strategy": Flag("train.save_every", "in steps"),
    "save_steps": Flag("train.save_every"),
    "save_total_limit": Flag("train.keep_checkpoints"),
    "resume_from_checkpoint": Flag("train.resume", "`auto`, or a checkpoint's directory"),
    "evaluation_strategy": Flag("train.validate_every", "in steps, with `data.validation_samples`"),
    "eval_steps": Flag("train.validate_every"),
    "per_device_eval_batch_size": Flag("", "validation fills rows of `train.pack_length` tokens"),
    "logging_steps": Flag("tracker.log_every"),
    "report_to": Flag("tracker.wandb_project", "or `tracker.tensorboard: true`"),
    "run_name": Flag("", "the name of `train.output_dir`"),
}  # fmt: skip
"""Flags of LLaVA's training scripts (pretrain.sh, finetune.sh, finetune_lora.sh and the rest of its arguments), without
dashes. docs/from_llava.md shows this table."""


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a run from `[CONFIG.yaml] [--key.sub value ...]` of `llava-mole train`.

    Raises:
        ConfigError: as `parse_run_config`, or flags of LLaVA are given; the message names our keys.
    """
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    theirs = [flag for flag in dict.fromkeys(given) if flag[2:].replace("-", "_") in LLAVA_FLAGS]
    if theirs:
        width = max(map(len, theirs))
        lines = [f"  {flag:<{width}}  {_in_words(LLAVA_FLAGS[flag[2:].replace('-', '_')])}" for flag in theirs]
        first = "these are flags of LLaVA's scripts; write instead, in CONFIG.yaml or as --key.sub VALUE:"
        raise ConfigError("\n".join([first, *lines, "(docs/from_llava.md has all of them)"]))
    return parse_run_config(arguments, flags=FLAGS)


def _in_words(flag: Flag) -> str:
    if not flag.ours:
        return f"(leave it out: {flag.note})"
    return f"{flag.ours}   ({flag.note})" if flag.note else flag.ours
