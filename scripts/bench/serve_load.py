"""The server under load: tokens a second and latencies for 1 to 32 clients, batched against one at a time; or a stress.

    python scripts/bench/serve_load.py RUN                       # the load table
    python scripts/bench/serve_load.py RUN --stress 2000         # hostile and cancelled requests among good ones

Every figure is measured with `llava-mole serve` in a process of its own. The workloads are `text`
(`/v1/completions`, long answers) and `chat` (questions about images). The stress compares each answer with the one that
the same request got when the server was idle. A process of its own watches the latency of `/health`, and the memory of
the server is read as well.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from tqdm import tqdm

COLORS = [(250, 10, 10), (10, 10, 250), (10, 200, 10), (240, 220, 20), (120, 20, 160), (30, 30, 30)]
SUBJECTS = ["What is", "The red", "A list:", "USER: describe it", "one two", "Is it", "There are", "The answer"]
QUESTIONS = ["What color is this?", "Describe the image.", "Is it blue?", "How many circles are there?"]
Request = tuple[str, dict[str, Any]]


def data_url(color: Any, size: int = 64, mode: str = "RGB") -> str:
    """A plain image as an address."""
    buffer = io.BytesIO()
    Image.new(mode, (size, size), color).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def workload(kind: str, model: str, tokens: int) -> list[Request]:
    """Path and body of different greedy requests."""
    common: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0}
    if kind == "text":
        prompts = [f"{subject} {word}" for word in ("", "this", "blue circle", "of it") for subject in SUBJECTS]
        return [("/v1/completions", {**common, "prompt": prompt}) for prompt in prompts]
    found: list[Request] = []
    for color in COLORS:
        for question in QUESTIONS:
            parts = [
                {"type": "image_url", "image_url": {"url": data_url(color)}},
                {"type": "text", "text": question},
            ]
            found.append(("/v1/chat/completions", {**common, "messages": [{"role": "user", "content": parts}]}))
    return found


@contextlib.contextmanager
def server(run: str, *options: str) -> Iterator[tuple[str, int]]:
    """`llava-mole serve` on a free port. Yields its address and process id."""
    command = [sys.executable, "-W", "ignore", "-m", "llava_mole.cli", "serve", f"model={run}", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found := re.search(r"at (http://\S+)/v1", line):
                break
        if found is None:
            raise SystemExit(f"the server did not start: exit code {process.wait()}")
        try:
            yield found[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise SystemExit(f"the server ended with exit code {process.returncode}")


@dataclass
class Measured:
    """One row of the load table."""

    seconds: float
    tokens: int
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def percentile(self, share: float) -> float:
        return percentile(self.latencies, share)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1))]


async def measure(url: str, requests: Sequence[Request], clients: int, count: int) -> Measured:
    """`count` requests from `clients` clients, each of which asks again when it has its answer."""
    left = iter(range(count))
    found = Measured(0.0, 0)

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as asking:

        async def client() -> None:
            for n in left:
                path, body = requests[n % len(requests)]
                begun = time.perf_counter()
                answer = await asking.post(path, json=body)
                answer.raise_for_status()
                found.latencies.append(time.perf_counter() - begun)
                found.tokens += answer.json()["usage"]["completion_tokens"]

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        found.seconds = time.perf_counter() - begun
    return found


MODES = ("one at a time", "batched")
Cell = tuple[str, int, str]
"""Workload, clients and mode."""


def load_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cells, `args.rounds` times. The modes take turns, so that what else the machine does meets both."""
    found: dict[Cell, list[Measured]] = {}
    places = (1, max(args.clients))
    with contextlib.ExitStack() as stack:
        options = ("--device", args.device, "--max-waiting", "64")
        urls = {
            mode: stack.enter_context(server(args.run, "--max-batch", str(n), *options))[0]
            for mode, n in zip(MODES, places, strict=True)
        }
        for url in urls.values():
            for kind in args.workloads:
                asyncio.run(measure(url, workload(kind, "model", args.tokens), 1, 4))  # warm-up
        cells = [(kind, clients, mode) for kind in args.workloads for clients in args.clients for mode in MODES]
        for kind, clients, mode in tqdm(cells * args.rounds, desc="load", unit="cell", disable=None):
            count = min(args.requests, max(clients, args.requests // 8, args.requests * clients // 16))
            requests = workload(kind, "model", args.tokens)
            m = asyncio.run(measure(urls[mode], requests, clients, count))
            found.setdefault((kind, clients, mode), []).append(m)
    return [row_of(cell, found) for cell in cells]


def row_of(cell: Cell, found: dict[Cell, list[Measured]]) -> dict[str, Any]:
    """A row of the load table: medians over the rounds, and the ratio to the other mode in the same round."""
    kind, clients, mode = cell
    runs = found[cell]
    ratios = [m.rate / base.rate for m, base in zip(runs, found[kind, clients, MODES[0]], strict=True)]
    return {
        "workload": kind,
        "clients": clients,
        "mode": mode,
        "tokens/s": round(statistics.median(m.rate for m in runs), 1),
        "tokens/answer": round(sum(m.tokens for m in runs) / sum(len(m.latencies) for m in runs), 1),
        "p50 s": round(statistics.median(m.percentile(0.5) for m in runs), 3),
        "p95 s": round(statistics.median(m.percentile(0.95) for m in runs), 3),
        "against one at a time": f"{statistics.median(ratios):.1f} x ({min(ratios):.1f} to {max(ratios):.1f})",
    }


def draw_load(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens a second and the 95th percentile of the latencies over the number of clients."""
    from llava_mole.common.figures import COLORS, new_figure, save_figure, tidy

    figure = new_figure(8.0, 3.2)
    panels = figure.subplots(1, 2)
    for panel, key, title in zip(
        panels, ("tokens/s", "p95 s"), ("Tokens a second", "Latency of an answer, p95"), strict=True
    ):
        for color, kind in zip(COLORS, dict.fromkeys(row["workload"] for row in rows), strict=False):
            for mode, style in zip(MODES, ("--", "-"), strict=True):
                own = [row for row in rows if (row["workload"], row["mode"]) == (kind, mode)]
                x, y = [row["clients"] for row in own], [row[key] for row in own]
                panel.plot(x, y, style, color=color, marker="o", markersize=4, label=f"{kind}, {mode}")
        tidy(panel, title, "clients", "seconds" if key == "p95 s" else "")
        panel.set_ylim(bottom=0)
        panel.set_xticks(list(dict.fromkeys(row["clients"] for row in rows)))
    panels[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


HOSTILE = ("oversize", "broken image", "wrong JSON", "unknown model", "wrong value", "huge image", "not JSON at all")


@functools.cache
def hostile(kind: str, body_bytes: int) -> tuple[bytes, int]:
    """A body that must be refused, and with which status."""
    message: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "What?"}]}
    if kind == "oversize":
        return json.dumps({**message, "user": "x" * body_bytes}).encode(), 413
    if kind == "wrong JSON":
        return b'{"model": "model", "messages": [', 400
    if kind == "not JSON at all":
        return bytes(range(256)), 400
    if kind == "unknown model":
        return json.dumps({**message, "model": "other"}).encode(), 404
    if kind == "wrong value":
        return json.dumps({**message, "temperature": "hot"}).encode(), 400
    url = "data:image/png;base64,aGVsbG8=" if kind == "broken image" else data_url(0, 8000, "1")
    message["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps(message).encode(), 400


@dataclass
class Stress:
    """What a stress has seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that differ from the known ones, and statuses that were not expected."""
    health: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Requests so far, and the server's resident memory in bytes."""
    seconds: float = 0.0


async def stress(
    url: str,
    pid: int,
    count: int,
    clients: int,
    body_bytes: int,
    *,
    seed: int = 0,
    every: int = 1,
    headers: dict[str, str] | None = None,
) -> Stress:
    """`count` requests from `clients` clients, a part of them hostile or cancelled; see the module's text.

    `every` takes each such request of the workloads only.
    """
    found, rng = Stress(), random.Random(seed)
    requests = [*workload("chat", "model", 12), *workload("text", "model", 24)][::every]
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as asking:
        known = [await ask(asking, path, body) for path, body in requests]
        left, done = iter(range(count)), 0
        bar = tqdm(total=count, unit="request", disable=None)

        async def client() -> None:
            nonlocal done
            for _ in left:
                n, lot = rng.randrange(len(requests)), rng.random()
                path, body = requests[n]
                if lot < 0.15:
                    kind = rng.choice(HOSTILE)
                    content, status = hostile(kind, body_bytes)
                    header = {"Content-Type": "application/json"}
                    try:
                        answer = await asking.post("/v1/chat/completions", content=content, headers=header)
                        error = answer.json()["error"]
                        if answer.status_code != status or not error["message"]:
                            found.wrong.append(f"{kind}: status {answer.status_code}: {answer.text[:200]}")
                    except httpx.HTTPError as problem:
                        found.wrong.append(f"{kind}: {problem!r}")
                    found.outcomes[f"refused: {kind}"] += 1
                elif lot < 0.35:
                    long = {**body, "max_tokens": 200, "stream": rng.random() < 0.5}
                    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(consume(asking, path, long), rng.random() * 0.5)
                    found.outcomes["cancelled"] += 1
                else:
                    streamed = lot > 0.7
                    text = await (
                        consume(asking, path, {**body, "stream": True}) if streamed else ask(asking, path, body)
                    )
                    if text != known[n]:
                        found.wrong.append(f"{body.get('prompt', 'chat')}: {text!r} instead of {known[n]!r}")
                    found.outcomes["streamed" if streamed else "whole"] += 1
                done += 1
                bar.update()
                if done % 50 == 0:
                    found.memory.append((done, resident(pid)))

        for kind in HOSTILE:
            hostile(kind, body_bytes)
        with health_probe(url, found.health):
            begun = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            found.seconds = time.perf_counter() - begun
        bar.close()
        for _ in range(100):
            state = (await asking.get("/health")).json()
            if not state["running"] + state["waiting"]:
                break
            await asyncio.sleep(0.1)
        else:
            found.wrong.append(f"places were not freed: {state}")
        for n, (path, body) in enumerate(requests):
            if await ask(asking, path, body) != known[n]:
                found.wrong.append(f"after the stress, request {n} is answered differently")
    return found


@contextlib.contextmanager
def health_probe(url: str, seconds: list[float]) -> Iterator[None]:
    """Watch `/health` from a process of its own while the block runs, and add the latencies to `seconds`."""
    command = [sys.executable, str(Path(__file__).with_name("health_probe.py")), url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            seconds += json.loads(process.communicate("\n")[0] or "[]")


async def ask(asking: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """The text of a whole answer."""
    answer = await asking.post(path, json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


async def consume(asking: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """The joined text of a stream, or of a whole answer."""
    text = ""
    async with asking.stream("POST", path, json=body) as answer:
        answer.raise_for_status()
        if not body.get("stream"):
            await answer.aread()
            return ""
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def report_stress(found: Stress, count: int) -> str:
    """What was seen, as text."""
    flat = [size for done, size in found.memory if done >= count // 4]
    lines = [f"{count} requests in {found.seconds:.0f} s"]
    lines += [f"  {name:<26}{number}" for name, number in sorted(found.outcomes.items())]
    lines.append(
        f"/health: p50 {1000 * statistics.median(found.health):.1f} ms, p95 "
        f"{1000 * percentile(found.health, 0.95):.1f} ms, largest {1000 * max(found.health):.0f} ms "
        f"({len(found.health)} calls)"
    )
    if flat:
        lines.append(
            f"memory from request {count // 4} on: {min(flat) / 1e6:.0f} to {max(flat) / 1e6:.0f} MB, "
            f"{100 * (min(flat) / flat[0] - 1):+.1f}% to {100 * (max(flat) / flat[0] - 1):+.1f}%"
        )
    lines.append(f"wrong: {len(found.wrong)}")
    return "\n".join([*lines, *found.wrong[:20]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run or checkpoint that is served")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, default=128, help="requests of a cell with 16 clients and more")
    parser.add_argument("--rounds", type=int, default=3, help="how often every cell is measured")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the load table as PNG")
    parser.add_argument("--tokens", type=int, default=64, help="max_tokens of a request")
    parser.add_argument("--workloads", nargs="+", default=["text", "chat"], choices=["text", "chat"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--stress", type=int, metavar="N", help="send N requests, hostile and cancelled ones among them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    args = parser.parse_args()
    if args.stress:
        with server(args.run, "--max-body-mb", "2", "--device", args.device, "--max-waiting", "64") as (url, pid):
            found = asyncio.run(stress(url, pid, args.stress, max(args.clients), 2_500_000))
        print(report_stress(found, args.stress))
        result: Any = {**vars(found), "outcomes": dict(found.outcomes)}
    else:
        result = load_table(args)
        for row in result:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
        if args.figure is not None:
            draw_load(result, args.figure)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.stress and found.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
