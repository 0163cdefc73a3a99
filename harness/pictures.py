"""Reads image files, in the same way for every command."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from harness.errors import UserError, one_line

# Raster formats that Pillow decodes itself. Without this list, Pillow detects any format from the bytes, whatever the
# name, and runs Ghostscript on PostScript.
FORMATS = [
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI",
    "TIFF", "WEBP", "XBM", "XPM", "TGA",  # TGA is last: it has no magic number
]  # fmt: skip
RAW_SUFFIXES = {".bw", ".rgb", ".rgba", ".icb", ".vda", ".vst"}  # registered for SGI and TGA, but common for raw pixels
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} - RAW_SUFFIXES
IMAGE_SUFFIXES |= {"", ".mpo"}  # "": web datasets often have images without a suffix


def open_image(content: bytes) -> Image.Image:
    """Opens an encoded image without decoding it.

    Raises:
        UnidentifiedImageError: not in one of FORMATS. A broken file may raise almost any exception.
    """
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("unsupported image format") from None


def read_image(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
    """Reads an image file, or its `content`, and converts it with `to_rgb`. UserError: it is not a readable image."""
    try:
        with open_image(Path(path).read_bytes() if content is None else content) as image:
            return to_rgb(image)
    except Exception as error:
        raise UserError(f"{path}: not a readable image ({one_line(error)})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB as a viewer shows it: rotated by its EXIF orientation, transparency over white.

    Raises:
        ValueError: 32-bit gray, which has no defined white level.
    """
    image.load()  # raises on broken pixels; for JPEG 2000, only the first load does
    with contextlib.suppress(Exception):  # broken EXIF is ignored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit gray (mode {image.mode}) has no defined white level")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
