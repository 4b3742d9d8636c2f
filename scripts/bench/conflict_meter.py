"""What the conflict meter costs: seconds for each source, as a multiple of a training step with as many samples.

    python scripts/bench/conflict_meter.py configs/tiny/finetune_mole.yaml --repeats 5

Steps (forward, backward, clipping, AdamW on the mixture) and measurements alternate, so that other work on the machine
disturbs both alike; medians over the repeats are compared. Samples are in memory before the clock starts.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llava_mole.analysis.arguments import add_subject_arguments
from llava_mole.analysis.conflict.gradients import source_gradient
from llava_mole.analysis.conflict.interference import StepRule
from llava_mole.analysis.conflict.meter import measure_conflict
from llava_mole.analysis.opening import Subject, open_subject
from llava_mole.analysis.probe import Row
from llava_mole.common.errors import command


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step_of(subject: Subject, rows: Sequence[Row]) -> Callable[[], object]:
    """An optimizer step on some rows. Its rate is so small that the model stays the same."""
    parameters = subject.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-12, weight_decay=0)

    def step() -> None:
        subject.model.train()
        gradients, _ = source_gradient(subject.model, rows, parameters, subject.config.train.loss_reduction)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line for each kind of measurement."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", type=Path, metavar="RUN|CONFIG", help="run, checkpoint or configuration")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved repetitions (default 5)")
    parser.add_argument("--batch", type=int, metavar="G", help="samples of a step and of each source (default: the "
                        "run's train.global_batch_size)")  # fmt: skip
    add_subject_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    subject = open_subject(arguments.subject, overrides, arguments)
    size, model = arguments.batch or subject.config.train.global_batch_size, subject.model
    parameters, reduction = subject.parameters, subject.config.train.loss_reduction
    probe = subject.probe(4, max(1, size // 4), False)
    count, rule = len(probe.sources), StepRule(subject.rates(), 1.0)
    own = [probe.dataset[position] for position in range(4 * probe.batch_size)]
    step = step_of(subject, probe.rows(own))
    kinds: dict[str, Callable[[], object]] = {
        "gradients (train.conflict_every)": lambda: measure_conflict(model, probe, parameters, reduction),
        "gradients, interference": lambda: measure_conflict(model, probe, parameters, reduction, rule=rule),
        "gradients, tokens": lambda: measure_conflict(model, probe, parameters, reduction, tokens=True),
    }
    step()
    kinds["gradients (train.conflict_every)"]()  # reads the images
    steps: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.repeats):
        for name, function in kinds.items():
            steps.append(timed(step))
            found[name].append(timed(function) / count)
    normal = statistics.median(steps)
    print(f"{subject.name}: a step of {4 * probe.batch_size} samples takes {normal:.3f} s (median of {len(steps)})")
    for name, seconds in found.items():
        ratio = statistics.median(seconds) / normal
        print(f"{name}: {statistics.median(seconds):.3f} s for each of {count} sources, {ratio:.2f} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
