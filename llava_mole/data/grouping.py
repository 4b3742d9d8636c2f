"""LLaVA's order for `batching: grouped`: samples of one modality and of like length share a batch.

The results equal LLaVA's sampler for the same random state. Lengths are LLaVA's: words of all turns, negative for
text-only samples.
"""

from collections.abc import Sequence

import torch

from llava_mole.data.records import Record
from llava_mole.errors import DataError


def modality_length(record: Record) -> int:
    """Words of all turns, the `<image>` marker included; negative without an image.

    Raises:
        DataError: the record has no word, so no sign either.
    """
    words = sum(len(turn.text.split()) for turn in record.turns)
    if not words:
        raise DataError(f"{record.where}: no turn has a word; batching 'grouped' needs a length for every sample")
    return words if record.image is not None else -words


def grouped_order(
    lengths: Sequence[int],
    batch_size: int,
    num_chunks: int,
    generator: torch.Generator | None = None,
    by_modality: bool = True,
) -> list[int]:
    """Order of all samples of an epoch, one modality a global batch.

    Args:
        lengths: `modality_length` of each sample.
        batch_size: Samples of a micro-batch.
        num_chunks: Micro-batches of an optimizer step over all ranks.
        generator: None takes torch's global random state, as LLaVA's trainer does. Where both modalities occur LLaVA
            always draws the orders within each of them from the global state, and so does this.

        by_modality: False groups by length alone.

    Returns:
        Indices; consecutive runs of `batch_size` are micro-batches. The last batches, of what is left over of both
        modalities, are mixed.

    Raises:
        DataError: a length is 0.
    """
    if 0 in lengths:
        raise DataError(f"sample {list(lengths).index(0)} has length 0; batching 'grouped' needs a length for each")
    if not by_modality or all(n > 0 for n in lengths) or all(n < 0 for n in lengths):
        return _length_grouped(lengths, batch_size, num_chunks, generator)
    size = batch_size * num_chunks
    full: list[list[int]] = []
    left_over: list[int] = []
    for with_image in (True, False):
        indices = [i for i, n in enumerate(lengths) if (n > 0) == with_image]
        order = _length_grouped([abs(lengths[i]) for i in indices], batch_size, num_chunks, None)
        batches = [[indices[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        full += batches[:-1]
        left_over += batches[-1]
    shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    if left_over:
        shuffled.append(sorted(left_over))
    return [i for batch in shuffled for i in batch]


def _length_grouped(
    lengths: Sequence[int], batch_size: int, num_chunks: int, generator: torch.Generator | None
) -> list[int]:
    """A random cut into global batches; in each the samples sorted, then dealt to chunks of like total length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * num_chunks
    result: list[int] = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: -lengths[i])
        for chunk in _even_chunks(batch, lengths, num_chunks):
            result += chunk
    return result


def _even_chunks(batch: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Chunks of equal count and like total length; strided where the count does not divide."""
    if len(batch) % num_chunks:
        return [batch[i::num_chunks] for i in range(num_chunks)]
    per_chunk = len(batch) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in batch:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == per_chunk:
            totals[shortest] = float("inf")
    return chunks
