"""One way to read an image file, for training, scoring and every command."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from harness.errors import UserError, one_line

# Raster formats that Pillow decodes itself. Without this list, Pillow goes by a file's bytes whatever its name, and
# hands PostScript to Ghostscript, which executes it.
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI",
    "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip


def open_image(content: bytes) -> Image.Image:
    """An encoded image, not decoded yet. Raises whatever Pillow raises on bytes that are no image of FORMATS."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file in RGB. UserError: it is not a readable image."""
    try:
        with open_image(Path(path).read_bytes()) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises almost any exception on a broken file
        raise UserError(f"{path}: not a readable image ({one_line(error)})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it, in RGB: upright by its EXIF data, transparency over white, 16 bits scaled to 8.

    Raises:
        ValueError: an image of 32-bit numbers, whose white is not defined.
    """
    with contextlib.suppress(Exception):  # broken EXIF data costs no image; broken pixels raise again below
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow's own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not define white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
