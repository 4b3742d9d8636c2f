"""The HTTP side: routes, limits of requests, keys, and what a lost client means.

The event loop never waits for the model. Bodies are parsed and images decoded in worker threads, and the engine
computes in its own.
"""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from llava_mole import __version__
from llava_mole.common.log import get_logger
from llava_mole.common.text import format_bytes
from llava_mole.inference.row_batch import Job
from llava_mole.serve.api.errors import ApiError, as_api_error
from llava_mole.serve.api.metrics import Metrics
from llava_mole.serve.api.protocol import Options, parse_chat, parse_completion, parse_json
from llava_mole.serve.api.replies import Reply, TokenTexts
from llava_mole.serve.api.service import Answers, Service

BODY_SECONDS = 60
"""A body that takes longer is not waited for."""
PREPARING_THREADS = 2
Value = TypeVar("Value")

logger = get_logger(__name__)


@dataclass(frozen=True)
class HttpLimits:
    """What the HTTP side takes."""

    body_bytes: int
    requests: int
    """Requests at the same time, those that still send their bodies included."""
    keys: Collection[str]
    """API keys; none: everybody may ask."""
    drain_seconds: float
    """How long answers may go on when the server stops."""


class ClientGone(Exception):
    """The client has closed the connection."""


def build_app(service: Service, limits: HttpLimits) -> FastAPI:
    """The application. Starting it starts the engine, stopping it stops the engine."""
    metrics = Metrics(service.engine)
    started = int(time.time())
    preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="llava-mole-prepare")
    texts = {name: TokenTexts(predictor.loaded.tokenizer) for name, predictor in service.predictors.items()}
    at_work = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        finished = await asyncio.to_thread(service.engine.close, limits.drain_seconds)
        preparing.shutdown(wait=False, cancel_futures=True)
        logger.info("stopped; %s", "all answers were finished" if finished else "unfinished answers were cut off")

    app = FastAPI(
        title="llava_mole", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )

    async def in_thread(function: Callable[..., Value], *arguments: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(preparing, functools.partial(function, *arguments))

    def check_key(request: Request) -> None:
        if not limits.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = False
        for key in limits.keys:  # all of them: the time must not tell which one is nearly right
            found |= secrets.compare_digest(given.strip().encode(), key.encode())
        if kind.lower() != "bearer" or not found:
            raise ApiError(
                401, "Incorrect API key provided; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    def prepare_chat(body: bytes) -> tuple[Options, list[Job]]:
        parsed = parse_chat(parse_json(body))
        return parsed.options, service.chat_jobs(parsed)

    def prepare_completion(body: bytes) -> tuple[Options, list[Job]]:
        parsed = parse_completion(parse_json(body))
        return parsed.options, service.completion_jobs(parsed)

    async def answer(request: Request, prepare: Callable[[bytes], tuple[Options, list[Job]]], chat: bool) -> Response:
        nonlocal at_work
        begun = time.perf_counter()
        path = request.url.path
        status, streaming = 500, False
        jobs: list[Job] = []
        at_work += 1

        def close(code: int) -> None:
            nonlocal at_work
            at_work -= 1
            metrics.request(path, code, time.perf_counter() - begun)
            metrics.answers(jobs)

        try:
            check_key(request)
            if at_work > limits.requests:
                raise ApiError(
                    429,
                    f"{limits.requests} requests are at work already; try again later",
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                )
            options, jobs = await in_thread(prepare, await read_body(request, limits.body_bytes))
            answers = service.submit(jobs)
            reply = Reply(answers, chat=chat, include_usage=options.include_usage, texts=texts[options.model])
            if options.stream:
                streaming = True
                return _EventStream(reply, answers, close)
            await finish(request, answers)
            status = 200
            return JSONResponse(reply.whole())
        except ClientGone:
            status = 499
            return Response(status_code=499)
        except ApiError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            if not streaming:
                close(status)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, prepare_chat, True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, prepare_completion, False)

    def describe(name: str) -> dict[str, Any]:
        loaded = service.predictor(name).loaded
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "llava_mole",
            "adapter": loaded.adapter,
            "max_model_len": loaded.context_length,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [describe(name) for name in service.predictors]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request)
        return describe(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = service.engine.state()
        if state.alive:
            return JSONResponse({"status": "ok", "running": state.running, "waiting": state.waiting})
        return JSONResponse({"status": "failed"}, status_code=503)

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        check_key(request)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail} ({request.method} {request.url.path})"
        failure = ApiError(error.status_code, message, code="unknown_url" if error.status_code == 404 else None)
        return JSONResponse(failure.body(), status_code=error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error, exc_info=error)
        failure = as_api_error(error)
        return JSONResponse(failure.body(), status_code=failure.status)

    return app


class _EventStream(StreamingResponse):
    """The stream of a reply, which frees the answers' places and counts the request however it ends.

    A generator could not do that: if the client is gone before its first event, it never runs.
    """

    def __init__(self, reply: Reply, answers: Answers, close: Callable[[int], None]) -> None:
        super().__init__(reply.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._reply, self._answers, self._close = reply, answers, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 499
        try:
            await super().__call__(scope, receive, send)
            status = self._reply.status
        finally:
            self._answers.cancel()
            self._close(status)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than `most` bytes, takes too long, or is not declared as JSON: a web page could send
            other kinds to a server on the same machine.
        ClientGone: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the Content-Type is {kind or 'missing'}; it must be application/json", code="unsupported_media_type"
        )
    too_large = ApiError(413, f"the body is larger than {format_bytes(most)}", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > 2 * most:
        raise too_large

    async def read() -> bytes:
        content, discarded = bytearray(), 0
        async for piece in request.stream():
            if len(content) + discarded + len(piece) <= most and not discarded:
                content += piece
                continue
            # A client that is still sending reads no answer, so a little more is taken and thrown away.
            content.clear()
            discarded += len(piece)
            if discarded > most:
                break
        if discarded:
            raise too_large
        return bytes(content)

    from starlette.requests import ClientDisconnect

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s", code="timeout") from None
    except ClientDisconnect:
        raise ClientGone from None


async def finish(request: Request, answers: Answers) -> None:
    """Wait for the answers. Raises ClientGone, and frees their places, if the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answers.finish()), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
