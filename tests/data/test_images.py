"""Pixels equal LLaVA's; files outside the folder, missing, broken or huge are refused in one line."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageDraw
from worlds import golden_cases

import llava_mole
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.images import ImageProcessor, load_image, normalise_pixels, open_image
from llava_mole.data.prepare.images import look

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


def plain_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Padded, resized and normalised step by step, as LLaVA and the CLIP processor do."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in FIELDS["image_mean"]))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
    mean, std = np.asarray(FIELDS["image_mean"], np.float32), np.asarray(FIELDS["image_std"], np.float32)
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [14, 56, 336])
def test_shortcuts_change_no_bit(size: int) -> None:
    generator = np.random.default_rng(size)
    shapes = [(1, 1), (2, 1), (1, 2), (size, size), (size, 9), (9, size), (500, 333), (333, 500), (700, 14)]
    shapes += [tuple(generator.integers(1, 600, 2).tolist()) for _ in range(30)]
    for width, height in shapes:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        result = golden_processor(size, "pad")(image)
        assert np.array_equal(result.numpy(), plain_pixels(image, size)), (width, height)
        pixels = golden_processor(size, "pad").pixels(image)
        assert (pixels.dtype, pixels.is_contiguous()) == (torch.uint8, True)
        assert torch.equal(result, normalise_pixels(pixels[None], FIELDS["image_mean"], FIELDS["image_std"])[0])


def photo(width: int, height: int) -> Image.Image:
    """Smooth blobs with some noise."""
    generator = np.random.default_rng(0)
    blobs = generator.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + generator.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def page(width: int, height: int) -> Image.Image:
    """Small black text on white."""
    image = Image.new("RGB", (width, height), "white")
    for line in range(20, height - 20, 22):
        ImageDraw.Draw(image).text((30, line), "The quick brown fox jumps over 0123456789 " * 8, fill="black")
    return image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("content", [photo, page, noise])
@pytest.mark.parametrize(("width", "height", "drafted"), [(1400, 1344, 700), (2000, 1500, 1000), (2704, 3008, 676)])
def test_draft_decoding_stays_within_its_bound(
    content: Any, width: int, height: int, drafted: int, tmp_path: Path
) -> None:
    content(width, height).save(tmp_path / "a.jpg", quality=85)
    quick = load_image("a.jpg", tmp_path, draft_size=672)
    assert quick.width == drafted
    assert min(quick.size) >= 672
    std = np.array(FIELDS["image_std"])[:, None, None]
    processor = golden_processor(336, "pad")
    difference = (processor(quick) - processor(load_image("a.jpg", tmp_path))).abs().numpy() * std * 255
    assert 0 < difference.mean() <= 3
    assert difference.max() <= 32


@pytest.mark.parametrize("name", ["small.jpg", "odd.jpg", "margin.jpg", "large.png"])
def test_draft_decoding_leaves_other_images_alone(name: str, tmp_path: Path) -> None:
    sizes = {"small.jpg": (1342, 1500), "odd.jpg": (1500, 1401), "margin.jpg": (1400, 1402)}
    photo(*sizes.get(name, (1400, 1400))).save(tmp_path / name)
    full, quick = load_image(name, tmp_path), load_image(name, tmp_path, draft_size=672)
    assert np.array_equal(np.asarray(full), np.asarray(quick))


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


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../secret.png", "a/../../secret.png", "a/../in.png", "a\0.png", "\ud83d"]
)
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
    with pytest.raises(DataError, match=r"'a\.png' is not a file in the image folder"):
        load_image("a.png", tmp_path)
    with pytest.raises(DataError, match="'sub' is not a file"):
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


def test_a_postscript_file_never_runs_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.jpg", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once a process
    with pytest.raises(DataError, match=r"a\.jpg' cannot be decoded"):
        open_image(tmp_path / "a.jpg")
    problem = look(str(tmp_path / "a.jpg"), "a.jpg", decode=True)[0].problem
    assert problem is not None
    assert problem.kind == "corrupt-image"
    assert not ran.exists()


def test_the_package_opens_no_image_without_the_list_of_formats() -> None:
    calls = [
        (path.name, [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "formats"])
        for path in Path(llava_mole.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls
    allowed = (["FORMATS"], ["('TIFF',)"])  # the latter where a page is taken out
    assert {name for name, formats in calls if formats not in allowed} == set()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM"])
def test_formats_that_are_read(kind: str, tmp_path: Path) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if kind == "MPO" else {}
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a", format=kind, **more)
    assert open_image(tmp_path / "a").size == (8, 6)
    facts = look(str(tmp_path / "a"), "a", decode=True)[0]
    assert (facts.size, facts.problem) == ((8, 6), None)


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(DataError, match="too large to decode"):
        load_image("bomb.png", tmp_path)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'original' does not exist"):
        ImageProcessor(8, aspect_ratio="original")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        ImageProcessor(0)
