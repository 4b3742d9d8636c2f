"""A small model with experts and the data of a run, for meters: random adapters whose gradients are not zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.analysis.probe import Probe, Rows
from llava_mole.config import RunConfig, parse_run_config
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.model.adapters import trainable_parameters
from llava_mole.model.builder import attach_adapter, build_image_processor, build_parts
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.model.packed_attention import enable_packing
from llava_mole.mole import leave_balance_loss_to_caller


@dataclass
class Metered:
    """A model with random adapters, its training set and its configuration."""

    model: LlavaMole
    dataset: SupervisedDataset
    config: RunConfig

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return trainable_parameters(self.model)

    def probe(self, batches: int = 2, batch_size: int = 3, *, packed: bool = True) -> Probe:
        rows = Rows.of(self.model, packed=packed, capacity=60, pad_token_id=self.dataset.limits.tokenizer.pad_token_id)
        return Probe(self.dataset, batches, batch_size, rows, held_out=False)


def make_metered(world: Path, *overrides: str, dtype: torch.dtype = torch.float64) -> Metered:
    """The model of a world of `tiny_models.make_world`, with adapters that are random on both sides."""
    config = parse_run_config([str(world / "config.yaml"), *overrides])
    torch.manual_seed(0)
    model, hf_tokenizer, _ = build_parts(config.model)
    enable_packing(model.causal_lm)
    attach_adapter(model, config.adapter)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if ".mole_" in name or "lora_" in name:
                parameter.normal_(std=0.3)
    model.to(dtype)
    leave_balance_loss_to_caller(model.language_model)
    tokenizer: Any = HFTextTokenizer(hf_tokenizer, "keep")
    dataset = build_dataset(
        config.data,
        tokenizer,
        build_image_processor(model, "pad"),
        model.num_image_tokens,
        seed=0,
        epochs=1,
        batching="packed",
    )
    return Metered(model, dataset, config)
