"""What a run reports beside its loss: validation, gradient norms by part, arithmetic, progress and the last table."""

import dataclasses
import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from worlds.tiny_models import make_world

from llava_mole.common.errors import ConfigError
from llava_mole.common.text import format_seconds
from llava_mole.config import load_config, parse_run_config
from llava_mole.data.dataset import build_dataset
from llava_mole.inference.predictor import Predictor
from llava_mole.model.builder import build_image_processor, load_pretrained_model
from llava_mole.model.flops import model_shape, training_flops
from llava_mole.train.display import ProgressDisplay, summary_table
from llava_mole.train.monitor import batch_sums, peak_flops
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train
from llava_mole.train.validation import AnswerCheck, Validator, first_of_each_source, padded_batches, token_f1

STEPS, HELD_OUT = 6, 5
OPTIONS = ["--data.validation_samples", str(HELD_OUT), "--train.validate_every", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=24, text_only_every=5)
    return directory


def run(world: Path, name: str, *overrides: str) -> Path:
    arguments = ["--train.output_dir", str(world / name), "--train.max_steps", str(STEPS), "--tracker.log_every", "3"]
    return train(parse_run_config([str(world / "config.yaml"), *arguments, *overrides]))


@pytest.fixture(scope="module")
def validated(world: Path) -> Path:
    return run(world, "validated", *OPTIONS)


def test_validation_comes_when_it_is_due(validated: Path) -> None:
    entries = {entry["step"]: entry for entry in read_metrics(validated / "metrics.jsonl")}
    assert sorted(entries) == [3, 4, 6]  # every third by log_every, the fourth for its validation, the last
    assert [step for step, entry in entries.items() if "validation_loss" in entry] == [4, 6]
    assert set(entries[4]["validation_loss"]) == {"red", "blue"}
    assert entries[4]["validation_s"] > 0


def test_validation_loss_is_that_of_the_held_out_samples(validated: Path) -> None:
    config = load_config(validated / "config.yaml")
    loaded = load_pretrained_model(validated, device="cpu")
    processor = build_image_processor(loaded.model, config.data.image_aspect_ratio)
    dataset = build_dataset(
        config.data, loaded.tokenizer, processor, loaded.model.num_image_tokens, seed=config.train.seed, epochs=1
    )
    assert len(dataset) == 2 * (24 - HELD_OUT)
    held_out = dataset.validation
    assert held_out is not None
    examples = [held_out[n] for n in range(len(held_out))]
    assert {e.source: sum(x.source == e.source for x in examples) for e in examples} == {"red": 5, "blue": 5}
    assert not {e.id for e in examples} & {dataset[n].id for n in range(len(dataset))}
    expected: dict[str, list[float]] = {}
    for example in examples:
        ids = torch.tensor([example.input_ids])
        images = example.images
        with torch.no_grad():
            logits = loaded.model(ids, torch.ones_like(ids, dtype=torch.bool), images)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=-100)
        expected.setdefault(example.source, []).append(float(loss))
    reported = read_metrics(validated / "metrics.jsonl")[-1]["validation_loss"]
    for name, losses in expected.items():
        assert reported[name] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    for row_tokens in (1, 150):
        validator = Validator(held_out, row_tokens=row_tokens, pad_token_id=0, num_workers=0, routes=True)
        assert validator.losses(loaded.model) == pytest.approx(reported, abs=1e-4)
    assert not loaded.model.training


