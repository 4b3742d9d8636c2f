"""Deep, transparent and rotated images: what each of `data.image_modes` shows, refuses and says, in every command."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from worlds import raw_sets
from worlds.llama_sentencepiece import LlamaSentencePiece

from llava_mole.cli import main
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.config import DataConfig, SourceConfig
from llava_mole.data.dataset import SupervisedDataset, build_dataset
from llava_mole.data.images import DECODER_ERRORS, IMAGE_MODES, ImageProcessor, load_image, open_image
from llava_mole.data.prepare.images import look, unpack, unpack_page

RAMP = np.arange(12, dtype=np.float64).reshape(3, 4) / 11
"""0 to 1."""
STROKE = np.zeros((6, 8), np.uint8)
STROKE[2] = 255
"""Alpha of a drawing: a line on nothing."""
DRAWING = np.repeat(np.where(STROKE, 40, 255).astype(np.uint8)[..., None], 3, axis=2)
"""What a viewer shows of the line, whose grey is 40."""


def deep(values: np.ndarray) -> Callable[[Path], Any]:
    return lambda path: Image.fromarray(values).save(path)


def drawing(mode: str, **options: Any) -> Callable[[Path], Any]:
    """The line in a mode with transparency; below the transparent pixels everything is black."""

    def save(path: Path) -> None:
        grey = Image.fromarray(np.where(STROKE, 40, 0).astype(np.uint8))
        if mode in ("LA", "RGBA"):
            image = grey.convert(mode)
            image.putalpha(Image.fromarray(STROKE))
            image.save(path, **options)
        else:
            colour = 0 if mode in ("L", "P") else (0, 0, 0)
            image = grey.convert(mode) if mode != "P" else Image.fromarray(np.where(STROKE, 1, 0).astype(np.uint8))
            if mode == "P":
                image.putpalette([0, 0, 0, 40, 40, 40])
            image.save(path, transparency=colour, **options)

    return save


DEEP: dict[str, Callable[[Path], Any]] = {
    "x-ray.png": deep((RAMP * 4095).astype(np.uint16)),
    "full.png": deep((RAMP * 65535).astype(np.uint16)),
    "little.tif": deep((RAMP * 65535).astype(np.uint16)),
    "big.tif": deep((RAMP * 65535).astype(">u2")),
    "map.pgm": deep((RAMP * 65535).astype(np.uint16)),
    "signed.tif": deep((RAMP * 2000 - 1000).astype(np.int32)),
    "wide.tif": deep((RAMP * 2e9).astype(np.int32)),
    "unit.tif": deep(RAMP.astype(np.float32)),
    "huge.tif": deep((RAMP * 6e38 - 3e38).astype(np.float32)),
}
TRANSPARENT: dict[str, Callable[[Path], Any]] = {
    "rgba.png": drawing("RGBA"),
    "la.png": drawing("LA"),
    "palette.png": drawing("P"),
    "grey-key.png": drawing("L"),
    "rgb-key.png": drawing("RGB"),
    "palette.gif": drawing("P"),
    "rgba.webp": drawing("RGBA", lossless=True, exact=True),
    "rgba.tif": drawing("RGBA"),
}
CORNER = np.zeros((24, 40, 3), np.uint8)
CORNER[:8, :16] = 255


def rotated(orientation: int) -> Callable[[Path], Any]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(CORNER).save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))

    return save


ROTATED = {f"{n}.jpg": rotated(n) for n in range(2, 9)} | {"6.png": rotated(6), "8.webp": rotated(8)}
ODD = {**DEEP, **TRANSPARENT, **ROTATED}


def make(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    ODD[name](path)
    return path


def shown_by_a_viewer(name: str, path: Path) -> np.ndarray:
    if name in DEEP:
        return np.repeat(np.rint(RAMP * 255).astype(np.uint8)[..., None], 3, axis=2)
    if name in TRANSPARENT:
        return DRAWING
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("name", ODD)
def test_rescale_shows_what_an_image_viewer_shows(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, name)
    shown = np.asarray(open_image(path, modes="rescale")).astype(int)
    assert np.abs(shown - shown_by_a_viewer(name, path)).max() <= 1
    # A second conversion, as that of the processor, changes nothing.
    image = open_image(path, modes="rescale")
    assert torch.equal(ImageProcessor(8, modes="rescale").pixels(image), ImageProcessor(8).pixels(image))


@pytest.mark.parametrize("name", ODD)
def test_llava_is_the_conversion_of_the_original_and_says_so_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path, name)
    processor = ImageProcessor(8)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(path)), expected)
    assert not np.array_equal(expected, shown_by_a_viewer(name, path))
    for _ in range(3):
        assert np.array_equal(np.asarray(processor.load(path)), expected)
    (record,) = caplog.records
    assert str(path) in record.message
    assert "'rescale'" in record.message


@pytest.mark.parametrize("name", ODD)
def test_strict_refuses_what_has_no_one_meaning_and_turns_the_rest(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, name)
    if name in ROTATED:
        upright = np.asarray(open_image(path, modes="strict"))
        assert np.array_equal(upright, np.asarray(open_image(path, modes="rescale")))
        return
    with pytest.raises(DataError) as caught:
        open_image(path, modes="strict")
    message = str(caught.value)
    assert message.startswith(f"image {str(path)!r} has ")
    assert all(word in message for word in ("data.image_modes 'strict' refuses", "convert the file", "'rescale'"))


PLAIN: dict[str, Callable[[Path], Any]] = {
    "bits.png": lambda path: Image.new("1", (5, 4), 1).save(path),
    "grey.png": deep(np.arange(20, dtype=np.uint8).reshape(4, 5)),
    "palette.png": lambda path: Image.fromarray(CORNER).quantize(4).save(path),
    "opaque.png": lambda path: Image.new("RGBA", (5, 4), (1, 2, 3, 255)).save(path),
    "opaque-grey.png": lambda path: Image.new("LA", (5, 4), (9, 255)).save(path),
    "cmyk.jpg": lambda path: Image.new("CMYK", (5, 4), (9, 8, 7, 6)).save(path),
    "deep-bytes.png": deep(np.arange(0, 240, 12, dtype=np.uint16).reshape(4, 5)),
    "float-bytes.tif": deep(np.arange(0, 240, 12, dtype=np.float32).reshape(4, 5)),
    "black.png": deep(np.zeros((4, 5), np.uint16)),
    "upright.jpg": rotated(1),
    "senseless.jpg": rotated(77),
    "turned-by-pillow.tif": rotated(6),
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_images_are_the_same_in_every_mode(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PLAIN[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    for modes in IMAGE_MODES:
        processor = ImageProcessor(8, modes=modes)
        assert np.array_equal(np.asarray(processor.load(tmp_path / name)), expected), modes
    assert not caplog.records
    assert {note.kind for note in look(str(tmp_path / name), name, decode=True)[0].notes} <= {"cmyk-image"}


def test_the_frames_of_a_tiff_file_are_turned_once(tmp_path: Path) -> None:
    first, second = Image.fromarray(CORNER), Image.fromarray(CORNER[::-1].copy())
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second], tiffinfo={0x0112: 6})
    with Image.open(tmp_path / "a.tif") as image:
        expected = np.asarray(image.convert("RGB"))
    for modes in IMAGE_MODES:
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif", modes=modes)), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused_unless_as_in_llava(bad: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[1, 1] = bad
    Image.fromarray(values).save(tmp_path / "a.tif")
    for modes in ("rescale", "strict"):
        with pytest.raises(DataError, match=r"a\.tif' has float pixels that are NaN or infinite"):
            open_image(tmp_path / "a.tif", modes=modes)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(tmp_path / "a.tif").mode == "RGB"


def test_damaged_metadata_do_not_hide_an_image(tmp_path: Path) -> None:
    for number, exif in enumerate(
        (b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    ):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(CORNER).save(path, exif=exif)
        for modes in IMAGE_MODES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ImageProcessor(8, modes=modes).load(path).size == (40, 24)


def test_an_image_in_memory_follows_the_same_rule(tmp_path: Path) -> None:
    for name in ("x-ray.png", "rgba.png", "6.jpg", "grey-key.png"):
        path = make(tmp_path, name)
        processor = ImageProcessor(8, modes="rescale")
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(processor.load(image)), np.asarray(processor.load(path)))
            image.load()
            assert torch.equal(processor.pixels(image), processor.pixels(processor.load(path)))
    with pytest.raises(DataError, match="image 'given' has transparent pixels"):
        ImageProcessor(8, modes="strict").load(Image.new("RGBA", (3, 3)))


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="'exact' does not exist; choose one of"):
        ImageProcessor(8, modes="exact")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.sampled_from(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
                     "I", "F", "I;16", "I;16B", "I;16L", "I;16N"]),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.binary(min_size=144, max_size=144),
    st.none() | st.integers(0, 300) | st.binary(max_size=4) | st.tuples(*[st.integers(0, 255)] * 3),
    st.none() | st.binary(max_size=40) | st.integers(0, 9),
)  # fmt: skip
def test_any_image_is_rgb_of_its_size_or_refused_in_one_line(
    mode: str, size: tuple[int, int], data: bytes, transparency: Any, metadata: Any
) -> None:
    deep = {"I": np.int32, "F": np.float32}.get(mode, np.uint16) if mode[0] in "IF" else np.uint8
    bands = len(Image.new(mode, (1, 1)).getbands()) if deep is np.uint8 else 1
    raw = np.frombuffer(data, deep)[: size[0] * size[1] * bands].tobytes()
    image = Image.frombytes("L", size, raw).convert("1") if mode == "1" else Image.frombytes(mode, size, raw)
    if transparency is not None:
        image.info["transparency"] = transparency
    if isinstance(metadata, bytes):
        image.info["exif"] = b"Exif\0\0" + metadata
    elif metadata is not None:
        image.getexif()[0x0112] = metadata
        image.info["exif"] = image.getexif().tobytes()
    for modes in IMAGE_MODES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rgb = ImageProcessor(4, modes=modes).load(image)
            except DataError as error:
                problem = str(error)
                assert problem.startswith("image 'given' ")
                assert "\n" not in problem
                if modes == "llava":
                    with pytest.raises(DECODER_ERRORS):
                        image.convert("RGB")
                continue
            assert modes != "llava" or np.array_equal(np.asarray(rgb), np.asarray(image.convert("RGB")))
        turned = modes != "llava" and metadata in (5, 6, 7, 8)
        assert rgb.mode == "RGB"
        assert (rgb.size == (size[::-1] if turned else size)) or isinstance(metadata, bytes)
        assert ImageProcessor(4, modes=modes).pixels(rgb).shape == (3, 4, 4)


# Training


def source_of(folder: Path, names: list[str]) -> SourceConfig:
    records = [
        {"id": str(n), "image": name, "conversations": raw_sets.talk("<image>\nWhat?", "This.")}
        for n, name in enumerate(names)
    ]
    raw_sets.write_json(folder / "records.json", records)
    return SourceConfig(annotations=str(folder / "records.json"), image_folder=str(folder))


def build(data: DataConfig) -> SupervisedDataset:
    processor = ImageProcessor(8, modes=data.image_modes)
    return build_dataset(data, LlamaSentencePiece(legacy=False), processor, 4, seed=0, epochs=2)


@pytest.mark.parametrize("modes", IMAGE_MODES)
def test_training_and_validation_see_what_inference_sees(modes: Any, tmp_path: Path) -> None:
    names = ["x-ray.png", "rgba.png", "6.jpg", "unit.tif", *(f"plain{n}.png" for n in range(3))]
    for name in names[:4]:
        make(tmp_path, name)
    for name in names[4:]:
        Image.fromarray(CORNER).save(tmp_path / name)
    data = DataConfig(sources={"a": source_of(tmp_path, names)}, image_modes=modes, max_length=64, validation_samples=2)
    dataset = build(data)
    assert dataset.validation is not None
    processor = ImageProcessor(8, modes=modes)
    for part in (dataset, dataset.validation):
        for position in range(len(part)):
            example = part[position]
            shown = names[int(example.id)]
            assert torch.equal(example.images[0], processor.pixels(processor.load(tmp_path / shown)))  # type: ignore[index]
            assert np.array_equal(np.asarray(part.sample(position)[2][0]), np.asarray(processor.load(tmp_path / shown)))
            if modes == "strict":
                assert shown == "6.jpg" or shown.startswith("plain")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_default_warns_once_for_each_source(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, names in (("a", list(DEEP)), ("b", list(TRANSPARENT))):
        for name in names:
            make(tmp_path / folder, name)
    Image.fromarray(CORNER).save(tmp_path / "plain.png")
    sources = {
        "deep": source_of(tmp_path / "a", list(DEEP)),
        "drawings": source_of(tmp_path / "b", list(TRANSPARENT)),
        "plain": source_of(tmp_path, ["plain.png"] * 3),
    }
    dataset = build(DataConfig(sources=sources, max_length=64, validation_samples=1))
    # It writes to a descriptor, which worker processes share.
    monkeypatch.setattr(logging.getLogger("llava_mole"), "handlers", [logging.StreamHandler()])
    for part in (dataset, dataset.validation):
        list(torch.utils.data.DataLoader(part, batch_size=None, num_workers=workers))  # type: ignore[arg-type]
    lines = [line for line in capfd.readouterr().err.splitlines() if "image_modes" in line]
    assert sorted(line.split(": ")[1] for line in lines) == ["deep", "drawings"]
    assert all("records.json:" in line and "`llava-mole check-data` counts them" in line for line in lines)


def test_strict_replaces_refused_images_and_names_them(tmp_path: Path) -> None:
    make(tmp_path, "rgba.png")
    Image.fromarray(CORNER).save(tmp_path / "plain.png")
    source = source_of(tmp_path, ["rgba.png", "plain.png"])
    dataset = build(DataConfig(sources={"a": source}, image_modes="strict", max_length=64))
    replaced = [dataset[position].replaced_image for position in range(len(dataset))]
    (problem,) = {reason for reason in replaced if reason is not None}
    assert problem.startswith(f"{source.annotations}:2: image '{tmp_path}/rgba.png' has transparent pixels")


# prepare and check-data


def run_check(
    world: Path, out: Path, source: SourceConfig, *more: str
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    given = ["check-data", str(world / "config.yaml"), "--out", str(out), "--workers", "1", "--no-tokens"]
    given += ["--data.sources.red.annotations", source.annotations, "--data.mixture.blue", "0"]
    code = main([*given, "--data.sources.red.image_folder", source.image_folder, *more])
    findings = [json.loads(line) for line in (out / "findings.jsonl").read_text(encoding="utf-8").splitlines()]
    return code, json.loads((out / "check_data.json").read_text(encoding="utf-8")), findings


KIND = {**dict.fromkeys(DEEP, "deep-image"), **dict.fromkeys(TRANSPARENT, "transparent-image")}
KIND |= dict.fromkeys(ROTATED, "rotated-image")


@pytest.mark.parametrize("modes", IMAGE_MODES)
def test_check_data_counts_each_kind_and_shows_one(
    modes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from worlds.tiny_models import make_world

    make_world(tmp_path / "world", samples=4)
    for name in ODD:
        make(tmp_path / "own", name)
    source = source_of(tmp_path / "own", list(ODD))
    code, report, findings = run_check(tmp_path / "world", tmp_path / "out", source, "--data.image_modes", modes)
    refused = modes == "strict"
    expected = {n: "refused-image" if refused and KIND[n] != "rotated-image" else KIND[n] for n in ODD}
    assert {f["detail"].split(": ")[0]: f["kind"] for f in findings} == expected
    assert code == int(refused)
    counts = report["sources"][0]["findings"]
    assert counts == {kind: list(expected.values()).count(kind) for kind in expected.values()}
    printed = capsys.readouterr().out
    for kind in counts:
        assert f"red, first {kind}: {source.annotations}:" in printed


def test_prepare_counts_each_kind_and_strict_leaves_refused_ones_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ODD:
        make(tmp_path / "raw", name)
    source_of(tmp_path / "raw", list(ODD))
    for modes, copy in (("llava", []), ("rescale", ["--images", "unpack"])):
        more = ["--check-images", "decode", "--image-modes", modes, *copy]
        done = raw_sets.prepare("llava-json", tmp_path / "raw", tmp_path / modes, *more)
        assert len(done.rows) == len(ODD)
        assert done.defects == {f"{k} kept": list(KIND.values()).count(k) for k in KIND.values()}
    printed = capsys.readouterr().out
    assert "deep-image, first: records.json:2: x-ray.png: 16-bit pixels from 0 to 4095 (mode I;16)" in printed
    for copy in ([], ["--images", "unpack"]):
        more = ["--check-images", "decode", "--image-modes", "strict", "--overwrite", *copy]
        done = raw_sets.prepare("llava-json", tmp_path / "raw", tmp_path / "strict", *more)
        assert [row.id for row in done.rows] == [str(n) for n, name in enumerate(ODD) if name in ROTATED]
        assert done.defects["refused-image dropped"] == len(DEEP) + len(TRANSPARENT)
    given = ["prepare", "llava-json", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "x")]
    assert main([*given, "--image-modes", "strict"]) == 2
    assert "give --check-images decode" in capsys.readouterr().err


def test_an_image_inside_two_records_is_reported_for_both(tmp_path: Path) -> None:
    data = make(tmp_path, "x-ray.png").read_bytes()
    for _ in range(2):
        info = unpack(data, tmp_path / "out", "a", "rows:1 image 1", decode=True)
        assert [note.kind for note in info.notes] == ["deep-image"]


@pytest.mark.parametrize("name", ["little.tif", "big.tif", "wide.tif", "unit.tif", "rgba.tif"])
def test_an_unpacked_tiff_page_keeps_its_pixels(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, name)
    info = unpack_page(f"{path}.0", tmp_path / "out", "g", "x")
    for modes in ("llava", "rescale"):
        unpacked = load_image(info.path, tmp_path / "out", modes=modes)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(unpacked), np.asarray(open_image(path, modes=modes)))  # type: ignore[arg-type]
    assert [note.kind for note in info.notes] == [KIND[name]]


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", raw_sets.image_bytes(1)[:200]])
def test_findings_name_the_file_and_no_buffer(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, str(tmp_path / "a.png")):
        problem = look(source, "scans/a.png", decode=True)[0].problem
        assert problem is not None
        assert problem.detail.startswith("scans/a.png: ")
        assert "object at 0x" not in problem.detail
