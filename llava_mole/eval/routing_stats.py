"""Share of prompt tokens per layer and expert, by group, for all tokens and for image and text tokens apart.

This is the data behind the paper's Figure 3: the share over all tokens, and how much it varies between samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole.common.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from llava_mole.common.errors import ConfigError
from llava_mole.common.files import write_json
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.eval.questions import Question, errors_named_after, windows
from llava_mole.eval.ranks import share_of_rank
from llava_mole.inference.predictor import Batch, Predictor
from llava_mole.mole import choice_counts, collect_routing

MODALITIES = ("all", "image", "text")


@dataclass
class _Sums:
    """Sums over the samples of one group and modality, float64 [L, K] each."""

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
        # Unbiased; cancellation can leave slightly less than 0 if all samples agree.
        spread = (self.share_squared - self.samples * mean**2).clamp(min=0) / max(1, self.samples - 1)
        return {
            "tokens": round(float(self.tokens[0].sum())),
            "samples": self.samples,
            "share": (self.tokens / self.tokens.sum(dim=1, keepdim=True)).tolist(),
            "sample_mean": mean.tolist(),
            "sample_std": spread.sqrt().tolist(),
        }


class RoutingStats:
    """Counts how many prompt tokens each layer's router sends to each expert.

    Prompts take a forward pass of their own; the tokens of the answers are not counted.
    """

    def __init__(self, predictor: Predictor):
        """Raises ConfigError for a model without a mixture of experts."""
        method = predictor.loaded.adapter
        if method != "mole":
            raise ConfigError(
                f"routing statistics need a model with adapter.method 'mole'; {predictor.loaded.path} has {method!r}"
            )
        self._predictor = predictor
        self._sums: dict[tuple[str, str], _Sums] = {}

    def add(self, batch: Batch, groups: Sequence[str]) -> None:
        """Count one batch; row n belongs to `groups[n]`."""
        model = self._predictor.loaded.model
        causal_lm: Any = model.causal_lm
        with torch.inference_mode():
            inputs_BLD = self._predictor.embed(batch)
            # Through the whole model, which tells gates that average over a prompt where the padding is. The logits
            # are not needed, so only the last position's are computed.
            causal_lm(inputs_embeds=inputs_BLD, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            routing = collect_routing(model.language_model)
            prompt_BL, is_image_BL = batch.attention_mask, batch.input_ids == IMAGE_TOKEN_INDEX
            masks = {"all": prompt_BL, "image": prompt_BL & is_image_BL, "text": prompt_BL & ~is_image_BL}
            for modality, mask_BL in masks.items():
                # With top_k above 1, a token counts in equal parts for the experts that it uses.
                counts_lBK = choice_counts(routing, mask_BL).double().cpu() / routing.index[0].shape[-1]
                for row, group in enumerate(groups):
                    self._add_sample((group, modality), counts_lBK[:, row])

    def _add_sample(self, key: tuple[str, str], counts_lK: torch.Tensor) -> None:
        if not counts_lK.any():
            return  # a prompt without an image has no image tokens
        share_lK = counts_lK / counts_lK.sum(dim=1, keepdim=True)
        sample = _Sums(counts_lK, share_lK, share_lK**2, 1)
        self._sums[key] = self._sums[key] + sample if key in self._sums else sample

    def merge_ranks(self) -> None:
        """Add up what all ranks counted; a collective."""
        everyone = all_gather_objects(self._sums)
        self._sums = {}
        for sums in everyone:
            for key, value in sums.items():
                self._sums[key] = self._sums[key] + value if key in self._sums else value

    def result(self) -> dict[str, Any]:
        """Return plain values: `groups` -> group -> modality (`all`, `image`, `text`) -> numbers, [layer][expert] each.

        `share` is over all `tokens` of the group and sums to 1 in each layer; `sample_mean` and `sample_std` (n - 1)
        are over the shares of its `samples`, which count equally.
        """
        groups: dict[str, Any] = {}
        for group in dict.fromkeys(group for group, _ in self._sums):
            groups[group] = {
                modality: self._sums[group, modality].result()
                for modality in MODALITIES
                if (group, modality) in self._sums
            }
        return {"model_path": str(self._predictor.loaded.path), "counted": "prompt tokens", "groups": groups}

    def write(self, path: Path) -> None:
        """Write `result` as JSON, atomically."""
        write_json(path, self.result(), indent=None)


def collect_routing_stats(
    predictor: Predictor, questions: Sequence[Question], image_folder: Path, *, batch_size: int = 16
) -> RoutingStats:
    """Run every question's prompt through the model once, shared over the ranks.

    Raises as `RoutingStats` and `Predictor.batches` do.
    """
    stats = RoutingStats(predictor)
    mine = share_of_rank(questions, get_rank(), get_world_size())
    with tqdm(total=len(mine), desc="routing", unit="q", disable=None if is_main_process() else True) as progress:
        for window, images in windows(mine, image_folder, batch_size):
            with errors_named_after(window):
                batches = predictor.batches(images, [question.text for question in window], batch_size=batch_size)
            for batch in batches:
                stats.add(batch, [window[member].group for member in batch.members])
            progress.update(len(window))
    stats.merge_ranks()
    return stats
