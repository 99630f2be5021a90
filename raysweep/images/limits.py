"""What one image may cost: pixels and bytes, judged by its header, and the work of decoding it."""

from __future__ import annotations

import io
import re
from typing import Any

from PIL import Image

from raysweep.errors import DataError

MAX_MEGAPIXELS = 50.0  # the default of data.max_megapixels
MAX_ENCODED_BYTES = 2**29
MAX_SECONDS = 10  # of one CPU, for one image
MAX_READS = 100_000  # of a header, part by part: up to some tenths of a second; cameras need some hundred
MAX_SCANS = 100  # encoders make 1 to 14
# Decoders take about 20 ns for each pixel, and a progressive JPEG 1 to 4 ns for each pixel of each scan. With this much
# work, an image takes a few seconds and less than 500 MB at most. One with more is decoded apart.
WORK_HERE = 500e6  # all that phones make: 48 megapixels in 10 scans
WORK_OF_A_PIXEL = 30
WORK_OF_A_BYTE = 125  # for the decoders that Pillow has in Python: 0.2 to 0.8 microseconds a byte
PYTHON_DECODERS = ("bmp_rle", "ppm", "ppm_plain")
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
# Neither an escaped 0xFF of the compressed pixels, nor a restart marker between them.
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
WITHOUT_LENGTH = (0x01, 0xD8)
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
# Where the strips or tiles are, and their bytes.
TILE_PLACES = ((273, 279), (324, 325))


class EncodedImage(io.BytesIO):
    """The bytes of an image, of which Pillow can read a header in so many steps only.

    Pillow reads headers in Python, some of them byte by byte: of 20 MB that stand before the pixels, it takes a minute.
    """

    num_reads = 0
    is_opened = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads bytes.

        Raises:
            DataError: the header has too many parts.
        """
        self.num_reads += 1
        if self.num_reads > MAX_READS and not self.is_opened:
            raise DataError(f"its header takes more than {MAX_READS:,} steps to read")
        return super().read(size)


def check_bytes(num_bytes: int) -> None:
    """Raises a DataError for a file that is too large to be an image."""
    if num_bytes > MAX_ENCODED_BYTES:
        raise DataError(f"{num_bytes / 1e6:,.0f} MB; an image has at most {MAX_ENCODED_BYTES / 1e6:,.0f} MB")


def check_header(image: Image.Image, data: bytes, max_megapixels: float) -> None:
    """Raises a DataError if an image that is only opened declares more pixels than allowed, or too many scans."""
    if (num_scans := _num_scans(image, data, MAX_SCANS)) > MAX_SCANS:
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
    num_scans = _num_scans(image, data, int(WORK_HERE // max(1, pixels)))
    if any(tile.codec_name in PYTHON_DECODERS for tile in _tiles(image)):
        return float(pixels * WORK_OF_A_PIXEL + len(data) * WORK_OF_A_BYTE)
    if image.format in ("JPEG", "MPO"):
        return float(pixels * max(1, num_scans))
    return float(pixels * max(WORK_OF_A_PIXEL, num_scans))


def _num_scans(image: Image.Image, data: bytes, enough: int) -> int:
    """Returns the scans of a JPEG, or the most of a strip or tile of JPEGs in a TIFF; 0 for others.

    Only a number above `enough` is exact, because it takes a while to find that.
    """
    is_jpeg = image.format in ("JPEG", "MPO")
    if not is_jpeg and image.info.get("compression") != "jpeg":
        return 0
    if is_jpeg and _is_sequential(image, data):
        return 1
    most = data.count(bytes([0xFF, START_OF_SCAN]))
    if most <= enough:
        return most
    return count_scans(data) if is_jpeg else _scans_of_tiff(image, data)


def _is_sequential(image: Any, data: bytes) -> bool:
    """Returns whether a JPEG, only opened, has all channels in its first scan: decoders then read no other.

    This takes no time, and is true of nearly all photos.
    """
    length = 6 + 2 * image.layers  # of the header of a scan with all channels, behind which Pillow stops
    header = bytes([0xFF, START_OF_SCAN, 0, length, image.layers])
    return not image.info.get("progressive") and data.startswith(header, image.fp.tell() - length - 2)


def _scans_of_tiff(image: Image.Image, data: bytes) -> int:
    tags: Any = getattr(image, "tag_v2", {})
    places = {
        place for tag, size in TILE_PLACES for place in zip(_numbers(tags, tag), _numbers(tags, size), strict=False)
    }
    if sum(size for _, size in places) > len(data):  # some overlap, which would take long
        return data.count(bytes([0xFF, START_OF_SCAN]))
    return max((data.count(bytes([0xFF, START_OF_SCAN]), start, start + size) for start, size in places), default=0)


def count_scans(data: bytes) -> int:
    """Returns the scans of the JPEG at the start of `data`.

    Phones put other things behind it, such as a film, and a preview into its header: their scans are not decoded.
    """
    num_scans, place = 0, 2
    while (match := MARKER.search(data, place)) and (kind := match[1][0]) != END_OF_IMAGE:
        num_scans += kind == START_OF_SCAN
        place = match.end()
        if kind not in WITHOUT_LENGTH:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return num_scans


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    values = tags.get(tag, ())
    return tuple(value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, int))


def _tile_pixels(image: Image.Image) -> int:
    """Returns the pixels of a TIFF's tiles, which may be larger than the image, and are decoded as a whole."""
    tags: Any = getattr(image, "tag_v2", {})
    sides = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    return int(sides[0] * sides[1]) if all(isinstance(side, int) for side in sides) else 0


def _tiles(image: Image.Image) -> list[Any]:
    return list(getattr(image, "tile", ()))
