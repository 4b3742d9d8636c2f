"""Towers of every layout give the features and pixels of the original, and refuse what would give others."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds.towers import BLOCKS, PATCH, SIZE, TOWERS, WIDTH, Hidden, TowerCase, table

from llava_mole.common.errors import ConfigError, UserError, WeightsError
from llava_mole.config import VisionTowerConfig
from llava_mole.data.images import ImageProcessor
from llava_mole.model.multimodal_encoder import VisionTower, build_vision_tower
from llava_mole.model.tower_files import read_tower

ROOT = Path(__file__).parents[2]
SIDE = SIZE // PATCH


@dataclass
class World:
    case: TowerCase
    directory: Path
    original: Hidden

    def config(self, **changes) -> VisionTowerConfig:
        return VisionTowerConfig(**{"name": str(self.directory), "activation": self.case.activation, **changes})

    def build(self, **changes) -> VisionTower:
        config = self.config(**changes)
        pixels = {"image_size": config.image_size, "image_mean": config.image_mean, "image_std": config.image_std}
        return build_vision_tower(config.name, config.weights, config.activation, config.select_layer, **pixels)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    root = tmp_path_factory.mktemp("towers")
    return {case.name: World(case, root / case.name, case.make(root / case.name)) for case in TOWERS}


@pytest.mark.parametrize("name", [case.name for case in TOWERS])
def test_features_equal_the_originals(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    torch.manual_seed(0)
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    for layer in (-1, -2, 1):
        tower = world.build(select_layer=layer)
        assert next(tower.parameters()).dtype == torch.float64, "the stored dtype is kept"
        block = BLOCKS + layer if layer < 0 else layer - 1
        assert len(tower.blocks) == block + 1
        expected = world.original(images, block)
        assert expected.shape == (2, world.case.prefix + SIDE * SIDE, WIDTH)
        assert expected.std() > 0.1
        torch.testing.assert_close(tower(images), expected[:, world.case.prefix :], rtol=0, atol=1e-10)
    assert (tower.grid, tower.num_patches, tower.hidden_size) == ((SIDE, SIDE), SIDE * SIDE, WIDTH)


def square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """LLaVA's expand2square."""
    side = max(image.size)
    result = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    result.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return result


