"""Inference: images and prompts in; answers, streams of text or likelihoods out.

`Predictor` renders and encodes a prompt exactly as training does. Batches are padded on the left, and an answer does
not depend on the other prompts of its batch.
"""

import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, overload

import torch

from llava_mole.common.errors import ConfigError, PromptError
from llava_mole.common.text import count_of
from llava_mole.config import Quantization
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Rendered, Template, Turn, render
from llava_mole.data.chat_template import check_template_name, resolve_template
from llava_mole.data.tokenization import encode, end_ids
from llava_mole.inference.batching import (
    Batch,
    batches,
    check_room,
    check_shown,
    check_text,
    encode_prompt,
    image_tokens,
    place_images,
)
from llava_mole.inference.decoding import (
    DEVICES,
    DTYPES,
    AnswerDecoder,
    Decoding,
    RowStop,
    as_seeds,
    as_stops,
    check_count,
)
from llava_mole.inference.finite import finite_outputs
from llava_mole.inference.inputs import ImagesLike, Prompt, as_images, as_lists, is_single
from llava_mole.model.builder import LoadedModel, load_pretrained_model
from llava_mole.model.llava_arch import LlavaMole


@dataclass(frozen=True)
class Likelihood:
    """How likely the model finds one continuation."""

    logprob: float
    """Sum of the log probabilities (natural logarithm) of its tokens, given the prompt and each other."""
    is_greedy: bool
    """Whether greedy decoding would produce exactly these tokens."""
    tokens: int
    """Tokens scored."""


