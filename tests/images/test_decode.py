import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysweep.errors import DataError
from raysweep.experiment.config import DataConfig
from raysweep.images import decode, decode_process
from raysweep.images.decode import DecodeOptions, decode_image, decode_images, open_image
from raysweep.images.index import load_index
from raysweep.images.limits import MAX_MEGAPIXELS, MAX_SCANS, WORK_HERE, count_scans, decoding_work

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_lossless_formats_give_the_pixels_back(format):
    image = gradient(40, 30)
    options = {"lossless": True} if format == "WEBP" else {}
    assert decode_image(encode(image, format, **options)).tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, format):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    decoded = decode_image(encode(image, format, exif=exif, **options))
    assert decoded.size == ((32, 16) if orientation < 5 else (16, 32))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    right, bottom = corners[orientation]
    x, y = (decoded.width - 4 if right else 3), (decoded.height - 4 if bottom else 3)
    assert decoded.getpixel((x, y))[0] > 200


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    decoded = decode_image(encode(rgba))
    assert decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (0, 0, 255)
    assert decoded.getpixel((1, 0)) == (127, 127, 127)


def test_grey_with_alpha_is_laid_over_white():
    assert decode_image(encode(Image.new("LA", (2, 2), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_colour_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_a_single_transparent_colour_of_an_rgb_png_is_laid_over_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    decoded = decode_image(encode(image, transparency=(1, 2, 3)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_16_bit_grey_is_scaled_and_not_clipped():
    pixels = np.array([[0, 256, 32896, 65535]], np.uint16)
    for format in ("PNG", "TIFF", "PPM"):
        decoded = decode_image(encode(Image.fromarray(pixels), format))
        assert [decoded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255], format


def test_one_bit_and_cmyk():
    assert decode_image(encode(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = decoded.getpixel((4, 4))
    assert decoded.mode == "RGB"
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert decoded.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("min_side", "size"), [(None, (800, 640)), (400, (800, 640)), (320, (400, 320)), (1, (100, 80))]
)
def test_draft_mode_never_goes_below_the_shorter_side_asked_for(min_side, size):
    assert decode_image(encode(gradient(800, 640), "JPEG"), min_side).size == size


def test_draft_mode_leaves_other_formats_alone():
    assert decode_image(encode(gradient(64, 64)), min_side=8).size == (64, 64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_image_is_an_error_with_a_short_reason(format):
    data = encode(gradient(200, 200), format)
    with pytest.raises(DataError) as raised:
        decode_image(data[: len(data) // 2])
    assert 5 < len(str(raised.value)) <= 200
    assert "0x" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, not an image", "not an image in a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image in a known format"),
    ],
)
def test_what_is_no_image(data, reason):
    with pytest.raises(DataError, match=reason):
        open_image(data)


def bomb() -> bytes:
    """A small BMP whose header announces 40,000 x 40,000 pixels."""
    header = struct.pack("<IiiHHIIiiII", 40, 40000, 40000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + bytes(100)


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(DataError, match="too many pixels"):
        open_image(bomb())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(format):
    data = encode(gradient(1200, 1000), format)
    options = DecodeOptions(max_megapixels=1)
    with pytest.raises(DataError, match=r"1,200 x 1,000 is 1.2 megapixels; data.max_megapixels is 1"):
        open_image(data[: len(data) * 4 // 5] if format not in ("WEBP", "AVIF") else data, options)
    assert decode_image(data, options=DecodeOptions(max_megapixels=1.2)).size == (1200, 1000)


def test_the_default_limit_is_that_of_the_experiment_file():
    assert DataConfig(source="x").max_megapixels == DecodeOptions().max_megapixels == MAX_MEGAPIXELS


def test_tiles_larger_than_their_image_are_refused():
    """This image of 10 x 10 pixels took 1.5 GB."""
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40000, 323: 40000, 324: 134, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 100)
    with pytest.raises(DataError, match=r"a tile has 1,600.0 megapixels"):
        decode_image(data)


def with_scans(image: Image.Image, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan stands in it many times."""
    data = encode(image, "JPEG", progressive=True, quality=10)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (num_scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_by_its_header():
    image = Image.new("L", (64, 64), 90)
    assert decode_image(with_scans(image, MAX_SCANS)).size == (64, 64)
    with pytest.raises(DataError, match=r"too many scans: 3,000; an image has at most 100"):
        open_image(with_scans(image, 3000))


def test_scans_of_what_stands_behind_or_in_the_header_of_a_jpeg_are_not_counted():
    """Phones put a film of some megabytes behind a photo, in which the marker of a scan stands by chance."""
    photo = encode(gradient(640, 480), "JPEG", comment=bytes([0xFF, 0xDA]) * 500)
    film = np.random.default_rng(0).integers(0, 256, 2**24, np.uint8).tobytes()
    assert film.count(bytes([0xFF, 0xDA])) > MAX_SCANS
    assert count_scans(photo + film) == 1
    assert decode_image(photo + film).tobytes() == decode_image(photo).tobytes()
    progressive = encode(gradient(640, 480), "JPEG", progressive=True, exif=b"Exif\0\0" + photo)
    assert count_scans(progressive + progressive) == count_scans(progressive) == 10


def test_each_strip_of_a_tiff_may_be_a_jpeg():
    data = encode(gradient(640, 4800), "TIFF", compression="jpeg", tiffinfo={278: 16})
    assert data.count(bytes([0xFF, 0xDA])) > MAX_SCANS
    assert decode_image(data).size == (640, 4800)
    many = with_scans(Image.new("L", (640, 480), 90), 3000)
    tags = {256: 640, 257: 480, 258: 8, 259: 7, 262: 1, 273: 122, 277: 1, 278: 480, 279: len(many)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with pytest.raises(DataError, match=r"too many scans: 3,000; an image has at most 100"):
        open_image(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + many)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photos_of_phones_are_decoded_here(mode):
    data = encode(Image.new(mode, (8000, 6000)), "JPEG", progressive=True)
    assert decoding_work(open_image(data), data) <= WORK_HERE


def test_a_header_takes_only_so_many_steps():
    jpeg = encode(gradient(64, 48), "JPEG")
    for padding in (b"\xff" * 2**18, b"\xff\xfe\0\2" * 2**17):
        with pytest.raises(DataError, match=r"its header takes more than 100,000 steps to read"):
            open_image(jpeg[:2] + padding + jpeg[2:])
    with pytest.raises(DataError, match=r"its header takes more than 100,000 steps to read"):
        open_image(b"P5\n#" + b"x" * 2**18 + b"\n8 8 255\n" + bytes(64))


def test_a_large_image_is_decoded_apart_and_is_the_same():
    pixels = np.arange(4100 * 4100, dtype=np.uint32).reshape(4100, 4100).astype(np.uint16)
    data = encode(Image.fromarray(pixels), "PNG", compress_level=1)
    apart = decode_image(data)
    assert apart.size == (4100, 4100)
    assert apart.tobytes() == decode.decode_here(data, [None], DecodeOptions())[None].tobytes()


@pytest.fixture
def always_apart(monkeypatch):
    monkeypatch.setattr(decode, "WORK_HERE", 0)


@pytest.mark.usefixtures("always_apart")
def test_what_is_decoded_apart_has_its_sizes_and_its_errors():
    data = encode(gradient(800, 640), "JPEG")
    images = decode_images(data, [None, 320])
    assert {min_side: image.size for min_side, image in images.items()} == {None: (800, 640), 320: (400, 320)}
    assert images[320].tobytes() == decode.decode_here(data, [320], DecodeOptions())[320].tobytes()
    with pytest.raises(DataError, match="cannot be decoded: image file is truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.usefixtures("always_apart")
def test_an_image_gets_only_so_many_seconds(monkeypatch):
    monkeypatch.setattr(decode_process, "MAX_SECONDS", 1)
    with pytest.raises(DataError, match="takes more than 1 s to decode"):
        decode_image(with_scans(Image.new("L", (7000, 7000)), MAX_SCANS))


@pytest.mark.usefixtures("always_apart")
def test_an_image_gets_only_so_much_memory(monkeypatch):
    monkeypatch.setattr(decode_process, "MEMORY_OF_A_PIXEL", 0)
    monkeypatch.setattr(decode_process, "MEMORY_BYTES", 2**29)
    with pytest.raises(DataError, match="takes more memory to decode than an image gets"):
        decode_image(encode(Image.new("RGBA", (6900, 6900)), "TIFF", compression="tiff_lzw"))


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (9, 8, 7, 100)), ("LA", (9, 100)), ("P", 3), ("CMYK", (1, 2, 3, 4))]
)
def test_rows_are_converted_some_at_a_time_without_a_seam(mode, colour, monkeypatch):
    data = encode(Image.new(mode, (50, 41), colour), "TIFF")
    whole = decode_image(data)
    monkeypatch.setattr(decode, "PIXELS_AT_ONCE", 300)
    assert decode_image(data).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("min_side", "size"), [(None, 512), (257, 512), (256, 256), (100, 128), (1, 16)])
def test_a_jpeg_2000_is_decoded_at_a_reduced_size(min_side, size):
    data = encode(gradient(512, 512), "JPEG2000")
    decoded = decode_image(data, min_side)
    assert decoded.size == (size, size)
    whole = gradient(512, 512).resize((size, size), Image.Resampling.BOX)
    assert np.abs(np.asarray(decoded, float) - np.asarray(whole, float)).mean() < 255 / size


def test_a_jpeg_2000_without_smaller_resolutions_is_decoded_whole():
    data = encode(gradient(512, 384), "JPEG2000", num_resolutions=1)
    assert decode_image(data, min_side=64).tobytes() == gradient(512, 384).tobytes()


def test_a_broken_exif_block_does_not_lose_the_image():
    data = encode(gradient(16, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(data).size == (16, 16)


def test_an_image_beyond_pillows_own_limit_is_set_aside_without_pillows_warning(tmp_path, recwarn):
    for number in range(20):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        gradient(4, 4 + number).save(path)
    header = bytearray(bomb())
    header[18:26] = struct.pack("<ii", 12_000, 10_000)
    (tmp_path / "a" / "large.bmp").write_bytes(header)
    index = load_index(DataConfig(source=str(tmp_path), max_bad_fraction=0.1), seed=0)
    assert [row.reason for row in index.bad_rows] == [
        "too many pixels: 12,000 x 10,000 is 120.0 megapixels; data.max_megapixels is 50"
    ]
    assert not [warning for warning in recwarn if "DecompressionBomb" in str(warning.category)]


def test_no_global_state_of_pillow_is_touched():
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode_image(encode(gradient(8, 8)))
    with pytest.raises(DataError):
        open_image(bomb())
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared beans images are not here")
def test_real_photographs_in_draft_mode_look_like_the_full_ones_made_smaller():
    for path in sorted((SHARED / "beans_500_test").glob("*/*.jpg"))[:3]:
        data = path.read_bytes()
        half = decode_image(data, min_side=250)
        whole = decode_image(data).resize(half.size, Image.Resampling.BOX)
        difference = np.abs(np.asarray(half, float) - np.asarray(whole, float)).mean()
        assert half.size == (250, 250)
        assert difference < 3
