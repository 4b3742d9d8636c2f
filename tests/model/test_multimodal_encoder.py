"""The open_clip tower gives Hugging Face CLIP's features, and refuses what would silently give others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.tiny_models import IMAGE_SIZE, NUM_IMAGE_TOKENS, make_vision_tower

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.model.multimodal_encoder import build_vision_tower


@pytest.fixture
def tower_dir(tmp_path: Path) -> Path:
    make_vision_tower(tmp_path / "tower")
    return tmp_path / "tower"


def build(directory: Path, **changes):
    arguments = {
        "name": str(directory / "config.json"),
        "weights": str(directory / "model.safetensors"),
        "activation": "quick_gelu",
        "select_layer": -2,
        **changes,
    }
    return build_vision_tower(**arguments)


def hugging_face_twin(directory: Path):
    """A HF `CLIPVisionModel` with the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = json.loads((directory / "config.json").read_text())["vision_cfg"]
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
    ).eval()
    source = load_file(directory / "model.safetensors")
    state = {}
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in model.state_dict()) else ""
    for key in model.state_dict():
        short = key.removeprefix(prefix)
        parts = short.split(".")
        if short == "embeddings.class_embedding":
            value = source["visual.class_embedding"]
        elif short == "embeddings.patch_embedding.weight":
            value = source["visual.conv1.weight"]
        elif short == "embeddings.position_embedding.weight":
            value = source["visual.positional_embedding"]
        elif short.startswith(("pre_layrnorm", "post_layernorm")):
            value = source[f"visual.{'ln_pre' if parts[0] == 'pre_layrnorm' else 'ln_post'}.{parts[1]}"]
        elif parts[0] == "encoder":
            block, rest, kind = f"visual.transformer.resblocks.{parts[2]}.", parts[3:], parts[-1]
            if rest[0] == "self_attn" and rest[1] != "out_proj":
                thirds = source[f"{block}attn.in_proj_{kind}"].chunk(3)
                value = thirds[["q_proj", "k_proj", "v_proj"].index(rest[1])]
            elif rest[0] == "self_attn":
                value = source[f"{block}attn.out_proj.{kind}"]
            elif rest[0] == "mlp":
                value = source[f"{block}mlp.{'c_fc' if rest[1] == 'fc1' else 'c_proj'}.{kind}"]
            else:
                value = source[f"{block}ln_{rest[0][-1]}.{kind}"]
        else:
            continue
        state[key] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("position_ids" in key for key in missing)
    return model


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 1, 2, 3])
def test_features_equal_hugging_face_hidden_states(tower_dir: Path, select_layer: int) -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    ours = build(tower_dir, select_layer=select_layer)(images)
    with torch.no_grad():
        theirs = hugging_face_twin(tower_dir)(images, output_hidden_states=True).hidden_states[select_layer][:, 1:]
    assert ours.shape == (2, NUM_IMAGE_TOKENS, 24)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_bytes_are_normalised_by_the_tower(tower_dir: Path) -> None:
    tower = build(tower_dir)
    pixels = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(tower(pixels), tower((pixels / 255 - mean) / std))


def test_stays_frozen_and_in_eval_mode(tower_dir: Path) -> None:
    tower = build(tower_dir)
    tower.train()
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).requires_grad


def test_blocks_above_the_selected_one_are_dropped(tower_dir: Path) -> None:
    assert len(build(tower_dir, select_layer=-2).visual.transformer.resblocks) == 2


def test_wrong_activation_is_an_error(tower_dir: Path) -> None:
    with pytest.raises(ConfigError, match="built with quick_gelu, but its weights need gelu"):
        build(tower_dir, activation="gelu")
    with pytest.raises(ConfigError, match="-quickgelu"):
        build(tower_dir, name="ViT-L-14-336")


def test_unknown_name_and_layer_are_errors(tower_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no open_clip model"):
        build(tower_dir, name="ViT-Z")
    with pytest.raises(ConfigError, match="3 blocks; allowed are -3..-1 and 1..3"):
        build(tower_dir, select_layer=-4)


def test_missing_file_and_damaged_files_are_errors(tower_dir: Path) -> None:
    with pytest.raises(WeightsError, match="do not exist"):
        build(tower_dir, weights=str(tower_dir / "none.safetensors"))
    path = tower_dir / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        build(tower_dir)


def test_every_key_that_does_not_fit_is_named(tower_dir: Path) -> None:
    path = tower_dir / "model.safetensors"
    state = load_file(path)
    del state["visual.ln_pre.bias"]
    state["visual.extra"] = torch.zeros(1)
    state["visual.class_embedding"] = torch.zeros(5)
    save_file(state, path)
    with pytest.raises(WeightsError) as error:
        build(tower_dir)
    for part in ("missing ln_pre.bias", "unexpected extra", "class_embedding is (5,), the model needs (24,)"):
        assert part in str(error.value)


def test_values_that_are_not_finite_are_an_error(tower_dir: Path) -> None:
    path = tower_dir / "model.safetensors"
    state = load_file(path)
    state["visual.ln_pre.bias"][0] = float("nan")
    save_file(state, path)
    with pytest.raises(WeightsError, match="ln_pre.bias has values that are not finite"):
        build(tower_dir)


def test_pickled_objects_are_refused(tower_dir: Path) -> None:
    path = tower_dir / "model.pt"
    torch.save({"state_dict": {"visual.x": Path("no tensor")}}, path)
    with pytest.raises(WeightsError, match="more than plain tensors"):
        build(tower_dir, weights=str(path))


def test_plain_torch_files_load(tower_dir: Path) -> None:
    path = tower_dir / "model.pt"
    torch.save(load_file(tower_dir / "model.safetensors"), path)
    images = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(build(tower_dir, weights=str(path))(images), build(tower_dir)(images))


def test_fingerprint_ignores_precision_but_not_values(tower_dir: Path) -> None:
    path = tower_dir / "model.safetensors"
    state = {key: value.half() for key, value in load_file(path).items()}
    save_file(state, path)
    half = build(tower_dir).weights_fingerprint
    save_file({key: value.float() for key, value in state.items()}, path)
    assert build(tower_dir).weights_fingerprint == half
    state["visual.ln_pre.bias"][0] += 1
    save_file(state, path)
    assert build(tower_dir).weights_fingerprint != half
