"""Where a training stands between two optimizer steps: its passes, their weights, and the experts' pending counts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


class TrainingPass:
    """One forward pass of a training, until its backward pass."""

    def __init__(self, on_first_backward: Callable[[], None] | None = None) -> None:
        self.on_first_backward = on_first_backward
        """Called once, when the first backward pass takes the gradient."""
        self.claimed = False
        """Whether the caller weighs the auxiliary loss of this pass; the automatic one then gives no gradient."""
        self.taken_by: int | None = None
        """Autograd's number of the latest backward pass that has taken the gradient."""

    def take(self, backward: int) -> bool:
        """Whether this output carries the gradient: the first one that backward pass number `backward` reaches."""
        if self.claimed or self.taken_by == backward:
            return False
        if self.taken_by is None and self.on_first_backward is not None:
            self.on_first_backward()
        self.taken_by = backward
        return True


@dataclass
class TrainingProgress:
    """What all layers of a model share about its training. Copies and pickles of a model start anew."""

    left_to_caller: bool = False
    """Whether the training loop adds the balance loss itself; see `leave_balance_loss_to_caller`."""
    pending_counts: Tensor | None = None
    """Tokens of each expert since the last optimizer step, int64 `[L, M, K]`, for M token sets."""
    counts_before: Tensor | None = None
    """`pending_counts` before the latest pass was counted."""
    latest: TrainingPass | None = None
    passes: int = 0
    """Training passes since the last optimizer step."""
    passes_of_a_step: int | None = None
    """Training passes of the latest finished optimizer step."""
    announced_last: bool | None = None
    """Whether accelerate called the latest training pass the last one of its step; None without accelerate."""
    accumulated_weight: float | None = None
    """Weight given to the passes of an accumulation so far; None if accelerate has announced none."""
    moved_routers: set[str] = field(default_factory=set)
    """Names of the FFNs whose router has had a gradient."""
    blind_steps: int | None = 0
    """Optimizer steps so far that left a trainable router without any gradient; None once nobody watches any more."""

    def __reduce__(self) -> tuple[type["TrainingProgress"], tuple[bool]]:
        return TrainingProgress, (self.left_to_caller,)

    def begin_pass(self, last: bool | None) -> float:
        """Count a training pass and return its weight among those of its optimizer step.

        It is 1 / n, where the step before had n passes, and 1 before the first step. Where accelerate announces the
        last pass of an accumulation, that pass gets what is left, so the weights add up to 1: in the first step, whose
        n is unknown, and in the last one of an epoch, which may be shorter.

        Args:
            last: Whether an optimizer step follows this pass, as accelerate says; None if it says nothing.
        """
        if last is False and self.announced_last:
            self.accumulated_weight = None  # also after a step that was skipped
        self.latest, self.announced_last = TrainingPass(), last
        self.passes += 1
        if last is False:
            given = self.accumulated_weight or 0.0
            weight = min(1 - given, 1 / self.passes_of_a_step) if self.passes_of_a_step else 0.0
            self.accumulated_weight = given + weight
            return weight
        if last and self.accumulated_weight is not None:
            weight, self.accumulated_weight = 1 - self.accumulated_weight, 1.0
            return weight
        return 1 / (self.passes_of_a_step or 1)

    def pass_in_evaluation(self, counts_LMK: Tensor | None) -> tuple[TrainingPass, float]:
        """A pass in evaluation mode and its weight. It counts as a training pass once a backward pass follows it."""

        def count() -> None:
            self.passes += 1
            if counts_LMK is not None:
                self.add_counts(counts_LMK)

        self.latest = TrainingPass(count)
        return self.latest, 1 / (self.passes_of_a_step or 1)

    def end_step(self) -> None:
        """Note that the optimizer has stepped."""
        if self.passes:
            self.passes_of_a_step, self.passes = self.passes, 0
        self.accumulated_weight = None

    def claim(self) -> bool:
        """Leave the auxiliary loss of the latest pass to the caller; False if nothing else would have added it."""
        this_pass = self.latest
        if this_pass is None or this_pass.claimed or this_pass.taken_by is not None:
            return False
        this_pass.claimed = True
        if this_pass.on_first_backward is None:
            self.pending_counts = self.counts_before
        else:  # a pass in evaluation mode, whose counts have not been added yet
            self.passes += 1
        return True

    def add_counts(self, counts_LMK: Tensor) -> None:
        """Add the expert counts of a pass to those of its optimizer step."""
        self.counts_before = self.pending_counts
        self.pending_counts = counts_LMK if self.pending_counts is None else self.pending_counts + counts_LMK

    def take_counts(self) -> Tensor | None:
        """The counts of a finished optimizer step, which are then forgotten."""
        counts, self.pending_counts, self.counts_before = self.pending_counts, None, None
        return counts
