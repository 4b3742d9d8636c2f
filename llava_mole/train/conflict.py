"""The conflict meter along training: `train.conflict_every`."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from llava_mole.analysis.conflict.gradients import Reduction
from llava_mole.analysis.conflict.meter import measure_conflict
from llava_mole.analysis.probe import Probe, Rows, samples_of
from llava_mole.common.distributed import get_rank, get_world_size, raise_together
from llava_mole.common.errors import ConfigError, StorageError
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.train.tracker import CONFLICT_FILE, StepLog

BATCHES = 4

logger = get_logger(__name__)


def training_probe(dataset: SupervisedDataset, global_batch_size: int, rows: Rows) -> Probe:
    """As many samples of each source as a step has samples, in `BATCHES` batches; fewer if the data have no more.

    They are the same at every measurement: held-out ones if the run has some, else the first of the plan.

    Raises:
        ConfigError: a source has fewer than two samples.
    """
    chosen, held_out = samples_of(dataset)
    plan = chosen.plan
    # Different samples: a lambda above 1 and further epochs repeat them.
    different = {name: min(plan.sizes[name], count // plan.epochs) for name, count in plan.counts.items()}
    name, fewest = min(different.items(), key=lambda item: item[1])
    if fewest < 2:
        raise ConfigError(
            f"train.conflict_every needs two samples of every source, and {name!r} has {count_of(fewest, 'sample')}"
            f"{' held out' if held_out else ''}; set it to 0, or raise data.validation_samples"
        )
    batches = min(BATCHES, fewest)
    return Probe(chosen, batches, max(1, min(global_batch_size, fewest) // batches), rows, held_out)


class ConflictRecord:
    """Measures every `every` optimizer steps and after the last one, and writes `conflict.jsonl`.

    Nothing that training depends on changes. All ranks must make the same calls.

    Args:
        model: The model in training, without its engine.
        parameters: What trains.
        probe: The samples.
        reduction: `train.loss_reduction`.
        every, total_steps: Optimizer steps.
        run_dir: Of the run.
        first_step: Step at which the run starts, see `StepLog`.
        enabled: Whether this rank writes.
    """

    def __init__(
        self,
        model: LlavaMole,
        parameters: Mapping[str, torch.nn.Parameter],
        probe: Probe,
        reduction: Reduction,
        *,
        every: int,
        total_steps: int,
        run_dir: Path,
        first_step: int,
        enabled: bool,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._probe = probe
        self._reduction = reduction
        self._every = every
        self._total_steps = total_steps
        self._log = StepLog(run_dir / CONFLICT_FILE, first_step) if enabled else None

    def due(self, step: int) -> bool:
        """Whether there is a measurement after optimizer step `step` (from 1)."""
        return step % self._every == 0 or step == self._total_steps

    def measure(self, step: int) -> None:
        """Measure after optimizer step `step`; a collective."""
        started = time.perf_counter()
        failure = None
        try:
            self._probe.load(get_rank(), get_world_size())
        except StorageError as error:
            failure = error
        try:
            raise_together(failure)
        except StorageError as error:  # training goes on as long as its own samples can be read
            logger.warning("no conflict after step %d: %s", step, error)
            return
        found = measure_conflict(self._model, self._probe, self._parameters, self._reduction)
        if self._log is not None:
            self._log.write({"step": step, **found, "seconds": time.perf_counter() - started})

    def sync(self) -> None:
        """Flush the entries to the disk, as every checkpoint needs."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Flush and close the file."""
        if self._log is not None:
            self._log.close()