def test_validation_answers_are_those_of_the_saved_model(world: Path) -> None:
    """Scored again from the checkpoint with the Predictor; words of the references are counted by hand."""
    answered = run(world, "answered", *OPTIONS, "--train.validation_answers", "3")
    entry = read_metrics(answered / "metrics.jsonl")[-1]
    predictor = Predictor.from_pretrained(answered, device="cpu")
    config, model = load_config(predictor.loaded.path / "config.yaml"), predictor.loaded.model
    processor = build_image_processor(model, config.data.image_aspect_ratio)
    held_out = build_dataset(
        config.data, predictor.loaded.tokenizer, processor, model.num_image_tokens, seed=config.train.seed, epochs=1
    ).validation
    assert held_out is not None
    positions = first_of_each_source(held_out, 3)
    assert len(positions) == 6
    expected: dict[str, list[tuple[float, float]]] = {"red": [], "blue": []}
    for position in positions:
        source, record, pictures = held_out.sample(position)
        (answer,) = predictor.generate([pictures or None], [record.turns[:1]], max_new_tokens=64)
        said, wanted = answer.lower().split(), record.turns[1].text.lower().removesuffix(".").split()
        said = [*said[:-1], said[-1].removesuffix(".")] if said else []
        shared = sum(min(said.count(word), wanted.count(word)) for word in set(wanted))
        expected[source].append((float(said == wanted), 2 * shared / (len(said) + len(wanted))))
    for name, scores in expected.items():
        exact, f1 = zip(*scores, strict=True)
        assert entry["validation_exact"][name] == pytest.approx(sum(exact) / 3)
        assert entry["validation_f1"][name] == pytest.approx(sum(f1) / 3)
    unanswered = read_metrics(run(world, "unanswered", *OPTIONS) / "metrics.jsonl")[-1]
    assert unanswered["loss"] == entry["loss"]  # answering changes nothing in training
    assert "validation_exact" not in unanswered


def test_a_question_without_room_for_an_answer_is_left_out(world: Path, validated: Path) -> None:
    predictor = Predictor.from_pretrained(validated, device="cpu")
    config, loaded = load_config(predictor.loaded.path / "config.yaml"), predictor.loaded
    processor = build_image_processor(loaded.model, config.data.image_aspect_ratio)
    arguments = (config.data, loaded.tokenizer, processor, loaded.model.num_image_tokens)
    held_out = build_dataset(*arguments, seed=config.train.seed, epochs=1).validation
    assert held_out is not None
    tight = Predictor(dataclasses.replace(loaded, context_length=4))
    assert AnswerCheck(held_out, tight, count=2, routes=True).scores() == {"exact": {}, "f1": {}}
    assert set(AnswerCheck(held_out, predictor, count=2, routes=True).scores()["f1"]) == {"red", "blue"}


