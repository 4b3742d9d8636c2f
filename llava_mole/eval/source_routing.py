"""Models that route by a sample's source: which source each question belongs to, and the routing input that says so.

The control `oracle` and the methods that route by task know a sample's source in training. A question has none, so its
group stands for it, or the source that `--source-of` names.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.text import shorten
from llava_mole.config import load_config
from llava_mole.eval.questions import Question

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor

ROUTED = ("experts", "source", "task")
"""Routing inputs that say what a sample is; all of them are the number of its source, as in training."""


def parse_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Split `NAME=SOURCE` arguments. Raises ConfigError for another form, or a name that comes twice."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, separator, source = argument.partition("=")
        if not (separator and name and source) or name in found:
            raise ConfigError(f"--source-of {argument!r}: give NAME=SOURCE, each name (a group or benchmark) once")
        found[name] = source
    return found


def sources_of_groups(
    predictor: "Predictor", questions: Sequence[Question], given: Mapping[str, str], benchmark: str
) -> dict[str, int] | None:
    """The number of the source of every group of questions, for a model that routes by source; None for others.

    Args:
        given: Name of a group or benchmark -> name of a source. A group that is not in it has the name of its source.
        benchmark: The benchmark's name.

    Raises:
        ConfigError: a group whose source is not known, or is none of the model's.
    """
    from llava_mole.model.builder import CONFIG_FILE
    from llava_mole.mole import missing_input

    if predictor.loaded.adapter != "mole" or missing_input(predictor.loaded.model.language_model) not in ROUTED:
        return None
    names = list(load_config(predictor.loaded.path / CONFIG_FILE).data.sources)
    numbers = {}
    for group in dict.fromkeys(question.group for question in questions):
        source = given.get(group, given.get(benchmark, group))
        if source not in names:
            raise ConfigError(
                f"{predictor.loaded.path} routes by source, and group {group!r} of the questions has source "
                f"{source!r}, which is not one of its own ({shorten(names, 6)}); give --source-of {group}=SOURCE"
            )
        numbers[group] = names.index(source)
    return numbers


@contextmanager
def routed_by(predictor: "Predictor", source: int | None):
    """Route everything in the block as samples of source number `source`; None changes nothing."""
    if source is None:
        yield
        return
    import torch

    from llava_mole.mole import set_routing_inputs

    model: Any = predictor.loaded.model
    one = torch.tensor([source], device=model.device)  # the layers repeat it for the rows of a batch
    set_routing_inputs(model.language_model, **dict.fromkeys(ROUTED, one))
    try:
        yield
    finally:
        set_routing_inputs(model.language_model)


def by_source(
    questions: Sequence[Question], sources: Mapping[str, int] | None
) -> list[tuple[int | None, list[Question]]]:
    """The questions of each source, in order; all together under None for a model that does not route by source."""
    if sources is None:
        return [(None, list(questions))]
    parts: dict[int | None, list[Question]] = {}
    for question in questions:
        parts.setdefault(sources[question.group], []).append(question)
    return list(parts.items())
