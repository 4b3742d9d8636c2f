"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from llava_mole.inference.engine import Engine
from llava_mole.inference.row_batch import Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of requests and tokens, and the state of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._engine = engine
        ProcessCollector(registry=self._registry)
        prefix, registry = "llava_mole", self._registry
        self._requests = Counter(
            f"{prefix}_requests", "Requests that were answered", ["path", "status"], registry=registry
        )
        self._ends = Counter(f"{prefix}_answers", "Answers by their end", ["model", "reason"], registry=registry)
        self._prompt = Counter(f"{prefix}_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self._generated = Counter(f"{prefix}_generated_tokens", "Tokens of answers", ["model"], registry=registry)
        self._seconds = Histogram(
            f"{prefix}_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self._state = {
            name: Gauge(f"{prefix}_{name}", text, registry=registry)
            for name, text in {
                "running": "Answers that are being decoded",
                "waiting": "Answers that wait for a place",
                "decoding_steps": "Steps of decoding since the start",
                "cache_bytes": "Size of the key-value caches",
            }.items()
        }

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def answers(self, jobs: list[Job]) -> None:
        """Count the answers of a request, finished or not."""
        for job in jobs:
            self._ends.labels(job.model, job.reason or "cancelled").inc()
            self._generated.labels(job.model).inc(len(job.new_ids))
            self._prompt.labels(job.model).inc(len(job.ids))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        state = self._engine.state()
        for name, value in {
            "running": state.running,
            "waiting": state.waiting,
            "decoding_steps": state.steps,
            "cache_bytes": state.cache_bytes,
        }.items():
            self._state[name].set(value)
        return generate_latest(self._registry)
