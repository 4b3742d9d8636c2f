"""The server, asked by the real `openai` client, and by hand where a client would not send such a thing."""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from worlds.eval_models import colors

from llava_mole.conversation import Turn, render, with_system
from llava_mole.data.tokenization import encode
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.model.builder import load_pretrained_models
from llava_mole.serve.api.cli import build, listen, parse_arguments
from scripts.bench.openai_transcript import transcript
from scripts.bench.serve_load import report_stress, stress

KEY = "a secret key"
NEW = 12
TEXT = "What color is this?"


def data_url(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


IMAGES = [Image.new("RGB", (16, 16), color) for color in colors()]
URLS = [data_url(image) for image in IMAGES]


def shows(*urls: str, text: str = TEXT) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Served:
    """A server in this process, its models, and how to reach it."""

    def __init__(self, predictors: dict[str, Predictor], options: list[str]) -> None:
        import uvicorn

        self.predictors = predictors
        args: argparse.Namespace = parse_arguments([*predictors, *options])
        self.bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.bound.getsockname()[1]}"
        self.app = build(args, predictors, [KEY])
        config = uvicorn.Config(self.app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.bound])), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
            assert self.thread.is_alive()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def stop(self) -> None:
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        self.bound.close()
        assert not self.thread.is_alive()

    def state(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown")
    IMAGES[1].save(path / "blue.png")
    return path


@pytest.fixture(scope="module")
def served(mole_run: Path, chat_run: Path, folder: Path) -> Iterator[Served]:
    loaded = load_pretrained_models([mole_run, chat_run], device="cpu")
    found = Served(
        dict(zip(("mole", "lora"), map(Predictor, loaded), strict=True)),
        [
            *("--temperature", "0", "--max-new-tokens", str(NEW), "--max-body-mb", "1", "--max-image-megapixels", "1"),
            *(
                "--max-waiting",
                "40",
                "--max-batch",
                "8",
                "--max-tokens-limit",
                "450",
                "--allow-image-folder",
                str(folder),
            ),
        ],
    )
    yield found
    found.stop()


def expected(served: Served, model: str, images: Any, prompt: Any, **options: Any) -> str:
    return served.predictors[model].generate([images], [prompt], **{"max_new_tokens": NEW, **options})[0]


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["mole", "lora"]
    assert served.client.models.retrieve("lora").owned_by == "llava_mole"
    with pytest.raises(openai.NotFoundError, match="The model 'other' does not exist; there are mole, lora"):
        served.client.models.retrieve("other")


@pytest.mark.parametrize("model", ["mole", "lora"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_gives_the_predictors_answer(served: Served, model: str, stream: bool) -> None:
    create = served.client.chat.completions.create
    answers = []
    for image, url in zip(IMAGES, URLS, strict=True):
        if stream:
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last = list(create(model=model, messages=shows(url), **options))
            assert chunks[0].choices[0].delta.role == "assistant"
            answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            *others, reason = [chunk.choices[0].finish_reason for chunk in chunks]
            assert set(others) == {None}
            assert all(chunk.usage is None for chunk in chunks)
            assert not last.choices
            usage = last.usage
        else:
            answer = create(model=model, messages=shows(url))
            answers.append(answer.choices[0].message.content)
            assert (answer.object, answer.model) == ("chat.completion", model)
            reason, usage = answer.choices[0].finish_reason, answer.usage
        predictor = served.predictors[model]
        (batch,) = predictor.batches([image], [TEXT], batch_size=1)
        ids = predictor._decode(batch, Decoding(NEW), predictor.answer_decoder(None), [0])[0]
        assert (usage.prompt_tokens, usage.completion_tokens) == (batch.input_ids.shape[1], len(ids))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert reason == ("stop" if ids[-1] in predictor.eos_ids else "length")
        assert answers[-1] == expected(served, model, image, TEXT)
    assert len(set(answers)) > 1


def test_conversations_systems_and_several_images(served: Served) -> None:
    create = served.client.chat.completions.create
    turns: Any = [*shows(URLS[0]), {"role": "assistant", "content": "red"}, {"role": "user", "content": "Why?"}]
    found = create(model="mole", messages=turns).choices[0].message.content
    plain = [{**turns[0], "content": TEXT}, *turns[1:]]
    assert found == expected(served, "mole", IMAGES[0], plain)
    between: Any = [
        {"type": "text", "text": "Is"},
        {"type": "image_url", "image_url": {"url": URLS[0], "detail": "low"}},
        {"type": "text", "text": "like"},
        {"type": "image_url", "image_url": {"url": URLS[1]}},
        {"type": "text", "text": "?"},
    ]
    found = create(model="mole", messages=[{"role": "user", "content": between}]).choices[0].message.content
    assert found == expected(served, "mole", IMAGES[:2], "Is\n<image>\nlike\n<image>\n?")
    several: Any = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert create(model="mole", messages=several).choices[0].message.content == expected(
        served, "mole", None, "one\ntwo"
    )
    predictor = served.predictors["mole"]
    own = Predictor(predictor.loaded)
    own.template = with_system(predictor.template, "Be </s> brief.")
    for role in ("system", "developer"):
        messages: Any = [{"role": role, "content": "Be </s> brief."}, {"role": "user", "content": "What?"}]
        found = create(model="mole", messages=messages).choices[0].message.content
        assert (
            found == own.generate([None], ["What?"], max_new_tokens=NEW)[0] != expected(served, "mole", None, "What?")
        )


def test_sampling_is_reproducible_by_its_seed(served: Served) -> None:
    create = served.client.chat.completions.create
    options: Any = {"model": "mole", "messages": shows(URLS[0]), "temperature": 1.5, "top_p": 0.9}
    first = create(**options, seed=5, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    wanted = {"temperature": 1.5, "top_p": 0.9}
    assert texts == [expected(served, "mole", IMAGES[0], TEXT, seeds=[5 + n], **wanted) for n in range(3)]
    assert create(**options, seed=6).choices[0].message.content == texts[1]
    assert len({create(**options).choices[0].message.content for _ in range(4)}) > 1
    streamed = ["", "", ""]
    for chunk in create(**options, seed=5, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert first.usage.completion_tokens <= 3 * NEW
    assert create(**{**options, "top_p": 0}).choices[0].message.content == expected(served, "mole", IMAGES[0], TEXT)


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_texts_never_show(served: Served, as_list: bool) -> None:
    create = served.client.chat.completions.create
    for url, image in zip(URLS, IMAGES, strict=True):
        full = expected(served, "mole", image, TEXT)
        for place in range(2, len(full) - 1, 3):
            stop = full[place : place + 2]
            options: Any = {"model": "mole", "messages": shows(url), "stop": [stop, "never"] if as_list else stop}
            wanted = full[: full.index(stop)].strip()
            whole = create(**options).choices[0]
            assert (whole.message.content, whole.finish_reason) == (wanted, "stop")
            pieces = [chunk.choices[0].delta.content or "" for chunk in create(**options, stream=True)]
            shown = ""
            for piece in pieces:
                shown += piece
                assert wanted.startswith(shown)
            assert shown == wanted


def test_log_probabilities(served: Served) -> None:
    create = served.client.chat.completions.create
    options: Any = {"model": "mole", "messages": shows(URLS[0]), "logprobs": True, "top_logprobs": 3}
    whole = create(**options).choices[0]
    content = whole.logprobs.content
    assert "".join(each.token for each in content).strip() == whole.message.content
    assert b"".join(bytes(each.bytes) for each in content).decode().strip() == whole.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in content)
    assert all(len(each.top_logprobs) == 3 for each in content)
    streamed = []
    for chunk in create(**options, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content
    assert create(model="mole", messages=shows(URLS[0])).choices[0].logprobs is None
    stop = (content[4].token + content[5].token).strip()
    cut = create(**options, stop=stop).choices[0]
    assert stop not in "".join(each.token for each in cut.logprobs.content)


def test_completions(served: Served) -> None:
    predictor = served.predictors["lora"]
    create = served.client.completions.create
    tokenizer = predictor.loaded.tokenizer
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*first, *tokenizer.encode_with_offsets("Is it blue")[0]]
    one = create(model="lora", prompt="Is it blue", max_tokens=5, logprobs=2)
    assert (one.object, one.choices[0].finish_reason, one.usage.prompt_tokens) == (
        "text_completion",
        "length",
        len(ids),
    )
    same = create(model="lora", prompt=ids, max_tokens=5)
    assert same.choices[0].text == one.choices[0].text
    both = create(model="lora", prompt=["Is it blue", "one two"], max_tokens=5, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[:2]] == [one.choices[0].text] * 2
    assert both.usage.prompt_tokens < 2 * one.usage.prompt_tokens + 2
    assert (
        "".join(chunk.choices[0].text for chunk in create(model="lora", prompt="Is it blue", max_tokens=5, stream=True))
        == one.choices[0].text
    )
    logprobs = one.choices[0].logprobs
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    )
    assert all(len(each) == 2 for each in logprobs.top_logprobs)


def said(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


BAD: list[tuple[Any, ...]] = [
    ({"colour": 1}, "Unrecognized request argument supplied: colour", "colour", "unknown_parameter"),
    ({"messages": None}, "Invalid value for 'messages'", "messages"),
    ({"messages": []}, "Invalid value for 'messages'", "messages"),
    ({"messages": said("tool", "a")}, "'messages[0].role'", "messages[0].role"),
    ({"messages": said("user", 7)}, "must be a text or a list", "messages[0].content"),
    ({"messages": said("user", [{"type": "audio"}])}, "is not a part", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "name": "b"}]}, "messages[0].name", "messages[0].name", "unknown_parameter"),
    ({"messages": said("assistant", "a")}, "must end with a user turn", "messages"),
    ({"messages": [*said("user", "a"), *said("system", "b")]}, "must be the first", "messages"),
    ({"messages": said("user", "see <image>")}, "1 <image> in the text, but no image given", "messages"),
    ({"messages": said("user", "\ud800")}, "unpaired surrogate", "messages[0].content"),
    ({"messages": said("user", "one " * 600)}, "leave no room", "messages", "context_length_exceeded"),
    ({"temperature": "hot"}, "Invalid value for 'temperature'", "temperature"),
    ({"temperature": 2.5}, "less than or equal to 2 (it is 2.5)", "temperature"),
    ({"temperature": 1e-6}, "must be 0 (greedy) or at least", "temperature"),
    ({"top_p": -1}, "'top_p'", "top_p"),
    ({"n": 0}, "'n'", "n"),
    ({"n": 9}, "at most 8 answers", "n"),
    ({"max_tokens": 451}, "max_tokens is 451; this server writes at most 450", "max_tokens"),
    ({"max_completion_tokens": 451}, "max_completion_tokens is 451", "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "give one of them", "max_tokens"),
    ({"stop": ["a"] * 5}, "at most 4 items", "stop"),
    ({"stop": ["a", ""]}, "an empty text", "stop"),
    ({"seed": 1.5}, "'seed'", "seed"),
    ({"top_logprobs": 2}, "needs logprobs: true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "'top_logprobs'", "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "needs stream: true", "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools is not supported", "tools", "unsupported_parameter"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "not supported", "response_format", "unsupported_parameter"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case[0])[:40])
def test_wrong_values_are_named(served: Served, case: tuple[Any, ...]) -> None:
    change, message, param, code = case if len(case) == 4 else (*case, "invalid_value")
    body = {"model": "mole", "messages": [{"role": "user", "content": "What?"}], **change}
    answer = served.http.post(
        "/v1/chat/completions", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        400, "invalid_request_error", param, code
    )  # fmt: skip
    assert message in error["message"]


def test_neutral_values_and_values_without_effect_are_taken(served: Served) -> None:
    more = {
        "frequency_penalty": 0,
        "tools": [],
        "tool_choice": "auto",
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
    }
    more |= {"response_format": {"type": "text"}, "logit_bias": None, "max_completion_tokens": 3, "n": 1, "seed": None}
    answer = served.client.chat.completions.create(model="mole", messages=shows(URLS[0]), extra_body=more)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "has an http address, which this server does not open"),
        ("file:///etc/passwd", "is not in the folder that this server allows"),
        ("file:///../../etc/passwd", "is not in the folder"),
        ("ftp://example.org/a.png", "has an address of an unknown kind"),
        ("/etc/passwd", "has an address of an unknown kind"),
        ("data:image/png,abc", "has a data: address without base64"),
        ("data:image/png;base64,!!!", "whose base64 is damaged"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read; allowed are the formats JPEG, PNG"),
        (URLS[0][:-60] + "AAAA", "cannot be"),
        (data_url(Image.new("1", (1001, 1000))), "has 1001 x 1000 pixels; at most 1,000,000 are allowed"),
    ],
)
def test_images_that_are_refused(served: Served, url: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="mole", messages=shows(URLS[0], url))
    assert caught.value.param == "messages[0].content[1].image_url.url"
    assert caught.value.code == "invalid_image"
    assert message in caught.value.message


