"""Prompts as model input: rendered and tokenized like training samples, batched by length, padded on the left.

An image that several prompts share is decoded and encoded once, even if they end up in different batches.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from llava_mole.common.errors import ConfigError, ContextError, DataError, PromptError
from llava_mole.common.text import UNPAIRED_SURROGATE, is_text
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Template, Turn, place_image_first, render
from llava_mole.data.anyres import Tiles, join_tiles
from llava_mole.data.native import ImageLayout
from llava_mole.data.records import marker_problem
from llava_mole.data.tokenization import encode
from llava_mole.inference.inputs import ImagesLike, OneImage, Prompt, as_images, as_turns, open_any, size_any
from llava_mole.model.builder import LoadedModel
from llava_mole.model.llava_arch import LlavaMole


class Shown(NamedTuple):
    """An image whose features are computed."""

    features: torch.Tensor
    """[t, P, D], of each of its tiles."""
    shows: torch.Tensor | None
    """See `Tiles.shows`."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one forward pass, padded on the left."""

    input_ids: torch.Tensor
    """int64 [B, L], IMAGE_TOKEN_INDEX at image positions."""
    attention_mask: torch.Tensor
    """bool [B, L], False at padding."""
    features: torch.Tensor | None
    """[M, P, D], the projected features of each distinct image of the batch, or of all tiles of these images."""
    image_index: torch.Tensor | None
    """int64 [N]: which of the M images the n-th `<image>` shows, counted through the rows in order; None with tiles."""
    members: tuple[int, ...]
    """Position of each row in the caller's lists."""
    images: tuple[ImagesLike, ...]
    """Each row's images, as the caller gave them."""
    feature_index: torch.Tensor | None = None
    """int64 [n, 2]: tile and feature that the n-th image position shows; None without tiles."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        return self.attention_mask.sum(dim=1).tolist()


def place_images(prompt: Prompt, num_images: int, position: int) -> list[Turn]:
    """The turns of a prompt, with one `<image>` for each of its images.

    If the text has none, they are put before the first turn. A single image moves to the front of its turn, as in
    LLaVA's training; several images stay where the prompt has them.

    Raises:
        PromptError: It is not a prompt or does not end with a user turn, or the number of `<image>` is wrong.
    """
    turns = as_turns(prompt, position)
    if not turns or turns[-1].role != "user":
        raise PromptError(position, "a conversation to be answered must end with a user turn")
    text = "\n".join(turn.text for turn in turns)
    if problem := marker_problem(text, num_images):
        raise PromptError(position, problem)
    if DEFAULT_IMAGE_TOKEN not in text:
        turns[0] = Turn(turns[0].role, f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + turns[0].text)
    return list(place_image_first(turns)) if num_images == 1 else turns


def image_tokens(loaded: LoadedModel, images: ImagesLike, position: int) -> list[int]:
    """Positions of each image of prompt `position`. If they depend on its size, it is opened for that, not decoded.

    Raises:
        PromptError: an image cannot be read, or the model cannot see one of this size.
    """
    fixed, layouts = loaded.model.num_image_tokens, image_layouts(loaded, images, position)
    return [fixed if layout is None else layout.tokens for layout in layouts]


def image_layouts(loaded: LoadedModel, images: ImagesLike, position: int) -> list[ImageLayout | None]:
    """How each image becomes tokens, or None for each if all take the same. Raises as `image_tokens`."""
    processor, shown = loaded.image_processor, as_images(images)
    if processor.grid is None:
        return [None] * len(shown)
    try:
        return [processor.grid.layout(size_any(image, processor), name_of(image)) for image in shown]
    except DataError as error:
        raise PromptError(position, str(error)) from None


def encode_prompt(
    loaded: LoadedModel, template: Template, prompt: Prompt, images: int | Sequence[int], position: int
) -> list[int]:
    """Ids of a prompt, up to the template's marker for the answer.

    Args:
        images: The positions of each image, from `image_tokens`; or only their number, which counts images in tiles as
            the smallest that there are.

    Raises:
        PromptError: As for `place_images`; or the template does not show all images, or the prompt fills the context.
    """
    grid = loaded.image_processor.grid
    if isinstance(images, int):
        images = [loaded.model.num_image_tokens if grid is None else grid.least] * images
    num_images = len(images)
    turns = place_images(prompt, num_images, position)
    rendered = render(template, turns, add_generation_prompt=True)
    check_text(rendered.text, position)
    encoded = encode(rendered, loaded.tokenizer, num_image_tokens=images, max_length=None)
    check_shown(template, encoded.num_images, num_images, position)
    check_room(loaded, len(encoded.input_ids), position)
    return encoded.input_ids


def check_text(text: str, position: int) -> None:
    """Raise PromptError for an unpaired surrogate, which JSON can spell and no tokenizer accepts."""
    if not is_text(text):
        raise PromptError(position, f"it holds an {UNPAIRED_SURROGATE}")


def check_shown(template: Template, shown: int, given: int, position: int) -> None:
    """Raise PromptError if the template leaves out some of the images."""
    if shown != given:
        raise PromptError(
            position,
            f"template {template.name!r} shows {shown} of {given} images; give one image, or choose another template",
        )


def check_room(loaded: LoadedModel, tokens: int, position: int) -> None:
    """Raise ContextError if `tokens` fill the model's context."""
    if tokens >= loaded.context_length:
        raise ContextError(
            position,
            f"{tokens} tokens with its image leave no room for an answer in the model's context of "
            f"{loaded.context_length}; shorten it",
        )


