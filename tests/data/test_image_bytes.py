"""Images from bytes and base64: known by content, decoded completely or refused."""

import base64
import contextlib
import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_mole.data.image_bytes import EXTENSIONS, decode_base64, decode_bytes, inspect_image, sniff
from llava_mole.errors import DataError


def encoded(kind: str, mode: str = "RGB", frames: int = 1) -> bytes:
    images = [Image.effect_noise((40, 30), 60 + 20 * n).convert(mode) for n in range(frames)]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(buffer, format=kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_content_decides_what_an_image_is(kind: str, tmp_path: Path) -> None:
    data = encoded(kind)
    assert sniff(data) == kind
    info = inspect_image(data)
    assert (info.format, info.width, info.height, info.animated) == (kind, 40, 30, False)
    (tmp_path / "named.jpg").write_bytes(data)
    assert inspect_image(tmp_path / "named.jpg") == info
    assert decode_bytes(data).size == (40, 30)
    assert decode_bytes(data).mode == "RGB"


def test_animation_is_seen_whatever_the_name(tmp_path: Path) -> None:
    (tmp_path / "cover.jpg").write_bytes(encoded("gif", "P", frames=3))
    info = inspect_image(tmp_path / "cover.jpg")
    assert (info.format, info.animated) == ("gif", True)
    assert inspect_image(encoded("webp", frames=2)).animated


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "jpeg"), ("L", "jpeg"), ("RGBA", "png"), ("1", "png"), ("I;16", "png")]
)
def test_modes_are_named_and_decoded(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, format=kind)
    assert inspect_image(buffer.getvalue()).mode == mode
    assert decode_bytes(buffer.getvalue()).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8", b"RIFF\0\0\0\0WAVE", b"%PDF-1.4"])
def test_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    for source in (data, tmp_path / "a.jpg"):
        (tmp_path / "a.jpg").write_bytes(data)
        with pytest.raises(DataError, match="no image: it"):
            inspect_image(source)


@pytest.mark.parametrize("kind", EXTENSIONS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encoded(kind)
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        inspect_image(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DataError, match="too large to decode"):
        inspect_image(bomb(60_000))
    with pytest.raises(DataError, match="9000 x 9000 pixels; allowed are 1,000,000"):
        inspect_image(bomb(9000), most_pixels=1_000_000)


@pytest.mark.parametrize("change", ["", "lines", "no padding", "url", "safe", "bytes"])
def test_base64_of_every_kind(change: str) -> None:
    data = b"\xfb\xff" + encoded("png")
    text = base64.b64encode(data).decode()
    given_text: str | bytes = {
        "lines": "\r\n ".join(text[n : n + 76] for n in range(0, len(text), 76)),
        "no padding": text.rstrip("="),
        "url": f"data:image/png;base64,{text}",
        "safe": base64.urlsafe_b64encode(data).decode(),
        "bytes": text.encode(),
    }.get(change, text)
    assert decode_base64(given_text) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("====", "it is empty"),
        ("data:image/png;base64,", "it is empty"),
        ("ab!cd", "not base64"),
        ("abcde", "not base64"),
        ("图像图像", "characters that are not ASCII"),
        ("../../etc/passwd\0", "not base64"),
        ("A" * 500, "an image may have 100 bytes|it may have 100"),
        ("A" * 160, "an image of 120 bytes; it may have 100"),
    ],
)
def test_base64_rubbish_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_base64(text, largest=100)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.binary()))
def test_any_text_is_bytes_or_our_error(text: str | bytes) -> None:
    with contextlib.suppress(DataError):
        assert isinstance(decode_base64(text), bytes)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(EXTENSIONS)),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12),
    end=st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_raise_nothing_but_our_error(kind: str, changes: list[tuple[int, int]], end: float) -> None:
    data = bytearray(FILES[kind])
    for position, value in changes:
        data[position % min(len(data), 200)] = value  # headers, where the damage is worst
    for damaged in (bytes(data), bytes(data[: int(end * len(data))])):
        with contextlib.suppress(DataError):
            inspect_image(damaged, most_pixels=10**6)


FILES = {kind: encoded(kind) for kind in EXTENSIONS}
