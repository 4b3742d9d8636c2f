"""Base64 text to the bytes of an image, and how many those may be. Public data sets break the lines of theirs."""

import base64
import binascii
import re

from llava_mole.common.errors import DataError

LARGEST_IMAGE = 64 << 20
"""Most bytes of an encoded image."""
_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,")
_BLANKS = b" \t\r\n"


def decode_base64(text: str | bytes, *, largest: int = LARGEST_IMAGE) -> bytes:
    """The bytes of base64 text. Blanks and line breaks in it, a `data:...;base64,` in front and a missing padding are
    forgiven, as is the URL-safe alphabet; everything else is an error.

    Raises:
        DataError: other characters, a length that cannot be, nothing, or more than `largest` bytes.
    """
    if len(text) > 2 * largest:
        raise DataError(f"base64 text of {len(text):,} characters; an image may have {largest:,} bytes")
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise DataError("not base64: it holds characters that are not ASCII") from None
    match = _DATA_URL.match(data)
    data = data[match.end() if match else 0 :].translate(None, _BLANKS)
    data = data.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    if not data:
        raise DataError("not base64: it is empty")
    try:
        decoded = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(f"not base64: {' '.join(str(error).split())}") from None
    if len(decoded) > largest:
        raise DataError(f"an image of {len(decoded):,} bytes; it may have {largest:,}")
    return decoded
