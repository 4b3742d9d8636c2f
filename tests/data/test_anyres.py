"""Images in tiles: pixels, number and order of positions are those of transformers' LlavaNext, for any size."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.anyres import Grid, Tiles, join_tiles
from llava_mole.data.images import ImageProcessor, image_size, normalise_pixels, open_image

CLIP = Grid.of_tower(336, 576)
SMALL = Grid.of_tower(16, 4, [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]])
UNEVEN = Grid.of_tower(28, 9, [[84, 28], [28, 28], [56, 112]])
GRIDS = {"clip": CLIP, "small": SMALL, "uneven": UNEVEN}


def pinpoints(grid: Grid) -> list[list[int]]:
    return [list(pair) for pair in grid.pinpoints]


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Widths and heights from 1 to 3,000, evenly on a logarithmic scale, and some special ones."""
    generator = random.Random(seed)
    drawn = [(round(10 ** generator.uniform(0, 3.5)), round(10 ** generator.uniform(0, 3.5))) for _ in range(count)]
    return [(336, 336), (672, 672), (1, 1), (1008, 336), (337, 1009), (640, 480), (1654, 2339), *drawn]


def theirs(grid: Grid) -> Any:
    """transformers' model class, with a configuration and nothing else."""
    from transformers import CLIPVisionConfig, LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    model = LlavaNextModel.__new__(LlavaNextModel)
    vision = CLIPVisionConfig(image_size=grid.tile, patch_size=grid.tile // grid.side)
    object.__setattr__(model, "config", LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pinpoints(grid)))
    return model


@pytest.mark.parametrize("name", GRIDS)
def test_the_number_of_tokens_is_that_of_the_processor(name: str) -> None:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    grid = GRIDS[name]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(grid))
    processor.patch_size, processor.num_additional_image_tokens = grid.tile // grid.side, 1
    refused = 0
    for width, height in sizes(2000):
        expected = processor._get_number_of_features(height, width, grid.tile, grid.tile) - 1  # without the class token
        try:
            layout = grid.layout((width, height))
        except DataError:
            refused += 1
            continue
        assert layout.tokens == expected, (width, height)
        assert grid.least <= layout.tokens <= grid.most
        assert layout.tiles <= grid.most_tiles
    assert refused < 1400  # a tower of few features shows no long strips


@pytest.mark.parametrize("name", GRIDS)
def test_positions_show_the_features_that_the_model_packs(name: str) -> None:
    grid, model = GRIDS[name], theirs(GRIDS[name])
    patches = grid.side**2
    for size in sizes(40, seed=1):
        try:
            layout = grid.layout(size)
        except DataError:
            continue
        numbered = torch.arange(layout.tiles * patches, dtype=torch.float64).reshape(layout.tiles, patches, 1)
        expected, _ = model.pack_image_features(
            [numbered], torch.tensor([[size[1], size[0]]]), "default", image_newline=torch.tensor([-1.0])
        )
        newline = torch.full((layout.tiles, 1, 1), -1.0, dtype=torch.float64)
        shown = layout.index()
        ours = torch.cat([numbered, newline], dim=1)[shown[:, 0], shown[:, 1]]
        assert len(ours) == layout.tokens
        assert torch.equal(ours, expected[0]), size
        for place, value in zip(layout.places(), ours.flatten().tolist(), strict=True):
            assert (place is None) == (value == -1)


@pytest.mark.parametrize("size", [(40, 24), (24, 70), (60, 11), (5, 7), (64, 64), (33, 16)])
def test_pixels_equal_those_of_the_pillow_processor(size: tuple[int, int]) -> None:
    from transformers import LlavaNextImageProcessorPil

    random_pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(random_pixels)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints(SMALL)
    )(image, return_tensors="pt")
    processor = ImageProcessor(16, aspect_ratio="anyres", grid=SMALL)
    tiles = processor.tiles(image)
    ours = normalise_pixels(tiles.pixels, processor.mean, processor.std)
    assert theirs["image_sizes"].tolist() == [[size[1], size[0]]]
    torch.testing.assert_close(ours, theirs["pixel_values"][0], rtol=0, atol=1e-5)
    assert torch.equal(processor.pixels(image), tiles.pixels[0])


def test_tiles_of_several_images_count_through() -> None:
    first, second = (
        ImageProcessor(16, aspect_ratio="anyres", grid=SMALL).tiles(Image.new("RGB", s)) for s in sizes(0)[4:6]
    )
    joined = join_tiles([first, second])
    assert first.shows is not None
    assert second.shows is not None
    assert joined.shows is not None
    assert joined.pixels.shape[0] == len(first.pixels) + len(second.pixels)
    assert torch.equal(joined.shows[: len(first.shows)], first.shows)
    assert torch.equal(joined.shows[len(first.shows) :, 0], second.shows[:, 0] + len(first.pixels))
    plain = join_tiles([Tiles(torch.zeros(1, 3, 4, 4)), Tiles(torch.ones(1, 3, 4, 4))])
    assert plain.shows is None
    assert plain.pixels.shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 20_000), "image 'x.png' is 1 x 20000 pixels, too narrow for data.image_aspect_ratio 'anyres'"),
        ((20_000, 1), "crop it to at most 24:1, or use 'pad'"),
        ((0, 5), "image 'x.png' has no pixels: its size is 0 x 5"),
    ],
)
def test_an_image_that_no_tile_shows_is_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(DataError, match="image 'x.png'") as error:
        CLIP.layout(size, "x.png")
    assert message in str(error.value)


def test_advice_for_narrow_images_holds() -> None:
    for width in (1, 7, 30):
        for size in ((width, 24 * width), (24 * width, width)):
            CLIP.layout(size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Grid.of_tower, 336, 576, [[336, 700]]), "[336, 700], but tiles have the tower's 336 x 336 pixels"),
        (partial(Grid.of_tower, 336, 576, [[100, 336]]), "such as [336, 336]"),
        (partial(Grid.of_tower, 336, 576, []), "data.image_grid_pinpoints is empty"),
        (partial(Grid.of_tower, 336, 578), "578, which is no square"),
    ],
)
def test_a_grid_that_does_not_fit_the_tower_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("modes", ["llava", "rescale"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_the_size_of_a_file_is_that_of_the_decoded_image(kind: str, modes: Any, tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x112] = 6
    image.save(tmp_path / "a", format=kind, exif=exif)
    assert image_size("a", tmp_path, modes=modes) == open_image(tmp_path / "a", modes=modes).size
