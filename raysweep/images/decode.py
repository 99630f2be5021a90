"""From encoded image bytes to upright RGB pixels, or to a short reason why they cannot be decoded."""

import io
from collections.abc import Collection
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raysweep.errors import DataError

# Only these are accepted. Pillow has other readers, such as the one for EPS, which runs Ghostscript on its input.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
LFS_POINTER = b"version https://git-lfs"


def open_image(data: bytes) -> Image.Image:
    """Opens an image by its header; no pixels are decoded yet.

    Raises:
        DataError: the bytes are empty, are no image, or declare more pixels than Pillow's decompression bomb limit.
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

    EXIF orientation is applied, transparent pixels are blended with white, 16-bit grey is scaled to 8 bits, and an
    animation is represented by its first frame.

    Args:
        data: The encoded image.
        min_side: Pixels that the shorter side must keep. A JPEG with at least twice as many is decoded at 1/2, 1/4 or
            1/8 of its size, which is several times faster. None decodes at full size.

    Raises:
        DataError: the image cannot be decoded completely; the message is a short reason.
    """
    return decode_images(data, (min_side,))[min_side]


def decode_images(data: bytes, min_sides: Collection[int | None]) -> dict[int | None, Image.Image]:
    """Decodes an image for several values of `min_side` (see `decode_image`).

    Values for which draft mode chooses the same size share one decoding. The header determines that size.

    Returns:
        The image for each value of `min_side`.

    Raises:
        DataError: the image cannot be decoded completely; the message is a short reason.
    """
    drafts = {min_side: _draft(open_image(data), min_side) for min_side in set(min_sides)}
    sizes = {min_side: image.size for min_side, image in drafts.items()}
    one_of_each = {image.size: image for image in drafts.values()}
    decoded = {size: _decode(image) for size, image in one_of_each.items()}
    return {min_side: decoded[size] for min_side, size in sizes.items()}


def _draft(image: Image.Image, min_side: int | None) -> Image.Image:
    if min_side is not None:
        # This has an effect on JPEG only. The mode is unchanged, so that draft mode reduces only the size.
        image.draft(image.mode, (min_side, min_side))
    return image


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except DataError:
        raise
    # Pillow's readers raise many kinds of errors on damaged files: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise DataError(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels can be used although the EXIF block is damaged
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
    """Scales 0..65535 to 0..255; `convert` would clip all values above 255 to white."""
    pixels = np.asarray(cast(Any, image)).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError("32-bit integer pixels; save the image with 8 or 16 bits per channel")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own message contains a memory address
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too many pixels: {error}"
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text or type(error).__name__}"[:200]
