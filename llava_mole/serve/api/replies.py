"""Answers as OpenAI's objects: whole ones, and the chunks of streams.

A stream shows only text that the whole answer has at the same place: unfinished characters and what may be the
beginning of a stop text are held back.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from llava_mole.data.tokenization import HFTextTokenizer
from llava_mole.inference.decoding import INCOMPLETE_CHARACTER
from llava_mole.inference.row_batch import Job, TokenLogprob
from llava_mole.serve.api.errors import ApiError
from llava_mole.serve.api.service import Answers

DONE = "data: [DONE]\n\n"
KNOWN_TOKENS = 65536
"""Tokens whose texts stay in memory."""


class TokenTexts:
    """The text of single tokens, with the blanks that they begin with."""

    def __init__(self, tokenizer: HFTextTokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders strip blanks from the beginning of a text, so a token is decoded behind another one.
        self._before = tokenizer.encode_with_offsets("a")[0]
        self._base = tokenizer.decode(self._before)
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """The text of a token, and its bytes; a byte that is a part of a character shows as U+FFFD."""
        if token not in self._known:
            if len(self._known) >= KNOWN_TOKENS:
                self._known.clear()
            text = self._tokenizer.decode([*self._before, token]).removeprefix(self._base)
            piece = str(self._tokenizer.hf.convert_ids_to_tokens(token) or "")
            single = INCOMPLETE_CHARACTER in text and piece.startswith("<0x") and len(piece) == 6
            self._known[token] = text, [int(piece[3:5], 16)] if single else list(text.encode())
        return self._known[token]


class Reply:
    """The objects of one request's answers.

    Args:
        answers: The jobs; the number of a job is the index of its choice.
        chat: Objects of `/v1/chat/completions`, or else of `/v1/completions`.
        include_usage: End a stream with a chunk that counts tokens.
        texts: Of the model's tokens.
    """

    def __init__(self, answers: Answers, *, chat: bool, include_usage: bool, texts: TokenTexts) -> None:
        self._answers, self._chat, self._include_usage, self._texts = answers, chat, include_usage, texts
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self.status = 500
        """What the stream's status would be if it had not been sent before the answer: 200 once it has ended well."""

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the answers, end marks included."""
        jobs = self._answers.jobs
        # The choices of one prompt share it.
        prompts = sum(len(ids) for ids in {id(job.ids): job.ids for job in jobs}.values())
        answers = sum(len(job.new_ids) for job in jobs)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    def whole(self) -> dict[str, Any]:
        """The object of finished answers."""
        choices = []
        for index, job in enumerate(self._answers.jobs):
            text = job.answer.final(job.new_ids)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            logprobs = self._logprobs(job, 0, _tokens_of(job, len(job.new_ids), text), 0)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": job.reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """The server-sent events of the answers."""
        sent = [""] * len(self._answers.jobs)
        tokens = [0] * len(sent)
        open_choices = set(range(len(sent)))
        try:
            if self._chat:
                for index in range(len(sent)):
                    yield self._event([self._chunk(index, {"role": "assistant", "content": ""}, None, None)])
            async for _ in self._answers.changes():
                for index in sorted(open_choices):
                    job = self._answers.jobs[index]
                    reason, count = job.reason, len(job.new_ids)  # in this order: ids come before the reason
                    ids = job.new_ids[:count]
                    text = job.answer.stable(ids) if reason is None else job.answer.final(ids)
                    if len(text) > len(sent[index]) and text.startswith(sent[index]):
                        upto = _tokens_of(job, count, text)
                        logprobs = self._logprobs(job, tokens[index], upto, len(sent[index]))
                        delta = text[len(sent[index]) :]
                        sent[index], tokens[index] = text, upto
                        yield self._event([self._chunk(index, delta, logprobs, None)])
                    if reason is not None:
                        open_choices.discard(index)
                        yield self._event([self._chunk(index, None, None, reason)])
            if self._include_usage:
                yield self._event([], self.usage())
            yield DONE
            self.status = 200
        except ApiError as error:
            self.status = error.status
            yield f"data: {json.dumps(error.body())}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._answers.jobs[0].model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "system_fingerprint": None}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        body = {**self._head("chat.completion.chunk" if self._chat else "text_completion"), "choices": choices}
        if self._include_usage:
            body["usage"] = usage
        return f"data: {json.dumps(body)}\n\n"

    def _chunk(self, index: int, delta: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        if self._chat:
            content = {"content": delta} if isinstance(delta, str) else delta or {}
            return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        return {"index": index, "text": delta or "", "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, job: Job, start: int, end: int, offset: int) -> dict[str, Any] | None:
        """Log probabilities of the tokens from `start` to `end`, whose text begins at `offset` of the answer."""
        if job.top_logprobs is None:
            return None
        chosen = job.logprobs[start:end]
        if self._chat:
            content = [
                {
                    **self._token(each.token, each.logprob),
                    "top_logprobs": [self._token(token, logprob) for token, logprob in each.top],
                }
                for each in chosen
            ]
            return {"content": content, "refusal": None}
        return self._legacy(chosen, offset)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self._texts(token)
        return {"token": text, "logprob": logprob, "bytes": content}

    def _legacy(self, chosen: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """The form of `/v1/completions`."""
        texts = [self._texts(each.token)[0] for each in chosen]
        offsets = [offset + len("".join(texts[:n])) for n in range(len(texts))]
        top = [{self._texts(token)[0]: logprob for token, logprob in each.top} for each in chosen]
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _tokens_of(job: Job, count: int, text: str) -> int:
    """How many of the first `count` tokens the answer's beginning `text` consists of; for log probabilities only."""
    if job.top_logprobs is None:
        return 0
    while count and len(job.answer.final(job.new_ids[: count - 1])) >= len(text):
        count -= 1
    return count
