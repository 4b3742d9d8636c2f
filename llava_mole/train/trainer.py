"""The training loop.

One optimizer step covers the same samples whatever the number of ranks and the micro-batch are. Losses are weighted by
counts of the whole step, so the update is the same too. Every step seeds its own random generators from
(seed, step, rank), so their state need not be saved for an exact resume.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader

from llava_mole.common.distributed import all_gather_objects, all_reduce_sum, cores
from llava_mole.common.errors import ConfigError, StorageError, UserError, value_errors_as, without_worker
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.config import TrainConfig
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.data.batching import BatchPlan, StepSampler
from llava_mole.data.collator import collate, collate_packed
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model.adapters import parameter_report
from llava_mole.model.batch_loss import (
    forward_losses,
    next_token_targets,
    per_sample,
    routing_inputs,
    to_device,
    weigh,
)
from llava_mole.model.flops import model_shape
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import (
    collect_routing,
    disable_finite_check,
    leave_balance_loss_to_caller,
    mole_after_step,
    mole_auxiliary_loss,
    mole_drop_step,
    set_routing_inputs,
)
from llava_mole.train.checkpointing import CheckpointWriter, Progress, save_together, write_summary
from llava_mole.train.conflict import ConflictRecord
from llava_mole.train.display import ProgressDisplay, summary_table
from llava_mole.train.faults import StepGuard, StopRequested, check_ranks_agree, ignore_stop_signals
from llava_mole.train.metrics import StepStats
from llava_mole.train.monitor import Monitor
from llava_mole.train.optim import set_learning_rates
from llava_mole.train.strategy import Strategy
from llava_mole.train.tracker import METRICS_FILE, Tracker, read_metrics
from llava_mole.train.trained_parts import is_of_base
from llava_mole.train.trainer_state import Pieces

logger = get_logger(__name__)


@dataclass
class Trainer:
    """The state of a run and its loop; `run` is the entry point."""

    name: str
    """Shown with the progress, e.g. `finetune (mole)`."""
    train: TrainConfig
    total_steps: int
    """Optimizer steps from the start of the run to its end."""
    row_tokens: int
    """Most tokens of a packed row."""
    has_experts: bool
    """Whether the adapter is MoLE."""
    strategy: Strategy
    model: LlavaMole
    dataset: SupervisedDataset
    pad_token_id: int
    writer: CheckpointWriter
    tracker: Tracker
    monitor: Monitor
    guard: StepGuard
    progress: Progress
    conflict: ConflictRecord | None = None
    """The conflict meter along training; None without it."""

    def __post_init__(self) -> None:
        train, world_size = self.train, self.strategy.world_size
        self.plan = BatchPlan(
            batching=train.batching,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            world_size=world_size,
            lengths=self.dataset.lengths,
            capacity=self.row_tokens,
            quadratic=model_shape(self.model).quadratic_length,
        )
        logger.info(
            "%d optimizer steps of %d samples on %s, %s; %d samples of the plan are left over",
            self.total_steps,
            train.global_batch_size,
            count_of(world_size, "rank"),
            train.batching if train.batching == "packed" else f"{train.batching} by {train.micro_batch_size}",
            len(self.dataset) - self.total_steps * train.global_batch_size,
        )
        disable_finite_check(self.model.language_model)
        leave_balance_loss_to_caller(self.model.language_model)

    def run(self) -> None:
        """Train from `progress.step` to the last step, saving on the way and at the end.

        Raises:
            StopRequested: some rank was asked to stop; the run has saved.
            StorageError: some rank got no data; the run has saved. Raised on every rank.
            TrainingError: it cannot continue; raised on every rank.
        """
        train, main = self.train, self.strategy.rank == 0
        first, run_started, entry = self.progress.step, time.perf_counter(), None
        saved = first
        self._check_shards(first)
        batches = iter(self._loader(first))
        self.strategy.engine.train()
        display = ProgressDisplay(self.total_steps, first, self.name, main)
        for step in range(first, self.total_steps):
            started = time.perf_counter()
            micro_batches, failure = self._fetch(batches, step)
            waited = time.perf_counter() - started
            rates = set_learning_rates(self.strategy.optimizer, step, self.total_steps, train)
            stats = self._step(step, micro_batches, failure)
            if stats is None:
                display.close()
                self._end_without_data(failure, saved)
            self._count(stats)
            if self.monitor.due(step + 1):
                entry = stats.entry(step + 1, rates, time.perf_counter() - started, waited)
                entry = self.monitor.extend(entry, micro_batches) | self.guard.entry()
                self.tracker.log(entry)
                display.show(entry)
            if self.conflict is not None and self.conflict.due(step + 1):
                self.conflict.measure(step + 1)
            display.advance()
            self.guard.end_step()
            final = step + 1 == self.total_steps
            saves = final or (step + 1) % train.save_every == 0 or self.guard.stop_requested
            if saves or (train.check_ranks_every and (step + 1) % train.check_ranks_every == 0):
                # Where weights are spread, ranks have nothing in common that could drift apart.
                check_ranks_agree({} if self.strategy.shards_weights else self.strategy.parameters, step + 1)
            if saves:
                self.save(final)
                saved = step + 1
            if self.guard.stop_requested and not final:
                display.close()
                self._close_logs()
                raise StopRequested(f"asked to stop; stopped after step {step + 1} of {self.total_steps}")
        display.close()
        self._close_logs()
        if main:
            entries = read_metrics(self.writer.run_dir / METRICS_FILE)
            if entries:
                table = summary_table(self.name, entries, self.progress.consumed_by_source)
                print("\n" + table, file=sys.stderr, flush=True)
            seconds = time.perf_counter() - run_started
            trainable = {part: count for part, count, _ in parameter_report(self.model) if count}
            write_summary(self.writer.run_dir, self.progress, entry, seconds, self.dataset.report, trainable)

    def save(self, final: bool) -> None:
        """Write a checkpoint; a collective. A failure is logged, and raised for the last one."""
        strategy, pieces = self.strategy, None
        if self.train.checkpoint_files == "sharded":
            pieces = Pieces(strategy)
            state = strategy.gather_state(lambda name: not is_of_base(name))
        else:
            state = strategy.gather_state()
        self.tracker.sync()
        if self.conflict is not None:
            self.conflict.sync()
        save_together(self.writer, self.model, state, self.progress, self.train.keep_checkpoints, final, pieces)

    def _fetch(self, batches: Iterator[dict], step: int) -> tuple[list[dict], StorageError | None]:
        """This rank's micro-batches of a step, or why there are none."""
        try:
            return [_next(batches) for _ in self.plan.micro_batches(step, self.strategy.rank)], None
        except StorageError as error:
            return [], error

    def _end_without_data(self, failure: StorageError | None, saved: int) -> NoReturn:
        """Save the steps since step `saved` and end the run on every rank; a collective."""
        if self.progress.step > saved:
            check_ranks_agree(self.strategy.parameters, self.progress.step)
            self.save(final=False)
        self._close_logs()
        reasons = [reason for reason in all_gather_objects(failure and str(failure)) if reason]
        error = StorageError(f"stopped after step {self.progress.step} of {self.total_steps}, saved: {reasons[0]}")
        error.on_every_rank = True
        raise error

    def _close_logs(self) -> None:
        self.tracker.close()
        if self.conflict is not None:
            self.conflict.close()

    def _step(self, step: int, micro_batches: list[dict], failure: StorageError | None) -> StepStats | None:
        """Forward and backward over one step's micro-batches, then the optimizer's update.

        Returns None on every rank, and does nothing, if one of them has a failure in place of its micro-batches.
        """
        train, strategy = self.train, self.strategy
        seed = np.random.SeedSequence([train.seed, step, strategy.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        micro_batches = [to_device(batch, strategy.device) for batch in micro_batches]
        targets = sum(int(next_token_targets(batch["labels"])[0].sum()) for batch in micro_batches)
        known = torch.tensor([float(targets), float(failure is not None)], device=strategy.device)
        global_tokens, failures = all_reduce_sum(known).tolist()
        if failures:
            return None
        stats = StepStats(self.dataset.source_names, strategy.device)
        for index, batch in enumerate(micro_batches):
            with strategy.micro_batch(last=index == len(micro_batches) - 1):
                loss = self._loss(batch, global_tokens, stats)
                self.guard.watch(batch, loss)
                strategy.backward(loss)
        stats.reduce()
        if self.guard.allows_update(step, strategy.squared_gradients()):
            stats.grad_norm = strategy.apply_gradients(train.max_grad_norm)
            mole_after_step(self.model.language_model)
        else:
            strategy.drop_gradients()
            mole_drop_step(self.model.language_model)
        return stats

    def _loss(self, batch: dict, global_tokens: float, stats: StepStats) -> torch.Tensor:
        """This micro-batch's share of the step's loss; the shares of all micro-batches and ranks add up to it."""
        train = self.train
        if self.has_experts:
            with value_errors_as(ConfigError):  # more sources than experts or tasks
                set_routing_inputs(self.model.language_model, **routing_inputs(batch))
        sums, counts, loss_mask = forward_losses(self.strategy.engine, batch)
        loss = weigh(sums, counts, train.loss_reduction, train.global_batch_size, global_tokens)
        stats.add_batch(batch, loss.detach(), sums.detach(), counts)
        if self.has_experts:
            loss = loss + self._balance_loss(batch, loss_mask, stats)
        return loss

    def _balance_loss(self, batch: dict, loss_mask: torch.Tensor, stats: StepStats) -> torch.Tensor:
        language_model = self.model.language_model
        routing, masks = per_sample(
            batch,
            collect_routing(language_model),
            token_mask=batch["attention_mask"],
            supervised_mask=loss_mask,
            image_mask=batch["input_ids"] == IMAGE_TOKEN_INDEX,
        )
        balance = mole_auxiliary_loss(language_model, routing=routing, **masks)
        # A mean over this micro-batch's samples becomes its share of the mean over the step's samples.
        balance = balance * (len(batch["ids"]) / self.train.global_batch_size)
        stats.add_routing(batch["source_index"], masks["token_mask"], masks["image_mask"], routing, balance.detach())
        return balance

    def _count(self, stats: StepStats) -> None:
        self.progress.step += 1
        self.progress.samples_consumed += self.train.global_batch_size
        for name, count in stats.samples_by_source().items():
            self.progress.consumed_by_source[name] = self.progress.consumed_by_source.get(name, 0) + count

    def _loader(self, first: int) -> DataLoader:
        workers = min(self.train.num_workers, cores())
        put_together = collate_packed if self.plan.batching == "packed" else collate
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]  # map-style, without torch's base class
            batch_sampler=StepSampler(self.plan, self.strategy.rank, first, self.total_steps),
            collate_fn=partial(put_together, pad_token_id=self.pad_token_id),
            num_workers=workers,
            pin_memory=self.strategy.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=ignore_stop_signals,
        )

    def _check_shards(self, step: int) -> None:
        """Raise RuntimeError unless the ranks' samples of a step are disjoint and together the whole step."""
        if step >= self.total_steps:
            return
        own = self.plan.micro_batches(step, self.strategy.rank)
        ranks = all_gather_objects((self.dataset.plan.digest, [position for row in own for position in row]))
        if len({digest for digest, _ in ranks}) > 1:
            raise RuntimeError("the ranks have planned different orders of samples: their data files differ")
        shards = [positions for _, positions in ranks]
        union = {position for shard in shards for position in shard}
        size = self.train.global_batch_size
        if sum(map(len, shards)) != size or union != set(range(step * size, (step + 1) * size)):
            raise RuntimeError(f"the ranks' samples of step {step + 1} are not a partition of its {size} samples")


def _next(batches: Iterator[dict]) -> dict:
    """The next micro-batch. A loader process wraps an error in its own traceback; only its message is kept."""
    try:
        return next(batches)
    except UserError as error:
        raise without_worker(error) from None
