"""Images with more than 8 bits a channel: which value is white, and from their values to 8 bits.

Cameras and scanners store 10, 12 or 14 bits in channels of 16, and the file does not say so. The largest value in
a sample of the data set tells it (`judge_whites`), unless the experiment does (`data.bit_depth`).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from raysweep.errors import DataError

BIT_DEPTHS = (8, 10, 12, 14, 16, 20, 24, 32)
FLOAT_TOLERANCE = 0.05  # resampling may overshoot black and white by some percent
ROWS_AT_ONCE = 2**20  # pixels
MAX_JUDGED_PIXELS = 5e8  # some seconds
_OTHER_BYTE = {"B": "L", "L": "B"}  # big-endian and little-endian


@dataclass(frozen=True, slots=True)
class WhiteLevels:
    """The values that are shown as white.

    Attributes:
        integers: For integers of more than 8 bits.
        floats: For floating-point numbers.
    """

    integers: int = 65535
    floats: int = 1

    @classmethod
    def of_bits(cls, bit_depth: int) -> WhiteLevels:
        """Returns the levels of data with this many bits."""
        return cls(2**bit_depth - 1, 2**bit_depth - 1)


USUAL_WHITES = WhiteLevels()


def is_deep(image: Image.Image) -> bool:
    """Whether an image, which may be only opened, has more than 8 bits a channel."""
    return image.mode == "F" or image.mode.startswith("I") or bool(_raw_mode(image))


def judge_whites(images: Iterable[tuple[Image.Image, bytes]]) -> tuple[WhiteLevels, int]:
    """Judges the white levels by a sample of deep images, each only opened, with its bytes.

    The level is the largest number of the smallest usual bit depth that holds all values. A damaged image says nothing.

    Returns:
        The levels, and the number of images that were looked at.
    """
    largest, num_pixels, num_images = {"i": 0.0, "f": 0.0}, 0, 0
    for image, data in images:
        if num_pixels > MAX_JUDGED_PIXELS:
            break
        num_pixels, num_images = num_pixels + image.width * image.height, num_images + 1
        try:
            values = _values(image, data)
        except Exception:  # the pass over the images tells what is wrong with it
            continue
        kind = "f" if values.dtype.kind == "f" else "i"
        found = float(np.nanmax(values)) if values.size else 0.0
        if np.isfinite(found):
            largest[kind] = max(largest[kind], found)
    integers = _white_of(largest["i"]) if largest["i"] > 0 else USUAL_WHITES.integers
    floats = USUAL_WHITES.floats if largest["f"] <= 1 + FLOAT_TOLERANCE else _white_of(largest["f"])
    return WhiteLevels(integers, floats), num_images


def describe_whites(whites: WhiteLevels, num_deep: int, num_judged: int) -> str:
    """Returns a warning about levels that were judged, and are not what the files declare; empty if there are none."""
    levels = [
        f"{kind} have {white:,} as white ({white.bit_length()} bits)"
        for kind, white, usual in (
            ("integers", whites.integers, USUAL_WHITES.integers),
            ("floating-point numbers", whites.floats, USUAL_WHITES.floats),
        )
        if white != usual
    ]
    if not levels:
        return ""
    return (
        f"{num_deep:,} images have more than 8 bits a channel; by the largest value in {num_judged} of them, "
        f"{' and '.join(levels)}; data.bit_depth says otherwise"
    )


def _white_of(largest: float) -> int:
    bits = next((bits for bits in BIT_DEPTHS if largest < 2**bits), BIT_DEPTHS[-1])
    return (1 << bits) - 1


def to_8_bits(image: Image.Image, whites: WhiteLevels, low_bytes: Callable[[], Image.Image]) -> Image.Image:
    """Returns a loaded deep image with 8 bits a channel, grey or with its own channels.

    Args:
        image: The image.
        whites: The values that are white.
        low_bytes: Returns the low bytes of its channels (see `decode_low_bytes`); called only if they are needed.

    Raises:
        DataError: values lie outside 0 to the white level, or their low bytes cannot be read.
    """
    if image.mode == "F":
        return _scale_rows(image, lambda rows: _scale_floats(np.asarray(cast(Any, rows)), whites.floats))
    if image.mode.startswith("I"):
        return _scale_rows(image, lambda rows: _scale(np.asarray(cast(Any, rows)), whites.integers))
    if whites.integers == USUAL_WHITES.integers:
        return image  # Pillow has kept the high byte of each value
    low = low_bytes()
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for rows in _row_ranges(image):
        box = (0, rows.start, image.width, rows.stop)
        values = _join_bytes(image.crop(box), low.crop(box))
        pixels[rows] = values >> 8  # transparency always has 16 bits
        colours = _without_transparency(image, values)
        pixels[rows, :, : colours.shape[-1]] = _scale(colours, whites.integers)
    return Image.frombytes(image.mode, image.size, pixels.tobytes())


def _scale_rows(image: Image.Image, scale: Any) -> Image.Image:
    pixels = np.empty((image.height, image.width), np.uint8)
    for rows in _row_ranges(image):
        pixels[rows] = scale(image.crop((0, rows.start, image.width, rows.stop)))
    return Image.fromarray(pixels)


def _row_ranges(image: Image.Image) -> list[slice]:
    size = max(1, ROWS_AT_ONCE // max(1, image.width))
    return [slice(top, min(top + size, image.height)) for top in range(0, image.height, size)]


def _scale(values: np.ndarray, white: int) -> np.ndarray:
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0:
        raise DataError(f"negative pixel values, down to {smallest}; save the image with values from 0")
    if largest > white:
        raise DataError(
            f"pixel value {largest}, where white is {white}; set data.bit_depth to {_white_of(largest).bit_length()}"
        )
    return ((values.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)


def _scale_floats(values: np.ndarray, white: int) -> np.ndarray:
    smallest, largest = float(values.min()), float(values.max())
    if not np.isfinite([smallest, largest]).all():
        raise DataError("floating-point pixels that are not finite")
    if smallest < -FLOAT_TOLERANCE * white:
        raise DataError(f"negative pixel values, down to {smallest:g}; save the image with values from 0")
    if largest > (1 + FLOAT_TOLERANCE) * white:
        raise DataError(
            f"floating-point pixel value {largest:g}, where white is {white}; "
            f"set data.bit_depth to {_white_of(largest).bit_length()}"
        )
    return np.rint(np.clip(values.astype(np.float64) / white, 0, 1) * 255).astype(np.uint8)


def _values(image: Image.Image, data: bytes) -> np.ndarray:
    """Returns the values of a deep image, without transparency."""
    raw_mode = _raw_mode(image)
    low = decode_low_bytes(image, data) if raw_mode else None
    image.load()
    if low is None:
        return np.asarray(cast(Any, image))
    return _without_transparency(image, _join_bytes(image, low))


def _without_transparency(image: Image.Image, values: np.ndarray) -> np.ndarray:
    return values[..., :-1] if image.getbands()[-1] == "A" else values


def _raw_mode(image: Image.Image) -> str:
    """Returns the layout of an image with several channels of 16 bits, such as `RGB;16B`; else nothing.

    Of such an image, Pillow's decoders keep one byte of each value. `image.info` remembers it once they have run.
    """
    if image.mode[:1] in ("I", "F"):
        return ""
    modes = {_argument(tile) for tile in getattr(image, "tile", ())} or {image.info.get("raw_mode", "")}
    mode = str(modes.pop()) if len(modes) == 1 else ""
    if ";16" in mode:
        image.info["raw_mode"] = mode
        return mode
    return ""


def _argument(tile: Any) -> Any:
    return tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args


def decode_low_bytes(image: Image.Image, data: bytes) -> Image.Image:
    """Decodes the low bytes of an image with several channels of 16 bits: as if they had the other byte order.

    Raises:
        DataError: Pillow cannot do so for this kind of image.
    """
    layout, _, order = _raw_mode(image).rpartition(";16")
    native = "L" if sys.byteorder == "little" else "B"
    other = f"{layout};16{_OTHER_BYTE[native if order == 'N' else order]}"
    again: Any = Image.open(io.BytesIO(data), formats=(str(image.format),))
    again.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other) for tile in again.tile
    ]
    try:
        again.load()
    except ValueError as error:  # Pillow has no such layout
        raise DataError(f"{image.mode} with 16 bits a channel; save it as RGB or grey") from error
    return cast(Image.Image, again)


def _join_bytes(high: Image.Image, low: Image.Image) -> np.ndarray:
    values: np.ndarray = (np.asarray(cast(Any, high)).astype(np.uint16) << 8) | np.asarray(cast(Any, low))
    return values