def _check_router(loaded: LoadedModel) -> None:
    if loaded.adapter != "mole":
        return
    from llava_mole.mole import missing_input

    if name := missing_input(loaded.model.language_model):
        raise ConfigError(
            f"{loaded.path} routes by the routing input {name!r}, which prompts do not have; "
            f"call set_routing_inputs(model, {name}=...) before, or train with another router"
        )


def batches(
    loaded: LoadedModel, rows: Sequence[list[int]], images: Sequence[ImagesLike], batch_size: int
) -> Iterator[Batch]:
    """The rows of ids as batches, shortest first to keep padding low.

    Raises:
        ConfigError: the model's router needs to know each sample's source, which a prompt does not have.
        PromptError: an image cannot be read.
    """
    _check_router(loaded)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    batched = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shown = [_distinct(images, members) for members in batched]
    remaining = Counter(key for distinct in shown for key in distinct)
    features: dict[object, Shown] = {}
    for members, distinct in zip(batched, shown, strict=True):
        new = [key for key in distinct if key not in features]
        if new:
            tiles = [read_tiles(loaded, *distinct[key]) for key in new]
            with torch.inference_mode():
                encoded = encode_tiles(loaded.model, join_tiles(tiles))
            parts = encoded.split([len(each.pixels) for each in tiles])
            features |= {key: Shown(part, own.shows) for key, part, own in zip(new, parts, tiles, strict=True)}
        own = [images[n] for n in members]
        yield _collate(loaded, [rows[n] for n in members], own, {key: features[key] for key in distinct}, members)
        for key in distinct:
            remaining[key] -= 1
            if not remaining[key]:  # no later batch shows it
                del features[key]


def encode_tiles(model: LlavaMole, tiles: Tiles) -> torch.Tensor:
    """Features [t, P, D] of tiles, on the model's device."""
    grids = None if tiles.grids is None else tiles.grids.to(model.device)
    return model.encode_images(tiles.pixels.to(model.device), grids)


def _distinct(images: Sequence[ImagesLike], members: Sequence[int]) -> dict[object, tuple[OneImage, int]]:
    """Each image of the prompts `members` under its key, with the first prompt that shows it."""
    return {_key(image): (image, n) for n in reversed(members) for image in as_images(images[n])}


def _key(image: OneImage) -> object:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)


def name_of(image: OneImage) -> str:
    """What an image is called in messages."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"given as {type(image).__name__}"


def read_tiles(loaded: LoadedModel, image: OneImage, position: int) -> Tiles:
    """All that the model sees of an image. Raises PromptError about prompt `position` if it cannot be read."""
    processor = loaded.image_processor
    try:
        return processor.tiles(open_any(image, processor), name_of(image))
    except DataError as error:
        raise PromptError(position, str(error)) from None


def _collate(
    loaded: LoadedModel,
    rows: Sequence[list[int]],
    images: Sequence[ImagesLike],
    features: dict[object, Shown],
    members: Sequence[int],
) -> Batch:
    longest = max(map(len, rows))
    device = loaded.model.device
    pad_id = loaded.tokenizer.pad_token_id
    ends = accumulate(len(each.features) for each in features.values())
    starts = {key: end - len(features[key].features) for key, end in zip(features, ends, strict=True)}
    keys = [_key(image) for own in images for image in as_images(own)]
    tiled = [each + torch.tensor([starts[key], 0]) for key in keys if (each := features[key].shows) is not None]
    return Batch(
        input_ids=torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device),
        attention_mask=torch.tensor([[n >= longest - len(row) for n in range(longest)] for row in rows], device=device),
        features=torch.cat([each.features for each in features.values()]) if features else None,
        image_index=torch.tensor([starts[key] for key in keys], device=device) if keys and not tiled else None,
        members=tuple(members),
        images=tuple(images),
        feature_index=torch.cat(tiled).to(device) if tiled else None,
    )
