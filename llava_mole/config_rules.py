"""What a configuration may say: relations between its values that types alone do not express."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from llava_mole.check_config import check_limits
from llava_mole.errors import ConfigError

if TYPE_CHECKING:
    from llava_mole.config import RunConfig

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
