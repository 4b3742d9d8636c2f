"""Images of requests: `data:` addresses, and others only as far as the server's owner allows them.

Bytes and pixels are limited before anything is decoded. Nothing is fetched from an address unless its host is listed,
and redirects are not followed: otherwise clients could make the server read what only the server can reach.
"""

import base64
import binascii
import io
import urllib.error
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image as pil
from PIL.Image import Image

from llava_mole.common.errors import DataError
from llava_mole.common.text import format_bytes
from llava_mole.data.images import DECODER_ERRORS, FORMATS, resolve_image
from llava_mole.serve.api.errors import ApiError

FETCH_SECONDS = 10


@dataclass(frozen=True)
class ImagePolicy:
    """Which images a request may show."""

    max_pixels: int
    max_bytes: int
    hosts: Collection[str] = ()
    """Hosts of http and https addresses."""
    folder: Path | None = None
    """Folder of `file:` addresses."""


def open_image(url: str, policy: ImagePolicy, param: str) -> Image:
    """The image at an address; its header is read, its pixels are not decoded yet.

    Raises:
        ApiError: the policy does not allow it, or it is no image. `param` names the part of the request.
    """
    content = _content(url, policy, param)
    if len(content) > policy.max_bytes:
        raise _refuse(f"has {format_bytes(len(content))}; at most {format_bytes(policy.max_bytes)} are allowed", param)
    try:
        image = pil.open(io.BytesIO(content), formats=FORMATS)
    except pil.DecompressionBombError as error:
        raise _refuse(f"is too large: {error}", param) from None
    except DECODER_ERRORS:
        raise _refuse(f"cannot be read; allowed are the formats {', '.join(FORMATS)}", param) from None
    width, height = image.size
    if width * height > policy.max_pixels:
        raise _refuse(
            f"has {width} x {height} pixels; at most {policy.max_pixels:,} are allowed, so scale it down", param
        )
    return image


def _content(url: str, policy: ImagePolicy, param: str) -> bytes:
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _inline(url, param)
    if scheme in ("http", "https"):
        return _fetch(url, policy, param)
    if scheme == "file":
        return _read(url, policy, param)
    raise _refuse("has an address of an unknown kind; send it as data:image/png;base64,...", param)


def _inline(url: str, param: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _refuse("has a data: address without base64; send it as data:image/png;base64,...", param)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise _refuse("has a data: address whose base64 is damaged", param) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def _fetch(url: str, policy: ImagePolicy, param: str) -> bytes:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    if host.lower() not in {name.lower() for name in policy.hosts}:
        raise _refuse(
            "has an http address, which this server does not open; send the image as data:image/png;base64,... (the "
            "server's owner can allow hosts with --allow-image-host)",
            param,
        )
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _NoRedirects):
        opener.add_handler(handler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    try:
        with opener.open(url, timeout=FETCH_SECONDS) as answer:
            return answer.read(policy.max_bytes + 1)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise _refuse(f"cannot be fetched from {host}: {error}", param) from None


def _read(url: str, policy: ImagePolicy, param: str) -> bytes:
    if policy.folder is None:
        raise _refuse(
            "has a file address, which this server does not open; send the image as data:image/png;base64,... (the "
            "server's owner can allow a folder with --allow-image-folder)",
            param,
        )
    name = unquote(urlsplit(url).path).lstrip("/")
    folder = str(policy.folder.resolve()).lstrip("/")
    name = name.removeprefix(f"{folder}/")
    try:
        with resolve_image(name, policy.folder).open("rb") as file:
            return file.read(policy.max_bytes + 1)
    except (DataError, OSError):
        raise _refuse("is not in the folder that this server allows", param) from None


def _refuse(problem: str, param: str) -> ApiError:
    return ApiError(400, f"the image {problem}", code="invalid_image", param=param)
