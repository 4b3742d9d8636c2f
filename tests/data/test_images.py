"""Pixels equal LLaVA's; files outside the folder, missing, broken or huge are refused in one line."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import golden_cases
import numpy as np
import pytest
import torch
from PIL import Image

from llava_mole.data.images import ImageProcessor, load_image, open_image
from llava_mole.errors import ConfigError, DataError

FIELDS, CASES = golden_cases.load_cases("pad_cases")
ARRAYS = golden_cases.load_arrays("pad_cases")
RATIOS = ["pad", "square"]


def golden_processor(size: int, ratio: str) -> ImageProcessor:
    return ImageProcessor(size, FIELDS["image_mean"], FIELDS["image_std"], ratio)  # type: ignore[arg-type]


def png_of(case: dict[str, Any]) -> bytes:
    return ARRAYS[f"{case['key']}_png"].tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_file_becomes_the_same_rgb_pixels(case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(png_of(case))
    image = load_image("image", tmp_path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), ARRAYS[f"{case['key']}_rgb"])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_pixels_of_the_tower_input(case: dict[str, Any], ratio: str) -> None:
    with Image.open(io.BytesIO(png_of(case))) as image:
        result = golden_processor(56, ratio)(image)
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result.numpy(), ARRAYS[f"{case['key']}_{ratio}_56"], rtol=0, atol=1e-5)
        if f"{ratio}_336_sub8" in case["outputs"]:
            large = golden_processor(336, ratio)(image).numpy()
            expected = ARRAYS[f"{case['key']}_{ratio}_336_sub8"]
            np.testing.assert_allclose(large[:, ::8, ::8], expected, rtol=0, atol=1e-5)
            statistics = np.stack([large.mean((1, 2), dtype=np.float64), large.std((1, 2), dtype=np.float64)])
            expected = ARRAYS[f"{case['key']}_{ratio}_336_mean_std"]
            np.testing.assert_allclose(statistics, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_padding_has_the_mean_colour_and_the_image_in_the_middle(case: dict[str, Any]) -> None:
    square = ARRAYS[f"{case['key']}_square"]
    # At the size of the square nothing is resampled, so the padded pixels can be read back.
    result = golden_processor(square.shape[0], "pad")(Image.open(io.BytesIO(png_of(case)))).numpy()
    mean, std = (np.array(FIELDS[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    assert np.array_equal(np.rint((result * std + mean) * 255).transpose(1, 2, 0), square)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.effect_noise((12, 9), 60).convert("RGB").convert(mode) if mode != "LA" else Image.new("LA", (12, 9))
    result = ImageProcessor(8)(image)
    assert result.shape == (3, 8, 8)
    assert torch.equal(result, ImageProcessor(8)(image.convert("RGB")))


def test_cmyk_file_is_read(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 5), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert load_image("c.jpg", tmp_path).getpixel((3, 3))[0] > 200  # type: ignore[index]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [(200_000, 1), (1, 200_000), (9000, 3)])
def test_extreme_strips_stay_small_in_memory(ratio: str, size: tuple[int, int]) -> None:
    result = ImageProcessor(8, aspect_ratio=ratio)(Image.new("RGB", size, (255, 0, 0)))  # type: ignore[arg-type]
    assert result.shape == (3, 8, 8)
    assert torch.isfinite(result).all()
    if ratio == "square":
        assert torch.allclose(result, ImageProcessor(8)(Image.new("RGB", (8, 8), (255, 0, 0))))


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "a/../../secret.png", "a/../in.png", "a\0.png"])
def test_path_out_of_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for file in (tmp_path / "secret.png", root / "in.png"):
        Image.new("RGB", (4, 4)).save(file)
    with pytest.raises(DataError, match="must be relative to the image folder"):
        load_image(path, root)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_link_out_of_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "root-2"  # shares its beginning with the root's name
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    target = outside / "a.png" if kind == "file" else outside
    os.symlink(target, root / "link")
    with pytest.raises(DataError, match="outside the image folder"):
        load_image("link" if kind == "file" else "link/a.png", root)


def test_links_inside_the_folder_and_of_the_folder_itself_are_fine(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    Image.new("RGB", (4, 3)).save(real / "a.png")
    os.symlink(real / "a.png", real / "b.png")
    os.symlink(real, tmp_path / "root")
    assert load_image("b.png", tmp_path / "root").size == (4, 3)


def test_missing_file_folder_and_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"'a\.png' is no file in the image folder"):
        load_image("a.png", tmp_path)
    with pytest.raises(DataError, match="'sub' is no file"):
        load_image("sub", tmp_path)
    with pytest.raises(DataError, match="this folder does not exist"):
        load_image("a.png", tmp_path / "absent")
    with pytest.raises(DataError, match="does not exist"):
        open_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_file_is_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    data = path.read_bytes()
    assert load_image(path.name, tmp_path).size == (64, 64)
    for length in (0, 4, 20, len(data) // 3, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="cannot be decoded") as caught:
            load_image(path.name, tmp_path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_text_file_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="cannot be decoded: cannot identify"):
        load_image("a.png", tmp_path)


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(DataError, match="too large to decode"):
        load_image("bomb.png", tmp_path)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'anyres' does not exist"):
        ImageProcessor(8, aspect_ratio="anyres")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        ImageProcessor(0)