class Predictor:
    """Answers prompts with a loaded model, or with one in training."""

    def __init__(self, loaded: LoadedModel, *, template: str | None = None):
        """Use a loaded model; `template` replaces its own. Raises ConfigError for an unknown template."""
        self.loaded = loaded
        self.template = resolve_template(template or loaded.template, loaded.tokenizer)
        configured = loaded.model.causal_lm.generation_config.eos_token_id
        self.eos_ids = end_ids(loaded.tokenizer, configured, self.template.stop)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        *,
        model_base: str | None = None,
        vision_tower: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        quantization: Quantization | None = None,
        template: str | None = None,
    ) -> "Predictor":
        """Load a checkpoint or run directory.

        Arguments and errors are those of `load_pretrained_model`; `template` is that of the constructor.
        """
        if not isinstance(model_path, (str, os.PathLike)):
            raise ConfigError(f"model_path is {model_path!r}; give the path of a run or checkpoint")
        check_placement(device, dtype, quantization)
        if template is not None:
            check_template_name(template)
        loaded = load_pretrained_model(
            Path(model_path),
            model_base=model_base,
            vision_tower=vision_tower,
            device=device,
            dtype=dtype,
            quantization=quantization,
        )
        return cls(loaded, template=template)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self,
        images: ImagesLike,
        prompts: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float | None = ...,
        num_beams: int = ...,
        stop: str | Sequence[str] | None = ...,
        seeds: Sequence[int] | None = ...,
        batch_size: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        images: ImagesLike | Sequence[ImagesLike],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float | None = ...,
        num_beams: int = ...,
        stop: str | Sequence[str] | None = ...,
        seeds: Sequence[int] | None = ...,
        batch_size: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        images: ImagesLike | Sequence[ImagesLike],
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        num_beams: int = 1,
        stop: str | Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> str | list[str]:
        """Answers to the prompts, in their order; to a single prompt its answer alone, as a text.

        Args:
            images: One entry per prompt: an image (see `OneImage`), None, or a list of images. An object or path that
                occurs several times is encoded once. A single image or None goes with every prompt.
            prompts: Questions, or conversations that end with a user turn. All images belong to a single one that is
                not in a list. If the text has no image placeholders, they are put before the first turn.
            max_new_tokens: Longest answer in tokens; an answer also ends at the context's limit.
            temperature: 0 is greedy, whatever the language model's own generation config says.
            top_p: Sample only within this probability mass.
            num_beams: Beams of beam search; 1 turns it off.
            stop: A text, or texts, that end an answer, in addition to the template's end marker.
            seeds: One per prompt, for sampling; by default drawn from torch's generator. With `num_beams` above 1
                they are not used: torch's generator decides, and answers depend on the batch.
            batch_size: Prompts per forward pass; prompts of similar length share one.

        Raises:
            ConfigError: The lists differ in length, or an option is out of range.
            PromptError: An image cannot be read, placeholders and images do not match, a prompt fills the context, or
                the model computes NaN or infinity for it.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p, num_beams)
        answer = self.answer_decoder(stop)
        single = is_single(prompts)
        images, prompts = as_lists(images, prompts)
        seeds = _draw_seeds(decoding, len(prompts)) if seeds is None else as_seeds(seeds, len(prompts))
        answers = [""] * len(prompts)
        for batch in self.batches(images, prompts, batch_size=batch_size):
            found = self._decode(batch, decoding, answer, [seeds[member] for member in batch.members])
            for position, ids in zip(batch.members, found, strict=True):
                answers[position] = answer.final(ids)
        return answers[0] if single else answers

    def stream(
        self,
        image: ImagesLike,
        prompt: Prompt,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece; the joined pieces equal `generate`'s answer.

        If the model writes invalid UTF-8, the pieces end where it begins. Closing the iterator stops the generation.
        Arguments and errors are those of `generate`; wrong arguments raise at the call.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p)
        answer = self.answer_decoder(stop)
        (batch,) = self.batches([image], [prompt], batch_size=1)
        return self._pieces(batch, decoding, answer)

    def score(
        self,
        images: ImagesLike | Sequence[ImagesLike],
        prompts: Prompt | Sequence[Prompt],
        continuations: str | Sequence[str],
        *,
        with_end: bool = False,
        batch_size: int = 16,
    ) -> list[Likelihood]:
        """The likelihood of each continuation as the answer to its prompt.

        Args:
            images: As for `generate`.
            prompts: As for `generate`.
            continuations: One answer per prompt; a single text is a list of one.
            with_end: Also score the end marker, that is, that the answer stops there.
            batch_size: Rows per forward pass; rows of similar length share one.

        Raises:
            ConfigError: The lists differ in length.
            PromptError: As for `generate`, or a continuation is empty.
        """
        check_count("batch_size", batch_size)
        images, prompts = as_lists(images, prompts)
        continuations = [continuations] if isinstance(continuations, str) else continuations
        if not isinstance(continuations, Sequence) or not all(isinstance(text, str) for text in continuations):
            raise ConfigError(f"continuations is {continuations!r}; give a list with one text for every prompt")
        if len(continuations) != len(prompts):
            raise ConfigError(f"{len(continuations)} continuations for {len(prompts)} prompts; give one per prompt")
        encoded = [
            encode_continuation(
                self.loaded,
                self.template,
                place_images(prompt, len(as_images(own)), n),
                text,
                image_tokens(self.loaded, own, n),
                n,
                with_end,
            )
            for n, (own, prompt, text) in enumerate(zip(images, prompts, continuations, strict=True))
        ]
        results: dict[int, Likelihood] = {}
        for batch in batches(self.loaded, [ids for ids, _ in encoded], images, batch_size):
            with finite_outputs(self.loaded, batch) as check:
                found = score_batch(self.loaded.model, batch, [encoded[n][1] for n in batch.members])
                check.note(
                    torch.tensor([not math.isfinite(each.logprob) for each in found], device=batch.input_ids.device)
                )
            results.update(zip(batch.members, found, strict=True))
        return [results[n] for n in range(len(prompts))]

    def batches(
        self, images: ImagesLike | Sequence[ImagesLike], prompts: Prompt | Sequence[Prompt], *, batch_size: int
    ) -> Iterator[Batch]:
        """The prompts as model input, shortest first to keep padding low. Arguments and errors are `generate`'s."""
        check_count("batch_size", batch_size)
        images, prompts = as_lists(images, prompts)
        rows = [
            encode_prompt(self.loaded, self.template, prompt, image_tokens(self.loaded, own, n), n)
            for n, (prompt, own) in enumerate(zip(prompts, images, strict=True))
        ]
        return batches(self.loaded, rows, images, batch_size)

    def check(self, images: Sequence[int] | Sequence[ImagesLike], prompts: Sequence[Prompt]) -> None:
        """Raise PromptError for the first prompt that cannot be asked, whatever its images hold.

        Args:
            images: The number of images of each prompt. For a model that sees images in tiles, the images themselves:
                they are opened for their sizes, on which the length of a prompt depends.
            prompts: As for `generate`.
        """
        for position, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            shown = own if isinstance(own, int) else image_tokens(self.loaded, own, position)
            encode_prompt(self.loaded, self.template, prompt, shown, position)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D] of a batch."""
        return embed_batch(self.loaded.model, batch)

    def answer_decoder(self, stop: str | Sequence[str] | None, *, with_template: bool = True) -> AnswerDecoder:
        """What turns generated ids into an answer that ends at one of the stop texts.

        With `with_template` the template's end marker is one of them.
        """
        own = [self.template.stop] if with_template else []
        return AnswerDecoder(self.loaded.tokenizer, self.eos_ids, [*own, *as_stops(stop)])

    def _decode(
        self,
        batch: Batch,
        decoding: Decoding,
        answer: AnswerDecoder,
        seeds: Sequence[int],
        *,
        criterion: RowStop | None = None,
        streamer: Any = None,
    ) -> list[list[int]]:
        """The new ids of every row, up to the row's own limit. Raises PromptError if the model is not finite."""
        limits = [min(decoding.max_new_tokens, self.loaded.context_length - length) for length in batch.lengths]
        criterion = criterion or RowStop(answer, limits)
        language_model: Any = self.loaded.model.language_model
        # A stream shows every token, so it waits for each; drawing beams from NaN would end the whole process on a GPU.
        at_once = streamer is not None or (decoding.samples and decoding.num_beams > 1)
        with torch.inference_mode(), finite_outputs(self.loaded, batch, criterion, at_once=at_once) as check:
            new_ids = language_model.generate(
                inputs_embeds=self.embed(batch),
                attention_mask=batch.attention_mask,
                generation_config=decoding.generation_config(
                    eos_ids=self.eos_ids, pad_id=self.loaded.tokenizer.pad_token_id
                ),
                logits_processor=[check, *decoding.processors(seeds)],
                stopping_criteria=[criterion],
                streamer=streamer,
            )
        return [ids[:limit] for ids, limit in zip(new_ids.tolist(), limits, strict=True)]

    def _pieces(self, batch: Batch, decoding: Decoding, answer: AnswerDecoder) -> Iterator[str]:
        # transformers' generate() pushes tokens to a streamer; a second thread makes them iterable.
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        criterion = RowStop(answer, [min(decoding.max_new_tokens, self.loaded.context_length - batch.lengths[0])])
        seeds = _draw_seeds(decoding, 1)

        def work() -> None:
            try:
                self._decode(batch, decoding, answer, seeds, criterion=criterion, streamer=_QueueStreamer(tokens))
                tokens.put(None)
            except BaseException as error:  # raised by the consumer
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
                # The stable text can shrink for a while (see `AnswerDecoder.stable`); sent text stays sent.
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
    """A streamer for transformers' `generate`: puts each new id into a queue."""

    def __init__(self, tokens: "queue.SimpleQueue[int | BaseException | None]"):
        self._tokens = tokens

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten().tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """Does nothing: the thread that runs `generate` marks the end, once it knows of no error."""


