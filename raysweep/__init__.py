"""raysweep: which pretrained image encoder fits your images, how to train it, and what it costs."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("raysweep")
except PackageNotFoundError:  # run straight from a source tree that was never installed
    __version__ = "0+unknown"
