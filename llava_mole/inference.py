"""Inference: images and prompts in, answers out, in batches or as a stream.

A prompt goes the way of a training sample: `conversation.render` -> `tokenization.encode` -> model. Batches are padded
on the left; a sample's answer does not depend on what else is in its batch.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from llava_mole.config import Quantization
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, get_template, place_image_first, render
from llava_mole.data.images import open_image
from llava_mole.data.tokenization import encode
from llava_mole.decoding import AnswerDecoder, Decoding, RowStop
from llava_mole.errors import ConfigError, DataError
from llava_mole.model.builder import LoadedModel, load_pretrained_model

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "Image | str | os.PathLike[str] | None"
ImagesLike: TypeAlias = "ImageLike | Sequence[Image | str | os.PathLike[str]]"
Prompt: TypeAlias = str | Sequence[Turn]


@dataclass(frozen=True)
class Batch:
    """Prompts of one forward pass, padded on the left."""

    input_ids: torch.Tensor
    """int64 [B, L], IMAGE_TOKEN_INDEX at image positions."""
    attention_mask: torch.Tensor
    """bool [B, L], False at padding."""
    images: torch.Tensor | None
    """float32 [M, 3, S, S], each distinct image once."""
    image_index: torch.Tensor | None
    """int64 [N]: which of the M images the n-th `<image>` of the rows, taken one after the other, shows."""
    members: tuple[int, ...]
    """Positions of the rows in the caller's lists."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        return self.attention_mask.sum(dim=1).tolist()


