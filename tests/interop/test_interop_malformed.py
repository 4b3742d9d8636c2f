"""Weight files and configurations that contradict themselves or are none: one clear line each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from worlds.foreign_models import projector_state
from worlds.released_mole import CASES, golden, make_released

from llava_mole.common.errors import WeightsError
from llava_mole.interop.kinds import find_kind
from llava_mole.interop.lora import read_lora
from llava_mole.interop.names import split_llava, split_llava_hf
from llava_mole.interop.released import read_released
from llava_mole.interop.sources import read_source
from llava_mole.model.builder import load_projector
from llava_mole.model.multimodal_projector import build_projector
from llava_mole.mole.surgery import scaling

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


def released_state(tmp_path: Path, *dropped: str) -> dict[str, torch.Tensor]:
    """The authors' tensors, without those whose name holds one of `dropped`."""
    make_released(tmp_path, CASES[2], golden(CASES[2]))
    state = torch.load(tmp_path / "released.pt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if not any(part in name for part in dropped)}


def test_a_released_file_without_whole_experts_is_refused(tmp_path: Path) -> None:
    file, layer = tmp_path / "cut.pt", "llm_model.base_model.model.model.layers.0.mlp"
    without = released_state(tmp_path, ".moe_")
    only_b = released_state(tmp_path, "lora_A", "moe_up", "moe_down")
    flat = {**released_state(tmp_path), f"{layer}.moe_gate.0.lora_A": torch.ones(3)}
    for state, message in (
        ({**without, f"{layer}.moe_gate.x": torch.ones(1)}, "has no expert"),
        (only_b | {n: v for n, v in released_state(tmp_path).items() if "self_attn" in n}, "has no expert"),
        ({n: torch.ones(3) if ".moe_gate." in n else v for n, v in flat.items()}, "needed are matrices"),
    ):
        torch.save(state, file)
        with pytest.raises(WeightsError, match=message):
            read_released(find_kind(file))


def test_a_released_projector_of_one_linear_gets_its_number(tmp_path: Path) -> None:
    state = released_state(tmp_path, "in_adaptor.projector.")
    state |= {"in_adaptor.projector.weight": torch.ones(32, 4), "in_adaptor.projector.bias": torch.ones(32)}
    torch.save(state, tmp_path / "linear.pt")
    source = read_released(find_kind(tmp_path / "linear.pt")).source
    assert sorted(source.projector) == ["0.bias", "0.weight", "1.end", "1.start"]
    assert source.projector_kind == "linear+ends"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({0: torch.ones(1), 1: torch.ones(1)}, "is not a state dict: no named tensor at 0, 1$"),
        ({"mm_projector.0.weight": torch.ones(1), "epoch": 3}, "is not a state dict: no named tensor at epoch$"),
        ({"state_dict": {7: "x"}}, "is not a state dict: no named tensor at 7$"),
        ([torch.ones(1)], "is not a state dict but a list$"),
    ],
)
def test_a_file_of_something_else_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=message):
        find_kind(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["0x.weight", "0..weight", "\u00b2.weight", "0.other.weight", "weight", ""])
def test_strange_names_in_a_projector_are_refused(name: str, tmp_path: Path) -> None:
    tensors = {f"mm_projector.{n}": torch.ones(2, 2) for n in ("0.weight", "0.bias", name)}
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(WeightsError, match=r"holds no linear or mlp<N>x_gelu projector"):
        read_source(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "8", "r '8'; needed is a whole number from 1 on"),
        ("r", 8.0, "r 8.0; needed"),
        ("r", True, "r True; needed"),
        ("lora_alpha", "16", "lora_alpha '16'; needed is a number"),
        ("lora_alpha", [16], r"lora_alpha \[16\]; needed"),
        ("target_modules", "up_proj(", r"target_modules 'up_proj\(' is not a regular expression"),
        ("target_modules", {"up_proj": 1}, "target_modules .* needed are names or a regular expression"),
        ("target_modules", ["up_proj", 3], "target_modules .* needed are names"),
        ("rank_pattern", {"up_proj(": 4}, r"rank_pattern 'up_proj\(' is not a regular expression"),
        ("rank_pattern", {"up_proj": "4"}, "rank_pattern up_proj '4'; needed is a whole number"),
        ("rank_pattern", [4], r"rank_pattern \[4\]; needed is an object"),
        ("alpha_pattern", {"*": 4}, r"alpha_pattern '\*' is not a regular expression"),
        ("alpha_pattern", {"up_proj": None}, "alpha_pattern up_proj None; needed is a number"),
        ("lora_alpha", float("nan"), "lora_alpha nan; needed is a number"),
        ("lora_dropout", "x", "lora_dropout 'x'; needed is a number"),
        ("exclude_modules", 3, "exclude_modules 3; needed are names"),
        ("use_dora", True, "use_dora True; only plain LoRA pairs"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights 'pissa_niter_4'; only plain LoRA pairs"),
        ("init_lora_weights", "olora", "init_lora_weights 'olora'; only plain"),
        ("alora_invocation_tokens", [5], r"alora_invocation_tokens \[5\]; only plain"),
        ("layer_replication", [[0, 1], [0, 1]], "layer_replication .* only plain"),
        ("layers_to_transform", [1], r"layers_to_transform \[1\]; only plain"),
        ("kasa_config", {}, "kasa_config {}; only plain"),
    ],
)
def test_a_lora_configuration_that_makes_no_sense_is_refused(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, {**LORA, key: value}, PAIR)
    with pytest.raises(WeightsError, match=f"adapter_config.json: {message}"):
        read_lora(tmp_path, LINEARS)
    write_adapter(tmp_path, LORA, PAIR)
    assert scaling(read_lora(tmp_path, LINEARS).config, "model.layers.0.mlp.up_proj", 1) == 2


def test_what_an_adapter_excludes_is_not_missing(tmp_path: Path) -> None:
    linears = {**LINEARS, "model.layers.0.mlp.down_proj": (2, 3)}
    config = {**LORA, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}
    write_adapter(tmp_path, config, PAIR)
    assert list(read_lora(tmp_path, linears).pairs) == list(LINEARS)
    write_adapter(tmp_path, {**config, "exclude_modules": None}, PAIR)
    with pytest.raises(WeightsError, match="2 missing: model.layers.0.mlp.down_proj.lora_A"):
        read_lora(tmp_path, linears)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, {**PAIR, f"{B}.weight": torch.full((3, 1), float("nan"))})
    with pytest.raises(WeightsError, match="not finite, in model.layers.0.mlp.up_proj.lora_B; download"):
        read_lora(tmp_path, LINEARS)
    torch.save({f"model.mm_projector.{n}": v / 0 for n, v in projector_state().items()}, tmp_path / "p.bin")
    with pytest.raises(WeightsError, match="not finite, in 0.weight"):
        read_source(tmp_path / "p.bin")
    save_file({n: v / 0 for n, v in projector_state().items()}, tmp_path / "p.safetensors")
    projector = build_projector("mlp2x_gelu", 24, 32)
    with pytest.raises(WeightsError, match="has values that are not finite"):
        load_projector(projector, tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").write_text("junk")
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        load_projector(projector, tmp_path / "p.safetensors")
