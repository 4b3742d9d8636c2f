"""Train one stage: `python -m llava_mole.train.train CONFIG [--key.sub value ...]`, alone or under a launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_mole.analysis.probe import Rows
from llava_mole.common.distributed import all_gather_objects, cores, end_rank, is_main_process, on_main
from llava_mole.common.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError, command
from llava_mole.common.log import get_logger, setup_logging
from llava_mole.common.text import format_table
from llava_mole.config import RunConfig, config_to_dict, save_config
from llava_mole.data.batching import count_steps
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.inference.predictor import Predictor
from llava_mole.model.adapters import parameter_report, trainable_parameters
from llava_mole.model.builder import LoadedModel, build_parts, configured_image_processor, context_length
from llava_mole.model.language_model import compile_layers, set_recompute
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.trainable import let_train
from llava_mole.train.arguments import DRY_RUN, DRY_RUN_LOAD, parse_arguments
from llava_mole.train.checkpointing import (
    CheckpointWriter,
    Progress,
    read_progress,
    write_environment,
)
from llava_mole.train.conflict import ConflictRecord, training_probe
from llava_mole.train.faults import StepGuard, StopRequested, StopSignal, record_exit_code, tell_interruption
from llava_mole.train.monitor import Monitor
from llava_mole.train.optim import announce_schedule, build_optimizer
from llava_mole.train.preflight import check_inputs, check_model
from llava_mole.train.resume import (
    Start,
    check_same_contents,
    check_same_plan,
    check_steps_free,
    contents_of,
    find_start,
    run_directory,
)
from llava_mole.train.strategy import Strategy, start_strategy
from llava_mole.train.tracker import Tracker
from llava_mole.train.trained_parts import is_of_base
from llava_mole.train.trainer import Trainer
from llava_mole.train.trainer_state import TrainerState
from llava_mole.train.validation import AnswerCheck, AnswerLog, Validator

logger = get_logger("llava_mole.train.train")  # not __name__, which is __main__ under `python -m`


def train(config: RunConfig) -> Path:
    """Run the configured stage from start (or from a checkpoint) to end.

    Returns:
        The run directory.

    Raises:
        UserError: an input is missing or unusable; nothing is written before model and data are known to be good.
        StopRequested: SIGTERM or SIGUSR1 came; the run has saved.
    """
    check_inputs(config.model, config.data, projector_weights=config.projector_weights, init_from=config.init_from)
    check_model(config.model, config.data, config.adapter)
    values, run_dir = config_to_dict(config), Path(config.train.output_dir)
    with StopSignal() as stop:
        strategy = start_strategy(config.train, config.device)
        with run_directory(config.train):
            start = on_main(lambda: find_start(config.train, values))  # before the model, which takes minutes to load
            torch.manual_seed(config.train.seed)  # the same initial weights on every rank
            model, hf_tokenizer, fingerprints = build_parts(config.model)
            tokenizer = HFTextTokenizer(hf_tokenizer, config.data.special_tokens)
            dataset = load_data(config, model, tokenizer, start.begun)
            steps, _ = count_steps(len(dataset), config.train.global_batch_size)
            steps = min(steps, config.train.max_steps or steps)
            contents = contents_of(fingerprints, tokenizer.fingerprint, dataset.limits.template, dataset.digests)
            progress = check_start(config, start, dataset, contents, steps)
            if start.finished:  # after all comparisons: nobody must take edited data for trained data
                logger.info("%s is complete: nothing to do", start.checkpoint)
                return run_dir
            make_trainable(config, model, strategy.device, fingerprints, start.checkpoint)
            frozen = small_frozen_weights(model)
            strategy.prepare(model, build_optimizer(trainable_parameters(model), config.train))
            if start.checkpoint is not None:
                strategy.load_state(TrainerState(start.checkpoint), progress.updates)
            record_start(run_dir, values, strategy)
            most_bad = config.train.max_bad_steps, config.data.max_bad_image_share
            trainer = Trainer(
                name=f"{config.stage} ({config.adapter.method})",
                train=config.train,
                total_steps=steps,
                row_tokens=config.train.pack_length or config.data.max_length,
                has_experts=config.adapter.method == "mole",
                strategy=strategy,
                model=model,
                dataset=dataset,
                pad_token_id=tokenizer.pad_token_id,
                writer=CheckpointWriter(run_dir, values, hf_tokenizer, fingerprints, contents, start.run, frozen),
                tracker=Tracker(config.tracker, run_dir, progress.step, run=values, enabled=is_main_process()),
                monitor=build_monitor(config, strategy, model, dataset, tokenizer, steps),
                guard=StepGuard(progress, dataset.source_names, stop, strategy.device, *most_bad),
                progress=progress,
                conflict=build_conflict_record(config, strategy, model, dataset, tokenizer, progress.step, steps),
            )
            with tell_interruption(run_dir, progress, steps):
                trainer.run()
    return run_dir


def record_start(run_dir: Path, values: dict[str, Any], strategy: Strategy) -> None:
    """Write the environment, which marks a run's directory, and then the complete configuration."""
    if is_main_process():
        write_environment(run_dir, strategy.world_size, str(strategy.device), type(strategy.engine).__name__)
        save_config(values, run_dir / "config.yaml")


