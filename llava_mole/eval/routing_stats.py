"""Share of tokens per layer and expert while prompts are evaluated, per domain, split into image and text tokens.

This is what the paper's Figure 3 shows: the share over all tokens, and how much it varies from sample to sample.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_mole.common.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from llava_mole.common.errors import ConfigError
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.eval.answers import write_text_atomically
from llava_mole.eval.questions import Question, naming, windows
from llava_mole.eval.ranks import share_of_rank

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Batch, Predictor

MODALITIES = ("all", "image", "text")


@dataclass
class _Sums:
    """Sums over the samples of one domain and modality, float64 [L, K] each."""

    tokens: torch.Tensor
    share: torch.Tensor
    share_squared: torch.Tensor
    samples: int

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.tokens + other.tokens,
            self.share + other.share,
            self.share_squared + other.share_squared,
            self.samples + other.samples,
        )

    def result(self) -> dict[str, Any]:
        mean = self.share / self.samples
        # Unbiased; cancellation can leave a hair below 0 where all samples agree.
        spread = (self.share_squared - self.samples * mean**2).clamp(min=0) / max(1, self.samples - 1)
        return {
            "tokens": round(float(self.tokens[0].sum())),
            "samples": self.samples,
            "share": (self.tokens / self.tokens.sum(dim=1, keepdim=True)).tolist(),
            "sample_mean": mean.tolist(),
            "sample_std": spread.sqrt().tolist(),
        }


class RoutingStats:
    """Counts, over prompts, how many tokens each layer's router sends to each expert.

    Only prompts count (one forward pass of their own, without the head), not the tokens of the answers.
    """

    def __init__(self, predictor: "Predictor"):
        """Raises ConfigError for a model without a mixture of experts."""
        method = predictor.loaded.adapter
        if method != "mole":
            raise ConfigError(
                f"routing statistics need a model with adapter.method 'mole'; {predictor.loaded.path} has {method!r}"
            )
        self._predictor = predictor
        self._sums: dict[tuple[str, str], _Sums] = {}

    def add(self, batch: "Batch", domains: Sequence[str]) -> None:
        """Count one batch; row n belongs to `domains[n]`."""
        from llava_mole.mole import choice_counts, collect_routing

        model = self._predictor.loaded.model
        causal_lm: Any = model.causal_lm
        with torch.inference_mode():
            inputs_BLD = self._predictor.embed(batch)
            # Through the whole model, which notes the padding for gates that average over a prompt; of the logits,
            # which nobody needs here, only the last position's are computed.
            causal_lm(inputs_embeds=inputs_BLD, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            routing = collect_routing(model.language_model)
            prompt_BL, is_image_BL = batch.attention_mask, batch.input_ids == IMAGE_TOKEN_INDEX
            masks = {"all": prompt_BL, "image": prompt_BL & is_image_BL, "text": prompt_BL & ~is_image_BL}
            for modality, mask_BL in masks.items():
                # With top_k above 1 a token is shared by the experts that it uses.
                counts_lBK = choice_counts(routing, mask_BL).double().cpu() / routing.index[0].shape[-1]
                for row, domain in enumerate(domains):
                    self._add_sample((domain, modality), counts_lBK[:, row])

    def _add_sample(self, key: tuple[str, str], counts_lK: torch.Tensor) -> None:
        if not counts_lK.any():
            return  # a prompt without image has no image tokens to share out
        share_lK = counts_lK / counts_lK.sum(dim=1, keepdim=True)
        sample = _Sums(counts_lK, share_lK, share_lK**2, 1)
        self._sums[key] = self._sums[key] + sample if key in self._sums else sample

    def merge_ranks(self) -> None:
        """Add up what all ranks have counted; a collective."""
        everyone = all_gather_objects(self._sums)
        self._sums = {}
        for sums in everyone:
            for key, value in sums.items():
                self._sums[key] = self._sums[key] + value if key in self._sums else value

    def result(self) -> dict[str, Any]:
        """Plain values: `domains` -> domain -> modality (`all`, `image`, `text`) -> its numbers, [layer][expert] each.

        `share` is over all `tokens` of the domain and sums to 1 in each layer; `sample_mean` and `sample_std` (n - 1)
        are over the shares of its `samples`, each weighing the same.
        """
        domains: dict[str, Any] = {}
        for domain in dict.fromkeys(domain for domain, _ in self._sums):
            domains[domain] = {
                modality: self._sums[domain, modality].result()
                for modality in MODALITIES
                if (domain, modality) in self._sums
            }
        return {"model_path": str(self._predictor.loaded.path), "counted": "prompt tokens", "domains": domains}

    def write(self, path: Path) -> None:
        """Write `result` as JSON, atomically."""
        write_text_atomically(path, json.dumps(self.result()) + "\n")


def collect_routing_stats(
    predictor: "Predictor", questions: Sequence[Question], image_folder: Path, *, batch_size: int = 16
) -> RoutingStats:
    """Run every question's prompt through the model once, shared over the ranks.

    Raises as `RoutingStats` and `Predictor.batches`.
    """
    from tqdm import tqdm

    stats = RoutingStats(predictor)
    mine = share_of_rank(questions, get_rank(), get_world_size())
    with tqdm(total=len(mine), desc="routing", unit="q", disable=None if is_main_process() else True) as progress:
        for window, images in windows(mine, image_folder, batch_size):
            with naming(window):
                batches = predictor.batches(images, [question.text for question in window], batch_size=batch_size)
            for batch in batches:
                stats.add(batch, [window[member].domain for member in batch.members])
            progress.update(len(window))
    stats.merge_ranks()
    return stats
