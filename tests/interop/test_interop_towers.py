"""CLIP towers of Hugging Face and of open_clip: the same features after the mapping, and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.foreign_models import make_clip, vision_config
from worlds.interop_tools import convert
from worlds.tiny_models import IMAGE_SIZE, make_vision_tower

from llava_mole.common.errors import ConfigError
from llava_mole.model.multimodal_encoder import build_vision_tower

IMAGES = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def ours(directory: Path, activation: str = "quick_gelu", layer: int = -2) -> torch.Tensor:
    return build_vision_tower(str(directory / "config.json"), str(directory / "model.safetensors"), activation, layer)(
        IMAGES
    )


def theirs(directory: Path, layer: int = -2) -> torch.Tensor:
    from transformers import CLIPVisionModel

    model, info = CLIPVisionModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IMAGES, output_hidden_states=True).hidden_states[layer][:, 1:]


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_hugging_face_to_open_clip_and_back(layer: int, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "ours") == 0
    expected = theirs(tmp_path / "clip", layer)
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours(tmp_path / "ours", layer=layer), expected, rtol=0, atol=1e-5)
    assert convert(tmp_path / "ours", "--to", "hf-clip", "--out", tmp_path / "back") == 0
    assert torch.equal(theirs(tmp_path / "back", layer), expected)


def test_open_clip_to_hugging_face(tmp_path: Path) -> None:
    make_vision_tower(tmp_path / "tower")
    assert convert(tmp_path / "tower", "--to", "hf-clip", "--out", tmp_path / "clip") == 0
    torch.testing.assert_close(theirs(tmp_path / "clip"), ours(tmp_path / "tower"), rtol=0, atol=1e-5)


def test_a_whole_clip_model_keeps_its_projection(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = vision_config().to_dict()
    torch.manual_seed(4)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path / "clip")
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "ours") == 0
    with torch.no_grad():
        expected = model.vision_model(IMAGES, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(ours(tmp_path / "ours"), expected, rtol=0, atol=1e-5)
    projection = load_file(tmp_path / "ours" / "model.safetensors")["visual.proj"]
    assert torch.equal(projection, model.visual_projection.weight.T)


def test_the_activation_is_stated_and_enforced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_clip(tmp_path / "clip")
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "ours") == 0
    assert "activation quick_gelu" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="built with quick_gelu, but its weights need gelu"):
        ours(tmp_path / "ours", "gelu")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "exact") == 0
    torch.testing.assert_close(ours(tmp_path / "exact", "gelu"), theirs(tmp_path / "clip"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layers.1.mlp.fc1.bias": None}, "1 missing: encoder.layers.1.mlp.fc1.bias"),
        ({"encoder.layers.0.extra": torch.zeros(1)}, "1 unexpected: encoder.layers.0.extra"),
        ({"pre_layrnorm.bias": torch.zeros(9)}, "ln_pre.bias is (9,), the model needs (24,)"),
        ({"class_embedding": "nan"}, "values that are not finite"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clip(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    state = load_file(file)
    for short, value in change.items():
        name = next((n for n in state if n.endswith(short)), f"vision_model.{short}")
        if value is None:
            del state[name]
        else:
            state[name] = state[name] * float("nan") if isinstance(value, str) else value  # type: ignore[assignment]
    save_file(state, file, metadata={"format": "pt"})
    assert convert(tmp_path / "clip", "--to", "open-clip", "--out", tmp_path / "ours") == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]