def test_files_of_the_allowed_folder(served: Served, folder: Path) -> None:
    for url in ("file:///blue.png", (folder / "blue.png").as_uri()):
        answer = served.client.chat.completions.create(model="mole", messages=shows(url))
        assert answer.choices[0].message.content == expected(served, "mole", IMAGES[1], TEXT)


def test_bodies_that_are_no_requests(served: Served) -> None:
    post, header = served.http.post, {"Content-Type": "application/json"}
    path = "/v1/chat/completions"
    for content in (b"", b"{", b"\xff\xfe", b"[1]", b'{"temperature": NaN}', b"[" * 100_000):
        answer = post(path, content=content, headers=header)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json"), content[:20]
    answer = post(path, content=b"x" * 1_200_000, headers=header)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert "larger than 1.0 MB" in answer.json()["error"]["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            yield b"x" * 100_000

    assert post(path, content=pieces(), headers=header).status_code == 413
    answer = post(path, content=b"{}", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = served.http.get(path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, f"Method Not Allowed (GET {path})")
    answer = served.http.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_keys(served: Served) -> None:
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer"},
    ):
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(served.url + path, headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        answer = httpx.post(served.url + "/v1/chat/completions", headers=header, json={})
        assert answer.status_code == 401
    assert httpx.get(served.url + "/health").json()["status"] == "ok"
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong").models.list()


def wait_for_idle(served: Served) -> None:
    for _ in range(200):
        if not served.state()["running"] + served.state()["waiting"]:
            return
        time.sleep(0.02)
    raise AssertionError(f"places were not freed: {served.state()}")


@pytest.fixture
def endless(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers end at their limit only."""
    for predictor in served.predictors.values():
        monkeypatch.setattr(predictor, "eos_ids", ())


@pytest.mark.usefixtures("endless")
def test_clients_that_leave_free_their_places(served: Served) -> None:
    body = {"model": "mole", "messages": shows(URLS[0]), "max_tokens": 440, "n": 4}
    with served.client.chat.completions.create(**body, stream=True) as stream:  # type: ignore[call-overload]
        next(iter(stream))
    wait_for_idle(served)
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/v1/chat/completions", json=body, timeout=0.3)
    wait_for_idle(served)
    assert served.metric('llava_mole_answers_total{model="mole",reason="cancelled"}') >= 8


@pytest.mark.usefixtures("endless")
def test_too_many_requests_are_refused_and_retried(served: Served) -> None:
    body: Any = {"model": "mole", "messages": shows(URLS[0]), "max_tokens": 100, "n": 8}
    outcomes: list[Any] = []

    def ask() -> None:
        outcomes.append(served.http.post("/v1/chat/completions", json=body))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in outcomes if answer.status_code != 200]
    assert 1 <= len(refused) < 8
    assert {answer.status_code for answer in refused} == {429}
    assert refused[0].headers["Retry-After"] == "1"
    assert re.fullmatch(r"\d+ requests are waiting already, .*", refused[0].json()["error"]["message"])


def test_metrics(served: Served) -> None:
    before = served.metric('llava_mole_generated_tokens_total{model="lora"}')
    served.client.chat.completions.create(model="lora", messages=shows(URLS[0]), max_tokens=4)
    assert served.metric('llava_mole_generated_tokens_total{model="lora"}') == before + 4
    assert served.metric('llava_mole_requests_total{path="/v1/chat/completions",status="200"}') >= 1
    assert served.metric("llava_mole_decoding_steps") > 0
    assert served.metric("process_resident_memory_bytes") > 1e7
    assert "llava_mole_request_seconds_bucket" in served.http.get("/metrics").text


def test_a_fault_of_the_model_is_status_500_and_the_end_of_a_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_mole.inference.row_batch import RowBatch

    def broken(*args: Any) -> None:
        raise FloatingPointError("the logits are not finite")

    monkeypatch.setattr(RowBatch, "_forward", broken)
    with pytest.raises(openai.InternalServerError, match="computes NaN or infinity"):
        served.client.chat.completions.create(model="mole", messages=shows(URLS[0]))
    with pytest.raises(openai.APIError, match="computes NaN or infinity"):
        list(served.client.chat.completions.create(model="mole", messages=shows(URLS[0]), stream=True))


def test_a_small_stress(mole_run: Path) -> None:
    """`scripts/bench/serve_load.py --stress` in a small form: hostile, cancelled and good requests at once."""
    stressed = Served({"model": Predictor.from_pretrained(mole_run, device="cpu")}, ["--max-body-mb", "1"])
    try:
        found = asyncio.run(
            stress(stressed.url, os.getpid(), 120, 12, 1_200_000, every=6, headers={"Authorization": f"Bearer {KEY}"})
        )
    finally:
        stressed.stop()
    assert not found.wrong, report_stress(found, 120)
    assert {"cancelled", "streamed", "whole"} < set(found.outcomes)


def test_the_transcript(served: Served) -> None:
    """`scripts/bench/openai_transcript.py`: every kind of call has its answer."""
    lines: list[str] = []
    transcript(served.client, lines.append)
    text = "\n".join(lines)
    assert text.count("chat.completions.create(") == 7
    assert text.count("finish_reason None") >= 2
    assert "'completion_tokens'" in text
    assert "most likely:" in text
    assert [f"  {n}: " in text for n in range(3)] == [True] * 3
    assert "NotFoundError 404" in text
    assert text.count("BadRequestError 400") == 2


def test_the_same_prompt_as_in_training(served: Served) -> None:
    """A completion of the rendered prompt equals the chat."""
    predictor = served.predictors["mole"]
    rendered = render(predictor.template, [Turn("user", "What?")], add_generation_prompt=True)
    ids = encode(rendered, predictor.loaded.tokenizer, num_image_tokens=1, max_length=None).input_ids
    messages: Any = [{"role": "user", "content": "What?"}]
    chat = served.client.chat.completions.create(model="mole", messages=messages).choices[0].message.content
    assert served.client.completions.create(model="mole", prompt=ids, max_tokens=NEW).choices[0].text == chat
