"""Sample lengths of each source: measured if its data is on disk, otherwise assumed and marked as such."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mole.analysis.plan.simulation import Samples
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.config import DataConfig
from llava_mole.data.native import ImageGrid, ImageLayout
from llava_mole.data.sources import is_there

ANSWER_SHARE = 0.5
"""Assumed share of a sample's text that is supervised. Only the language model's head depends on it."""
BYTES_PER_TOKEN = 4.0
"""Assumed without a tokenizer; Llama's averages about 4 bytes of English per token."""
ASSUMED_SIZE = (1024, 768)
"""Width and height of an image in tiles that is not on disk."""
POOL = 20_000
"""Number of lengths drawn from an assumed distribution."""


@dataclass(frozen=True)
class AssumedSource:
    """Assumptions about a source without data. Lengths are those of LLaVA-1.5, with 576 tokens per image."""

    records: int
    text_tokens: float
    """Mean of the log-normal text length in tokens, without the image's."""
    spread: float
    """Standard deviation of the logarithm."""
    tail_share: float
    """Share of samples that reach `data.max_length`."""
    origin: str
    images: int = 1
    """Of each sample."""


KNOWN_SOURCES: dict[str, AssumedSource] = {
    # Record counts: the LLaVA-MoLE paper, section 4.1. Of lengths it only says that many UReader samples reach the
    # context of 4096; the means stand for one caption or question (M3IT), several turns (ShareGPT4V), short
    # questions (PathVQA) and page texts (UReader). LLaVA-1.5's counts are those of its files: 558K captions, and 665K
    # conversations of which 40,688 (ShareGPT) have no image. Its README gives no lengths; the means stand for a short
    # caption, and for one to ten rounds of short answers beside LLaVA's long ones.
    "m3it": AssumedSource(1_600_000, 160, 0.5, 0.0, "mean 736"),
    "sharegpt4v-instruct": AssumedSource(688_000, 450, 0.6, 0.0, "mean 1026"),
    "ureader": AssumedSource(1_100_000, 424, 0.6, 0.2, "20% at max_length, the others mean 1000"),
    "pathvqa": AssumedSource(19_755, 60, 0.2, 0.0, "mean 636"),
    "sharegpt4v-pt": AssumedSource(1_246_000, 190, 0.3, 0.0, "mean 766"),
    "llava-pretrain": AssumedSource(558_128, 30, 0.4, 0.0, "mean 606"),
    "llava-instruct": AssumedSource(624_610, 240, 0.7, 0.0, "mean 816"),
    "llava-instruct-text": AssumedSource(40_688, 1000, 0.8, 0.0, "mean 1000 before the cut, without images", images=0),
}
"""By name in `data.sources`."""


@dataclass(frozen=True)
class SourceLengths(Samples):
    """Samples that represent a source."""

    name: str
    records: int
    basis: str
    """Origin of the numbers, as the plan shows it."""
    assumed: bool


def source_lengths(
    data: DataConfig,
    language_model: str,
    image_tokens: int,
    *,
    grid: ImageGrid | None = None,
    sample: int = 2000,
    given: Mapping[str, tuple[int, float]] | None = None,
) -> list[SourceLengths]:
    """Lengths of every source with lambda above 0.

    Args:
        language_model: Directory whose tokenizer is used, if it exists.
        image_tokens: Tokens of an image.
        grid: For images in tiles, whose tokens depend on their sizes; `Samples.images` are then tiles.
        sample: Most records to tokenize of each source, evenly spaced.
        given: `(records, mean tokens)` by source; overrides data and assumptions.

    Raises:
        ConfigError: A source is neither given, nor on disk, nor known.
        DataError: A file or record is wrong.
    """
    given = dict(given or {})
    unknown = sorted(given.keys() - data.sources.keys())
    if unknown:
        raise ConfigError(f"--source {unknown[0]}: no such source; data.sources has {', '.join(data.sources)}")
    result = []
    for name, source in data.sources.items():
        if data.mixture.get(name, 1.0) <= 0:
            continue
        if name in given:
            records, mean = given[name]
            text = max(1.0, mean - assumed_image(image_tokens, grid)[0])
            assumption = AssumedSource(records, text, 0.5, 0.0, f"mean {mean:.0f}")
            result.append(assumed_lengths(name, assumption, image_tokens, data.max_length, "given", grid))
        elif is_there(source):
            result.append(measured_lengths(name, data, language_model, image_tokens, sample, grid))
        elif name in KNOWN_SOURCES:
            result.append(assumed_lengths(name, KNOWN_SOURCES[name], image_tokens, data.max_length, "assumed", grid))
        else:
            raise ConfigError(
                f"data.sources.{name}: {source.annotations} is absent and no lengths are known for this name (known: "
                f"{', '.join(KNOWN_SOURCES)}); give them with --source {name}=RECORDS,MEAN_TOKENS"
            )
    return result


