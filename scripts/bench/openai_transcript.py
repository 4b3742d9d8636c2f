"""What OpenAI's client and curl get from the server, call by call: `python scripts/bench/openai_transcript.py RUN`.

It starts `llava-mole serve` on a free port. With `--url http://127.0.0.1:8000` it asks a server that runs already.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[2]))  # `scripts`, from wherever this is started

from scripts.bench.serve_load import COLORS, data_url, server

Show = Callable[[str], None]


def image_message(*colors: tuple[int, int, int], text: str) -> list[dict[str, Any]]:
    """A question after plain images of these colours."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(color)}} for color in colors]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def transcript(client: openai.OpenAI, show: Show = print) -> None:
    """Models, chat, image parts, a stream, log probabilities, `n`, `stop`, a completion and three errors."""
    models = client.models.list().data
    show(f"models.list()\n  {[model.id for model in models]}")
    name = models[0].id
    red, blue = COLORS[:2]
    chat: Any = client.chat.completions.create
    common = {"model": name, "temperature": 0, "max_tokens": 24}

    def title(text: str) -> None:
        show(f"\nchat.completions.create({text})")

    title('one image, "What color is this?"')
    answer = chat(**common, messages=image_message(red, text="What color is this?"))
    show(f"  {answer.choices[0].message.content!r}   finish_reason {answer.choices[0].finish_reason}")
    show(f"  usage {answer.usage.model_dump(exclude_none=True)}")

    title('two images, "Is the second one blue?", stream=True')
    asked = image_message(red, blue, text="Is the second one blue?")
    stream = chat(**common, messages=asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            show(f"  delta {choice.delta.model_dump(exclude_none=True)}  finish_reason {choice.finish_reason}")
        if chunk.usage:
            show(f"  usage {chunk.usage.model_dump(exclude_none=True)}")

    title("logprobs=True, top_logprobs=2, max_tokens=3")
    short = {**common, "max_tokens": 3}
    likely = chat(**short, messages=image_message(red, text="What color is this?"), logprobs=True, top_logprobs=2)
    for token in likely.choices[0].logprobs.content:
        others = ", ".join(f"{other.token!r} {other.logprob:.3f}" for other in token.top_logprobs)
        show(f"  {token.token!r} {token.logprob:.3f}   most likely: {others}")

    title("n=3, temperature=1.2, seed=7")
    drawn = {**common, "temperature": 1.2, "n": 3, "seed": 7}
    several = chat(**drawn, messages=image_message(blue, text="Describe the image."))
    for choice in several.choices:
        show(f"  {choice.index}: {choice.message.content!r}")

    show('\ncompletions.create("The red", and the same with stop=[" "])')
    for stop in (None, [" "]):
        text: Any = client.completions.create(**common, prompt="The red", stop=stop)  # type: ignore[call-overload]
        show(f"  {text.choices[0].text!r}   finish_reason {text.choices[0].finish_reason}")

    for wrong, what in (
        ({"model": "gpt-4o"}, 'model="gpt-4o"'),
        ({"temperature": 9}, "temperature=9"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "image file:///etc/passwd"),
    ):  # fmt: skip
        title(what)
        try:
            chat(**{**common, "messages": [{"role": "user", "content": "What?"}], **wrong})
        except openai.APIStatusError as error:
            show(f"  {type(error).__name__} {error.status_code}: {json.dumps(error.body)}")


def with_curl(url: str, name: str, show: Show = print) -> None:
    """The health of the server and one question, asked with curl."""
    parts = image_message(COLORS[0], text="What color is this?")
    body = json.dumps({"model": name, "temperature": 0, "max_tokens": 24, "messages": parts})
    shown = body.replace(parts[0]["content"][0]["image_url"]["url"], "data:image/png;base64,...")
    json_header = "Content-Type: application/json"
    for arguments, given in (
        ([f"{url}/health"], None),
        ([f"{url}/v1/chat/completions", "-H", json_header, "-d", "@-"], body),
    ):
        words = [f"'{word}'" if " " in word else word for word in arguments]
        show(f"\ncurl -s {' '.join(words)}" + (f" <<< '{shown}'" if given else ""))
        done = subprocess.run(["curl", "-s", *arguments], input=given, capture_output=True, text=True, check=True)
        show(f"  {done.stdout}")


@contextlib.contextmanager
def running(url: str) -> Iterator[tuple[str, int]]:
    """A server that somebody else has started."""
    yield url.rstrip("/"), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="run or checkpoint to serve")
    parser.add_argument("--url", help="ask this server instead")
    args = parser.parse_args()
    if (args.run is None) == (args.url is None):
        parser.error("give a run, or --url")
    with running(args.url) if args.url else server(args.run, "--device", "cpu") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("LLAVA_MOLE_API_KEY", "none"))
        transcript(client)
        if shutil.which("curl"):
            with_curl(url, client.models.list().data[0].id)


if __name__ == "__main__":
    main()
