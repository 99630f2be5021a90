"""From encoded image bytes to upright RGB pixels, or to a short reason why they cannot be decoded."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image, ImageOps, UnidentifiedImageError

from raysweep.errors import DataError, one_line
from raysweep.images.decode_process import decode_apart
from raysweep.images.formats import FORMATS
from raysweep.images.limits import (
    MAX_MEGAPIXELS,
    MAX_READS,
    WORK_HERE,
    EncodedImage,
    check_bytes,
    check_header,
    decoding_work,
)
from raysweep.images.pixel_depth import USUAL_WHITES, WhiteLevels, decode_low_bytes, is_deep, to_8_bits

LFS_POINTER = b"version https://git-lfs"
PIXELS_AT_ONCE = 2**22
JPEG2000_HALVINGS = 5  # what encoders offer unless they are told otherwise


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How the images of a data set are decoded.

    Attributes:
        max_megapixels: An image with more is refused, before any pixel of it is decoded.
        whites: The values that are white in images of more than 8 bits a channel.
    """

    max_megapixels: float = MAX_MEGAPIXELS
    whites: WhiteLevels = USUAL_WHITES

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecodeOptions:
        """Makes options from the dict that `dataclasses.asdict` gives.

        Raises:
            KeyError, TypeError, ValueError: the dict has other keys or values.
        """
        whites = WhiteLevels(**values["whites"])
        max_megapixels = float(values["max_megapixels"])
        if not (type(whites.integers) is type(whites.floats) is int and min(whites.integers, whites.floats) > 0):
            raise ValueError(f"whites: {values['whites']}; accepted: whole numbers above 0")
        if not 0 < max_megapixels < float("inf"):
            raise ValueError(f"max_megapixels: {max_megapixels:g}; accepted: a number above 0")
        return cls(max_megapixels, whites)


DEFAULT_OPTIONS = DecodeOptions()


def open_image(data: bytes, options: DecodeOptions = DEFAULT_OPTIONS) -> Image.Image:
    """Opens an image by its header; no pixels are decoded yet.

    Raises:
        DataError: the bytes are empty, are no image or too many, or declare too many pixels.
    """
    if not data:
        raise DataError("empty (0 bytes)")
    if data.startswith(LFS_POINTER):
        raise DataError("a Git LFS pointer, not the image itself (run 'git lfs pull')")
    check_bytes(len(data))
    try:
        if len(data) <= MAX_READS:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        else:
            stream = EncodedImage(data)
            image = Image.open(stream, formats=FORMATS)
            stream.is_opened = True
    except DataError:
        raise
    except Exception as error:
        raise DataError(_reason(error)) from error
    check_header(image, data, options.max_megapixels)
    return image


def decode_image(data: bytes, min_side: int | None = None, options: DecodeOptions = DEFAULT_OPTIONS) -> Image.Image:
    """Decodes an image to RGB as a person would see it.

    EXIF orientation is applied, transparent pixels are blended with white, channels of more than 8 bits are scaled to
    8 bits, and an animation is represented by its first frame.

    Args:
        data: The encoded image.
        min_side: Pixels that the shorter side must keep. A JPEG or JPEG 2000 with at least twice as many is decoded at
            a half, a quarter ... of its size, which is several times faster. None decodes at full size.
        options: Limits, and the values that are white.

    Raises:
        DataError: the image cannot be decoded completely; the message is a short reason.
    """
    return decode_images(data, (min_side,), options)[min_side]


def decode_images(
    data: bytes, min_sides: Collection[int | None], options: DecodeOptions = DEFAULT_OPTIONS
) -> dict[int | None, Image.Image]:
    """Decodes an image for several values of `min_side` (see `decode_image`).

    An image that is much work, for the size of its pixels or by the number of its scans, is decoded in a process of
    its own, with limits of time and memory.

    Returns:
        The image for each value of `min_side`.

    Raises:
        DataError: the image cannot be decoded completely; the message is a short reason.
    """
    image = open_image(data, options)
    if decoding_work(image, data) > WORK_HERE:
        return decode_apart(data, min_sides, options)
    return decode_here(data, min_sides, options, image)


def decode_here(
    data: bytes, min_sides: Collection[int | None], options: DecodeOptions, image: Image.Image | None = None
) -> dict[int | None, Image.Image]:
    """Does what `decode_images` does, in this process, however long it takes.

    Values for which the decoder chooses the same size share one decoding. The header determines that size.

    Args:
        data: The encoded image.
        min_sides: Values of `min_side`.
        options: Limits, and the values that are white.
        image: The image, only opened, if the caller has it.
    """
    drafts = {}
    for min_side in set(min_sides):
        drafts[min_side] = _draft(image or open_image(data, options), min_side)
        image = None
    kinds = {min_side: (image.size, _reduction(image)) for min_side, image in drafts.items()}
    one_of_each = dict(zip(kinds.values(), drafts.values(), strict=True))
    decoded = {kind: _decode(image, data, options) for kind, image in one_of_each.items()}
    return {min_side: decoded[kind] for min_side, kind in kinds.items()}


def _draft(image: Image.Image, min_side: int | None) -> Image.Image:
    if min_side is not None:
        # This has an effect on JPEG only. The mode is unchanged, so that draft mode reduces only the size.
        image.draft(image.mode, (min_side, min_side))
        if image.format == "JPEG2000" and min(image.size) >= 2 * min_side:
            cast(Any, image).reduce = min(JPEG2000_HALVINGS, (min(image.size) // min_side).bit_length() - 1)
    return image


def _reduction(image: Image.Image) -> int:
    """Returns how often a JPEG 2000, not yet loaded, is to be halved."""
    return getattr(image, "_reduce", 0) if image.format == "JPEG2000" else 0


def _decode(image: Image.Image, data: bytes, options: DecodeOptions) -> Image.Image:
    try:
        image = _load(image, data, options)
        pixels = _upright(image)
        if is_deep(pixels):
            pixels = to_8_bits(pixels, options.whites, lambda: _upright(decode_low_bytes(image, data)))
        return _by_rows(pixels, _to_rgb)
    except DataError:
        raise
    # Pillow's readers raise many kinds of errors on damaged files: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise DataError(_reason(error)) from error


def _load(image: Image.Image, data: bytes, options: DecodeOptions) -> Image.Image:
    is_deep(image)  # remembers the layout of the channels
    try:
        image.load()
    except OSError:
        if not _reduction(image):
            raise
        # The file has fewer resolutions, or sides that Pillow rounds in another way than the decoder.
        image = open_image(data, options)
        image.load()
    return image


def _by_rows(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts an image to RGB some rows at a time, so that a large one has few copies in memory."""
    num_rows = max(1, PIXELS_AT_ONCE // max(1, image.width))
    if image.height <= num_rows or (image.mode == "RGB" and "transparency" not in image.info):
        return convert(image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        result.paste(convert(image.crop((0, top, image.width, bottom))), (0, top))
    return result


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels can be used although the EXIF block is damaged
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own message contains a memory address
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too many pixels: {error}"
    if isinstance(error, MemoryError):
        return "takes more memory to decode than an image gets"
    text = one_line(error)
    return f"cannot be decoded: {text or type(error).__name__}"[:200]
