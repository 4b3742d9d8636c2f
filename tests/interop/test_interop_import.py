"""Foreign checkpoints become ours with the same outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.foreign_models import VOCABULARY, make_clip, make_llava, make_llava_hf, make_llava_lora, projector_state
from worlds.interop_tools import close, convert, hf_logits, load, our_logits, reference_logits
from worlds.tiny_models import make_language_model

from llava_mole.config import load_config
from llava_mole.inference.predictor import Predictor


@pytest.mark.parametrize("names", ["old", "new"])
def test_llava_hf_gives_the_logits_of_transformers(names: str, tmp_path: Path) -> None:
    theirs = make_llava_hf(tmp_path / "hf", names)
    assert convert(tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    loaded = load(tmp_path / "run")
    for ours, expected in zip(our_logits(loaded), hf_logits(theirs, VOCABULARY), strict=True):
        close(ours, expected)
    assert loaded.template == "vicuna_v1"
    assert load_config(loaded.path / "config.yaml").model.vision_tower.activation == "quick_gelu"
    # The directory can be moved, and answers prompts.
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    (answer,) = Predictor.from_pretrained(tmp_path / "elsewhere", device="cpu").generate(
        [None], ["What color is this?"], max_new_tokens=3
    )
    assert isinstance(answer, str)


def test_a_llava_hf_may_tie_its_embeddings_as_a_whole(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    make_llava_hf(tmp_path / "hf", "new")
    for name, changes in (("config.json", {"tie_word_embeddings": True}), ("model.safetensors.index.json", {})):
        content = {**json.loads((tmp_path / "hf" / name).read_text()), **changes}
        content.get("weight_map", {}).pop("lm_head.weight", None)
        (tmp_path / "hf" / name).write_text(json.dumps(content))
    file = tmp_path / "hf" / "model-00002-of-00002.safetensors"
    save_file({n: v for n, v in load_file(file).items() if n != "lm_head.weight"}, file, metadata={"format": "pt"})
    assert convert(tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "run") == 0
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    for theirs, ours in zip(hf_logits(model, VOCABULARY), our_logits(load(tmp_path / "run")), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("binary", [False, True])
def test_a_full_llava_checkpoint_with_its_tower(binary: bool, tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_llava(tmp_path / "llava", tower=tower, binary=binary)
    make_language_model(tmp_path / "vicuna")  # the same seed: LLaVA's language model alone
    assert (
        convert(
            tmp_path / "llava", "--to", "checkpoint", "--out", tmp_path / "run", "--vision-tower", tmp_path / "clip"
        )
        == 0
    )
    loaded = load(tmp_path / "run")
    expected = reference_logits(tmp_path / "vicuna", tower, projector_state())
    close(our_logits(loaded)[0], expected)
    assert load_config(loaded.path / "config.yaml").data.image_aspect_ratio == "pad"
    assert load_config(loaded.path / "config.yaml").model.vision_tower.select_layer == -2


def test_a_llava_lora_on_its_base(tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    make_llava_lora(tmp_path / "lora", tmp_path / "vicuna")
    command = (tmp_path / "lora", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    assert convert(*command, "--vision-tower", tmp_path / "clip") == 0
    loaded = load(tmp_path / "run")
    expected = reference_logits(tmp_path / "vicuna", tower, projector_state(), tmp_path / "lora")
    close(our_logits(loaded)[0], expected)
    assert (expected - reference_logits(tmp_path / "vicuna", tower, projector_state())).abs().max() > 0.1
    assert (
        load_config(loaded.path / "config.yaml").adapter.method,
        load_config(loaded.path / "config.yaml").adapter.rank,
        load_config(loaded.path / "config.yaml").adapter.alpha,
    ) == ("lora", 4, 8.0)
    assert not (tmp_path / "run" / "language_model").exists(), "a usable base is not copied"


def test_a_projector_alone_is_a_stage_1_checkpoint(tmp_path: Path) -> None:
    tower = make_clip(tmp_path / "clip")
    make_language_model(tmp_path / "vicuna")
    torch.save({f"model.mm_projector.{k}": v for k, v in projector_state().items()}, tmp_path / "p.bin")
    command = (tmp_path / "p.bin", "--to", "checkpoint", "--out", tmp_path / "run", "--model-base", tmp_path / "vicuna")
    assert convert(*command, "--vision-tower", tmp_path / "clip") == 0
    loaded = load(tmp_path / "run")
    close(our_logits(loaded)[0], reference_logits(tmp_path / "vicuna", tower, projector_state()))
    assert load_config(loaded.path / "config.yaml").stage == "pretrain"
    assert loaded.template == "plain"
    assert convert(tmp_path / "p.bin", "--to", "projector", "--out", tmp_path / "p.safetensors") == 0
    state = load_file(tmp_path / "p.safetensors")
    assert {k: v.tolist() for k, v in state.items()} == {
        f"mm_projector.{k}": v.tolist() for k, v in projector_state().items()
    }
