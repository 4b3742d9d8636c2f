"""A language model is loaded whole and as its configuration says, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.tiny_models import make_language_model, make_world

from llava_mole.analysis.check import cli as check
from llava_mole.analysis.plan import cli as plan
from llava_mole.common.errors import CheckpointError, ConfigError, WeightsError
from llava_mole.data.tokenization import load_tokenizer
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.model.builder import load_pretrained_model
from llava_mole.model.language_model import (
    check_max_length,
    check_vocabulary,
    load_language_model,
    longest_sequence,
    read_config,
)
from llava_mole.train import train

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_language_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"1 problems: missing {NORM}"),
        ({"model.extra.weight": torch.zeros(2)}, "1 problems: unexpected model.extra.weight"),
        ({NORM: torch.ones(7)}, rf"{NORM} is \(7,\), needed is \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_never_replaced_by_random_ones(
    changes: dict[str, Any], message: str, directory: Path
) -> None:
    state: dict[str, Any] = {**load_file(directory / "model.safetensors"), **changes}
    kept = {name: value for name, value in state.items() if value is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        load_language_model(str(directory))
    with pytest.raises(WeightsError, match=message):
        fingerprint_language_model(directory)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_fingerprint_is_of_the_dtype_that_is_loaded(key: str, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype", None)
    (directory / "config.json").write_text(json.dumps({**config, key: "float16"}))
    assert load_file(directory / "model.safetensors")[NORM].dtype == torch.float32
    model, fingerprint = load_language_model(str(directory))
    assert model.dtype == torch.float16
    assert fingerprint_language_model(directory) == fingerprint


def changed(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))


def widen_tokenizer(directory: Path, count: int) -> None:
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(count)])
    tokenizer.save_pretrained(directory)


IDS_OUTSIDE = [
    ("config.json", {"pad_token_id": 400}, "config.json: pad_token_id 400"),
    ("config.json", {"bos_token_id": -1}, "config.json: bos_token_id -1"),
    ("config.json", {"eos_token_id": [2, 32000]}, "config.json: eos_token_id 32000"),
    ("generation_config.json", {"eos_token_id": 32001}, "generation_config.json: eos_token_id 32001"),
    ("generation_config.json", {"eos_token_id": [2, 400]}, "generation_config.json: eos_token_id 400"),
    ("generation_config.json", {"pad_token_id": 999}, "generation_config.json: pad_token_id 999"),
]


@pytest.mark.parametrize(("file", "values", "message"), IDS_OUTSIDE)
def test_special_ids_outside_the_embedding_are_refused(
    file: str, values: dict[str, Any], message: str, directory: Path
) -> None:
    load_language_model(str(directory))
    changed(directory, file, **values)
    with pytest.raises(WeightsError, match=f"{message} is outside .*rows 0 to 399; write the id"):
        load_language_model(str(directory))


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_a_tokenizer_wider_than_the_embedding_is_refused(count: int, directory: Path) -> None:
    model, _ = load_language_model(str(directory))
    widen_tokenizer(directory, count)
    with pytest.raises(WeightsError, match=r"rows 0 to 399: '<extra 0>' has id 400.*resize_token_embeddings"):
        check_vocabulary(model, load_tokenizer(str(directory)), directory)


def test_a_pad_id_of_minus_one_means_none(directory: Path) -> None:
    changed(directory, "config.json", pad_token_id=-1)
    load_language_model(str(directory))


POSITIONS = [
    ({}, 512),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        1024,
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64,
                          "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        512,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "positions"), POSITIONS)
def test_max_length_above_the_positions_is_refused(values: dict[str, Any], positions: int, directory: Path) -> None:
    changed(directory, "config.json", **values)
    config = read_config(str(directory))
    assert longest_sequence(config) == positions
    check_max_length(config, positions, str(directory))
    with pytest.raises(
        ConfigError, match=rf"max_length is {positions + 1}, but .* has {positions} positions; set --da"
    ):
        check_max_length(config, positions + 1, str(directory))


def test_every_command_refuses_a_model_and_a_tokenizer_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, plan and check-data for lengths; training, plan and loading a checkpoint for the vocabulary."""
    config = make_world(tmp_path, samples=8)
    too_long = [str(config), "--data.max_length", "600"]
    for command in (train.main, plan.main, check.main):
        assert command(too_long) == 2
        assert "data.max_length is 600, but language model" in capsys.readouterr().err
    steps = ["--train.max_steps", "2", "--train.warmup_steps", "0"]
    assert train.main([str(config), *steps]) == 0
    widen_tokenizer(tmp_path / "language_model", 1)
    capsys.readouterr()
    for command in (train.main, plan.main):
        assert command([str(config), *steps, "--train.output_dir", str(tmp_path / "other")]) == 2
        assert "'<extra 0>' has id 400" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert load_pretrained_model(checkpoint).path == checkpoint  # which has its own tokenizer
    widen_tokenizer(checkpoint / "tokenizer", 1)
    with pytest.raises((WeightsError, CheckpointError)):
        load_pretrained_model(checkpoint)
