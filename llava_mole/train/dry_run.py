"""`llava-mole train CONFIG --dry-run`: everything up to the first step, without writing anything."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from llava_mole.analysis.plan.architecture import build_meta_model
from llava_mole.common.errors import ConfigError
from llava_mole.common.text import count_of, format_bytes, format_table
from llava_mole.config import RunConfig, check_batch, config_to_dict, deepspeed_config
from llava_mole.data.batching import count_steps
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer
from llava_mole.model.adapters import parameter_report
from llava_mole.model.builder import build_parts, configured_image_processor
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.checkpointing import read_progress
from llava_mole.train.optim import announce_schedule
from llava_mole.train.preflight import check_inputs, check_model
from llava_mole.train.resume import check_same_contents, check_same_plan, check_steps_free, contents_of, find_start
from llava_mole.train.strategy import check_device

BYTES_PER_PARAMETER = 16
"""Of a trainable parameter in a checkpoint: the weight, its master and two moments of Adam, all float32."""


def dry_run(config: RunConfig, make_trainable: Callable[..., None] | None) -> str:
    """What a run with this configuration would do, as text; the ranks are those of the launcher's environment.

    Args:
        config: The run.
        make_trainable: `train.make_trainable` reads the weights, quantises them and adds the adapter, as the run does;
            with None the model has its shape only.

    Raises:
        UserError: whatever would end the run before its first step.
    """
    train, world_size = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    check_batch(train.batching, train.global_batch_size, train.micro_batch_size, world_size)
    check_inputs(config.model, config.data, projector_weights=config.projector_weights, init_from=config.init_from)
    check_model(config.model, config.data, config.adapter)
    if train.distributed in ("zero2", "zero3") and world_size > 1:
        deepspeed_config(train, world_size)
    start = find_start(train, config_to_dict(config), read_only=True)
    if make_trainable is not None:
        torch.manual_seed(train.seed)
        model, hf_tokenizer, fingerprints = build_parts(config.model)
    else:
        built = build_meta_model(config.model, config.adapter, train_projector=config.train_projector)
        model, hf_tokenizer = built.model, load_tokenizer(config.model.language_model)
    tokenizer = HFTextTokenizer(hf_tokenizer, config.data.special_tokens)
    dataset = build_dataset(
        config.data,
        tokenizer,
        configured_image_processor(model, config.data),
        model.num_image_tokens,
        seed=train.seed,
        epochs=train.epochs,
        batching=train.batching,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        resuming=start.begun,
        store_lengths=False,
    )
    steps, left_over = count_steps(len(dataset), train.global_batch_size)
    steps = min(steps, train.max_steps or steps)
    done = 0
    if start.checkpoint is not None:
        progress = read_progress(start.checkpoint)
        check_same_plan(progress, dataset.plan.digest, train.global_batch_size, start.checkpoint)
        done = progress.step
        if make_trainable is not None:
            contents = contents_of(fingerprints, tokenizer.fingerprint, dataset.limits.template, dataset.digests)
            check_same_contents(start.checkpoint, contents, train.accept_changed)
    check_steps_free(Path(train.output_dir), start.run, done, steps)
    announce_schedule(train, steps, begun=start.begun or start.checkpoint is not None)
    if make_trainable is not None:
        device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
        make_trainable(config, model, device, fingerprints, start.checkpoint)
    goes_on = f"resumes from {start.checkpoint}" if start.checkpoint else "starts at step 1"
    if start.finished:
        goes_on = f"is complete: {start.checkpoint}"
    sizes = f"{count_of(steps, 'optimizer step')} of {count_of(train.global_batch_size, 'sample')}"
    unused = "" if train.max_steps else f"; {count_of(left_over, 'sample')} left over"
    lines = [
        f"dry run of {config.stage} ({config.adapter.method}) on {count_of(world_size, 'rank')}: nothing was written",
        "",
        _sources_table(dataset, train.epochs),
        "",
        _parameters_table(model),
        "",
        f"steps        {sizes}{unused}",
        f"checkpoint   {_checkpoint_size(model)}, every {count_of(train.save_every, 'step')}; the newest "
        f"{train.keep_checkpoints} stay",
        f"directory    {Path(train.output_dir)}; the run {goes_on}",
    ]
    try:
        check_device(config.device, train.precision)
    except ConfigError as error:  # it may be meant for another machine
        lines.append(f"not here     {error}")
    if make_trainable is None:
        lines.append("weights      not read (--dry-run-load reads them)")
    return "\n".join(lines)


def _sources_table(dataset: SupervisedDataset, epochs: int) -> str:
    rows: list[tuple[str, ...]] = [
        ("source", "records", "samples an epoch", "text only", "cut", "shortened", "dropped", "mean tokens")
    ]
    positions: dict[str, list[int]] = {name: [] for name in dataset.source_names}
    for position in range(len(dataset)):
        positions[dataset.plan[position][0]].append(position)
    for name, report in dataset.report.items():
        try:
            tokens = dataset.lengths(positions[name])
            mean = f"{sum(tokens) / len(tokens):,.0f}" if tokens else ""
        except ValueError:  # they are counted for packed rows only
            mean = ""
        counts = (report[key] for key in ("text_only", "cut", "shortened", "dropped"))
        samples = f"{len(positions[name]) // epochs:,}"
        rows.append((name, f"{report['records']:,}", samples, *(f"{count:,}" for count in counts), mean))
    return format_table(rows, right=range(1, 8))


def _parameters_table(model: LlavaMole) -> str:
    rows = parameter_report(model)
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    shown = ((part, f"{trainable:,}", f"{total:,}") for part, trainable, total in rows)
    return format_table([("part", "trainable", "all"), *shown], right={1, 2})


def _checkpoint_size(model: LlavaMole) -> str:
    return format_bytes(BYTES_PER_PARAMETER * sum(row[1] for row in parameter_report(model)))
