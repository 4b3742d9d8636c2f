"""Continuous batching: what an answer says never depends on its neighbours, and places are freed."""

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worlds.eval_models import colors, make_checkpoint

from llava_mole.common.errors import ConfigError
from llava_mole.data.anyres import Tiles
from llava_mole.inference.batching import encode_prompt, read_tiles
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.engine import BusyError, ClosedError, Engine, EngineLimits
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.row_batch import Job, RowBatch
from llava_mole.model.builder import load_pretrained_models

IMAGES = [*(Image.new("RGB", (16, 16), color) for color in colors()), None]
TEXTS = ["What?", "What color is this?", "Is it blue? yes or no? " * 4, "one two three four five six " * 8]


@pytest.fixture(scope="module")
def runs(mole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained runs over one base model: token routing, routing by prompts, and plain LoRA."""
    directory = tmp_path_factory.mktemp("runs")
    return {
        "mole": mole_run,
        "sequence": make_checkpoint(directory / "sequence", options={"granularity": "sequence"}),
        "lora": make_checkpoint(directory / "lora", "lora"),
    }


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> dict[str, Predictor]:
    return dict(zip(runs, map(Predictor, load_pretrained_models(list(runs.values()), device="cpu")), strict=True))


class Running:
    """An engine and what it delivers."""

    def __init__(self, predictors: dict[str, Predictor], **limits: int) -> None:
        self.ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.news: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.engine = Engine(predictors, EngineLimits(**limits), self.deliver)

    def deliver(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.news.put(job)
            if job.reason is not None:
                self.ended.put(job)

    def wait(self, count: int) -> list[Job]:
        return [self.ended.get(timeout=60) for _ in range(count)]


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(predictors: dict[str, Predictor], **limits: int) -> Running:
        started.append(Running(predictors, **limits))
        started[-1].engine.start()
        return started[-1]

    yield make
    for running in started:
        running.engine.close(0)


def make_job(predictor: Predictor, image: Any, text: str, new: int = 12, model: str = "mole", **options: Any) -> Job:
    loaded, decoding = predictor.loaded, options.pop("decoding", None) or Decoding(new)
    ids = encode_prompt(loaded, predictor.template, text, image is not None, 0)
    shown = () if image is None else (read_tiles(loaded, image, 0),)
    limit = min(decoding.max_new_tokens, loaded.context_length - len(ids))
    return Job(model, ids, shown, decoding, predictor.answer_decoder(options.pop("stop", None)), limit, **options)


def alone(predictor: Predictor, image: Any, text: str, job: Job) -> list[int]:
    """The new ids of the same prompt by `Predictor`."""
    (batch,) = predictor.batches([image], [text], batch_size=1)
    return predictor._decode(batch, job.decoding, job.answer, [job.seed])[0]


def test_answers_are_those_of_single_runs_whatever_arrives_when(served, start) -> None:
    """Greedy and sampled, three models over one base, at random times, with fewer places than requests."""
    rng = random.Random(0)
    running = start(served, rows=7, prefill_tokens=200)
    asked: dict[Job, tuple[str, Any, str]] = {}
    for n in range(60):
        model, image, text = rng.choice(list(served)), rng.choice(IMAGES), rng.choice(TEXTS)
        decoding = Decoding(
            rng.choice([1, 5, 20, 40]), *rng.choice([(0.0, None), (0.0, None), (1.5, 0.9), (0.7, None)])
        )
        job = make_job(served[model], image, text, model=model, decoding=decoding, seed=n, live=rng.random() < 0.5)
        asked[job] = model, image, text
        running.engine.submit([job])
        if rng.random() < 0.3:
            running.news.get(timeout=60)  # some wait for what others are doing
    running.wait(len(asked))
    assert {job.reason for job in asked} <= {"stop", "length"}
    for job, (model, image, text) in asked.items():
        expected = alone(served[model], image, text, job)
        assert job.new_ids == expected[: len(job.new_ids)]
        assert len(job.new_ids) == len(expected) or job.reason == "stop"
    assert len({tuple(job.new_ids) for job in asked}) > 30
    state = running.engine.state()
    assert (state.running, state.waiting, state.alive) == (0, 0, True)


def test_log_probabilities_are_the_models(served, start) -> None:
    predictor = served["mole"]
    running = start(served)
    jobs = [make_job(predictor, IMAGES[0], text, new=6, top_logprobs=3) for text in TEXTS]
    running.engine.submit(jobs)
    running.wait(len(jobs))
    for job in jobs:
        model = predictor.loaded.model
        ids = torch.tensor([job.ids + job.new_ids])
        features = model.encode_images(job.images[0].pixels)
        with torch.inference_mode():
            logits = model.causal_lm(inputs_embeds=model.embed(ids, features=features)).logits
        logprobs = logits[0, len(job.ids) - 1 : -1].log_softmax(-1)
        assert [each.token for each in job.logprobs] == job.new_ids
        for each, expected in zip(job.logprobs, logprobs, strict=True):
            assert each.logprob == pytest.approx(float(expected[each.token]), abs=1e-4)
            assert each.token == each.top[0][0] == int(expected.argmax())
            assert [logprob for _, logprob in each.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_stop_texts_end_an_answer_early(served, start) -> None:
    predictor = served["mole"]
    full = predictor.generate([None], ["What?"], max_new_tokens=12)[0]
    stop = full[len(full) // 2 :][:2]
    running = start(served)
    job = make_job(predictor, None, "What?", stop=[stop])
    running.engine.submit([job])
    running.wait(1)
    assert job.reason == "stop"
    assert job.answer.final(job.new_ids) == full[: full.index(stop)].strip()


def test_runs_over_one_base_share_its_weights(served, runs, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    models = [predictor.loaded.model for predictor in served.values()]
    weights = [
        {parameter.data_ptr() for name, parameter in model.named_parameters() if "projector" not in name}
        for model in models
    ]
    shared = set.intersection(*weights)
    own = [
        sum(
            not {"mole_", "lora_"}.isdisjoint([part[:5] for part in name.split(".")])
            for name, _ in m.named_parameters()
        )
        for m in models
    ]
    assert [len(each) - len(shared) for each in weights] == own
    assert all(own)
    assert models[0].vision_tower is models[1].vision_tower
    for name, path in runs.items():
        by_itself = Predictor.from_pretrained(path, device="cpu")
        expected = by_itself.generate(IMAGES, TEXTS, max_new_tokens=8)
        assert served[name].generate(IMAGES, TEXTS, max_new_tokens=8) == expected
    other = make_checkpoint(tmp_path, "lora", overrides=["--model.vision_tower.select_layer", "-1"])
    with caplog.at_level("INFO"):
        loaded = load_pretrained_models([runs["lora"], other], device="cpu")
    assert "has another base model than the runs before it; it is loaded separately" in caplog.text
    assert loaded[0].model.vision_tower is not loaded[1].model.vision_tower


def test_cancelled_jobs_free_their_places(served, start) -> None:
    predictor = served["mole"]
    running = start({"mole": predictor}, rows=1)
    endless = make_job(predictor, None, "What?", new=400, live=True)
    endless.answer.eos_ids = ()
    waiting = [make_job(predictor, image, "What color is this?", new=3) for image in IMAGES]
    running.engine.submit([endless, *waiting])
    assert running.news.get(timeout=60) is endless
    running.engine.cancel([endless, waiting[1]])
    ended = running.wait(len(waiting) + 1)
    assert {job for job in ended if job.reason == "cancelled"} == {endless, waiting[1]}
    assert 1 <= len(endless.new_ids) < 300
    assert not waiting[1].new_ids
    state = running.engine.state()
    assert (state.running, state.waiting) == (0, 0)


@pytest.mark.parametrize("fault", ["router", "logits", "memory"])
def test_a_fault_ends_only_the_rows_that_cause_it(served, start, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    predictor = served["mole"]
    jobs = [
        make_job(predictor, image, text, new=8, seed=n)
        for n, (image, text) in enumerate(zip(IMAGES, TEXTS, strict=True))
    ]
    expected = [alone(predictor, image, text, job) for job, image, text in zip(jobs, IMAGES, TEXTS, strict=True)]
    poison = expected[1][2]
    reached = [poison in ids[:-1] for ids in expected]
    assert 0 < sum(reached) < 4
    forward = RowBatch._forward

    def faulty(self: RowBatch, ids: Sequence[int], *rest: Any) -> torch.Tensor:
        if fault == "memory" and len(ids) > 3:
            raise torch.OutOfMemoryError("no memory")
        if fault == "router" and poison in ids:
            raise FloatingPointError("the router's logits are not finite")
        logits = forward(self, ids, *rest)
        if fault == "logits":
            logits = logits.clone()
            logits[[n for n, token in enumerate(ids) if token == poison]] = float("nan")
        return logits

    running = start({"mole": predictor})
    monkeypatch.setattr(RowBatch, "_forward", faulty)
    running.engine.submit(jobs)
    running.wait(4)
    failed = [job.reason == "error" for job in jobs]
    if fault == "memory":
        assert failed == [False, False, False, True] or sum(failed) == 1
        assert "memory is full" in str(next(job.error for job in jobs if job.error))
    else:
        assert failed == reached
        assert all("computes NaN or infinity" in str(job.error) for job in jobs if job.error)
    for job, ids, bad in zip(jobs, expected, failed, strict=True):
        assert job.new_ids == (ids[: len(job.new_ids)] if bad else ids)


def test_a_prompt_that_fails_does_not_take_others_with_it(served, start, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = served["mole"]
    jobs = [make_job(predictor, image, "What?", new=4) for image in IMAGES]
    encode = RowBatch._encode

    def faulty(self: RowBatch, tiles: Tiles) -> torch.Tensor:
        if torch.equal(tiles.pixels, jobs[1].images[0].pixels):
            raise RuntimeError("broken")
        return encode(self, tiles)

    monkeypatch.setattr(RowBatch, "_encode", faulty)
    running = start({"mole": predictor})
    running.engine.submit(jobs)
    running.wait(4)
    assert [job.reason == "error" for job in jobs] == [False, True, False, False]
    assert jobs[1].error == "internal error"


def test_limits(served, start) -> None:
    predictor = served["mole"]
    running = start({"mole": predictor}, rows=2, waiting=3, cache_tokens=300)
    with pytest.raises(ConfigError, match=r"may take \d+ tokens, but the server keeps 300 in all"):
        running.engine.submit([make_job(predictor, None, "What?", new=290)])
    with pytest.raises(BusyError, match="0 requests are waiting already, and at most 3 may"):
        running.engine.submit([make_job(predictor, None, "What?") for _ in range(6)])
    jobs = [make_job(predictor, None, "What?", new=80) for _ in range(5)]  # two of them exceed 300 tokens
    most = []
    deliver = running.deliver
    running.engine._deliver = lambda news: (most.append(running.engine.state().running), deliver(news))
    for job in jobs:
        job.live = True
        job.answer.eos_ids = ()
    running.engine.submit(jobs)
    running.wait(5)
    assert max(most) == 1
    for name in ("rows", "waiting", "cache_tokens", "prefill_tokens"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            EngineLimits(**{name: 0})


def test_closing_finishes_what_it_has_or_cuts_it_off(served) -> None:
    predictor = served["mole"]
    for timeout, reason in ((None, "length"), (0.0, "cancelled")):
        running = Running({"mole": predictor})
        running.engine.start()
        jobs = [make_job(predictor, image, "What?", new=200) for image in IMAGES]
        for job in jobs:
            job.answer.eos_ids = ()
        running.engine.submit(jobs)
        assert running.engine.close(timeout) == (timeout is None)
        assert [job.reason for job in jobs] == [reason] * 4
        with pytest.raises(ClosedError, match="the server is stopping"):
            running.engine.submit(jobs)


def test_an_engine_that_fails_says_so(served, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = served["mole"]
    running = Running({"mole": predictor})
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(RowBatch, "step", lambda self: 1 / 0)
    running.engine.start()
    job = make_job(predictor, None, "What?")
    running.engine.submit([job])
    assert running.wait(1) == [job]
    assert (job.reason, job.error) == ("error", "internal error")
    running.engine._thread.join(10)
    assert not running.engine.state().alive
    with pytest.raises(ClosedError, match="the server's model has failed"):
        running.engine.submit([job])


def test_models_that_cannot_be_served_are_refused_at_the_start(tmp_path: Path) -> None:
    run = make_checkpoint(tmp_path, options={"router": "oracle", "expert_scale": "none", "balance_coef": 0})
    with pytest.raises(ConfigError, match="routes by the routing input 'source', which prompts do not have"):
        RowBatch(Predictor.from_pretrained(run, device="cpu"))
