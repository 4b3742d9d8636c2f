"""Pages of TIFF files, which UReader's rows name as `x.tiff.<page>`, counted from 0, where only `x.tiff` is there."""

import io
import re
from pathlib import Path

from PIL import Image

from llava_mole.data.converters.image_files import ImageFacts, Note, unpack
from llava_mole.data.images import DECODER_ERRORS, FORMATS

_PAGE = re.compile(r"(.+\.tiff?)\.([0-9]{1,6})", re.IGNORECASE | re.DOTALL)
_PLAIN_MODES = ("1", "L", "RGB")


def tiff_page(path: str) -> tuple[str, int] | None:
    """The TIFF file and the page, from 0, that a path speaks of; None for another path."""
    match = _PAGE.fullmatch(path)
    return None if match is None else (match[1], int(match[2]))


def unpack_page(path: str, folder: Path, group: str, name: str) -> ImageFacts:
    """Write one page as `folder/<group>/<sha1>.png`.

    Args:
        path: File name with the page's number behind it.
        folder: The prepared set's image folder.
        group: Folder below it.
        name: What messages call the image.

    Returns:
        The facts; a page that is not there or is damaged is one of them.

    Raises:
        DataError: the page cannot be written.
    """
    found = tiff_page(path)
    if found is None:
        return ImageFacts(name, None, Note("missing-image", name))
    buffer = io.BytesIO()
    try:
        with Image.open(found[0], formats=FORMATS) as image:
            image.seek(found[1])
            page = image if image.mode in _PLAIN_MODES else image.convert("RGB")
            page.save(buffer, "PNG")
    except (Image.DecompressionBombError, MemoryError) as error:
        return ImageFacts(name, None, Note("too-large-image", f"{name}: {error}"))
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ImageFacts(name, None, Note("corrupt-image", f"{name}: {reason}"))
    return unpack(buffer.getvalue(), folder, group, name, decode=False)
