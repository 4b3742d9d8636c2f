"""From a parsed request to jobs of the engine, and from the engine's thread back to the event loop."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_mole.common.errors import ContextError, UserError
from llava_mole.conversation import Rendered, Template, with_system
from llava_mole.data.anyres import Tiles
from llava_mole.data.tokenization import encode
from llava_mole.inference.batching import check_room, encode_prompt, read_tiles
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.engine import Engine, EngineLimits
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_batch import Job
from llava_mole.serve.api.errors import ApiError, as_api_error, internal
from llava_mole.serve.api.images import ImagePolicy, open_image
from llava_mole.serve.api.protocol import Chat, Completion, Message, Options

IMAGE_MARK = {"type": "image"}
"""A part of a turn where an image stands, see `inference.inputs`."""


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for."""

    new_tokens: int
    """Largest `max_tokens`."""
    prompt_tokens: int
    """Most tokens of a prompt, image tokens included; the model's context limits it, too."""
    choices: int
    """Most answers: `n` times the number of prompts."""


@dataclass(frozen=True)
class Defaults:
    """What requests get that do not say."""

    max_new_tokens: int
    temperature: float
    top_p: float | None


class Answers:
    """The jobs of one request, and news of them in the event loop."""

    def __init__(self, jobs: list[Job], engine: Engine) -> None:
        self.jobs = jobs
        self.started = time.perf_counter()
        self._engine = engine
        self._news = asyncio.Event()
        for job in jobs:
            job.tag = self

    def notify(self) -> None:
        """Called in the event loop when a job has news."""
        self._news.set()

    async def changes(self) -> AsyncIterator[None]:
        """Yields whenever there may be news, last when all jobs have ended. Leaving the loop frees the others' places.

        Raises:
            ApiError: a job failed.
        """
        try:
            while True:
                self._news.clear()
                ended = all(job.reason for job in self.jobs)
                for job in self.jobs:
                    if job.reason == "error":
                        raise _failure(job)
                    if job.reason == "cancelled":
                        raise ApiError(503, "the server is stopping", kind="server_error", code="server_shutting_down")
                yield
                if ended:
                    return
                await self._news.wait()
        finally:
            self.cancel()

    async def finish(self) -> None:
        """Wait until all jobs have ended. Raises what `changes` raises."""
        async for _ in self.changes():
            pass

    def cancel(self) -> None:
        """Stop the jobs that have not ended."""
        if left := [job for job in self.jobs if job.reason is None]:
            self._engine.cancel(left)


