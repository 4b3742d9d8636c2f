"""Weight files and configurations that contradict themselves or are none: one clear line each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released_mole import CASES, golden, make_released
from safetensors.torch import save_file

from llava_mole.errors import WeightsError
from llava_mole.model.interop.kinds import find_kind
from llava_mole.model.interop.llava_keys import split_llava, split_llava_hf
from llava_mole.model.interop.lora import read_lora
from llava_mole.model.interop.released import read_released

LINEARS = {"model.layers.0.mlp.up_proj": (3, 2)}
A, B = ("base_model.model.model.layers.0.mlp.up_proj.lora_" + half for half in "AB")
PAIR = {f"{A}.weight": torch.ones(1, 2), f"{B}.weight": torch.ones(3, 1)}
LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up_proj"]}


def write_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("second", [f"{A}.default.weight", f"{A.removeprefix('base_model.model.')}.weight"])
def test_two_spellings_in_an_adapter_are_named(second: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, {**PAIR, second: torch.zeros(1, 2)})
    with pytest.raises(WeightsError, match="are one tensor in two spellings; remove one") as caught:
        read_lora(tmp_path, LINEARS)
    assert f"{A}.weight" in str(caught.value)
    assert second in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("model.mm_projector.0.weight", "base_model.model.model.mm_projector.0.weight"),
        ("model.mm_projector.0.weight", "mm_projector.0.weight"),
        ("model.norm.weight", "model.model.norm.weight"),
        ("model.vision_tower.vision_tower.vision_model.x", "model.vision_tower.x"),
    ],
)
def test_two_spellings_in_llava_are_named(names: tuple[str, str]) -> None:
    with pytest.raises(WeightsError, match=f"FILE: {names[0]} and {names[1]} are one tensor in two spellings"):
        split_llava(names).check("FILE")


def test_two_spellings_elsewhere_are_named(tmp_path: Path) -> None:
    old, new = "language_model.model.norm.weight", "model.language_model.norm.weight"
    with pytest.raises(WeightsError, match=f"{old} and {new} are one tensor"):
        split_llava_hf([old, new]).check("FILE")
    make_released(tmp_path, CASES[2], golden(CASES[2]))
    checkpoint = torch.load(tmp_path / "released.pt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if "moe_gate.1.lora_A" in name)
    checkpoint["state_dict"]["module." + name] = checkpoint["state_dict"][name]
    torch.save(checkpoint, tmp_path / "released.pt")
    with pytest.raises(WeightsError, match=f"{name} and module.{name} are one tensor"):
        read_released(find_kind(tmp_path / "released.pt"))
