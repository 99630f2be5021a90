"""Encoded image bytes to upright RGB pixels, or a short reason why not."""

import io
from collections.abc import Collection
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raysweep.errors import DataError

# A closed list: among Pillow's other readers is EPS, which starts Ghostscript on whatever it is given.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
LFS_POINTER = b"version https://git-lfs"


def open_image(data: bytes) -> Image.Image:
    """Opens an image by its header; no pixels are decoded yet.

    Raises:
        DataError: the bytes are empty, are no image, or announce more pixels than Pillow's bomb limit allows.
    """
    if not data:
        raise DataError("empty (0 bytes)")
    if data.startswith(LFS_POINTER):
        raise DataError("a Git LFS pointer, not the image itself (run 'git lfs pull')")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise DataError(_reason(error)) from error


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decodes an image to RGB as a person would see it.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        data: The encoded image.
        min_side: Pixels that the shorter side must keep. A JPEG of twice that or more is then decoded at 1/2, 1/4 or
            1/8 of its size, which is several times faster. None decodes at full size.

    Raises:
        DataError: with a short reason, for anything that cannot be decoded whole.
    """
    return decode_images(data, (min_side,))[min_side]


def decode_images(data: bytes, min_sides: Collection[int | None]) -> dict[int | None, Image.Image]:
    """Decodes an image for several values of `min_side` (see `decode_image`), by value.

    Values for which draft mode chooses the same size share one decoding; its choice follows from the header.

    Raises:
        DataError: with a short reason, for anything that cannot be decoded whole.
    """
    drafts = {min_side: _draft(open_image(data), min_side) for min_side in set(min_sides)}
    sizes = {min_side: image.size for min_side, image in drafts.items()}
    one_of_each = {image.size: image for image in drafts.values()}
    decoded = {size: _decode(image) for size, image in one_of_each.items()}
    return {min_side: decoded[size] for min_side, size in sizes.items()}


def _draft(image: Image.Image, min_side: int | None) -> Image.Image:
    if min_side is not None:
        # Takes effect for JPEG only; the mode is passed as it is so that only the size is drafted.
        image.draft(image.mode, (min_side, min_side))
    return image


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except DataError:
        raise
    # Pillow's readers raise whatever their parsing stumbled over: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise DataError(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to lose an image whose pixels are whole
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise DataError("floating-point pixels, whose range is unknown; save the image with 8 or 16 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255; `convert` would clip at 255 and return white."""
    pixels = np.asarray(cast(Any, image)).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError("32-bit integer pixels; save the image with 8 or 16 bits per channel")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own words hold a memory address
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too many pixels: {error}"
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text or type(error).__name__}"[:200]