class Service:
    """The models under their names, and the engine that answers for them."""

    def __init__(
        self,
        predictors: Mapping[str, Predictor],
        *,
        engine_limits: EngineLimits,
        limits: RequestLimits,
        defaults: Defaults,
        images: ImagePolicy,
    ) -> None:
        """Raises ConfigError if a model cannot be served."""
        self.predictors, self.limits, self.defaults, self.images = predictors, limits, defaults, images
        self.engine = Engine(predictors, engine_limits, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tokenizing = threading.Lock()

    def start(self) -> None:
        """Start the engine; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def predictor(self, name: str) -> Predictor:
        """The model of this name. Raises ApiError if there is none."""
        if name not in self.predictors:
            raise ApiError(
                404,
                f"The model '{name[:100]}' does not exist; there are {', '.join(self.predictors)}",
                code="model_not_found",
                param="model",
            )
        return self.predictors[name]

    def chat_jobs(self, request: Chat) -> list[Job]:
        """The jobs of a chat request: tokenizes, and decodes images. Raises ApiError."""
        predictor = self.predictor(request.options.model)
        template = _template(predictor, request.messages)
        turns: list[dict[str, Any]] = []
        images, param = [], "messages"
        for message in request.messages:
            if message.role == "system":
                continue
            for part in message.parts:
                if isinstance(part, dict):
                    images.append((part["url"], part["param"]))
            parts = [{"type": "text", "text": p} if isinstance(p, str) else IMAGE_MARK for p in message.parts]
            if turns and turns[-1]["role"] == message.role:
                turns[-1]["content"] += parts
            else:
                turns.append({"role": message.role, "content": parts})

        def encode_with(shown: int | Sequence[int]) -> list[int]:
            try:
                with self._tokenizing:
                    ids = encode_prompt(predictor.loaded, template, turns, shown, 0)
            except UserError as error:
                raise as_api_error(error, param) from None
            self._check_tokens(ids, param)
            return ids

        ids = encode_with(len(images))  # before the images are fetched and decoded: a prompt that is too long is cheap
        shown = tuple(self._tiles(predictor, url, param) for url, param in images)
        if tiled := [len(each.shows) for each in shown if each.shows is not None]:
            ids = encode_with(tiled)
        return self._jobs(predictor, request.options, [(ids, shown)], with_template=True)

    def completion_jobs(self, request: Completion) -> list[Job]:
        """The jobs of a completion request, `n` for each prompt in turn. Raises ApiError."""
        predictor = self.predictor(request.options.model)
        prompts: list[tuple[list[int], tuple[Tiles, ...]]] = []
        for n, prompt in enumerate(request.prompts):
            param = "prompt" if len(request.prompts) == 1 else f"prompt[{n}]"
            ids = self._raw_ids(predictor, prompt, param)
            try:
                check_room(predictor.loaded, len(ids), 0)
            except ContextError as error:
                raise as_api_error(error, param) from None
            self._check_tokens(ids, param)
            prompts.append((ids, ()))
        return self._jobs(predictor, request.options, prompts, with_template=False)

    def submit(self, jobs: list[Job]) -> Answers:
        """Give the jobs to the engine. Raises ApiError if there is no place for them."""
        answers = Answers(jobs, self.engine)
        try:
            self.engine.submit(jobs)
        except UserError as error:
            raise as_api_error(error, "max_tokens") from None
        return answers

    def _deliver(self, jobs: Sequence[Job]) -> None:
        """Called in the engine's thread."""
        answers = list({id(job.tag): job.tag for job in jobs if job.tag is not None}.values())

        def notify() -> None:
            for each in answers:
                each.notify()

        assert self._loop is not None
        if answers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(notify)

    def _raw_ids(self, predictor: Predictor, prompt: str | list[int], param: str) -> list[int]:
        loaded = predictor.loaded
        if isinstance(prompt, str):
            with self._tokenizing:
                encoded = encode(Rendered(prompt, ()), loaded.tokenizer, num_image_tokens=1, max_length=None)
            if encoded.num_images:
                raise ApiError(
                    400,
                    "prompt holds <image>; ask about images at /v1/chat/completions",
                    code="invalid_value",
                    param=param,
                )
            if not encoded.input_ids:
                raise ApiError(400, "prompt is empty", code="invalid_value", param=param)
            return encoded.input_ids
        size = loaded.model.causal_lm.get_input_embeddings().weight.shape[0]
        if not all(0 <= token < size for token in prompt):
            raise ApiError(400, f"{param} holds a token id outside 0 to {size - 1}", code="invalid_value", param=param)
        return prompt

    def _check_tokens(self, ids: list[int], param: str) -> None:
        if len(ids) > self.limits.prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; this server takes at most {self.limits.prompt_tokens}",
                code="context_length_exceeded",
                param=param,
            )

    def _tiles(self, predictor: Predictor, url: str, param: str) -> Tiles:
        image = open_image(url, self.images, param)
        try:
            return read_tiles(predictor.loaded, image, 0)
        except UserError as error:
            failure = as_api_error(error, param)
            failure.code = "invalid_image"
            raise failure from None

    def _jobs(
        self,
        predictor: Predictor,
        options: Options,
        prompts: Sequence[tuple[list[int], tuple[Tiles, ...]]],
        *,
        with_template: bool,
    ) -> list[Job]:
        if options.n * len(prompts) > self.limits.choices:
            raise ApiError(
                400,
                f"n is {options.n} for {len(prompts)} prompts; this server gives at most {self.limits.choices} answers "
                "to a request",
                code="invalid_value",
                param="n",
            )
        if (options.max_tokens or 0) > self.limits.new_tokens:
            raise ApiError(
                400,
                f"{options.max_tokens_param} is {options.max_tokens}; this server writes at most "
                f"{self.limits.new_tokens} tokens",
                code="invalid_value",
                param=options.max_tokens_param,
            )
        maximum = options.max_tokens or min(self.defaults.max_new_tokens, self.limits.new_tokens)
        temperature = self.defaults.temperature if options.temperature is None else options.temperature
        top_p = self.defaults.top_p if options.top_p is None else max(options.top_p, 1e-9)
        try:
            decoding = Decoding(maximum, temperature, None if top_p == 1 else top_p)
        except UserError as error:
            raise as_api_error(error, "temperature") from None
        seed = secrets.randbits(62) if options.seed is None else options.seed
        return [
            Job(
                model=options.model,
                ids=ids,
                images=shown,
                decoding=decoding,
                answer=predictor.answer_decoder(options.stop, with_template=with_template),
                limit=min(maximum, predictor.loaded.context_length - len(ids)),
                seed=seed + choice,
                top_logprobs=options.top_logprobs,
                live=options.stream,
            )
            for ids, shown in prompts
            for choice in range(options.n)
        ]


def _template(predictor: Predictor, messages: Sequence[Message]) -> Template:
    """The model's template, with the request's system text if it has one."""
    texts = [message for message in messages if message.role == "system"]
    if not texts:
        return predictor.template
    if len(texts) > 1 or messages[0].role != "system":
        raise ApiError(
            400, "a system message must be the first, and the only one", code="invalid_value", param="messages"
        )
    try:
        return with_system(predictor.template, "\n".join(part for part in texts[0].parts if isinstance(part, str)))
    except UserError as error:
        raise as_api_error(error, "messages[0].content") from None


def _failure(job: Job) -> ApiError:
    failure = internal(job.error or "internal error")
    if job.error and "memory" in job.error:
        failure.status, failure.code = 503, "out_of_memory"
    return failure
