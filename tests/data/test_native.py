"""Images in their own shape: sizes, patches and features are those of transformers' SigLIP2 NaFlex."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds.towers import BLOCKS, PATCH, SIZE, siglip2

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.anyres import Tiles, join_tiles
from llava_mole.data.images import ImageProcessor, normalise_pixels
from llava_mole.data.native import NativeGrid
from llava_mole.model.builder import grid_of
from llava_mole.model.multimodal_encoder import VisionTower, build_vision_tower
from llava_mole.model.tower_files import read_tower

HALF = (0.5, 0.5, 0.5)
GRIDS = {"base": NativeGrid(256, 16), "large": NativeGrid(512, 32), "small": NativeGrid(SIZE, SIZE // PATCH)}
SHAPES = [(40, 24), (24, 70), (60, 11), (5, 7), (64, 64), (1, 300), (301, 2)]


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor_of(grid: NativeGrid) -> ImageProcessor:
    return ImageProcessor(grid.tile, HALF, HALF, "native", resample=grid.resample, grid=grid)


@pytest.mark.parametrize("name", GRIDS)
def test_sizes_are_those_of_the_processor(name: str) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    grid, generator = GRIDS[name], random.Random(0)
    patch = grid.tile // grid.side
    sizes = [(round(10 ** generator.uniform(0, 4)), round(10 ** generator.uniform(0, 4))) for _ in range(2000)]
    for width, height in [(256, 256), (640, 480), (1654, 2339), (1, 20000), (20000, 1), *sizes]:
        rows, columns = (side // patch for side in get_image_size_for_max_num_patches(height, width, patch, grid.most))
        layout = grid.layout((width, height))
        assert (layout.rows, layout.columns) == (rows, columns), (width, height)
        assert grid.least <= layout.tokens == rows * columns <= grid.most
        assert len(layout.places()) == len(layout.index()) == layout.tokens


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", ["base", "small"])
def test_pixels_equal_those_of_the_pillow_processor(name: str, size: tuple[int, int]) -> None:
    from transformers import Siglip2ImageProcessorPil

    grid, image = GRIDS[name], noise(size)
    patch = grid.tile // grid.side
    theirs = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=grid.most)(image, return_tensors="pt")
    processor = processor_of(grid)
    tiles = processor.tiles(image)
    assert tiles.grids is not None
    assert torch.equal(tiles.grids, theirs["spatial_shapes"])
    square = normalise_pixels(tiles.pixels, HALF, HALF)[0]
    patches = square.reshape(3, grid.side, patch, grid.side, patch).permute(1, 3, 2, 4, 0).reshape(grid.most, -1)
    shown = int(theirs["pixel_attention_mask"].sum())
    assert tiles.shows is not None
    assert tiles.shows.tolist() == [[0, n] for n in range(shown)]
    torch.testing.assert_close(patches[:shown], theirs["pixel_values"][0, :shown].float(), rtol=0, atol=1e-6)
    assert (tiles.pixels[0].reshape(3, -1).sum() > 0).item()
    assert processor.pixels(image).shape == (3, grid.tile, grid.tile)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("siglip2")
    siglip2(path)
    return path


def build(directory: Path, image_size: int | None = None) -> VisionTower:
    weights = str(directory / "model.safetensors")
    return build_vision_tower(str(directory / "config.json"), weights, "gelu_pytorch_tanh", -2, image_size=image_size)


@pytest.mark.parametrize("image_size", [None, 48])
def test_features_equal_the_original_on_masked_patches(directory: Path, image_size: int | None) -> None:
    """Also with more patches than the tower was trained with."""
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionModel

    tower = build(directory, image_size)
    grid = grid_of("native", tower.spec, tower.num_patches, None)
    assert isinstance(grid, NativeGrid)
    assert grid.most == tower.num_patches == ((image_size or SIZE) // PATCH) ** 2
    processor = processor_of(grid)
    images = [noise(size) for size in SHAPES]
    told = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=grid.most)(images, return_tensors="pt")
    model = Siglip2VisionModel.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = model(
            told["pixel_values"].double(),
            told["pixel_attention_mask"],
            told["spatial_shapes"],
            output_hidden_states=True,
        ).hidden_states
    assert hidden is not None
    tiles = join_tiles([processor.tiles(image) for image in images])
    pixels = normalise_pixels(tiles.pixels, HALF, HALF).double()
    ours = tower(pixels, tiles.grids)
    for found, expected, mask in zip(ours, hidden[BLOCKS - 1], told["pixel_attention_mask"].bool(), strict=True):
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)
    alone = tower(pixels[1:2], processor.tiles(images[1]).grids)
    shown = int(told["pixel_attention_mask"][1].sum())
    torch.testing.assert_close(alone[0, :shown], ours[1, :shown], rtol=0, atol=1e-12)
    square = processor_of(grid).tiles(Image.new("RGB", (grid.tile, grid.tile)))
    assert square.grids is not None
    torch.testing.assert_close(tower(square.pixels), tower(square.pixels, square.grids), rtol=0, atol=1e-12)


def test_several_images_count_through() -> None:
    processor = processor_of(GRIDS["small"])
    first, second = (processor.tiles(noise(size)) for size in SHAPES[:2])
    joined = join_tiles([first, second])
    assert joined.shows is not None
    assert joined.grids is not None
    assert first.shows is not None
    assert joined.shows[len(first.shows)].tolist() == [1, 0]
    assert joined.grids.shape == (2, 2)
    assert join_tiles([Tiles(first.pixels)]).grids is None


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="has no pixels: its size is 0 x 5"):
        GRIDS["base"].layout((0, 5), "a.png")


@pytest.mark.parametrize(
    ("size", "message"), [(30, "whole patches of 8 pixels; give 24 or 32"), (4, "below the patch")]
)
def test_an_image_size_that_is_no_square_of_patches_is_refused(directory: Path, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tower(str(directory / "config.json"), image_size=size)


def test_a_tower_of_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'native' needs a tower that takes images of any shape.*ViT-B-16"):
        grid_of("native", read_tower("ViT-B-16"), 196, None)


def test_grids_are_refused_by_a_tower_of_one_size(tmp_path: Path) -> None:
    from worlds.towers import siglip

    siglip(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    tower = build_vision_tower(str(tmp_path / "config.json"), weights, "gelu_pytorch_tanh")
    with pytest.raises(ValueError, match="takes images of one size"):
        tower(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([[1, 2]]))
