"""Inference: images and prompts in, answers out, in batches or as a stream.

A prompt goes the way of a training sample: `conversation.render` -> `tokenization.encode` -> model. Batches are padded
on the left; a sample's answer does not depend on what else is in its batch.
"""

import argparse
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from llava_mole.common.errors import ConfigError, PromptError
from llava_mole.config import Quantization
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Rendered, Template, Turn, render
from llava_mole.data.chat_template import check_template_name, resolve_template
from llava_mole.data.tokenization import encode
from llava_mole.inference.batching import (
    Batch,
    ImagesLike,
    Prompt,
    as_images,
    batches,
    check_pairs,
    check_room,
    check_shown,
    check_text,
    encode_prompt,
    place_images,
)
from llava_mole.inference.decoding import AnswerDecoder, Decoding, RowStop
from llava_mole.model.builder import InferenceModel, LoadedModel, load_pretrained_model
from llava_mole.model.llava_arch import LlavaMole

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Likelihood:
    """What the model thinks of one continuation."""

    logprob: float
    """Sum of the log probabilities (natural logarithm) of its tokens, given the prompt and each other."""
    is_greedy: bool
    """Whether greedy decoding would write exactly these tokens."""
    tokens: int


def encode_continuation(
    loaded: InferenceModel, template: Template, turns: Sequence[Turn], continuation: str, position: int, with_end: bool
) -> tuple[list[int], int]:
    """Ids of the conversation with `continuation` as its last answer, and how many of them, at the end, are scored.

    The answer is rendered and tokenized as in training, so its first token holds the space that the template puts in
    front of it. Without `with_end` the ids end where the answer's text does.

    Raises:
        PromptError: the continuation is empty, or fills the context; a template that does not show all images.
    """
    if not continuation.strip():
        raise PromptError(position, "its continuation is empty; give the text whose probability is asked for")
    rendered = render(template, [*turns, Turn("assistant", continuation)])
    check_text(rendered.text, position)
    start, end = rendered.answer_spans[-1]
    if not with_end:
        end -= len(template.answer_end)
    only_this = Rendered(rendered.text[:end], ((start, end),))
    encoded = encode(only_this, loaded.tokenizer, num_image_tokens=loaded.model.num_image_tokens, max_length=None)
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
        # Rows end together, so the last positions of all of them hold what is asked for; the head computes no others.
        logits = causal_lm(
            inputs_embeds=model.embed(batch.input_ids, image_index=batch.image_index, features=batch.features),
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


Model = TypeVar("Model", bound=InferenceModel)


class Predictor(Generic[Model]):
    """Answers prompts with a loaded model, or with one in training."""

    def __init__(self, loaded: Model, *, template: str | None = None):
        """`template` replaces the one stored in the checkpoint. Raises ConfigError for an unknown name."""
        self.loaded = loaded
        self.template = resolve_template(template or loaded.template, loaded.tokenizer)
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
    ) -> "Predictor[LoadedModel]":
        """Load a checkpoint or run directory; errors as `load_pretrained_model` and the constructor."""
        if template is not None:
            check_template_name(template)
        loaded = load_pretrained_model(
            Path(model_path), model_base=model_base, device=device, dtype=dtype, quantization=quantization
        )
        return Predictor(loaded, template=template)

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
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> list[str]:
        """Answer every prompt; the answers stand in the order of the prompts.

        Args:
            images: One per prompt: a PIL image, a path, None, or a list of images for a prompt about several. The same
                object or path is encoded once.
            prompts: A question, or the turns of a conversation that ends with the user's. The image placeholders are
                put in front of the first user turn where the text has none.
            max_new_tokens: Upper bound of an answer; it also ends where the context does.
            temperature: 0 is greedy, whatever the language model's own generation config says.
            stop: Texts that end an answer besides the template's end marker.
            seeds: One per prompt, for sampling; default: drawn from torch's generator. With `num_beams` above 1 that
                generator decides alone, and answers depend on the batch.
            batch_size: Prompts of one forward pass; they are batched by length.

        Raises:
            ConfigError: lists of different lengths, or a decoding option outside its range.
            DataError: an image that cannot be read, a placeholder without image, a prompt longer than the context.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p, num_beams)
        if seeds is None:
            seeds = _draw_seeds(decoding, len(prompts))
        answers = [""] * len(prompts)
        for batch in self.batches(images, prompts, batch_size=_positive(batch_size)):
            answer = self._answer_decoder(stop)
            found = self._decode(batch, decoding, answer, [seeds[member] for member in batch.members])
            for position, ids in zip(batch.members, found, strict=True):
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

    def score(
        self,
        images: Sequence[ImagesLike],
        prompts: Sequence[Prompt],
        continuations: Sequence[str],
        *,
        with_end: bool = False,
        batch_size: int = 16,
    ) -> list[Likelihood]:
        """How likely each continuation is as the answer to its prompt; see `likelihood.Likelihood`.

        Args:
            images, prompts: As for `generate`.
            continuations: The answer whose probability is asked for, one a prompt.
            with_end: Whether the end marker counts, that is, the probability that the answer stops there.
            batch_size: Rows of one forward pass; they are batched by length.

        Raises:
            ConfigError: lists of different lengths.
            DataError: as for `generate`, or an empty continuation.
        """
        check_pairs(images, prompts)
        if len(continuations) != len(prompts):
            raise ConfigError(
                f"{len(continuations)} continuations for {len(prompts)} prompts; give one for every prompt"
            )
        encoded = [
            encode_continuation(
                self.loaded, self.template, place_images(prompt, len(as_images(own)), n), text, n, with_end
            )
            for n, (own, prompt, text) in enumerate(zip(images, prompts, continuations, strict=True))
        ]
        results: dict[int, Likelihood] = {}
        for batch in batches(self.loaded, [ids for ids, _ in encoded], images, _positive(batch_size)):
            found = score_batch(self.loaded.model, batch, [encoded[n][1] for n in batch.members])
            results.update(zip(batch.members, found, strict=True))
        return [results[n] for n in range(len(prompts))]

    def batches(self, images: Sequence[ImagesLike], prompts: Sequence[Prompt], *, batch_size: int) -> Iterator[Batch]:
        """The prompts as model input, shortest first so that batches hold little padding."""
        check_pairs(images, prompts)
        rows = [
            encode_prompt(self.loaded, self.template, prompt, len(as_images(own)), n)
            for n, (prompt, own) in enumerate(zip(prompts, images, strict=True))
        ]
        return batches(self.loaded, rows, images, batch_size)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D] of a batch."""
        return self.loaded.model.embed(batch.input_ids, image_index=batch.image_index, features=batch.features)

    def _answer_decoder(self, stop: Sequence[str] | None) -> AnswerDecoder:
        return AnswerDecoder(self.loaded.tokenizer, self._eos_ids, [self.template.stop, *(stop or ())])

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
                logits_processor=decoding.processors(seeds),
                stopping_criteria=[criterion],
                streamer=streamer,
            )
        return [ids[:limit] for ids, limit in zip(new_ids.tolist(), limits, strict=True)]

    def _pieces(self, batch: Batch, decoding: Decoding, answer: AnswerDecoder) -> Iterator[str]:
        # transformers' generate() pushes tokens; a second thread turns it into something one can iterate over.
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        criterion = RowStop(answer, [min(decoding.max_new_tokens, self.loaded.context_length - batch.lengths[0])])
        seeds = _draw_seeds(decoding, 1)

        def work() -> None:
            try:
                self._decode(batch, decoding, answer, seeds, criterion=criterion, streamer=_QueueStreamer(tokens))
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


