"""Share of prompt tokens per layer and expert, by group, for all tokens and for image and text tokens apart.

This is the data behind the paper's Figure 3: the share over all tokens, and how much it varies between samples.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole.common.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from llava_mole.common.errors import ConfigError
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.eval.questions import Question, errors_named_after, windows
from llava_mole.eval.ranks import share_of_rank
from llava_mole.eval.source_routing import by_source, routed_by
from llava_mole.inference.finite import finite_outputs
from llava_mole.inference.predictor import Batch, Predictor
from llava_mole.mole import choice_counts, collect_routing

MODALITIES = ("all", "image", "text")


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
        # By (group, modality): the number of samples, and sums over them of tokens, shares and squared shares.
        self._samples: Counter[tuple[str, str]] = Counter()
        self._sums_3lK: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, batch: Batch, groups: Sequence[str]) -> None:
        """Count one batch; row n belongs to `groups[n]`."""
        model = self._predictor.loaded.model
        causal_lm: Any = model.causal_lm
        with torch.inference_mode():
            inputs_BLD = self._predictor.embed(batch)
            # Through the whole model, which tells gates that average over a prompt where the padding is. The logits
            # are not needed, so only the last position's are computed.
            with finite_outputs(self._predictor.loaded, batch) as check:
                output = causal_lm(
                    inputs_embeds=inputs_BLD, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1
                )
                check.note(~output.logits.isfinite().flatten(1).all(dim=1))
            routing = collect_routing(model.language_model)
            prompt_BL, is_image_BL = batch.attention_mask, batch.input_ids == IMAGE_TOKEN_INDEX
            masks = {"all": prompt_BL, "image": prompt_BL & is_image_BL, "text": prompt_BL & ~is_image_BL}
            for modality, mask_BL in masks.items():
                # With top_k above 1, a token counts in equal parts for the experts that it uses.
                counts_lBK = choice_counts(routing, mask_BL).double().cpu() / routing.index[0].shape[-1]
                for row, group in enumerate(groups):
                    counts_lK = counts_lBK[:, row]
                    if counts_lK.any():  # a prompt without an image has no image tokens
                        share_lK = counts_lK / counts_lK.sum(dim=1, keepdim=True)
                        self._add((group, modality), 1, torch.stack([counts_lK, share_lK, share_lK**2]))

    def _add(self, key: tuple[str, str], samples: int, sums_3lK: torch.Tensor) -> None:
        self._samples[key] += samples
        self._sums_3lK[key] = self._sums_3lK[key] + sums_3lK if key in self._sums_3lK else sums_3lK

    def merge_ranks(self) -> None:
        """Add up what all ranks counted; a collective."""
        everyone = all_gather_objects((self._samples, self._sums_3lK))
        self._samples, self._sums_3lK = Counter(), {}
        for samples, sums in everyone:
            for key, sums_3lK in sums.items():
                self._add(key, samples[key], sums_3lK)

    def result(self) -> dict[str, Any]:
        """Return plain values: `groups` -> group -> modality (`all`, `image`, `text`) -> numbers, [layer][expert] each.

        `share` is over all `tokens` of the group and sums to 1 in each layer; `sample_mean` and `sample_std` (n - 1)
        are over the shares of its `samples`, which count equally.
        """
        groups: dict[str, Any] = {group: {} for group, _ in self._sums_3lK}
        for group, modality in itertools.product(groups, MODALITIES):
            if (group, modality) in self._sums_3lK:
                groups[group][modality] = self._numbers((group, modality))
        return {"model_path": str(self._predictor.loaded.path), "counted": "prompt tokens", "groups": groups}

    def _numbers(self, key: tuple[str, str]) -> dict[str, Any]:
        samples, (tokens_lK, share_lK, squared_lK) = self._samples[key], self._sums_3lK[key]
        mean_lK = share_lK / samples
        # Unbiased; cancellation can leave slightly less than 0 if all samples agree.
        variance_lK = (squared_lK - samples * mean_lK**2).clamp(min=0) / max(1, samples - 1)
        return {
            "tokens": round(float(tokens_lK[0].sum())),
            "samples": samples,
            "share": (tokens_lK / tokens_lK.sum(dim=1, keepdim=True)).tolist(),
            "sample_mean": mean_lK.tolist(),
            "sample_std": variance_lK.sqrt().tolist(),
        }


def collect_routing_stats(
    predictor: Predictor,
    questions: Sequence[Question],
    image_folder: Path,
    sources: Mapping[str, int] | None = None,
    *,
    batch_size: int = 16,
    follow_links: bool = False,
) -> RoutingStats:
    """Run every question's prompt through the model once, shared over the ranks.

    `sources` is that of `answer_questions`.

    Raises as `RoutingStats` and `Predictor.batches` do.
    """
    stats = RoutingStats(predictor)
    mine = share_of_rank(questions, get_rank(), get_world_size())
    with tqdm(total=len(mine), desc="routing", unit="q", disable=None if is_main_process() else True) as progress:
        for source, part in by_source(mine, sources):
            for window, images in windows(part, image_folder, batch_size, follow_links=follow_links):
                with errors_named_after(window), routed_by(predictor, source):
                    prompts = [question.text for question in window]
                    for batch in predictor.batches(images, prompts, batch_size=batch_size):
                        stats.add(batch, [window[member].group for member in batch.members])
                progress.update(len(window))
    stats.merge_ranks()
    return stats
