"""The router meters over some samples, from a model to plain values."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_mole.analysis.conflict.gradients import layer_of
from llava_mole.analysis.probe import Advance, Row, no_progress
from llava_mole.analysis.routing import information
from llava_mole.analysis.routing.interventions import intervene, score_answers
from llava_mole.analysis.routing.similarity import describe_similarity, find_projections, read_inputs
from llava_mole.analysis.routing.tokens import RoutedTokens, describe_tokens, route_tokens
from llava_mole.analysis.undisturbed import undisturbed
from llava_mole.model.llava_arch import LlavaMole

SEED = 0


def measure_routing(
    model: LlavaMole,
    rows: Sequence[Row],
    sources: Sequence[str],
    tokenizer: Any,
    *,
    permutations: int,
    advance: Advance = no_progress,
) -> tuple[dict[str, Any], RoutedTokens]:
    """Load, certainty, mutual information and likeness of experts, and the routing they come from.

    Args:
        model: A model with experts.
        rows: Rows without padding.
        sources: Names of the sources.
        tokenizer: The transformers tokenizer.
        permutations: For the baseline of mutual information.
    """
    started = time.perf_counter()
    projections = find_projections(model)
    with undisturbed(model), read_inputs(projections):
        routed = route_tokens(model, rows, tokenizer, advance)
    result = {
        "routers": list(routed.names),
        "layers": [layer_of(f"language_model.{name}") for name in routed.names],
        "sources": list(sources),
        "has_probabilities": routed.has_probabilities,
        "routing": describe_tokens(routed, sources),
        "information": describe_information(routed, permutations),
        "similarity": describe_similarity(projections),
        "drift": [],
        "seconds": {"routing": time.perf_counter() - started},
    }
    return result, routed


def describe_information(routed: RoutedTokens, permutations: int) -> dict[str, Any]:
    """Mutual information of expert and source, modality, role and form, as plain values."""
    generator = torch.Generator().manual_seed(SEED)
    experts = max(logs.shape[1] for logs in routed.logprobs)
    samples = int(routed.sample.max()) + 1
    of_sample = torch.zeros(samples, dtype=torch.int64).index_copy(0, routed.sample, routed.source)
    shared: dict[str, Any] = {"experts": experts, "permutations": permutations, "generator": generator}
    found = {"source": information.of_samples(routed.expert, routed.sample, of_sample, **shared)}
    for kind, classes in routed.kinds.items():
        found[kind] = information.of_tokens(routed.expert, routed.sample, classes, **shared)
    return {kind: own.values() for kind, own in found.items()}


def measure_interventions(
    model: LlavaMole, rows: Sequence[Row], sources: Sequence[str], *, by_layer: bool, advance: Advance = no_progress
) -> dict[str, Any]:
    """`intervene` on the answers of some rows."""
    score: Callable[[], Any] = lambda: score_answers(model, rows, advance)  # noqa: E731
    with undisturbed(model):
        return intervene(model, score, sources, by_layer=by_layer)
