"""What one image may cost: pixels and bytes, judged by its header, and the work of decoding it."""

from __future__ import annotations

from typing import Any

from PIL import Image

from raysweep.errors import DataError

MAX_MEGAPIXELS = 50.0  # the default of data.max_megapixels
MAX_ENCODED_BYTES = 2**29
MAX_SECONDS = 10  # of one CPU, for one image
MAX_SCANS = 100  # encoders make 1 to 14
# Decoders take about 20 ns for each pixel, and a progressive JPEG some nanoseconds for each pixel of each scan. With
# this much work, an image takes a few seconds and less than 500 MB at most. One with more is decoded apart.
WORK_HERE = 160e6
WORK_OF_A_PIXEL = 10
WORK_OF_A_BYTE = 40  # for the decoders that Pillow has in Python: 0.2 to 0.8 microseconds a byte
PYTHON_DECODERS = ("bmp_rle", "ppm", "ppm_plain")
START_OF_SCAN = b"\xff\xda"
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF


def check_bytes(num_bytes: int) -> None:
    """Raises a DataError for a file that is too large to be an image."""
    if num_bytes > MAX_ENCODED_BYTES:
        raise DataError(f"{num_bytes / 1e6:,.0f} MB; an image has at most {MAX_ENCODED_BYTES / 1e6:,.0f} MB")


def check_header(image: Image.Image, data: bytes, max_megapixels: float) -> None:
    """Raises a DataError if an image that is only opened declares more pixels than allowed, or too many scans."""
    if (num_scans := _num_scans(image, data)) > MAX_SCANS:
        raise DataError(f"too many scans: {num_scans:,}; an image has at most {MAX_SCANS}")
    width, height = image.size
    if max(width * height, _tile_pixels(image)) > max_megapixels * 1e6:
        size = f"{width:,} x {height:,} is {width * height / 1e6:,.1f} megapixels"
        if width * height <= max_megapixels * 1e6:
            size = f"a tile has {_tile_pixels(image) / 1e6:,.1f} megapixels"
        raise DataError(f"too many pixels: {size}; data.max_megapixels is {max_megapixels:g}")


def decoding_work(image: Image.Image, data: bytes) -> float:
    """Returns about how much work an image is to decode, in pixels of one scan of a JPEG.

    Args:
        image: The image, only opened.
        data: The encoded image.
    """
    pixels = image.size[0] * image.size[1]
    if any(tile.codec_name in PYTHON_DECODERS for tile in _tiles(image)):
        return float(pixels * WORK_OF_A_PIXEL + len(data) * WORK_OF_A_BYTE)
    if image.format in ("JPEG", "MPO"):
        return float(pixels * max(1, _num_scans(image, data)))
    return float(pixels * max(WORK_OF_A_PIXEL, _num_scans(image, data)))


def _num_scans(image: Image.Image, data: bytes) -> int:
    """Returns the scans of a JPEG, or of all JPEGs in a TIFF; 0 for others.

    The marker of a scan cannot be part of a JPEG's compressed pixels.
    """
    is_jpeg = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
    return data.count(START_OF_SCAN) if is_jpeg else 0


def _tile_pixels(image: Image.Image) -> int:
    """Returns the pixels of a TIFF's tiles, which may be larger than the image, and are decoded as a whole."""
    tags: Any = getattr(image, "tag_v2", {})
    sides = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    return int(sides[0] * sides[1]) if all(isinstance(side, int) for side in sides) else 0


def _tiles(image: Image.Image) -> list[Any]:
    return list(getattr(image, "tile", ()))