class Predictor:
    """Answers prompts with a loaded model."""

    def __init__(self, loaded: LoadedModel, *, template: str | None = None):
        """`template` replaces the one stored in the checkpoint. Raises ConfigError for an unknown name."""
        self.loaded = loaded
        self.template = get_template(template or loaded.template)
        self._eos_ids = _end_ids(loaded, self.template.stop)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        *,
        model_base: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        quantization: Quantization | None = None,
        template: str | None = None,
    ) -> "Predictor":
        """Load a checkpoint or run directory; errors as `load_pretrained_model` and the constructor."""
        if template is not None:
            get_template(template)
        loaded = load_pretrained_model(
            Path(model_path), model_base=model_base, device=device, dtype=dtype, quantization=quantization
        )
        return cls(loaded, template=template)

    def generate(
        self,
        images: Sequence[ImagesLike],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        num_beams: int = 1,
        stop: Sequence[str] | None = None,
        batch_size: int = 16,
    ) -> list[str]:
        """Answer every prompt; the answers stand in the order of the prompts.

        Args:
            images: One per prompt: a PIL image, a path, None, or a list of images for a prompt about several. The same
                object or path is encoded once a batch.
            prompts: A question, or the turns of a conversation that ends with the user's. The image placeholders are
                put in front of the first user turn where the text has none.
            max_new_tokens: Upper bound of an answer; it also ends where the context does.
            temperature: 0 is greedy, whatever the language model's own generation config says.
            stop: Texts that end an answer besides the template's end marker.
            batch_size: Prompts of one forward pass; they are batched by length.

        Raises:
            ConfigError: lists of different lengths, or a decoding option outside its range.
            DataError: an image that cannot be read, a placeholder without image, a prompt longer than the context.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p, num_beams)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        answers = [""] * len(prompts)
        for batch in self.batches(images, prompts, batch_size=batch_size):
            answer = self._answer_decoder(stop)
            for position, ids in zip(batch.members, self._decode(batch, decoding, answer), strict=True):
                answers[position] = answer.final(ids)
        return answers

    def stream(
        self,
        image: ImagesLike,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        stop: Sequence[str] | None = None,
    ) -> Iterator[str]:
        """Yield the answer to one prompt in pieces, as they come; joined they equal `generate`'s answer.

        Should the model write invalid UTF-8, the pieces end where that begins. Closing the iterator ends the
        generation. Arguments and errors as for `generate`; errors of the arguments are raised at the call.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p)
        (batch,) = self.batches([image], [prompt], batch_size=1)
        return self._pieces(batch, decoding, self._answer_decoder(stop))

    def batches(self, images: Sequence[ImagesLike], prompts: Sequence[Prompt], *, batch_size: int) -> Iterator[Batch]:
        """The prompts as model input, shortest first so that batches hold little padding."""
        if len(images) != len(prompts):
            raise ConfigError(
                f"{len(images)} images for {len(prompts)} prompts; give one image (or None) for every prompt"
            )
        shown = [_as_tuple(given) for given in images]
        rows = [self._encode(prompt, len(own), n) for n, (prompt, own) in enumerate(zip(prompts, shown, strict=True))]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            yield self._collate([rows[n] for n in members], [image for n in members for image in shown[n]], members)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D] of a batch, each distinct image encoded once."""
        return self.loaded.model.embed(batch.input_ids, batch.images, batch.image_index)

    def _encode(self, prompt: Prompt, num_images: int, position: int) -> list[int]:
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if not turns or turns[-1].role != "user":
            raise DataError(f"prompt {position}: a conversation to be answered must end with a user turn")
        placeholders = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
        if placeholders not in (0, num_images) or (placeholders and not num_images):
            given = {0: "no image", 1: "one image"}.get(num_images, f"{num_images} images")
            raise DataError(f"prompt {position}: {placeholders} {DEFAULT_IMAGE_TOKEN} in the text, but {given} given")
        if not placeholders:
            turns[0] = Turn(turns[0].role, f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + turns[0].text)
        # One image goes where LLaVA trains it; several stay where the prompt has put them.
        placed = place_image_first(turns) if num_images == 1 else turns
        rendered = render(self.template, placed, add_generation_prompt=True)
        encoded = encode(
            rendered, self.loaded.tokenizer, num_image_tokens=self.loaded.model.num_image_tokens, max_length=None
        )
        if encoded.num_images != num_images:
            raise DataError(
                f"prompt {position}: template {self.template.name!r} shows {encoded.num_images} of {num_images} "
                "images; give one image, or take another template"
            )
        if len(encoded.input_ids) >= self.loaded.context_length:
            raise DataError(
                f"prompt {position}: {len(encoded.input_ids)} tokens with its image leave no room for an answer in the "
                f"model's context of {self.loaded.context_length}; shorten it"
            )
        return encoded.input_ids

    def _collate(
        self, rows: list[list[int]], images: "list[Image | str | os.PathLike[str]]", members: list[int]
    ) -> Batch:
        longest = max(map(len, rows))
        device = self.loaded.model.device
        pad_id = self.loaded.tokenizer.pad_token_id
        distinct: dict[object, torch.Tensor] = {}
        keys = []
        for image in images:
            key = os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)
            if key not in distinct:
                distinct[key] = self.loaded.image_processor(_open(image))
            keys.append(list(distinct).index(key))
        return Batch(
            input_ids=torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device),
            attention_mask=torch.tensor(
                [[n >= longest - len(row) for n in range(longest)] for row in rows], device=device
            ),
            images=torch.stack(list(distinct.values())).to(device) if distinct else None,
            image_index=torch.tensor(keys, device=device) if distinct else None,
            members=tuple(members),
        )

    def _answer_decoder(self, stop: Sequence[str] | None) -> AnswerDecoder:
        return AnswerDecoder(self.loaded.tokenizer, self._eos_ids, [self.template.stop, *(stop or ())])

    def _decode(
        self,
        batch: Batch,
        decoding: Decoding,
        answer: AnswerDecoder,
        *,
        criterion: RowStop | None = None,
        streamer: Any = None,
    ) -> list[list[int]]:
        """New ids of every row, cut at the row's own limit."""
        limits = [min(decoding.max_new_tokens, self.loaded.context_length - length) for length in batch.lengths]
        criterion = criterion or RowStop(answer, limits)
        language_model: Any = self.loaded.model.language_model
        with torch.inference_mode():
            new_ids = language_model.generate(
                inputs_embeds=self.embed(batch),
                attention_mask=batch.attention_mask,
                generation_config=decoding.generation_config(
                    eos_ids=self._eos_ids, pad_id=self.loaded.tokenizer.pad_token_id
                ),
                stopping_criteria=[criterion],
                streamer=streamer,
            )
        return [ids[:limit] for ids, limit in zip(new_ids.tolist(), limits, strict=True)]

    def _pieces(self, batch: Batch, decoding: Decoding, answer: AnswerDecoder) -> Iterator[str]:
        # transformers' generate() pushes tokens; a second thread turns it into something one can iterate over.
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        criterion = RowStop(answer, [min(decoding.max_new_tokens, self.loaded.context_length - batch.lengths[0])])

        def work() -> None:
            try:
                self._decode(batch, decoding, answer, criterion=criterion, streamer=_QueueStreamer(tokens))
                tokens.put(None)
            except BaseException as error:  # handed to the consumer, who raises it
                tokens.put(error)

        worker = threading.Thread(target=work, name="llava-mole-stream", daemon=True)
        worker.start()
        ids: list[int] = []
        sent = ""
        try:
            while (item := tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                ids.append(item)
                text = answer.stable(ids)
                # The stable text can shrink for a while, see there; what has been sent is not taken back.
                if len(text) > len(sent) and text.startswith(sent):
                    yield text[len(sent) :]
                    sent = text
            text = answer.final(ids)
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
        finally:
            criterion.cancelled = True
            worker.join()


class _QueueStreamer:
    """The receiving end that transformers' `generate` calls with each new id."""

    def __init__(self, tokens: "queue.SimpleQueue[int | BaseException | None]"):
        self._tokens = tokens

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten().tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """The end is put by the thread that runs `generate`, after its errors are known."""


def _as_tuple(images: ImagesLike) -> "tuple[Image | str | os.PathLike[str], ...]":
    if images is None:
        return ()
    return tuple(images) if isinstance(images, Sequence) and not isinstance(images, str) else (images,)


def _open(image: "Image | str | os.PathLike[str]") -> "Image":
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    return image.convert("RGB")


def _end_ids(loaded: LoadedModel, stop: str) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, the language model's, and the template's end marker if it is one id.

    A special token such as `<|im_end|>` never shows up in decoded text, so it has to be recognised by its id.
    """
    causal_lm: Any = loaded.model.causal_lm
    configured = causal_lm.generation_config.eos_token_id
    ids = [loaded.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    marker, _ = loaded.tokenizer.encode_with_offsets(stop)
    if len(marker) == 1:
        ids += marker
    return tuple(dict.fromkeys(token for token in ids if token is not None))
