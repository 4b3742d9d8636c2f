"""Share of tokens per layer and expert while prompts are evaluated, per domain, split into image and text tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.errors import ConfigError
from llava_mole.eval.answers import write_text_atomically
from llava_mole.eval.questions import Question, windows

if TYPE_CHECKING:
    from llava_mole.inference import Batch, Predictor

MODALITIES = ("all", "image", "text")


class RoutingStats:
    """Counts, over prompts, how many tokens each layer's router sends to each expert.

    Only prompts count (one forward pass of their own, without the head), not the tokens of the answers.
    """

    def __init__(self, predictor: "Predictor"):
        """Raises ConfigError for a model without a mixture of experts."""
        method = predictor.loaded.config.adapter.method
        if method != "mole":
            raise ConfigError(
                f"routing statistics need a model with adapter.method 'mole'; {predictor.loaded.path} has {method!r}"
            )
        self._predictor = predictor
        self._counts: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, batch: "Batch", domains: Sequence[str]) -> None:
        """Count one batch; row n belongs to `domains[n]`."""
        from llava_mole.mole import collect_routing, routing_load

        model = self._predictor.loaded.model
        causal_lm: Any = model.causal_lm
        with torch.inference_mode():
            inputs_BLD = self._predictor.embed(batch)
            # Through the whole model, which notes the padding for gates that average over a prompt; of the logits,
            # which nobody needs here, only the last position's are computed.
            causal_lm(inputs_embeds=inputs_BLD, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            routing = collect_routing(model.language_model)
            is_image_BL = batch.input_ids == IMAGE_TOKEN_INDEX
            for domain in dict.fromkeys(domains):
                rows_B1 = torch.tensor([[name == domain] for name in domains], device=batch.input_ids.device)
                prompt_BL = batch.attention_mask & rows_B1
                masks = {"all": prompt_BL, "image": prompt_BL & is_image_BL, "text": prompt_BL & ~is_image_BL}
                for modality, mask_BL in masks.items():
                    tokens = int(mask_BL.sum())
                    if tokens:
                        self._accumulate(domain, modality, routing_load(routing, mask_BL).double().cpu() * tokens)

    def _accumulate(self, domain: str, modality: str, counts_lK: torch.Tensor) -> None:
        of_domain = self._counts.setdefault(domain, {})
        of_domain[modality] = of_domain[modality] + counts_lK if modality in of_domain else counts_lK

    def result(self) -> dict[str, Any]:
        """`domains` -> domain -> modality -> `tokens` and `share` [layer][expert]; a layer's shares sum to 1."""
        domains: dict[str, Any] = {}
        for domain, modalities in self._counts.items():
            domains[domain] = {
                modality: {
                    "tokens": round(float(modalities[modality][0].sum())),
                    "share": (modalities[modality] / modalities[modality].sum(dim=1, keepdim=True)).tolist(),
                }
                for modality in MODALITIES
                if modality in modalities
            }
        return {"model_path": str(self._predictor.loaded.path), "counted": "prompt tokens", "domains": domains}

    def write(self, path: Path) -> None:
        """Write `result` as JSON, atomically."""
        write_text_atomically(path, json.dumps(self.result()) + "\n")


def collect_routing_stats(
    predictor: "Predictor", questions: Sequence[Question], image_folder: Path, *, batch_size: int = 16
) -> RoutingStats:
    """Run every question's prompt through the model once. Raises as `RoutingStats` and `Predictor.batches`."""
    from tqdm import tqdm

    stats = RoutingStats(predictor)
    with tqdm(total=len(questions), desc="routing", unit="q", disable=None) as progress:
        for window, images in windows(questions, image_folder, batch_size):
            for batch in predictor.batches(images, [question.text for question in window], batch_size=batch_size):
                stats.add(batch, [window[member].domain for member in batch.members])
            progress.update(len(window))
    return stats
