"""A language model is loaded whole and as its configuration says, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.tiny_models import make_language_model

from llava_mole.common.errors import WeightsError
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.model.language_model import load_language_model

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
