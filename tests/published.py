"""Small folders in the forms that datasets are published in."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from raysweep.experiment.config import DataConfig
from raysweep.images.index import ImageIndex, load_index
from raysweep.images.listed_rows import Listing
from raysweep.images.listing import list_source


def png(number: int) -> bytes:
    """A small image, different for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: list[str], start: int = 0) -> None:
    """Writes images that differ from each other, under relative names."""
    for number, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def write_text(path: Path, lines: list[str]) -> None:
    """Writes lines of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def listed(source: object, **keys: Any) -> Listing:
    """Lists a source, given as a path or URI."""
    return list_source(DataConfig(source=str(source), **keys))


def indexed(source: object, **keys: Any) -> ImageIndex:
    """Reads a source, given as a path or URI."""
    return load_index(DataConfig(source=str(source), **keys), seed=0)


def rows_of(listing: Listing, root: Path) -> dict[str, tuple[Any, Any]]:
    """Returns label and split of each row by its path in the folder."""
    return {row.path.removeprefix(f"{root}/"): (row.label, row.split) for row in listing.rows}


def labels_by_split(index: ImageIndex) -> dict[str, Counter[str]]:
    """Returns how many images each split has of each class."""
    counts: dict[str, Counter[str]] = {}
    for split, label in zip(index.table["split"].to_pylist(), index.table["label"].to_pylist(), strict=True):
        counts.setdefault(split, Counter())[index.classes[label]] += 1
    return counts