@pytest.mark.parametrize("name", [case.name for case in TOWERS])
def test_pixels_equal_the_originals(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    tower = world.build()
    noise = np.random.default_rng(0).integers(0, 256, (37, 52, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = tower.spec.pixels
    processor = ImageProcessor(tower.image_size, pixels.mean, pixels.std, "pad", resample=pixels.resample)
    ours = processor(image)
    padded = square(image, pixels.mean)
    if name.startswith("timm"):
        from open_clip.transform import PreprocessCfg, image_transform_v2

        told = json.loads((world.directory / "open_clip_config.json").read_text())["preprocess_cfg"]
        expected = image_transform_v2(PreprocessCfg(**{**told, "size": tuple(told["size"])}), is_train=False)(padded)
    else:
        from transformers import AutoImageProcessor

        original = AutoImageProcessor.from_pretrained(world.directory, backend="pil")
        expected = original(padded, return_tensors="pt")["pixel_values"][0].float()
        if name == "siglip2":
            grid = expected.reshape(SIDE, SIDE, PATCH, PATCH, 3)
            expected = grid.permute(4, 0, 2, 1, 3).reshape(3, SIZE, SIZE)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    as_bytes = tower(processor.pixels(image)[None])
    torch.testing.assert_close(as_bytes, tower(expected[None].double()), rtol=0, atol=1e-4)


def test_the_documented_table_is_the_tested_one() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in text, f"docs/models.md needs this table:\n{table()}"


def test_dinov2_takes_any_size(worlds: dict[str, World]) -> None:
    tower = worlds["dinov2"].build(image_size=40)
    assert (tower.image_size, tower.grid) == (40, (5, 5))
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    expected = worlds["dinov2"].original(images, BLOCKS - 2)[:, 1:]
    torch.testing.assert_close(tower(images), expected, rtol=0, atol=1e-10)
    assert worlds["dinov2"].build().grid == (3, 3), "without a wish, the size of its preprocessor"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("siglip", {"activation": "quick_gelu"}, "built with gelu_pytorch_tanh, but its weights need quick_gelu"),
        ("timm-siglip", {"activation": "gelu_pytorch_tanh"}, "built with gelu, but its weights need gelu_pytorch_tanh"),
        ("siglip", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean is [0.4, 0.5, 0.5], but the files of"),
        ("timm-siglip", {"image_std": [0.2, 0.2, 0.2]}, "say [0.5, 0.5, 0.5]"),
        ("dinov2", {"image_mean": [0.5, 0.5]}, "say [0.485, 0.456, 0.406]"),
        ("siglip", {"image_size": 32}, "image_size is 32, but"),
        ("timm-eva", {"image_size": 32}, "has 24"),
        ("dinov2", {"image_size": 4}, "below the patch of 8 pixels"),
        ("siglip2", {"select_layer": -4}, "3 blocks; allowed are -3..-1 and 1..3"),
    ],
)
def test_settings_against_the_files_are_errors(worlds: dict[str, World], name: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        worlds[name].build(**change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "image_size is 24, but"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "pixels are scaled by 1.0; supported is 1/255"),
        ("preprocessor_config.json", {"resample": 0}, "resample is 0; supported are 1 (lanczos)"),
        ("preprocessor_config.json", {"image_mean": None}, "do not say how pixels are normalised"),
        ("preprocessor_config.json", {"image_std": [0.0, 1, 1]}, "its numbers must be above 0"),
        ("preprocessor_config.json", {"image_mean": "x"}, "must be three numbers"),
        ("config.json", {"model_type": "resnet"}, "model_type 'resnet' is no vision tower that is known"),
        ("config.json", {"hidden_size": "wide"}, "no usable configuration"),
        ("config.json", {"num_hidden_layers": 2}, "unexpected encoder.layers.2"),
        ("config.json", {"hidden_size": 32}, "the model needs (32"),
        ("config.json", {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_files_that_contradict_each_other_are_errors(
    worlds: dict[str, World], tmp_path: Path, file: str, change: dict, message: str
) -> None:
    shutil.copytree(worlds["siglip"].directory, tmp_path / "tower")
    path = tmp_path / "tower" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        World(worlds["siglip"].case, tmp_path / "tower", worlds["siglip"].original).build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_preprocessor_the_configuration_says_how(worlds: dict[str, World], tmp_path: Path) -> None:
    shutil.copytree(worlds["siglip"].directory, tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    world = World(worlds["siglip"].case, tmp_path / "tower", worlds["siglip"].original)
    with pytest.raises(ConfigError, match="set model.vision_tower.image_mean and model.vision_tower.image_std"):
        world.build()
    tower = world.build(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5])
    assert tower.image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["RN50", "convnext_base", "MobileCLIP-S1", "swin_base_patch4_window7_224"])
def test_a_tower_without_patch_tokens_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="no patch tokens") as error:
        read_tower(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_published_models_of_open_clip_are_described() -> None:
    """Grid, normalisation and activation of models of open_clip's list, without weights."""
    spec = read_tower("ViT-SO400M-14-SigLIP-384")
    assert (spec.layout, spec.grid, spec.width, spec.blocks, spec.prefix_tokens) == ("timm", (27, 27), 1152, 27, 0)
    assert (spec.pixels.mean, spec.activation) == ((0.5, 0.5, 0.5), "gelu")
    assert read_tower("ViT-L-14-336-quickgelu").grid == (24, 24)


def test_a_directory_without_a_tower_is_an_error(tmp_path: Path) -> None:
    config = VisionTowerConfig(name=str(tmp_path))
    with pytest.raises(WeightsError, match="a directory without a vision tower; looked for config.json with"):
        read_tower(config.name)
