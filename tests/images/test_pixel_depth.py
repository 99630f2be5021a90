"""Images with more than 8 bits a channel."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from raysweep.errors import DataError
from raysweep.experiment.config import DataConfig
from raysweep.images.decode import DecodeOptions, decode_image, open_image
from raysweep.images.index import load_index
from raysweep.images.pixel_depth import WhiteLevels, judge_whites
from raysweep.storage.paths import signature

TWELVE_BITS = DecodeOptions(whites=WhiteLevels.of_bits(12))


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png48(values: np.ndarray) -> bytes:
    """A PNG with 16 bits in each of three or four channels, which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, order="<", sample_format=1, big=False) -> bytes:
    """An uncompressed TIFF or BigTIFF of one strip, in any byte order and sample format."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    pixels, bits = values.astype(values.dtype.newbyteorder(order)).tobytes(), 8 * values.dtype.itemsize
    first = 16 + 8 + 20 * 10 + 8  # where the values of long entries begin; enough for a small TIFF too
    colours = (struct.pack(f"{order}3H", *[bits] * 3), struct.pack(f"{order}3H", *[sample_format] * 3))
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if channels == 3 else 1, 273: first + 12, 277: channels,
            278: height, 279: len(pixels), 339: sample_format}  # fmt: skip
    if channels == 3:
        tags |= {258: first, 339: first + 6}
    entry = f"{order}HHQII" if big else f"{order}HHII"
    entries = b""
    for tag, value in tags.items():
        is_list = channels == 3 and tag in (258, 339)
        entries += struct.pack(entry, tag, 3 if is_list else 4, 3 if is_list else 1, value, *[0] * big)
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(tags))
    else:
        head = mark + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return (head + entries).ljust(first, b"\0") + colours[0] + colours[1] + pixels


RAMP = np.array([[0, 16, 2048, 4095]], np.uint16)
GREYS = [0, 1, 128, 255]


def greys(image: Image.Image) -> list[int]:
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


@pytest.mark.parametrize(
    "data",
    {
        "png": encode(Image.fromarray(RAMP)),
        "tiff": encode(Image.fromarray(RAMP), "TIFF"),
        "compressed tiff": encode(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        "big-endian tiff": tiff(RAMP, ">"),
        "bigtiff": tiff(RAMP, big=True),
        "signed": tiff(RAMP.astype(np.int16), sample_format=2),
        "32 bits": tiff(RAMP.astype(np.uint32)),
        "signed 32 bits": tiff(RAMP.astype(np.int32), sample_format=2),
        "floats": tiff(RAMP.astype(np.float32), sample_format=3),
        "colour png": png48(np.repeat(RAMP[..., None], 3, -1)),
        "colour tiff": tiff(np.repeat(RAMP[..., None], 3, -1)),
        "big-endian colour tiff": tiff(np.repeat(RAMP[..., None], 3, -1), ">"),
    }.items(),
    ids=lambda item: item[0],
)
def test_data_of_12_bits_keep_their_grey_levels(data):
    _, data = data
    whites, num_judged = judge_whites([(open_image(data), data)])
    assert num_judged == 1
    assert 4095 in (whites.integers, whites.floats)
    assert greys(decode_image(data, options=DecodeOptions(whites=whites))) == GREYS
    assert greys(decode_image(data, options=TWELVE_BITS)) == GREYS


def test_transparency_of_16_bits_keeps_its_range():
    values = np.array([[[4095, 0, 0, 65535], [4095, 0, 0, 0]]])
    decoded = decode_image(png48(values), options=TWELVE_BITS)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    data = png48(values)
    assert judge_whites([(open_image(data), data)])[0].integers == 4095


@pytest.mark.parametrize(
    ("largest", "white"),
    [(0, 65535), (3, 255), (255, 255), (256, 1023), (1023, 1023), (9000, 16383), (16384, 65535), (65535, 65535)],
)
def test_the_largest_value_tells_the_bit_depth(largest, white):
    data = encode(Image.fromarray(np.array([[0, largest]], np.uint16)))
    assert judge_whites([(open_image(data), data)])[0] == WhiteLevels(integers=white)


@pytest.mark.parametrize(("largest", "white"), [(0.0, 1), (0.7, 1), (1.02, 1), (254.5, 255), (3000.0, 4095)])
def test_floating_point_numbers_to_one_or_of_a_bit_depth(largest, white):
    data = tiff(np.array([[0, largest]], np.float32), sample_format=3)
    whites, _ = judge_whites([(open_image(data), data)])
    assert whites == WhiteLevels(floats=white)
    expected = round(255 * min(1, largest / white))
    assert greys(decode_image(data, options=DecodeOptions(whites=whites))) == [0, expected]


@pytest.mark.parametrize(
    ("values", "sample_format", "reason"),
    [
        (np.array([[-5, 3]], np.int16), 2, "negative pixel values, down to -5"),
        (np.array([[0, 10**6]], np.int32), 2, "pixel value 1000000, where white is 65535; set data.bit_depth to 20"),
        (np.array([[-0.5, 1]], np.float32), 3, "negative pixel values, down to -0.5"),
        (np.array([[0, np.nan]], np.float32), 3, "not finite"),
        (np.array([[0, 4000]], np.float32), 3, "value 4000, where white is 1; set data.bit_depth to 12"),
    ],
)
def test_values_outside_the_range_are_refused_rather_than_cut(values, sample_format, reason):
    with pytest.raises(DataError, match=reason):
        decode_image(tiff(values, sample_format=sample_format))


def test_16_bit_colours_are_as_they_were():
    values = np.array([[[0, 255, 256], [65535, 32896, 511]]])
    assert list(decode_image(png48(values)).tobytes()) == [0, 0, 1, 255, 128, 1]


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 4096, (6, 5), np.uint16)
        path = tmp_path / "ab"[number % 2] / f"{number:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path


def test_the_range_is_judged_over_the_data_set_and_part_of_the_signature(folder):
    index = load_index(DataConfig(source=str(folder)), seed=0)
    assert index.decode_options == DecodeOptions(whites=WhiteLevels(integers=4095))
    (warning,) = (text for text in index.warnings if "bits" in text)
    assert warning == (
        "40 images have more than 8 bits a channel; by the largest value in 40 of them, integers have 4,095 as white "
        "(12 bits); data.bit_depth says otherwise"
    )
    as_16 = load_index(DataConfig(source=str(folder), bit_depth=16), seed=0)
    assert not any("bits" in text for text in as_16.warnings)
    assert as_16.decode_options.whites.integers == 65535
    as_12 = load_index(DataConfig(source=str(folder), bit_depth=12), seed=0)
    assert as_12.decode_options.whites == WhiteLevels.of_bits(12)
    assert len({index.row_signature, as_16.row_signature, as_12.row_signature}) == 3
    assert len({index.fingerprint, as_16.fingerprint, as_12.fingerprint}) == 3


def test_one_brighter_image_makes_the_range_that_of_16_bits_without_a_word(folder):
    Image.fromarray(np.full((6, 5), 60000, np.uint16)).save(folder / "a" / "00.tif")
    index = load_index(DataConfig(source=str(folder)), seed=0)
    assert index.decode_options == DecodeOptions()
    assert not any("bits" in text for text in index.warnings)


def test_caches_of_8_bit_data_keep_their_signature(tmp_path):
    for number in range(20):
        path = tmp_path / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Image.new("L", (2, 2), number)))
    index = load_index(DataConfig(source=str(tmp_path)), seed=0)
    assert index.decode_options == DecodeOptions()
    hashes = "".join(f"{content.hex()}\n" for content in index.table["content_hash"].to_pylist())
    parts = np.arange(20).tobytes(), hashes.encode()
    assert index.row_signature == signature([hashlib.sha256(part).hexdigest() for part in parts])


def test_a_damaged_image_says_nothing_of_the_range():
    good = encode(Image.fromarray(RAMP.repeat(50, 0)), compress_level=0)
    bad = good[:90]
    assert judge_whites([(open_image(bad), bad), (open_image(good), good)])[0].integers == 4095