def _draw_seeds(decoding: Decoding, count: int) -> list[int]:
    """Seeds from torch's generator; greedy decoding leaves the generator untouched."""
    return torch.randint(2**62, (count,)).tolist() if decoding.samples else [0] * count


def check_placement(device: Any, dtype: Any, quantization: Any) -> None:
    """Raise ConfigError for a device, dtype or quantisation that does not exist, or is not there."""
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("quantization", quantization, (None, *get_args(Quantization))),
        ("device", str(device).partition(":")[0], DEVICES),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
    if str(device).startswith("cuda"):
        number = str(device).partition(":")[2] or "0"
        if not number.isdecimal() or int(number) >= torch.cuda.device_count():
            raise ConfigError(
                f"device is {device!r}, but PyTorch finds {count_of(torch.cuda.device_count(), 'GPU')} here; give "
                "another device, or cpu"
            )


def embed_batch(model: LlavaMole, batch: Batch) -> torch.Tensor:
    """Input embeddings [B, L, D] of a batch."""
    return model.embed(
        batch.input_ids, image_index=batch.image_index, features=batch.features, feature_index=batch.feature_index
    )


def encode_continuation(
    loaded: LoadedModel,
    template: Template,
    turns: Sequence[Turn],
    continuation: str,
    images: Sequence[int],
    position: int,
    with_end: bool,
) -> tuple[list[int], int]:
    """Ids of the conversation with `continuation` as its last answer, and how many ids at their end are scored.

    The answer is rendered and tokenized as in training, so its first token includes the space that the template puts
    before it. Without `with_end` the ids end with the answer's text. `images` are the positions of each image.

    Raises:
        PromptError: The continuation is empty or fills the context, or the template does not show all images.
    """
    if not continuation.strip():
        raise PromptError(position, "its continuation is empty; give the text to be scored")
    rendered = render(template, [*turns, Turn("assistant", continuation)])
    check_text(rendered.text, position)
    start, end = rendered.answer_spans[-1]
    if not with_end:
        end -= len(template.answer_end)
    only_this = Rendered(rendered.text[:end], ((start, end),))
    encoded = encode(only_this, loaded.tokenizer, num_image_tokens=images, max_length=None)
    given = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    check_shown(template, encoded.num_images, given, position)
    check_room(loaded, len(encoded.input_ids) - 1, position)
    return encoded.input_ids, encoded.num_supervised


def score_batch(model: LlavaMole, batch: Batch, scored: Sequence[int]) -> list[Likelihood]:
    """Likelihoods of the last `scored[n]` tokens of each row of a left-padded batch."""
    causal_lm: Any = model.causal_lm
    longest = max(scored)
    position_ids = (batch.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        # Rows are padded on the left and end together, so the head runs on their last positions only.
        logits = causal_lm(
            inputs_embeds=embed_batch(model, batch),
            attention_mask=batch.attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
        target_BN = batch.input_ids[:, -longest:]
        logprob_BN = logits.float().log_softmax(dim=-1).gather(-1, target_BN.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        greedy_BN = logits.argmax(dim=-1) == target_BN
    return [
        Likelihood(float(logprob_BN[row, -count:].double().sum()), bool(greedy_BN[row, -count:].all()), count)
        for row, count in enumerate(scored)
    ]