def _draw_seeds(decoding: Decoding, count: int) -> list[int]:
    """Seeds from torch's generator, which greedy decoding leaves alone."""
    return torch.randint(2**62, (count,)).tolist() if decoding.samples else [0] * count


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    return batch_size


def _end_ids(loaded: InferenceModel, stop: str) -> tuple[int, ...]:
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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how the model is loaded, batched and decoded."""
    parser.add_argument("--model-base", metavar="DIR", help="language model, where it has moved since training")
    parser.add_argument("--conv-mode", metavar="TEMPLATE", help="default: the template stored in the checkpoint")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=_batch_size, default=16)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is for GPUs")
    add_quantization_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 on")
    return int(text)


def load_predictor(model_path: str, args: argparse.Namespace) -> "Predictor":
    """The model that the options of `add_model_arguments` describe."""
    from llava_mole.inference.predictor import Predictor

    return Predictor.from_pretrained(
        model_path,
        model_base=args.model_base,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        template=args.conv_mode,
    )


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """`--load-4bit`, `--load-8bit`, `--load-full`: into `quantization`, which is None without them (as trained)."""
    group = parser.add_mutually_exclusive_group()
    for name, value, text in (
        ("4bit", "4bit", "the language model in 4 bits (extra quant); default: as it was in training"),
        ("8bit", "8bit", "in 8 bits"),
        ("full", "none", "not quantised, also where it was in training"),
    ):
        group.add_argument(
            f"--load-{name}", dest="quantization", action="store_const", const=value, default=None, help=text
        )
