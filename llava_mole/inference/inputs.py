"""What callers pass as prompts and images, in the forms that are common elsewhere, checked before the first answer."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image as pil
from PIL import UnidentifiedImageError
from PIL.Image import Image

from llava_mole.common.errors import ConfigError, DataError, PromptError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Role, Turn
from llava_mole.data.anyres import Size
from llava_mole.data.images import FORMATS, ImageProcessor, image_errors, open_size, shown_size

OneImage: TypeAlias = Image | str | os.PathLike[str] | bytes | bytearray | IO[bytes] | np.ndarray
"""A Pillow image, a path, a file's bytes, a file open for reading, or an array uint8 [H, W] or [H, W, 3 or 4]."""
ImagesLike: TypeAlias = OneImage | Sequence[OneImage] | None
Prompt: TypeAlias = str | Sequence[Turn | Mapping[str, Any]]
"""A question or a conversation, whose turns may be `{"role": ..., "content": ...}` or `{"from": ..., "value": ...}`.

A content that is a list of parts is read as `prepare messages` reads it for training: parts are lines of the turn.
"""

_ROLE_OF: dict[str, Role] = {"user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_BYTES = (bytes, bytearray)
_NO_LIST = (str, *_BYTES)


def as_lists(images: Any, prompts: Any) -> tuple[list[ImagesLike], list[Prompt]]:
    """One entry per prompt in each list.

    A text or a conversation is one prompt, to which all `images` belong. A single image, or None, goes with each of
    several prompts.

    Raises:
        ConfigError: `images` does not have one entry per prompt, or one of the two is not a list.
        PromptError: an entry is not an image, or one without pixels.
    """
    if is_single(prompts):
        images, prompts = [images], [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise ConfigError(f"prompts is {_shown(prompts)}; give a text, a list of turns, or a list of such prompts")
    if images is None or _is_image(images):
        images = [images] * len(prompts)
    if not isinstance(images, Sequence):
        raise ConfigError(f"images is {_shown(images)}; give a list with one image (or None) for every prompt")
    if len(images) != len(prompts):
        raise ConfigError(f"{len(images)} images for {len(prompts)} prompts; give one image (or None) for every prompt")
    for position, own in enumerate(images):
        for image in as_images(own):
            _check_image(image, position)
    return list(images), list(prompts)


def as_images(given: ImagesLike) -> tuple[OneImage, ...]:
    """The images of one prompt: none, one or several."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, _NO_LIST) else (given,)


def as_turns(prompt: Any, position: int) -> list[Turn]:
    """The turns of a prompt. Raises PromptError if it is neither a text nor a list of turns."""
    if isinstance(prompt, str):
        return [Turn("user", prompt)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, _BYTES):
        raise PromptError(position, f"{_shown(prompt)} was given; a prompt is a text or a list of turns")
    return [_as_turn(turn, position) for turn in prompt]


def open_any(image: OneImage, processor: ImageProcessor) -> Image:
    """The image as RGB by the processor's rule. Raises DataError if it cannot be read or decoded."""
    if isinstance(image, (str, os.PathLike)):
        return processor.load(image)
    name = str(getattr(image, "filename", "") or f"given as {type(image).__name__}")
    with image_errors(name):
        if isinstance(image, Image):
            return processor.load(image, name)
        if isinstance(image, np.ndarray):
            return processor.load(pil.fromarray(image), name)
        if not isinstance(image, _BYTES):
            if hasattr(image, "seekable") and image.seekable():  # it may have been read before
                image.seek(0)
            image = image.read()
        try:
            opened = pil.open(io.BytesIO(image), formats=FORMATS)
        except UnidentifiedImageError:  # whose own text shows an address in memory
            raise ValueError(f"it has none of the formats {', '.join(FORMATS)}") from None
        return processor.load(opened, name)


def size_any(image: OneImage, processor: ImageProcessor) -> Size:
    """Width and height of what `open_any` gives, without decoding it. Raises DataError if it cannot be read."""
    if isinstance(image, (str, os.PathLike)):
        return open_size(image, os.fspath(image), processor.modes)
    name = str(getattr(image, "filename", "") or f"given as {type(image).__name__}")
    if isinstance(image, Image):
        return shown_size(image, processor.modes)
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    if isinstance(image, _BYTES):
        return open_size(io.BytesIO(image), name, processor.modes)
    if not hasattr(image, "seekable") or not image.seekable():
        raise DataError(f"image {name!r} is a stream that can be read once only, and its size is needed first; read it")
    image.seek(0)
    return open_size(image, name, processor.modes)


def is_single(prompts: Any) -> bool:
    """Whether the prompts are one that is not in a list: a text, or the turns of a conversation."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and all(isinstance(p, (Turn, Mapping)) for p in prompts)


def _is_image(value: Any) -> bool:
    return isinstance(value, (Image, os.PathLike, np.ndarray, *_NO_LIST)) or hasattr(value, "read")


def _check_image(image: Any, position: int) -> None:
    if not _is_image(image):
        raise PromptError(
            position,
            f"{_shown(image)} was given as an image; allowed are a path, the bytes of a file, a file open for "
            "reading, a Pillow image and a uint8 array",
        )
    if isinstance(image, np.ndarray) and (
        image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,))
    ):
        raise PromptError(
            position,
            f"an array {image.dtype} {list(image.shape)} was given as an image; it must be uint8 [height, width] or "
            "[height, width, 3 or 4]",
        )
    size = image.size if isinstance(image, Image) else image.shape if isinstance(image, np.ndarray) else (1, 1)
    if not all(size):
        raise PromptError(position, f"its image has no pixels: its size is {' x '.join(map(str, size))}")


def _as_turn(turn: Any, position: int) -> Turn:
    role, text = (turn.role, turn.text) if isinstance(turn, Turn) else (None, None)
    if isinstance(turn, Mapping):
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        text = "\n".join(_part(part, position) for part in text) if isinstance(text, list) else text
    if not isinstance(role, str) or not isinstance(text, str):
        raise PromptError(
            position,
            f"{_shown(turn)} was given as a turn; a turn is {{'role': 'user', 'content': TEXT}}, or the same with "
            "'from' and 'value'",
        )
    if role not in _ROLE_OF:
        raise PromptError(
            position,
            f"a turn has the role {role!r}; allowed are {', '.join(_ROLE_OF)}; the system text is the template's",
        )
    return Turn(_ROLE_OF[role], text)


def _part(part: Any, position: int) -> str:
    """The text of one part of a turn, as in the chat messages of transformers."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, Mapping) and dict(part) == {"type": "image"}:
        return DEFAULT_IMAGE_TOKEN
    raise PromptError(
        position,
        f"{_shown(part)} was given as a part of a turn; allowed are {{'type': 'text', 'text': TEXT}} and "
        "{'type': 'image'}, with the image itself among the images",
    )


def _shown(value: Any) -> str:
    """A value in a message, or the type of one that is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"an object of type {type(value).__name__}"