def check_start(
    config: RunConfig, start: Start, dataset: SupervisedDataset, contents: dict[str, str], steps: int
) -> Progress:
    """The progress that the run starts with, once it is proven that it continues the same experiment."""
    checkpoint, progress = start.checkpoint, Progress(plan_digest=dataset.plan.digest)
    if checkpoint is not None:
        on_main(lambda: check_same_contents(checkpoint, contents, config.train.accept_changed))
        progress = read_progress(checkpoint)
        check_same_plan(progress, dataset.plan.digest, config.train.global_batch_size, checkpoint)
        logger.info("resuming from %s: %d samples consumed", checkpoint, progress.samples_consumed)
    on_main(lambda: check_steps_free(Path(config.train.output_dir), start.run, progress.step, steps))
    announce_schedule(config.train, steps, begun=start.begun or start.checkpoint is not None)
    return progress


def load_data(config: RunConfig, model: LlavaMole, tokenizer: HFTextTokenizer, resuming: bool) -> SupervisedDataset:
    """The training set in the order of the run, with its held-out samples."""
    return build_dataset(
        config.data,
        tokenizer,
        configured_image_processor(model, config.data),
        model.num_image_tokens,
        seed=config.train.seed,
        epochs=config.train.epochs,
        batching=config.train.batching,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        resuming=resuming,
    )


def make_trainable(
    config: RunConfig, model: LlavaMole, device: torch.device, fingerprints: dict[str, str], checkpoint: Path | None
) -> None:
    """Let the model train as configured, from `checkpoint` if there is one, in place."""
    let_train(
        model,
        config.adapter,
        device,
        fingerprints,
        quantization=config.model.quantization,
        precision=config.train.precision,
        packed=config.train.batching == "packed",
        train_projector=config.train_projector,
        parts=config.model.train,
        projector_weights=config.projector_weights,
        init_from=config.init_from,
        checkpoint=checkpoint,
    )
    set_recompute(model.causal_lm, config.train.activation_checkpointing, config.train.checkpoint_every_n)
    if config.train.compile:
        compile_layers(model.causal_lm)
    if is_main_process():
        print(trainable_table(model), file=sys.stderr, flush=True)


def small_frozen_weights(model: LlavaMole) -> dict[str, torch.Tensor]:
    """Copies of what does not train in adapter and projector; a strategy may leave nothing of it in one place."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and not is_of_base(name)
    }


def build_monitor(
    config: RunConfig,
    strategy: Strategy,
    model: LlavaMole,
    dataset: SupervisedDataset,
    tokenizer: HFTextTokenizer,
    steps: int,
) -> Monitor:
    """The run's measurements and validation."""
    held_out, routes = dataset.validation, config.adapter.method == "mole"
    validator = answer_check = None
    if held_out is not None:
        validator = Validator(
            held_out,
            row_tokens=config.train.pack_length or config.data.max_length,
            pad_token_id=tokenizer.pad_token_id,
            num_workers=min(config.train.num_workers, cores()),
            routes=routes,
        )
        if config.train.validation_answers:
            parts = LoadedModel(
                model,
                tokenizer,
                dataset.image_processor,
                config.data.template,
                context_length(model, config.data.max_length),
                Path(config.train.output_dir),
                adapter=config.adapter.method,
            )
            count = config.train.validation_answers
            answer_check = AnswerCheck(held_out, Predictor(parts), count=count, routes=routes)
    return Monitor(
        strategy,
        model,
        validator,
        answer_check,
        answer_log=AnswerLog(Path(config.train.output_dir)) if answer_check is not None else None,
        precision=config.train.precision,
        log_every=config.tracker.log_every,
        validate_every=config.train.validate_every,
        total_steps=steps,
    )


def build_conflict_record(
    config: RunConfig,
    strategy: Strategy,
    model: LlavaMole,
    dataset: SupervisedDataset,
    tokenizer: HFTextTokenizer,
    first_step: int,
    steps: int,
) -> ConflictRecord | None:
    """The conflict meter along training, if the run has one."""
    train = config.train
    if not train.conflict_every:
        return None
    rows = Rows.of(
        model,
        packed=train.batching == "packed",
        capacity=train.pack_length or config.data.max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ConflictRecord(
        model,
        strategy.parameters,
        training_probe(dataset, train.global_batch_size, rows),
        train.loss_reduction,
        every=train.conflict_every,
        total_steps=steps,
        run_dir=Path(train.output_dir),
        first_step=first_step,
        enabled=is_main_process(),
    )


def trainable_table(model: torch.nn.Module) -> str:
    """Number of trainable and of all parameters of every part of the model, as text."""
    rows = parameter_report(model)
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    return format_table(
        [("part", "trainable", "all"), *((part, f"{own:,}", f"{total:,}") for part, own, total in rows)], right={1, 2}
    )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and turn the end of the run into an exit code."""
    setup_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after tokenizers has threads
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse_arguments(arguments)
        if {DRY_RUN, DRY_RUN_LOAD} & set(arguments):
            from llava_mole.train.dry_run import dry_run

            if os.environ.get("RANK", "0") == "0":
                print(dry_run(config, make_trainable if DRY_RUN_LOAD in arguments else None))
            return 0
        train(config)
    except StopRequested as stopped:
        logger.info("%s; continue with --train.resume auto (exit code %d)", stopped, EXIT_STOPPED)
        leave_process_group()
        # torchrun would count any exit code but 0 as a failure and start the run again.
        return 0 if record_exit_code(EXIT_STOPPED) else EXIT_STOPPED
    except UserError:
        record_exit_code(EXIT_USER_ERROR)
        raise
    leave_process_group()
    return 0


def leave_process_group() -> None:
    """Wait for the slowest rank and close the process group, so that no rank reports a lost peer."""
    if torch.distributed.is_initialized():
        all_gather_objects(None)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    end_rank(main())
