"""Image bytes that come as text."""

import base64
import binascii

from llava_mole.errors import DataError


def decode_base64(text: str) -> bytes:
    """The bytes of base64 `text`, which may have a `data:` prefix and white space. Raises DataError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"not valid base64: {error}") from None
