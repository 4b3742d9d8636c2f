"""Writes a whole model as one set of shards with its LoRA merged, and proves that the merge changed nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import WeightsError
from llava_mole.model.interop.causal_lm import load_causal_lm
from llava_mole.model.interop.lora import Lora
from llava_mole.model.interop.own import OwnCheckpoint
from llava_mole.model.interop.publishing import ShardWriter
from llava_mole.model.interop.tensors import open_weights

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of a logit between merged and unmerged, relative to the largest logit (or to 1, if that is less).
Half precision rounds each merged weight; float32 leaves rounding of the last bits."""
PROBE_TOKENS = 24
Naming = Callable[[str, str], str]
"""(part, name in it) -> name in the file; parts are language_model, projector, tower."""


@dataclass(frozen=True)
class Extra:
    """What is written besides the language model."""

    projector: Mapping[str, torch.Tensor]
    tower: Mapping[str, torch.Tensor]
    new_rows: Mapping[str, tuple[int, int]]
    """Embedding matrices that grow: name -> (rows afterwards, row that the new ones copy)."""


def write_model(
    directory: Path, own: OwnCheckpoint, lora: Lora | None, extra: Extra, naming: Naming, dtype: torch.dtype | None
) -> None:
    """Write all tensors, shard by shard; memory stays at one shard.

    Args:
        directory: exists.
        own: the checkpoint.
        lora: to be merged into the language model's linears, or None.
        extra: projector, tower and growing embeddings.
        naming: gives every tensor its name.
        dtype: of all tensors, or None to keep each as it is.
    """
    writer = ShardWriter(directory, "merged model" if lora else "model", own.weights.bytes)

    def add(part: str, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        writer.add(naming(part, name), tensor)

    for name, there in own.names.items():
        tensor = own.weights[there]
        path = name.removesuffix(".weight")
        if lora is not None and path in lora.pairs:
            wide = tensor if dtype is None else tensor.to(torch.promote_types(dtype, tensor.dtype))
            tensor = lora.merged(path, wide)
        if name in extra.new_rows:
            rows, copied = extra.new_rows[name]
            tensor = torch.cat([tensor, tensor[copied].expand(rows - tensor.shape[0], -1)])
        add("language_model", name, tensor)
    for part, tensors in (("projector", extra.projector), ("tower", extra.tower)):
        for name, tensor in tensors.items():
            add(part, name, tensor)
    writer.finish()


def check_merge(directory: Path, own: OwnCheckpoint, adapter_dir: Path, naming: Naming) -> float:
    """The largest difference between the logits of the merged model in `directory` and those of base plus adapter.

    Both models are loaded one after the other, in float32 (4 bytes a parameter), and read the same random tokens.

    Raises:
        WeightsError: they differ by more than `TOLERANCE` allows for the dtype written.
    """
    from peft import PeftModel

    config = own.skeleton.config.to_dict()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, own.skeleton.config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)
    base = load_causal_lm(config, lambda name: own.weights[own.names[name]], list(own.names))
    expected = _logits(PeftModel.from_pretrained(base, str(adapter_dir)).eval(), ids)
    del base
    merged = open_weights(directory)
    shapes = own.skeleton.shapes

    def read(name: str) -> torch.Tensor:
        return merged[naming("language_model", name)][: shapes[name][0]]

    dtype = merged[naming("language_model", next(iter(own.names)))].dtype
    found = _logits(load_causal_lm(config, read, list(own.names)), ids)
    difference = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    allowed = TOLERANCE.get(dtype, 1e-5) * scale
    if not difference <= allowed:
        raise WeightsError(
            f"the merged model's logits differ from the unmerged by {difference:.2e}; at most {allowed:.2e} is allowed "
            f"for {dtype}. Nothing was written; use --dtype float32 where half precision is the reason"
        )
    return difference


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()
