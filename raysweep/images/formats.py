"""The formats of images that raysweep reads, the same in folders, in tables and when images are decoded."""

from PIL import features

# Pillow's names of the formats by suffix, the usual suffixes first. Formats that Pillow reads with the help of other
# programs (EPS runs Ghostscript on its input), that hold video, or that have no fixed first bytes are not among them.
# fmt: off
_FORMAT_OF = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF",
    ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".jfif": "JPEG", ".jpe": "JPEG",
    ".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".j2c": "JPEG2000", ".jpc": "JPEG2000",
    ".jpf": "JPEG2000", ".jpx": "JPEG2000", ".apng": "PNG",
}
# fmt: on
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # Pillow can be built without these

FORMATS = tuple(
    name for name in dict.fromkeys(_FORMAT_OF.values()) if name not in _OPTIONAL or features.check(_OPTIONAL[name])
)
IMAGE_SUFFIXES = tuple(suffix for suffix, name in _FORMAT_OF.items() if name in FORMATS)