def test_a_model_that_overflows_for_a_question_does_not_end_the_run(
    world: Path, validated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Predictor.from_pretrained(validated, device="cpu")
    config, loaded = load_config(predictor.loaded.path / "config.yaml"), predictor.loaded
    processor = build_image_processor(loaded.model, config.data.image_aspect_ratio)
    arguments = (config.data, loaded.tokenizer, processor, loaded.model.num_image_tokens)
    held_out = build_dataset(*arguments, seed=config.train.seed, epochs=1).validation
    assert held_out is not None
    with torch.no_grad():
        loaded.model.causal_lm.model.norm.weight.fill_(float("nan"))
    with caplog.at_level("WARNING"):
        assert AnswerCheck(held_out, predictor, count=2, routes=True).scores() == {"exact": {}, "f1": {}}
    assert caplog.text.count("is not answered: the model computes NaN or infinity") == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.validation_answers", "6"], "validation_answers is 6; it must be 0 to data.validation_samples .5."),
        (
            ["--train.validation_answers", "2", "--adapter.options", '{"router": "oracle"}'],
            "cannot be used with adapter.options.router 'oracle'",
        ),
    ],
)
def test_impossible_validation_answers_are_refused(world: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config([str(world / "config.yaml"), *OPTIONS, *overrides])


def test_words_are_counted_once() -> None:
    assert token_f1("a big red ball.", "the red  Ball") == pytest.approx(2 * 2 / 7)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1
    assert token_f1("", "red") == token_f1("blue", "red") == 0


def test_validating_changes_nothing_in_training(world: Path, validated: Path) -> None:
    rare = run(world, "rare", "--data.validation_samples", str(HELD_OUT), "--train.validate_every", "100")
    last = [read_metrics(d / "metrics.jsonl")[-1]["loss"] for d in (rare, validated)]
    assert last[0] == last[1]


def test_gradient_norms_by_part_add_up(validated: Path) -> None:
    for entry in read_metrics(validated / "metrics.jsonl"):
        parts = entry["grad_norm_by_part"]
        assert set(parts) == {"projector", "attention LoRA", "experts", "router"}
        assert all(norm > 0 for norm in parts.values())
        assert math.sqrt(sum(norm**2 for norm in parts.values())) == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_arithmetic_is_reported_and_mfu_only_on_known_gpus(validated: Path) -> None:
    entry = read_metrics(validated / "metrics.jsonl")[-1]
    model = load_pretrained_model(validated, device="cpu").model
    least = training_flops(model_shape(model), entry["tokens"], 0.0, entry["supervised_tokens"], 0.0)
    assert entry["flops_per_s"] > least / entry["step_s"]
    assert "mfu" not in entry
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_mfu_needs_a_known_gpu_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cuda"), "bf16") == 312e12
    assert peak_flops(torch.device("cuda"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some new card")
    assert peak_flops(torch.device("cuda"), "bf16") is None


def test_batch_sums() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padded = {"attention_mask": mask, "sample_lengths": None, "ids": ["a", "b"], "images": torch.zeros(2, 3, 4, 4)}
    packed = {"attention_mask": mask[:1], "sample_lengths": [2, 1], "ids": ["c", "d"], "images": None}
    empty = {"attention_mask": mask[1:, 1:2], "sample_lengths": [1], "ids": [], "images": None}
    assert batch_sums([padded, packed, empty]).tolist() == [3**2 + 1 + 2**2 + 1, 2.0]


def test_validation_batches_hold_what_a_row_holds() -> None:
    batches = padded_batches([10, 11, 12, 13], [5, 9, 2, 3], row_tokens=10)
    assert batches == [[11], [10, 13], [12]]
    assert padded_batches([1], [50], row_tokens=10) == [[1]]
    assert padded_batches([], [], row_tokens=10) == []


def test_switches_come_together(world: Path) -> None:
    for half in (OPTIONS[:2], OPTIONS[2:]):
        with pytest.raises(ConfigError, match="set both above 0, or neither"):
            parse_run_config([str(world / "config.yaml"), *half])


def test_last_table(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(world, "table", *OPTIONS)
    printed = capsys.readouterr().err
    assert "finetune (mole): 6 steps, 24 samples" in printed
    entries = read_metrics(out / "metrics.jsonl")
    consumed = json.loads((out / "summary.json").read_text())["consumed_by_source"]
    table = summary_table("finetune (mole)", entries, consumed)
    assert table in printed
    (red,) = [line.split() for line in table.splitlines() if line.startswith("red")]
    assert red[1] == str(consumed["red"])
    assert float(red[-1]) == pytest.approx(entries[-1]["validation_loss"]["red"], abs=6e-4)
    assert "waiting for data" in table
    assert "expert load at the end" in table


def entry(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "tokens_per_s": 1000.0, "learning_rate": {"adapter": 1e-3}}


def test_a_log_file_gets_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(logging.getLogger("llava_mole"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("llava_mole"), "handlers", [])  # which an entry point may have added before
    caplog.set_level(logging.INFO, logger="llava_mole")
    display = ProgressDisplay(4, 0, "test", enabled=True)
    for step in range(1, 5):
        display.show(entry(step, 2.0))
        display.advance()
    display.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "the first at once, the last whatever the time; in between one a minute"
    assert lines[0].startswith("step 1/4  loss 2.000  tok/s 1,000  lr 1.0e-03")
    assert lines[1].endswith("0s left")
    silent = ProgressDisplay(4, 0, "test", enabled=False)
    silent.show(entry(4, 2.0))
    assert len(caplog.records) == 2


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    display = ProgressDisplay(4, 0, "test", enabled=True)
    display.show(entry(1, 2.0))
    display.show(entry(2, math.nan))
    display.show(entry(3, 1.0))
    display.advance()
    display.close()
    printed = capsys.readouterr().err
    assert "loss=1.900" in printed, "a value that is not finite is not carried on"
    assert "tok/s=1,000" in printed


def test_times() -> None:
    assert [format_seconds(s) for s in (0.4, 59.4, 65, 7620, 200_000)] == ["0s", "59s", "1m 05s", "2h 07m", "2d 07h"]
