"""What the routers' decisions are worth: experts are forced, exchanged or switched off, and the answers scored.

The reference answers are fed to the model. An answer counts as right if every token of it, its end included, is the
most probable one after those before it: then, and only then, greedy decoding writes exactly this answer (in a dialogue:
after the reference answers before it). One forward pass scores all answers of a sample.

Shape legend: K experts, N samples, S sources.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_mole.analysis.probe import Advance, Row, no_progress, send
from llava_mole.common.errors import ConfigError, value_errors_as
from llava_mole.model.batch_loss import forward_losses, next_token_targets
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import ExpertLayer
from llava_mole.mole.access import apply_to_experts


@dataclass(frozen=True)
class Scores:
    """The answers of N samples."""

    right: Tensor
    """float64 `[N]`: share of a sample's answers that greedy decoding would write."""
    loss: Tensor
    """float64 `[N]`: mean loss of its supervised tokens."""
    source: Tensor
    """int64 `[N]`."""


@contextmanager
def greedy_tokens(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the most probable token of every position that the head of the model sees inside the block."""
    found: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: found.append(output.argmax(dim=-1).flatten()))
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def score_answers(model: LlavaMole, rows: Sequence[Row], advance: Advance = no_progress) -> Scores:
    """Score the answers of rows, which have no padding; call it inside `undisturbed`."""
    right, losses, sources = [], [], []
    for row in rows:
        sent = send(model, row)
        with greedy_tokens(model.causal_lm.get_output_embeddings()) as greedy:
            sums, counts, mask = forward_losses(model, sent)
        _, targets = next_token_targets(sent["labels"])
        hits = torch.cat(greedy) == targets if greedy else targets.bool()
        right.append(_right_answers(hits.cpu(), mask.cpu(), row["sample_index"], len(row["ids"])))
        losses.append((sums / counts.clamp(min=1)).double().cpu())
        sources.append(row["source_index"])
        advance(len(row["ids"]))
    return Scores(torch.cat(right), torch.cat(losses), torch.cat(sources))


def _right_answers(hits_n: Tensor, mask_BL: Tensor, sample_BL: Tensor, samples: int) -> Tensor:
    """The share of right answers of every sample, float64 `[N]`. An answer is a run of supervised positions."""
    mask, sample = mask_BL.flatten(), sample_BL.flatten()
    before = torch.cat([torch.zeros(1, dtype=torch.bool), mask[:-1]])
    other = torch.cat([torch.zeros(1, dtype=torch.bool), sample[1:] != sample[:-1]])
    answer = ((mask & (~before | other)).cumsum(dim=0) - 1)[mask]
    count = int(answer.max()) + 1 if len(answer) else 0
    wrong = torch.zeros(count, dtype=torch.int64).index_add(0, answer, (~hits_n).long())
    owner = torch.zeros(count, dtype=torch.int64).index_copy(0, answer, sample[mask])
    totals = torch.zeros(2, samples, dtype=torch.float64)
    totals.index_add_(1, owner, torch.stack([(wrong == 0).double(), torch.ones(count, dtype=torch.float64)]))
    return totals[0] / totals[1].clamp(min=1)


def plan(experts: int) -> dict[str, Tensor]:
    """Every intervention on K experts, by name: the matrix for `apply_to_experts`, float64 `[K, K]`."""
    eye, ones = torch.eye(experts).double(), torch.ones(experts, experts).double()
    found: dict[str, Tensor] = {}
    for k in range(experts):
        found[f"force {k}"] = ones * eye[k]
    found["mean of all"] = ones / experts
    for i, j in itertools.combinations(range(experts), 2):
        order = list(range(experts))
        order[i], order[j] = j, i
        found[f"swap {i} and {j}"] = eye[order]
    for k in range(experts):
        found[f"ablate {k}"] = torch.diag(1 - eye[k])
    found["ablate all"] = torch.zeros(experts, experts).double()
    return found


def routers(model: LlavaMole) -> dict[str, int]:
    """The layers that decide, by their name in the language model, and their K.

    Raises:
        ConfigError: there is none with a choice.
    """
    found = {}
    for name, module in model.language_model.named_modules():
        adapter = module.current_adapter() if isinstance(module, ExpertLayer) else None
        if not isinstance(module, ExpertLayer) or adapter is None or module.configs[adapter].num_experts == 1:
            continue
        if module.configs[adapter].router_scope != "model" or adapter in module.mole_router:
            found[name] = module.configs[adapter].num_experts
    if not found:
        raise ConfigError("this model has no router with a choice of experts")
    return found


def intervene(
    model: LlavaMole,
    score: Callable[[], Scores],
    sources: Sequence[str],
    *,
    by_layer: bool = False,
) -> dict[str, Any]:
    """Score the answers as they are and under every intervention; afterwards the model is as it was.

    Args:
        model: A model with experts.
        score: `score_answers` of some rows.
        sources: Names of the sources.
        by_layer: Also switch off every expert of every router by itself.

    Returns:
        `intact`, `all layers` (by intervention) and, if asked for, `by layer` (router -> intervention). Where layers
        differ in K, an intervention reaches the layers that have its experts.

    Raises:
        ConfigError: no router has a choice, or the experts' weights cannot be replaced.
    """
    found = routers(model)
    intact = score()
    result: dict[str, Any] = {"intact": _describe(intact, intact, sources), "all layers": {}}

    def under(matrices: Mapping[str, Tensor]) -> dict[str, Any]:
        with value_errors_as(ConfigError), apply_to_experts(model.language_model, matrices):
            return _describe(score(), intact, sources)

    plans = {count: plan(count) for count in sorted(set(found.values()))}
    for name in plans[max(plans)]:
        matrices = {layer: plans[count][name] for layer, count in found.items() if name in plans[count]}
        result["all layers"][name] = under(matrices)
    if by_layer:
        result["by layer"] = {
            layer: {f"ablate {k}": under({layer: plans[count][f"ablate {k}"]}) for k in range(count)}
            for layer, count in found.items()
        }
    return result


def count_scores(counts: Sequence[int], *, by_layer: bool) -> int:
    """How many times `intervene` scores all answers, for routers with these K."""
    return 1 + len(plan(max(counts))) + (sum(counts) if by_layer else 0)


def _describe(scores: Scores, intact: Scores, sources: Sequence[str]) -> dict[str, Any]:
    """Accuracy and loss over all samples and by source, with the paired difference from the intact model."""
    groups = {"all": torch.ones_like(scores.source, dtype=torch.bool)}
    groups |= {name: scores.source == number for number, name in enumerate(sources)}
    return {name: _numbers(scores, intact, own) for name, own in groups.items() if bool(own.any())}


def _numbers(scores: Scores, intact: Scores, own: Tensor) -> dict[str, float]:
    right, loss = scores.right[own], scores.loss[own]
    change, worse = right - intact.right[own], loss - intact.loss[own]
    half = [float(1.96 * each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan for each in (change, worse)]
    return {
        "samples": len(right),
        "accuracy": float(right.mean()),
        "loss": float(loss.mean()),
        "accuracy_change": float(change.mean()),
        "accuracy_interval": half[0],
        "loss_change": float(worse.mean()),
        "loss_interval": half[1],
    }
