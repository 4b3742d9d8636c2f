"""Base64 of every kind becomes bytes, everything else our error."""

import base64
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.images import decode_base64


@pytest.mark.parametrize("change", ["", "lines", "no padding", "url", "safe", "bytes"])
def test_base64_of_every_kind(change: str) -> None:
    data = b"\xfb\xff" + bytes(range(256))
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