def assumed_image(image_tokens: int, grid: ImageGrid | None) -> tuple[int, int]:
    """Tokens of an image whose size is not known, and the images that the tower encodes for it."""
    if grid is None:
        return image_tokens, 1
    layout = grid.layout(ASSUMED_SIZE)
    return layout.tokens, layout.tiles


def assumed_lengths(
    name: str, source: AssumedSource, image_tokens: int, max_length: int, how: str, grid: ImageGrid | None = None
) -> SourceLengths:
    """A fixed draw of `POOL` lengths from an assumed distribution, cut at `max_length`."""
    image_tokens, tiles = assumed_image(image_tokens, grid)
    generator = np.random.Generator(np.random.Philox(key=20240129))
    location = np.log(source.text_tokens) - source.spread**2 / 2
    text = np.exp(location + source.spread * generator.standard_normal(POOL))
    tokens = np.minimum(np.rint(image_tokens * source.images + text), max_length).astype(np.int64)
    tokens[: round(source.tail_share * POOL)] = max_length
    tokens = generator.permutation(tokens)
    images = np.full(POOL, source.images * tiles, dtype=np.int64)
    supervised = np.rint(ANSWER_SHARE * np.maximum(tokens - image_tokens * source.images, 1)).astype(np.int64)
    basis = f"{how}: {source.origin}" + ("" if grid is None else f", images {ASSUMED_SIZE[0]} x {ASSUMED_SIZE[1]}")
    return SourceLengths(tokens, supervised, images, name, source.records, basis, True)


def measured_lengths(
    name: str, data: DataConfig, language_model: str, image_tokens: int, sample: int, grid: ImageGrid | None = None
) -> SourceLengths:
    """Lengths of up to `sample` records of a source on disk, tokenized as in training if the tokenizer exists.

    Images in tiles count by their sizes; one that is not here counts as one of `ASSUMED_SIZE`, and the basis says so.
    """
    from llava_mole.conversation import render
    from llava_mole.data.chat_template import resolve_template
    from llava_mole.data.lengths import ImagePlace
    from llava_mole.data.sources import open_source
    from llava_mole.data.tokenization import HFTextTokenizer, encode_record, load_tokenizer

    records, reader = open_source(data, name)
    has_tokenizer = (Path(language_model) / "config.json").is_file()
    tokenizer = HFTextTokenizer(load_tokenizer(language_model), data.special_tokens) if has_tokenizer else None
    template = resolve_template(data.template, tokenizer)
    indices = np.unique(np.linspace(0, len(records) - 1, min(sample, len(records))).astype(int)).tolist()
    chosen = [records[i] for i in indices]
    images = np.array([len(record.images) for record in chosen], dtype=np.int64)
    each, absent = [[image_tokens] * len(record.images) for record in chosen], 0
    if grid is not None:
        place = ImagePlace(reader, data.image_modes)
        for n, index in enumerate(indices):
            layouts, unknown = _layouts(records, index, place, grid)
            each[n], absent = [layout.tokens for layout in layouts], absent + unknown
            images[n] = sum(layout.tiles for layout in layouts)
    if tokenizer is not None:
        encoded = [
            encode_record(record, template, tokenizer, own, data.max_length)
            for record, own in zip(chosen, each, strict=True)
        ]
        tokens = np.array([len(e.input_ids) for e in encoded], dtype=np.int64)
        supervised = np.array([e.num_supervised for e in encoded], dtype=np.int64)
        basis = f"measured on {len(chosen):,} of {len(records):,} records"
    else:
        size = np.array([len(render(template, record.turns).text.encode()) for record in chosen])
        shown = np.array([sum(own) for own in each])
        tokens = np.minimum(size / BYTES_PER_TOKEN + shown + 1, data.max_length).astype(np.int64)
        supervised = np.rint(ANSWER_SHARE * np.maximum(tokens - shown, 0)).astype(np.int64)
        basis = f"{len(chosen):,} of {len(records):,} records at {BYTES_PER_TOKEN:g} bytes a token (no tokenizer here)"
    if absent:
        basis += f"; images of {absent:,} of them not readable here, counted as {ASSUMED_SIZE[0]} x {ASSUMED_SIZE[1]}"
    return SourceLengths(tokens, supervised, images, name, len(records), basis, False)


def _layouts(records: Sequence[Any], index: int, place: Any, grid: ImageGrid) -> tuple[list[ImageLayout], bool]:
    """How the images of a record are tiled, and whether that is assumed because they cannot be read."""
    from llava_mole.data.lengths import known_sizes

    try:
        return [grid.layout(size) for size in known_sizes(records, index, place)], False
    except DataError:
        return [grid.layout(ASSUMED_SIZE)] * len(records[index].images), True
