"""Bodies of requests, checked and in our own words.

Fields of OpenAI's that change nothing here are accepted; fields that would change the answer are refused by name unless
they have their neutral value; fields that OpenAI does not have are refused by name, as OpenAI does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_mole.common.text import is_text
from llava_mole.serve.api.errors import ApiError

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction", "verbosity",
}  # fmt: skip
"""Fields that do not change what a model of ours answers."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not supported, and the values with which they ask for nothing. None is allowed for each."""
MOST_STOPS = 4
"""Stop texts of a request, as OpenAI allows."""

Model = TypeVar("Model", bound="_Body")
Stops = str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None
Count = Annotated[int, Field(ge=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Count | None = None
    seed: int | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: "_StreamOptions | None" = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: Any = None


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _CompletionBody(_Body):
    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


@dataclass(frozen=True)
class Message:
    """A turn: text and image addresses in their order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | dict[str, str], ...]
    """Texts, and `{"url": ..., "param": ...}` for images, where `param` says which part of the body it is."""


@dataclass(frozen=True)
class Options:
    """How to answer; None leaves a value to the server's default."""

    model: str
    max_tokens: int | None
    max_tokens_param: str
    """Which of its names the request used."""
    temperature: float | None
    top_p: float | None
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    """None: no log probabilities."""


@dataclass(frozen=True)
class Chat:
    """A body of `/v1/chat/completions`."""

    options: Options
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """A body of `/v1/completions`; each prompt is a text or a list of token ids."""

    options: Options
    prompts: tuple[str | list[int], ...]


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError if it is none."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"the body is JSON of type {type(value).__name__}; it must be an object", code="invalid_json"
        )
    return value


def parse_chat(body: dict[str, Any]) -> Chat:
    """A chat request. Raises ApiError, which names the field."""
    found = _validate(_ChatBody, body)
    maximum, param = found.max_tokens, "max_tokens"
    if found.max_completion_tokens is not None:
        if maximum not in (None, found.max_completion_tokens):
            raise ApiError(
                400,
                f"max_tokens is {maximum} and max_completion_tokens is {found.max_completion_tokens}; give one of them",
                code="invalid_value",
                param="max_tokens",
            )
        maximum, param = found.max_completion_tokens, "max_completion_tokens"
    if found.top_logprobs is not None and not found.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    top = (found.top_logprobs or 0) if found.logprobs else None
    messages = tuple(_message(message, n) for n, message in enumerate(found.messages))
    return Chat(_options(found, maximum, param, top), messages)


def parse_completion(body: dict[str, Any]) -> Completion:
    """A completion request. Raises ApiError, which names the field."""
    found = _validate(_CompletionBody, body)
    return Completion(_options(found, found.max_tokens, "max_tokens", found.logprobs), _prompts(found.prompt))


def _validate(kind: type[Model], body: dict[str, Any]) -> Model:
    rest: dict[str, Any] = {}
    for name, value in body.items():
        if name in NEUTRAL and name not in kind.model_fields:
            if value is not None and value not in NEUTRAL[name]:
                raise ApiError(
                    400,
                    f"{name} is not supported by this server; leave it out",
                    code="unsupported_parameter",
                    param=name,
                )
        elif name not in IGNORED:
            rest[name] = value
    try:
        return kind.model_validate(rest)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The first problem that pydantic found, in OpenAI's words where it has some."""
    found = error.errors(include_url=False, include_context=False)
    # For a union there is an error of each alternative: the one that fits the value's type says more.
    first = next((each for each in found if not each["type"].endswith("_type")), found[0])
    # Behind the field, pydantic names the alternative of a union that it tried.
    path = [part for part in first["loc"] if isinstance(part, int) or not (set(part) & set("[](),") or part in _TYPES)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {name}", code="unknown_parameter", param=name)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)
    given = repr(first["input"])
    shown = f" (it is {given})" if len(given) <= 60 else ""
    return ApiError(400, f"Invalid value for '{name}': {first['msg']}{shown}", code="invalid_value", param=name)


_TYPES = {"str", "int", "float", "bool", "list", "constrained-list"}


def _options(body: _Body, maximum: int | None, param: str, top_logprobs: int | None) -> Options:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for stop in stops:
        if not stop:
            raise ApiError(
                400, "stop holds an empty text, which would stop every answer", code="invalid_value", param="stop"
            )
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", code="invalid_value", param="stream_options")
    return Options(
        model=body.model,
        max_tokens=maximum,
        max_tokens_param=param,
        temperature=body.temperature,
        top_p=body.top_p,
        n=body.n or 1,
        seed=body.seed,
        stop=tuple(stops),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        top_logprobs=top_logprobs,
    )


def _message(message: _Message, number: int) -> Message:
    role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
    param = f"messages[{number}].content"
    content = message.content
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(role, (_text(content, param),))
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{param} must be a text or a list of parts", code="invalid_value", param=param)
    return Message(role, tuple(_part(part, role, f"{param}[{n}]") for n, part in enumerate(content)))


def _part(part: Any, role: str, param: str) -> str | dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
        return _text(part["text"], f"{param}.text")
    if kind == "image_url" and set(part) == {"type", "image_url"} and isinstance(part["image_url"], dict):
        image = part["image_url"]
        if role != "user":
            raise ApiError(400, f"{param}: only user messages show images", code="invalid_value", param=param)
        if isinstance(image.get("url"), str) and set(image) <= {"url", "detail"}:
            return {"url": image["url"], "param": f"{param}.image_url.url"}
    raise ApiError(
        400,
        f"{param} is not a part of a message; allowed are {{'type': 'text', 'text': TEXT}} and {{'type': 'image_url', "
        "'image_url': {'url': ADDRESS}}",
        code="invalid_value",
        param=param,
    )


def _text(text: str, param: str) -> str:
    if not is_text(text):
        raise ApiError(400, f"{param} holds an unpaired surrogate; remove it", code="invalid_value", param=param)
    return text


def _prompts(prompt: Any) -> tuple[str | list[int], ...]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(part) is int for part in prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, "prompt must be a text, texts or token ids", code="invalid_value", param="prompt")
    for n, each in enumerate(prompt):
        if isinstance(each, str):
            _text(each, f"prompt[{n}]")
        elif not isinstance(each, list) or not each or not all(type(part) is int for part in each):
            raise ApiError(
                400, f"prompt[{n}] must be a text or a list of token ids", code="invalid_value", param=f"prompt[{n}]"
            )
    return tuple(prompt)
