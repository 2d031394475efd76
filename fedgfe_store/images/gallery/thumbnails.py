"""Small copies of images, made when they are missing or out of date."""

from __future__ import annotations

import os
import uuid
from io import BytesIO
from pathlib import Path

from PIL import Image

from fedgfe_store.storage.files import naming, placing

SIZE = 256
"""Longest side of a thumbnail in pixels; smaller images keep their size."""

# A little above Pillow's own 80: thumbnails are looked at side by side.
_QUALITY = 82


def thumbnail_name(file: str) -> str:
    """Name the thumbnail of the image `file`."""
    return f"{file.removesuffix('.png')}.webp"


def update_thumbnail(image: Path, thumbnail: Path) -> bool:
    """Make an image's thumbnail unless there is one of its present state.

    Parameters
    ----------
    image : Path
        The image.
    thumbnail : Path
        WebP file; it gets the image's time, by which it is known to be up to date, and is there
        whole or not at all.

    Returns
    -------
    bool
        Whether it was made.

    Raises
    ------
    OSError
        If the image cannot be read, or the thumbnail not written.
    """
    made_from = image.stat()
    if thumbnail.exists() and thumbnail.stat().st_mtime_ns == made_from.st_mtime_ns:
        return False
    with naming(image), Image.open(image, formats=["PNG"]) as opened:
        small = opened.convert("RGB")
    # A small image is shown enlarged, and every flaw with it.
    lossless = max(small.size) <= SIZE
    small.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=3)
    data = BytesIO()
    small.save(data, "WEBP", quality=_QUALITY, lossless=lossless, method=2)
    temporary = thumbnail.with_name(f".{uuid.uuid4().hex}.tmp")
    with naming(thumbnail), placing(thumbnail, temporary):
        with temporary.open("xb") as file:
            file.write(data.getbuffer())
        os.utime(temporary, ns=(made_from.st_atime_ns, made_from.st_mtime_ns))
    return True
