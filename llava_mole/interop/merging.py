"""Writes a whole model as one set of shards with its LoRA merged, and proves that the merge changed nothing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError, value_errors_as
from llava_mole.interop.causal_lm import load_causal_lm
from llava_mole.interop.lora import Lora
from llava_mole.interop.own import OwnCheckpoint
from llava_mole.interop.tensors import ShardWriter, open_weights
from llava_mole.model.language_model import load_language_model

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


def parse_expert(text: str) -> int | str:
    """`uniform`, `usage` or the number of an expert. Raises ConfigError for anything else."""
    if text in ("uniform", "usage"):
        return text
    if not text.isdecimal():
        raise ConfigError(f"--expert {text!r}: it must be the number of an expert, 'uniform' or 'usage'")
    return int(text)


def describe(own: OwnCheckpoint, expert: int | str) -> str:
    """What the approximation is, for labels."""
    what = {"uniform": "the mean of its experts", "usage": "the mean of its experts, weighted by their use"}.get(
        str(expert), f"its expert {expert}"
    )
    return (
        f"APPROXIMATION: a mixture of {own.config.adapter.num_experts} LoRA experts, each token routed to its own, "
        f"replaced by one plain LoRA: {what}. Outputs differ from the mixture's."
    )


def write_approximation(own: OwnCheckpoint, expert: int | str, usage_file: Path | None, directory: Path) -> str:
    """Write the plain LoRA to `directory`. Returns `describe`'s sentence. The language model is loaded.

    Raises:
        ConfigError: no such expert, or `usage` without any record of usage.
    """
    from peft import PeftModel

    from llava_mole.mole.surgery import to_lora

    base, _ = load_language_model(str(own.language_model))
    with value_errors_as(WeightsError):
        model = PeftModel.from_pretrained(base, str(own.adapter_dir))
    usage = _usage(model, usage_file) if expert == "usage" else None
    with value_errors_as(ConfigError):
        to_lora(model, directory, expert=expert, usage=usage)
    return describe(own, expert)


def _usage(model: torch.nn.Module, file: Path | None) -> torch.Tensor:
    """Share of tokens `[L, K]`: of a `routing.json` of `llava-mole eval`, or the adapter's counters."""
    if file is not None:
        return read_usage(file)
    from llava_mole.mole import MoleMlp

    counters: list[Any] = [m.mole_state["default"] for m in model.modules() if isinstance(m, MoleMlp) and m.mole_state]
    loads = [state.load.sum(dim=0).float() for state in counters]
    if not loads or not all(bool(load.any()) for load in loads):
        raise ConfigError(
            "--expert usage: this adapter has counted no tokens (it does with balance_group 'global_batch'); give the "
            "routing.json that `llava-mole eval` writes as --usage"
        )
    return torch.stack(loads)


def read_usage(file: Path) -> torch.Tensor:
    """Share of tokens `[L, K]` over all domains of a `routing.json`. Raises WeightsError for another file."""
    try:
        domains = json.loads(file.read_text(encoding="utf-8"))["domains"].values()
        parts = [domain["all"] for domain in domains]
        total = sum(part["tokens"] for part in parts)
        return sum((torch.tensor(p["share"]) * (p["tokens"] / total) for p in parts), torch.zeros(()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise WeightsError(f"--usage {file} is no routing.json of `llava-mole eval` ({error!r})") from None
