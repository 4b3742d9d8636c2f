"""The training loop.

One optimizer step covers the same samples whatever the number of ranks and the micro-batch are. Losses are weighed by
counts of the whole step, so the update is the same too. Every step seeds its own random generators from
(seed, step, rank): nothing of them needs to be saved for an exact resume.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from llava_mole.common.distributed import all_gather_objects, all_reduce_sum
from llava_mole.common.errors import ConfigError, UserError, value_errors_as
from llava_mole.common.log import get_logger
from llava_mole.config import RunConfig
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.data.batching import BatchPlan, StepSampler, count_steps
from llava_mole.data.collator import collate, collate_packed
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model.adapters import trainable_parameters
from llava_mole.model.flops import model_shape
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import (
    collect_routing,
    disable_finite_check,
    mole_after_step,
    mole_auxiliary_loss,
    mole_drop_step,
    set_routing_inputs,
)
from llava_mole.train.checkpointing import CheckpointWriter, Progress, save_together, write_summary
from llava_mole.train.display import ProgressDisplay, summary_table
from llava_mole.train.faults import StepGuard, StopRequested, StopSignal, check_ranks_agree, ignore_stop_signals
from llava_mole.train.loss import next_token_targets, per_sample, routing_inputs, sample_losses, weigh
from llava_mole.train.metrics import METRICS_FILE, StepStats, Tracker, read_metrics
from llava_mole.train.monitor import Monitor
from llava_mole.train.optim import set_learning_rates
from llava_mole.train.strategy import (
    Runtime,
    apply_gradients,
    backward,
    drop_gradients,
    gather_optimizer_state,
    micro_batch_context,
    squared_gradients,
)

logger = get_logger(__name__)


@dataclass
class Trainer:
    """The state of a run and its loop; `run` is the entry point."""

    config: RunConfig
    runtime: Runtime
    model: LlavaMole
    engine: torch.nn.Module
    """`model`, wrapped by DeepSpeed or DDP."""
    optimizer: Any
    dataset: SupervisedDataset
    pad_token_id: int
    writer: CheckpointWriter
    tracker: Tracker
    progress: Progress
    stop: StopSignal

    def __post_init__(self) -> None:
        train = self.config.train
        steps, left_over = count_steps(len(self.dataset), train.global_batch_size)
        self.total_steps = steps if train.max_steps is None else min(steps, train.max_steps)
        self.plan = BatchPlan(
            batching=train.batching,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            world_size=self.runtime.world_size,
            lengths=self.dataset.lengths,
            capacity=train.pack_length or self.config.data.max_length,
            quadratic=model_shape(self.model).quadratic_length,
        )
        logger.info(
            "%d optimizer steps of %d samples on %d ranks, %s; %d samples of the plan are left over",
            self.total_steps,
            train.global_batch_size,
            self.runtime.world_size,
            train.batching if train.batching == "packed" else f"{train.batching} by {train.micro_batch_size}",
            left_over + (steps - self.total_steps) * train.global_batch_size,
        )
        self.monitor = Monitor(
            self.config, self.runtime, self.model, self.optimizer, self.dataset, self.pad_token_id, self.total_steps
        )
        self.guard = StepGuard(self.config, self.runtime, self.progress, self.dataset.source_names, self.stop)
        disable_finite_check(self.model.language_model)

    def run(self) -> None:
        """Train from `progress.step` to the last step, saving on the way and at the end.

        Raises:
            StopRequested: some rank was asked to stop; the run has saved.
            TrainingError: it cannot go on; raised on every rank.
        """
        train, main = self.config.train, self.runtime.rank == 0
        first, run_started, entry = self.progress.step, time.perf_counter(), None
        self._check_shards(first)
        batches = iter(self._loader(first))
        self.engine.train()
        name = f"{self.config.stage} ({self.config.adapter.method})"
        display = ProgressDisplay(self.total_steps, first, name, main)
        for step in range(first, self.total_steps):
            started = time.perf_counter()
            micro_batches = [_next(batches) for _ in self.plan.micro_batches(step, self.runtime.rank)]
            waited = time.perf_counter() - started
            rates = set_learning_rates(self.optimizer, step, self.total_steps, train)
            stats = self._step(step, micro_batches)
            self._count(stats)
            if self.monitor.due(step + 1):
                entry = stats.entry(step + 1, rates, time.perf_counter() - started, waited)
                entry = self.monitor.extend(entry, micro_batches) | self.guard.entry()
                self.tracker.log(entry)
                display.show(entry)
            display.advance()
            self.guard.end_step()
            final = step + 1 == self.total_steps
            saves = final or (step + 1) % train.save_every == 0 or self.guard.stop_requested
            if saves or (train.check_ranks_every and (step + 1) % train.check_ranks_every == 0):
                check_ranks_agree(trainable_parameters(self.model), step + 1)
            if saves:
                self.save(final)
            if self.guard.stop_requested and not final:
                display.close()
                self.tracker.close()
                raise StopRequested(f"asked to stop; stopped after step {step + 1} of {self.total_steps}")
        display.close()
        self.tracker.close()
        if main:
            entries = read_metrics(self.writer.run_dir / METRICS_FILE)
            if entries:
                print(
                    "\n" + summary_table(name, entries, self.progress.consumed_by_source), file=sys.stderr, flush=True
                )
            seconds = time.perf_counter() - run_started
            write_summary(self.writer.run_dir, self.progress, entry, seconds, self.dataset.report)

    def save(self, final: bool) -> None:
        """Write a checkpoint; a collective. One that fails is reported and training goes on, unless it is the last."""
        state = gather_optimizer_state(trainable_parameters(self.model), self.optimizer, self.runtime.uses_deepspeed)
        self.tracker.sync()
        save_together(self.writer, self.model, state, self.progress, self.config.train.keep_checkpoints, final)

    def _step(self, step: int, micro_batches: list[dict]) -> StepStats:
        """Forward and backward over one step's micro-batches, then the optimizer's update."""
        train, runtime = self.config.train, self.runtime
        seed = np.random.SeedSequence([train.seed, step, runtime.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        micro_batches = [_to_device(batch, runtime.device) for batch in micro_batches]
        targets = sum(int(next_token_targets(batch["labels"])[0].sum()) for batch in micro_batches)
        global_tokens = float(all_reduce_sum(torch.tensor(float(targets), device=runtime.device)))
        stats = StepStats(self.dataset.source_names, runtime.device)
        parameters = list(trainable_parameters(self.model).values())
        for index, batch in enumerate(micro_batches):
            with micro_batch_context(runtime, self.engine, last=index == len(micro_batches) - 1):
                loss = self._loss(batch, global_tokens, stats)
                self.guard.watch(batch, loss)
                backward(runtime, self.engine, loss)
        stats.reduce()
        if self.guard.allows_update(step, squared_gradients(runtime, self.optimizer, parameters)):
            stats.grad_norm = apply_gradients(runtime, self.engine, self.optimizer, parameters, train.max_grad_norm)
            mole_after_step(self.model.language_model)
        else:
            drop_gradients(runtime, self.optimizer)
            mole_drop_step(self.model.language_model)
        return stats

    def _loss(self, batch: dict, global_tokens: float, stats: StepStats) -> torch.Tensor:
        """This micro-batch's share of the step's loss; the shares of all micro-batches and ranks add up to it."""
        train = self.config.train
        loss_mask, targets = next_token_targets(batch["labels"])
        if self.config.adapter.method == "mole":
            with value_errors_as(ConfigError):  # more sources than experts or tasks
                set_routing_inputs(self.model.language_model, **routing_inputs(batch))
        losses = self.engine(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            images=batch["images"],
            sample_lengths=batch["sample_lengths"],
            loss_mask=loss_mask,
            targets=targets,
        )
        sums, counts = sample_losses(losses, batch["sample_index"][loss_mask], len(batch["ids"]))
        loss = weigh(sums, counts, train.loss_reduction, train.global_batch_size, global_tokens)
        stats.add_batch(batch, loss.detach(), sums.detach(), counts)
        if self.config.adapter.method == "mole":
            loss = loss + self._auxiliary_loss(batch, loss_mask, stats)
        return loss

    def _auxiliary_loss(self, batch: dict, loss_mask: torch.Tensor, stats: StepStats) -> torch.Tensor:
        language_model = self.model.language_model
        routing, masks = per_sample(
            batch,
            collect_routing(language_model),
            token_mask=batch["attention_mask"],
            supervised_mask=loss_mask,
            image_mask=batch["input_ids"] == IMAGE_TOKEN_INDEX,
        )
        auxiliary = mole_auxiliary_loss(language_model, routing=routing, **masks)
        # A mean over this micro-batch's samples becomes its share of the mean over the step's samples.
        auxiliary = auxiliary * (len(batch["ids"]) / self.config.train.global_batch_size)
        stats.add_routing(batch["source_index"], masks["token_mask"], masks["image_mask"], routing, auxiliary.detach())
        return auxiliary

    def _count(self, stats: StepStats) -> None:
        self.progress.step += 1
        self.progress.samples_consumed += self.config.train.global_batch_size
        for name, count in stats.samples_by_source().items():
            self.progress.consumed_by_source[name] = self.progress.consumed_by_source.get(name, 0) + count

    def _loader(self, first: int) -> DataLoader:
        workers = self.config.train.num_workers
        put_together = collate_packed if self.plan.batching == "packed" else collate
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]  # map-style, without torch's base class
            batch_sampler=StepSampler(self.plan, self.runtime.rank, first, self.total_steps),
            collate_fn=partial(put_together, pad_token_id=self.pad_token_id),
            num_workers=workers,
            pin_memory=self.runtime.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=ignore_stop_signals,
        )

    def _check_shards(self, step: int) -> None:
        """Raise RuntimeError unless the ranks' samples of a step are disjoint and together the whole step."""
        if step >= self.total_steps:
            return
        own = self.plan.micro_batches(step, self.runtime.rank)
        ranks = all_gather_objects((self.dataset.plan.digest, [position for row in own for position in row]))
        if len({digest for digest, _ in ranks}) > 1:
            raise RuntimeError("the ranks have planned different orders of samples: their data files differ")
        shards = [positions for _, positions in ranks]
        union = {position for shard in shards for position in shard}
        size = self.config.train.global_batch_size
        if sum(map(len, shards)) != size or union != set(range(step * size, (step + 1) * size)):
            raise RuntimeError(f"the ranks' samples of step {step + 1} are no partition of the step's {size} samples")


def _next(batches: Iterator[dict]) -> dict:
    """The next micro-batch. A loader process wraps an error in its own traceback; only its message is kept."""
    try:
        return next(batches)
    except UserError as error:
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()) from None


def _to_device(batch: dict, device: torch.device) -> dict:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
