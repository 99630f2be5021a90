"""The images of benchmarks: real images if there are any, repeated to any number without equal files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import ROOT, Options

CLASSES = ("a", "b", "c")
IMAGES_PER_CLASS = 40
SIDE = 500
# Of each 20 images of a class: 14 train, 3 validation, 3 test.
SPLITS = ["train"] * 14 + ["validation"] * 3 + ["test"] * 3


def shared_folder(path: str) -> Path | None:
    """Finds a folder of the shared data: under RAYSWEEP_SHARED, or `shared/` in or above the repository."""
    given = os.environ.get("RAYSWEEP_SHARED")
    places = [Path(given)] if given else [folder / "shared" for folder in (ROOT, *ROOT.parents)]
    return next((place / path for place in places if (place / path).is_dir()), None)


def source_images(options: Options) -> dict[str, list[Path]]:
    """Returns the image files by class: from `--images`, else photographs of bean leaves, else generated images."""
    folder = options.images or shared_folder("data/beans_500_test")
    if folder is None:
        folder = options.scratch / "generated"
        generate_images(folder)
    files = {
        one.name: sorted(path for path in one.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        for one in sorted(folder.iterdir())
        if one.is_dir()
    }
    found = {name: paths for name, paths in files.items() if paths}
    if len(found) < 2:
        raise ValueError(f"{folder}: two or more folders of .jpg files, one a class, are needed")
    return found


def generate_images(folder: Path, num_per_class: int = IMAGES_PER_CLASS, side: int = SIDE) -> None:
    """Writes JPEGs that take about as long to decode as photographs, because they have as much detail."""
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(num_per_class):
            coarse = Image.fromarray(noise.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / name / f"{number}.jpg", quality=90)


def repeat_images(images: dict[str, list[Path]], folder: Path, num_images: int) -> list[Path]:
    """Writes `num_images` files as split/class/number.jpg, evenly over the classes, each with different bytes.

    A copy has a few bytes after the end of the JPEG, which decoders ignore.
    """
    written = []
    for number in range(num_images):
        name = list(images)[number % len(images)]
        place = number // len(images)
        copy, position = divmod(place, len(images[name]))
        path = folder / SPLITS[place % len(SPLITS)] / name / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[name][position].read_bytes() + (f"copy {copy}".encode() if copy else b""))
        written.append(path)
    return written
