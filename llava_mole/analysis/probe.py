"""The samples that a meter looks at: the same number of each source, as rows of a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llava_mole.common.errors import ConfigError, value_errors_as
from llava_mole.common.text import count_of
from llava_mole.data.batching import assign_step
from llava_mole.data.collator import Example, collate, collate_packed
from llava_mole.data.dataset import SupervisedDataset
from llava_mole.model.batch_loss import routing_inputs, to_device
from llava_mole.model.flops import model_shape
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import active_config, set_routing_inputs

Row = dict[str, Any]
"""One batch of the collator: a packed row, or a sample without padding."""


def routes_samples(model: LlavaMole) -> bool:
    """Whether a router decides once for a sample (granularity `sequence`)."""
    config = active_config(model.language_model)
    return config is not None and config.granularity == "sequence"


@dataclass(frozen=True)
class Rows:
    """How examples become rows, none of which has padding.

    Args:
        packed: Several samples in a row; else one.
        capacity: Most tokens of a packed row.
        quadratic: See `sample_cost`.
        pad_token_id: Of the tokenizer.
    """

    packed: bool
    capacity: int
    quadratic: float
    pad_token_id: int

    @classmethod
    def of(cls, model: LlavaMole, *, packed: bool, capacity: int, pad_token_id: int) -> "Rows":
        """Rows for `model`; `packed` needs `packed_attention.enable_packing`.

        A router that averages over a prompt (granularity `sequence`) tells packed samples apart in training mode only,
        so its samples are not packed. That changes no number.
        """
        return cls(packed and not routes_samples(model), capacity, model_shape(model).quadratic_length, pad_token_id)

    def __call__(self, examples: Sequence[Example]) -> list[Row]:
        """The rows of some examples."""
        if not self.packed:
            return [collate([example], pad_token_id=self.pad_token_id) for example in examples]
        lengths = [len(example.input_ids) for example in examples]
        (rows,) = assign_step(lengths, world_size=1, capacity=self.capacity, quadratic=self.quadratic)
        return [collate_packed([examples[n] for n in row], pad_token_id=self.pad_token_id) for row in rows if row]


@dataclass(frozen=True)
class Probe:
    """N batches of each of S sources.

    Args:
        dataset: Where the samples come from.
        batches: N.
        batch_size: Samples of a batch of one source.
        rows: How they become rows.
        held_out: Whether no step has trained on them.
    """

    dataset: SupervisedDataset
    batches: int
    batch_size: int
    rows: Rows
    held_out: bool
    _kept: dict[tuple[int, int], list[Row]] = field(default_factory=dict, repr=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in the order of all results."""
        return self.dataset.source_names

    @cached_property
    def positions(self) -> list[list[int]]:
        """For each source the positions of its first N x batch_size samples. Raises ConfigError if there are fewer."""
        return first_positions(self.dataset, self.batches * self.batch_size)

    def batch(self, number: int, source: int) -> list[Row]:
        """The rows of batch `number` of source number `source`, which are kept in memory.

        Raises:
            ConfigError: the source has too few samples.
            DataError: an image cannot be read, nor those of the records after it.
            StorageError: the storage of an image cannot be reached.
        """
        if (number, source) not in self._kept:
            chosen = self.positions[source][number * self.batch_size : (number + 1) * self.batch_size]
            self._kept[number, source] = self.rows(self.dataset.__getitems__(chosen))
        return self._kept[number, source]

    def load(self, first: int, every: int) -> None:
        """Read the batches number `first`, `first + every`, ... of all sources, if they are not in memory yet.

        Raises what `batch` does.
        """
        for number in range(first, self.batches, every):
            for source in range(len(self.sources)):
                self.batch(number, source)


def first_positions(dataset: SupervisedDataset, count: int) -> list[list[int]]:
    """For each source the positions of its first `count` different samples in the order of the plan.

    A sample that comes again, as with a lambda above 1, counts once.

    Raises:
        ConfigError: a source has fewer.
    """
    names = dataset.source_names
    number = {name: index for index, name in enumerate(names)}
    found: list[list[int]] = [[] for _ in names]
    taken: list[set[int]] = [set() for _ in names]
    missing = len(names)
    for position in range(len(dataset)):
        name, sample = dataset.plan[position]
        own, seen = found[number[name]], taken[number[name]]
        if len(own) < count and sample not in seen:
            own.append(position)
            seen.add(sample)
            missing -= len(own) == count
            if not missing:
                return found
    short = next(index for index, own in enumerate(found) if len(own) < count)
    raise ConfigError(
        f"source {names[short]!r} has {count_of(len(found[short]), 'sample')} to measure on, and {count:,} of each "
        "source are asked for; ask for fewer (--batches, --batch-size, --samples), or hold more out "
        "(data.validation_samples)"
    )


def samples_of(dataset: SupervisedDataset, held_out: bool | None = None) -> tuple[SupervisedDataset, bool]:
    """The held-out samples of a training set if it has some, else itself; and whether they are held out.

    Args:
        held_out: True insists on held-out samples and False on trained ones.

    Raises:
        ConfigError: none are held out, and `held_out` is True.
    """
    if held_out and dataset.validation is None:
        raise ConfigError(
            "no samples are held out of this run (data.validation_samples is 0); measure on its training samples, or "
            "name other data with --data.sources.NAME.annotations FILE"
        )
    if held_out is False or dataset.validation is None:
        return dataset, False
    return dataset.validation, True


def send(model: LlavaMole, row: Row) -> Row:
    """The row on the model's device; its routers know it. Raises ConfigError for more sources than experts or tasks."""
    row = to_device(row, model.device)
    with value_errors_as(ConfigError):
        set_routing_inputs(model.language_model, **routing_inputs(row))
    return row


Advance = Callable[[int], object]
"""Called with the number of batches done since the last call."""


def no_progress(_: int) -> None:
    """Show nothing."""
