"""Train one stage: `python -m llava_mole.train.train CONFIG [--key.sub value ...]`, alone or under a launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llava_mole.common.distributed import all_gather_objects, is_main_process, on_main
from llava_mole.common.errors import EXIT_STOPPED, EXIT_USER_ERROR, CheckpointError, UserError, command
from llava_mole.common.log import get_logger, setup_logging
from llava_mole.config import RunConfig, parse_run_config, save_config
from llava_mole.train.faults import StopRequested, StopSignal, record_exit_code
from llava_mole.train.preflight import check_inputs

logger = get_logger("llava_mole.train.train")  # not __name__, which is __main__ under `python -m`


def train(config: RunConfig) -> Path:
    """Run the configured stage from start (or from a checkpoint) to end.

    Returns:
        The run directory.

    Raises:
        UserError: see the steps; nothing has been written before the model and the data are known to be good.
        StopRequested: SIGTERM or SIGUSR1 came; the run has saved.
    """
    with StopSignal() as stop:
        return _train(config, stop)


def _train(config: RunConfig, stop: StopSignal) -> Path:
    from llava_mole.data.batching import count_steps
    from llava_mole.data.dataset import build_dataset
    from llava_mole.data.tokenization import HFTextTokenizer
    from llava_mole.model.adapters import trainable_parameters
    from llava_mole.model.builder import (
        attach_adapter,
        build_image_processor,
        build_parts,
        load_adapter_state,
        load_projector,
        start_from,
    )
    from llava_mole.model.language_model import compile_layers, set_recompute
    from llava_mole.model.packed_attention import enable_packing
    from llava_mole.model.quantization import quantize_linears
    from llava_mole.train.checkpointing import (
        CheckpointWriter,
        Progress,
        check_same_run,
        find_resume,
        read_progress,
        was_started,
        write_environment,
    )
    from llava_mole.train.metrics import Tracker
    from llava_mole.train.optim import build_optimizer
    from llava_mole.train.strategy import load_optimizer_state, prepare, start_runtime
    from llava_mole.train.trainer import Trainer

    check_inputs(config)
    runtime = start_runtime(config)
    # Before the model is loaded, which takes minutes.
    checkpoint, started_before = on_main(lambda: (find_resume(config), was_started(config)))
    if checkpoint is not None:
        check_same_run(checkpoint, config)

    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model, hf_tokenizer, fingerprints = build_parts(config.model)
    tokenizer = HFTextTokenizer(hf_tokenizer)
    dataset = build_dataset(
        config.data,
        tokenizer,
        build_image_processor(model, config.data.image_aspect_ratio),
        model.num_image_tokens,
        seed=config.train.seed,
        epochs=config.train.epochs,
        batching=config.train.batching,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        resuming=started_before,
    )
    count_steps(len(dataset), config.train.global_batch_size)  # refuses a mixture smaller than one batch
    if config.projector_weights is not None:
        load_projector(model.projector, config.projector_weights)
    if config.train.batching == "packed":
        enable_packing(model.causal_lm)
    compute_dtype = frozen_dtype(config.train.precision)
    quantize_linears(model.causal_lm, config.model.quantization, runtime.device, compute_dtype)
    attach_adapter(model, config.adapter)
    if config.init_from is not None:
        start_from(model, config.init_from, config.adapter, fingerprints)
    if checkpoint is not None:
        load_adapter_state(model, checkpoint)
    model.projector.requires_grad_(config.train_projector)
    cast_for_training(model, config.train.precision)
    set_recompute(model.causal_lm, config.train.activation_checkpointing, config.train.checkpoint_every_n)
    if config.train.compile:
        compile_layers(model.causal_lm)
    if is_main_process():
        print(trainable_table(model), file=sys.stderr, flush=True)

    parameters = trainable_parameters(model)
    engine, optimizer = prepare(runtime, model, build_optimizer(parameters, config.train))
    progress = Progress(plan_digest=dataset.plan.digest)
    if checkpoint is not None:
        progress, state = read_progress(checkpoint)
        check_same_plan(progress, dataset.plan.digest, config.train.global_batch_size, checkpoint)
        load_optimizer_state(state, progress.updates, parameters, optimizer, runtime.uses_deepspeed)
        logger.info("resuming from %s: %d samples consumed", checkpoint, progress.samples_consumed)

    run_dir = Path(config.train.output_dir)
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        write_environment(run_dir, runtime.world_size, str(runtime.device), type(engine).__name__)
    Trainer(
        config=config,
        runtime=runtime,
        model=model,
        engine=engine,
        optimizer=optimizer,
        dataset=dataset,
        pad_token_id=tokenizer.pad_token_id,
        writer=CheckpointWriter(run_dir, config, hf_tokenizer, fingerprints),
        tracker=Tracker(config, run_dir, progress.step, enabled=is_main_process()),
        progress=progress,
        stop=stop,
    ).run()
    return run_dir


def frozen_dtype(precision: str) -> torch.dtype:
    """What frozen weights are kept in, and quantised ones compute in, under `train.precision`."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def cast_for_training(model: torch.nn.Module, precision: str) -> None:
    """Frozen weights in the compute dtype, trainable ones in float32 (DeepSpeed keeps float32 masters of its own).

    Quantised weights are integers and stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype(precision))


def trainable_table(model: torch.nn.Module) -> str:
    """Parameters of every part of the model, trainable and in all, as text."""
    from llava_mole.model.adapters import parameter_report

    rows = parameter_report(model)
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{'part':<16}{'trainable':>16}{'all':>18}"]
    lines += [f"{part:<16}{trainable:>16,}{total:>18,}" for part, trainable, total in rows]
    return "\n".join(lines)


def check_same_plan(progress, digest: str, global_batch_size: int, checkpoint: Path) -> None:
    """Raise CheckpointError if the samples of the steps to come are others than the checkpoint's run would take."""
    if progress.samples_consumed != progress.step * global_batch_size:
        raise CheckpointError(
            f"{checkpoint} took {progress.samples_consumed} samples in {progress.step} steps, but "
            f"train.global_batch_size is {global_batch_size}: restore it, or start from the weights with --init-from"
        )
    if progress.plan_digest != digest:
        raise CheckpointError(
            f"{checkpoint} consumed {progress.samples_consumed} samples of another sample order: data files, mixture, "
            "epochs or seed have changed. Restore them, or start a new run in another --train.output_dir"
        )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    setup_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after tokenizers has threads
    try:
        train(parse_run_config(sys.argv[1:] if arguments is None else arguments))
    except StopRequested as stopped:
        logger.info("%s; go on with --train.resume auto (exit code %d)", stopped, EXIT_STOPPED)
        leave_process_group()
        # torchrun would count another exit code than 0 as a failure, and start the run again.
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
    sys.exit(main())
