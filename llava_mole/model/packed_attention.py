"""Attention over rows that hold several samples, each of which attends only to itself.

With `sdpa`, each sample is one causal call of torch's own kernel on its slice of the row: no mask in memory, no work
across samples, on every device. `flash_attention_2` gets the samples' boundaries and `flex_attention` builds its block
mask from the restarting positions; both need a GPU.

Shapes: T positions of a row, H heads, G key-value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from llava_mole.common.errors import ConfigError

NAME = "llava_mole_packed"
KERNELS = ("sdpa", "flash_attention_2", "flex_attention")


@dataclass(frozen=True)
class RowLayout:
    """Lengths of the samples of one packed row, in order.

    Wrapped in a class because torch.compile would recompile for every new tuple of lengths.
    """

    sample_lengths: tuple[int, ...]


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_layout: RowLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers; without `row_layout` it is transformers' own `sdpa`.

    Args:
        query, key, value: `[1, H, T, E]`, `[1, G, T, E]`, `[1, G, T, E]` of one packed row.
        row_layout: Lengths of the row's samples; they add up to T.

    Returns:
        `[1, T, H, E]`, and None for the weights.
    """
    if row_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    lengths, outputs = row_layout.sample_lengths, []
    # Slices instead of this split would cost a tensor of the whole row for each sample in the backward pass.
    parts = (x.split(lengths, dim=2) for x in (query, key, value))
    for length, own_query, own_key, own_value in zip(lengths, *parts, strict=True):
        band = _band(length, window, query.device) if window is not None and length > window else None
        output = scaled_dot_product_attention(
            own_query,
            own_key,
            own_value,
            attn_mask=band,
            dropout_p=dropout,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal mask `[length, length]` of a sliding window: a position sees itself and the `window - 1` before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def enable_packing(causal_lm: Any) -> None:
    """Prepare a transformers causal LM for packed rows; verify on a few tokens that samples do not see each other.

    Raises:
        ConfigError: Its attention kernel cannot separate samples, or the verification fails for this architecture.
    """
    kernel = causal_lm.config._attn_implementation
    if kernel not in (*KERNELS, NAME):
        raise ConfigError(
            f"model.attn_implementation {kernel!r} cannot keep packed samples apart; use one of {', '.join(KERNELS)}, "
            "or train.batching 'padded'"
        )
    if kernel == "sdpa":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        causal_lm.config._attn_implementation = NAME
    try:
        _prove_isolation(causal_lm)
    except ConfigError:
        causal_lm.config._attn_implementation = kernel
        raise


def packed_arguments(kernel: str, sample_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments that tell a transformers decoder, using `kernel`, where the samples of its one row begin and end."""
    position_ids = torch.cat([torch.arange(n, device=device) for n in sample_lengths]).unsqueeze(0)
    arguments: dict[str, Any] = {"position_ids": position_ids, "attention_mask": None, "use_cache": False}
    if kernel == NAME:
        # transformers passes on a four-dimensional mask unchanged instead of building one of T x T from the positions.
        arguments["attention_mask"] = torch.empty(1, 1, 1, 0, device=device)
        arguments["row_layout"] = RowLayout(tuple(sample_lengths))
    elif kernel == "flash_attention_2":
        ends = torch.tensor([0, *sample_lengths], device=device).cumsum(0).int()
        longest = max(sample_lengths)
        arguments.update(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
    return arguments


@torch.no_grad()
def _prove_isolation(causal_lm: Any) -> None:
    """Raise ConfigError unless the second of two packed samples has the same output as alone."""
    decoder = causal_lm.get_decoder()
    was_training = causal_lm.training
    causal_lm.eval()
    width = causal_lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, width.shape[1], generator=generator).to(width.device, width.dtype) * width.float().std()
    kernel = causal_lm.config._attn_implementation

    def run(inputs: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        arguments = packed_arguments(kernel, lengths, inputs.device)
        return decoder(inputs_embeds=inputs, **arguments).last_hidden_state.float()

    try:
        packed, alone = run(x, (4, 5))[:, 4:], run(x[:, 4:], (5,))
    except (TypeError, RuntimeError, ValueError) as error:
        raise ConfigError(_refusal(causal_lm, str(error))) from None
    finally:
        causal_lm.train(was_training)
    tolerance = 1e-4 if width.dtype == torch.float32 else 5e-2
    difference = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not difference <= tolerance:
        raise ConfigError(_refusal(causal_lm, f"a sample changes by {difference:.1e} beside another"))


def _refusal(causal_lm: Any, reason: str) -> str:
    return (
        f"{type(causal_lm).__name__} cannot train on packed rows ({' '.join(reason.split())[:200]}); "
        "use train.batching 'padded'"
    )
