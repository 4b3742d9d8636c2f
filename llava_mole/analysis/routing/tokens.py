"""The routing of every token of some samples, and what kind of token each is.

Shape legend: L routers, T tokens of all samples, K experts, N samples.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_mole.analysis.probe import Advance, Row, no_progress, send
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.model.batch_loss import forward_losses
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole import collect_routing

MODALITIES = ("image", "text")
ROLES = ("image", "prompt", "answer")
FORMS = ("image", "word", "digit", "punctuation", "other")


@dataclass(frozen=True)
class RoutedTokens:
    """Routing and kind of T tokens; all tensors on the CPU."""

    names: tuple[str, ...]
    """The routers."""
    expert: torch.Tensor
    """int64 `[L, T]`: the first choice."""
    logprobs: tuple[torch.Tensor, ...]
    """For each router float32 `[T, K]`: log probabilities. K may differ by layer."""
    sample: torch.Tensor
    """int64 `[T]`: number of the sample."""
    source: torch.Tensor
    """int64 `[T]`."""
    kinds: dict[str, torch.Tensor]
    """`modality`, `role`, `form`: int64 `[T]`, a position in MODALITIES, ROLES or FORMS."""

    @property
    def has_probabilities(self) -> bool:
        """Whether some router computes probabilities; those of controls and given experts are uniform."""
        return any(bool((logs - logs[:, :1]).abs().max() > 0) for logs in self.logprobs if logs.shape[1] > 1)


def form_of(piece: str, text: str) -> str:
    """The form of a text token: `digit`, `word` or `punctuation` if it holds nothing else, or `other`.

    Args:
        piece: The token as the tokenizer stores it; special and byte tokens, such as `</s>` or `<0x0A>`, are `other`.
        text: What it stands for.
    """
    text = text.strip()
    if not text or (piece.startswith("<") and piece.endswith(">") and len(piece) > 2):
        return "other"
    kinds = {unicodedata.category(character)[0] for character in text}
    for form, own in (("digit", {"N"}), ("word", {"L", "M"}), ("punctuation", {"P", "S"})):
        if kinds <= own:
            return form
    return "other"


def forms_of(tokenizer: Any, ids: Sequence[int]) -> torch.Tensor:
    """The form of every id as a position in FORMS, int64 `[T]`; IMAGE_TOKEN_INDEX is an image."""
    known: dict[int, int] = {IMAGE_TOKEN_INDEX: FORMS.index("image")}
    for number in set(ids) - known.keys():
        piece = tokenizer.convert_ids_to_tokens(number) or ""
        known[number] = FORMS.index(form_of(piece, tokenizer.convert_tokens_to_string([piece])))
    return torch.tensor([known[number] for number in ids])


@torch.no_grad()
def route_tokens(model: LlavaMole, rows: Sequence[Row], tokenizer: Any, advance: Advance = no_progress) -> RoutedTokens:
    """Run the rows, which have no padding, through the model once; call it inside `undisturbed`.

    Args:
        tokenizer: The transformers tokenizer.
    """
    experts: list[torch.Tensor] = []
    logprobs: list[list[torch.Tensor]] = []
    facts: dict[str, list[torch.Tensor]] = {"ids": [], "labels": [], "sample": [], "source": []}
    names: tuple[str, ...] = ()
    samples = 0
    for row in rows:
        forward_losses(model, send(model, row))
        routing = collect_routing(model.language_model)
        names = routing.names
        experts.append(torch.stack([index[..., 0].flatten() for index in routing.index]).cpu())
        logprobs.append([logits.float().log_softmax(dim=-1).flatten(0, -2).cpu() for logits in routing.logits])
        index = row["sample_index"].flatten()
        facts["ids"].append(row["input_ids"].flatten())
        facts["labels"].append(row["labels"].flatten())
        facts["sample"].append(index + samples)
        facts["source"].append(row["source_index"][index])
        samples += len(row["ids"])
        advance(len(row["ids"]))
    ids, labels, sample, source = (torch.cat(values) for values in facts.values())
    image = ids == IMAGE_TOKEN_INDEX
    role = torch.where(image, 0, torch.where(labels == IGNORE_INDEX, 1, 2))
    return RoutedTokens(
        names,
        torch.cat(experts, dim=1),
        tuple(torch.cat([own[layer] for own in logprobs]) for layer in range(len(names))),
        sample,
        source,
        {"modality": (~image).long(), "role": role, "form": forms_of(tokenizer, ids.tolist())},
    )


def describe_tokens(routed: RoutedTokens, sources: Sequence[str]) -> dict[str, Any]:
    """Load, entropy and margin as plain values, by router and for every group of tokens.

    `load` is the share of tokens by their first choice, `entropy` (nats) and `margin` (first minus second probability)
    are means over tokens. `[L][K]` for loads, `[L]` for the others.
    """
    groups = {"source": (routed.source, sources), **{
        kind: (routed.kinds[kind], names)
        for kind, names in (("modality", MODALITIES), ("role", ROLES), ("form", FORMS))
    }}  # fmt: skip
    certainty = torch.stack([_entropy_and_margin(logs) for logs in routed.logprobs])
    most = max(logs.shape[1] for logs in routed.logprobs)
    chosen = torch.nn.functional.one_hot(routed.expert, most)
    result: dict[str, Any] = {
        "load": chosen.double().mean(dim=1).tolist(),
        "entropy": certainty[:, 0].double().mean(dim=1).tolist(),
        "margin": certainty[:, 1].double().mean(dim=1).tolist(),
        "tokens": routed.expert.shape[1],
        "by": {},
    }
    for kind, (numbers, names) in groups.items():
        by_name = {}
        for number, name in enumerate(names):
            own = numbers == number
            if own.any():
                by_name[name] = {
                    "tokens": int(own.sum()),
                    "load": chosen[:, own].double().mean(dim=1).tolist(),
                    "entropy": certainty[:, 0, own].double().mean(dim=1).tolist(),
                    "margin": certainty[:, 1, own].double().mean(dim=1).tolist(),
                }
        result["by"][kind] = by_name
    return result


def _entropy_and_margin(logs_TK: torch.Tensor) -> torch.Tensor:
    """Entropy and margin of every token, float32 `[2, T]`."""
    probs = logs_TK.exp()
    entropy = -(probs * logs_TK.clamp(min=torch.finfo(logs_TK.dtype).min)).sum(dim=-1)
    if logs_TK.shape[-1] == 1:
        return torch.stack([entropy, probs[:, 0]])
    best = probs.topk(2, dim=-1).values
    return torch.stack([entropy, best[:, 0] - best[:, 1]])
