"""`llava-mole inspect` recognises everything by its content, whatever its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import make_clip, make_llava, make_llava_hf, make_llava_lora, projector_state
from worlds.interop_tools import convert
from worlds.released_mole import CASES, golden, make_released
from worlds.tiny_models import make_language_model, make_vision_tower

from llava_mole import cli
from llava_mole.conversation import Turn
from llava_mole.data.store import PreparedRow, StoreWriter
from llava_mole.model.language_model import load_language_model
from llava_mole.model.multimodal_encoder import build_vision_tower

PROJECTOR = "1,856 numbers"  # 24 * 32 + 32 + 32 * 32 + 32


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]):
    def run(path: Path) -> str:
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 0
        return capsys.readouterr().out

    return run


def row(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line


def test_llava_in_its_forms(inspected, tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    state = make_llava(tmp_path / "some-lora-projector", tower=tower, binary=True)
    text = inspected(tmp_path / "some-lora-projector")
    assert "a full LLaVA-1.5 checkpoint" in text
    assert PROJECTOR in row(text, "projector")
    assert f"{sum(v.numel() for v in tower.state_dict().values()):,} numbers" in row(text, "vision tower")
    assert "openai/clip-vit-large-patch14-336" in row(text, "mm_vision_tower")
    assert "finetune" in row(text, "stage")
    assert "2, " in row(text, "files")
    make_language_model(tmp_path / "vicuna")
    make_llava_lora(tmp_path / "checkpoint", tmp_path / "vicuna")
    text = inspected(tmp_path / "checkpoint")
    assert "a LLaVA-1.5 LoRA checkpoint" in text
    assert str(tmp_path / "vicuna") in row(text, "base_model_name_or_path")
    assert PROJECTOR in row(text, "projector")
    (tmp_path / "checkpoint" / "non_lora_trainables.bin").unlink()
    assert "the projector is not in it" in row(inspected(tmp_path / "checkpoint"), "incomplete")
    torch.save({n: v for n, v in state.items() if "mm_projector" in n}, tmp_path / "anything.bin")
    text = inspected(tmp_path / "anything.bin")
    assert "a LLaVA-1.5 projector" in text
    assert "pretrain" in row(text, "stage")
    save_file({f"mm_projector.{n}": v for n, v in projector_state().items()}, tmp_path / "ours.safetensors")
    assert "a projector of llava_mole" in inspected(tmp_path / "ours.safetensors")


@pytest.mark.parametrize("names", ["old", "new"])
def test_llava_hf(names: str, inspected, tmp_path: Path) -> None:
    make_llava_hf(tmp_path / "x", names)
    text = inspected(tmp_path / "x")
    assert "in the layout of llava-hf" in text
    assert PROJECTOR in row(text, "projector")
    assert "unknown" not in text


def test_language_models_and_towers_have_the_fingerprints_of_checkpoints(inspected, tmp_path: Path) -> None:
    make_language_model(tmp_path / "llm")
    text = inspected(tmp_path / "llm")
    assert "a language model in Hugging Face's layout" in text
    assert load_language_model(str(tmp_path / "llm"))[1] in row(text, "fingerprint")
    make_vision_tower(tmp_path / "tower")
    files = (str(tmp_path / "tower" / name) for name in ("config.json", "model.safetensors"))
    text = inspected(tmp_path / "tower")
    assert "a vision tower of open_clip" in text
    assert build_vision_tower(*files, "quick_gelu").weights_fingerprint in row(text, "fingerprint")
    make_clip(tmp_path / "clip")
    text = inspected(tmp_path / "clip")
    assert "a CLIP vision tower in Hugging Face's layout" in text
    assert "quick_gelu" in row(text, "activation")
    converted = row(text, "fingerprint").split()[-1]
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "ours") == 0
    assert converted in row(inspected(tmp_path / "ours"), "fingerprint")


def test_mixtures_adapters_and_what_was_converted(inspected, tmp_path: Path) -> None:
    make_released(tmp_path, CASES[2], golden(CASES[2]))
    text = inspected(tmp_path / "released.pt")
    assert "a LLaVA-MoLE checkpoint of the paper's authors" in text
    # two layers, two experts of rank 4: A and B of gate, up and down
    assert f"{2 * 2 * 4 * 3 * (32 + 48):,} numbers" in row(text, "experts")
    run = make_checkpoint(tmp_path / "mole", "mole")
    assert convert(run, "--to", "peft", "--expert", "0", "--out", tmp_path / "out") == 0
    text = inspected(tmp_path / "out")
    assert "a PEFT adapter" in text
    assert "LORA" in row(text, "peft_type")
    assert "APPROXIMATION" in row(text, "label")
    make_llava_hf(tmp_path / "hf", "old")
    assert convert(tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    text = inspected(tmp_path / "run")
    assert "run " in text
    assert "llava-hf" in row(text, "imported kind")
    assert "not there now" not in text


def test_a_prepared_data_set(inspected, tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "set", name="colours")
    turns = (Turn("user", "What?"), Turn("assistant", "Red."))
    writer.add(PreparedRow("1", "coco", (), turns, (), None, "a.json:1"))
    writer.finish({})
    text = inspected(tmp_path / "set")
    assert "a prepared data set of llava_mole" in text
    assert row(text, "rows").split() == ["rows", "1"]
    assert "1, " in row(text, "shards")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"readme.txt": "hello"}, "is not a known kind of directory"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": "[]"}, "holds a JSON list, not an object"),
        ({"config.json": json.dumps({"model_type": "llama"})}, "is not a known kind of directory"),
        ({"manifest.json": json.dumps({"format": "other/9"})}, "has format 'other/9'"),
        ({"config.json": json.dumps({"model_type": ["llama"]})}, "model_type ['llama']; it must be a name"),
        ({"config.json": "[" * 100_000}, "is not valid JSON"),
        ({"checkpoint-\u00b2/x": ""}, "is not a known kind of directory"),
        (
            {"model.safetensors": "junk", "config.json": json.dumps({"model_type": "llama"})},
            "not a readable safetensors",
        ),
    ],
)
def test_anything_else_gets_a_clear_message(
    content: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / ("n" * 300))]) == 2
    error = capsys.readouterr().err
    assert "File name too long; `inspect` must be able to read" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("language_model", "vocab_size", None),
        ("language_model", "num_attention_heads", 0),
        ("language_model", "hidden_size", 48),
        ("language_model", "dtype", "float17"),
        ("language_model", "quantization_config", "4bit"),
        ("clip", "hidden_size", "wide"),
        ("vision_tower", "vision_cfg", {"width": 24}),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    kind: str, key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = {"language_model": make_language_model, "clip": make_clip, "vision_tower": make_vision_tower}[kind]
    make(tmp_path / kind)
    file = tmp_path / kind / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / kind)]) == 2
    assert str(tmp_path / kind) in next(line for line in capsys.readouterr().err.splitlines() if "error:" in line)


def test_of_several_forms_it_is_the_one_that_is_loaded(inspected, tmp_path: Path) -> None:
    make_language_model(tmp_path / "lm")
    other = {name: 2 * value for name, value in load_file(tmp_path / "lm" / "model.safetensors").items()}
    torch.save(other, tmp_path / "lm" / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(other, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "lm" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "lm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert load_language_model(str(tmp_path / "lm"))[1] in row(inspected(tmp_path / "lm"), "fingerprint")
