"""The rows of a source: a folder of images, a folder of Parquet files, a single table, or scikit-learn's digits."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pyarrow import fs

from raysweep.errors import DataError, did_you_mean
from raysweep.images.parquet import read_parquet_files
from raysweep.images.splits import SPLIT_NAMES, count_of
from raysweep.images.tables import (
    Listing,
    Row,
    absolute_source,
    join_source,
    read_table,
    reading,
    suffix_of,
)
from raysweep.storage.filesystems import open_filesystem

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SKLEARN_SOURCES = ("sklearn://digits",)


def list_source(data: "DataConfig") -> Listing:
    """Lists the rows of a source. Opens no image.

    Raises:
        DataError: the source does not exist, or contains nothing that raysweep can read.
    """
    source = absolute_source(data.source)
    if source.startswith("sklearn://"):
        return _list_sklearn(source)
    with reading(source):
        filesystem, inner = open_filesystem(source)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.NotFound:
            raise DataError(f"data.source: {source}: no such file or folder")
        if kind != fs.FileType.Directory:
            is_parquet = suffix_of(source) == ".parquet"
            return read_parquet_files([(source, None)], data) if is_parquet else read_table(source, data)
        files = sorted(local_files(source) if "://" not in source else _remote_files(source))
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    tables = [file for file in files if file.lower().endswith(".parquet")]
    # Repositories of Parquet files often contain one or two images for their README.
    if tables and (not images or any(_split_of_file(table)[0] for table in tables)):
        listing = _list_parquet_folder(source, tables, data)
        used = set(tables)
    else:
        listing = _list_image_folder(source, images, files)
        listing.warnings.extend(_unused_columns(source, data))
        used = set(images)
    left_out = [file for file in files if file not in used]
    if left_out:
        listing.warnings.append(f"{count_of(left_out, 'file')} left out: {_kinds(left_out)}")
    return listing


def _unused_columns(source: str, data: "DataConfig") -> list[str]:
    named = [f"data.{key}" for key in ("image", "label", "split") if getattr(data, key) not in (None, "split")]
    return [f"{', '.join(named)} not used: {source} is a folder of images, not a table"] if named else []


def _list_sklearn(source: str) -> Listing:
    if source not in SKLEARN_SOURCES:
        raise DataError(f"data.source: no source '{source}'; {did_you_mean(source, SKLEARN_SOURCES)}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(buffer, "PNG")
        rows.append(Row(f"{source}/{number}", int(label), inline=buffer.getvalue()))
    return Listing(rows)


def local_files(folder: str) -> list[str]:
    """Returns relative paths of the files in a folder, without hidden ones. Links are followed, but not in circles."""

    def walk(path: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(path)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if os.path.realpath(entry.path) not in (*above, real):
                        yield from walk(entry.path, (*above, real))
                # A broken link is listed, and becomes a bad row. A pipe or socket is not: reading it would block.
                elif entry.is_file() or not os.path.exists(entry.path):
                    yield entry.path

    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in walk(folder, ())]


def _remote_files(source: str) -> list[str]:
    filesystem, base = open_filesystem(source)
    # Paths are cut by depth, because only some file systems repeat a leading slash.
    depth = len(base.strip("/").split("/"))
    infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    parts = [info.path.strip("/").split("/")[depth:] for info in infos if info.is_file]
    return ["/".join(names) for names in parts if not any(name.startswith(".") for name in names)]


def _list_image_folder(source: str, images: list[str], files: list[str]) -> Listing:
    """Distinguishes `class/*.jpg` from `split/class/*.jpg`, and takes labels and splits from the folders' names."""
    tables = [file for file in files if file.lower().endswith((".csv", ".tsv", ".jsonl"))]
    hint = f"; to use its table, set data.source to {join_source(source, tables[0])}" if tables else ""
    if not images:
        found = f"{count_of(files, 'file')}: {_kinds(files)}" if files else "nothing"
        raise DataError(
            f"{source}: no images found; looked for {' '.join(IMAGE_SUFFIXES)} and .parquet; found {found}{hint}"
        )
    parts = [image.split("/") for image in images]
    top = {names[0] for names in parts if len(names) > 1}
    # Only names of letters are splits here. Folders 0, 1, 2 are classes, although a split column may use numbers.
    splits = {name for name in top if name.lower() in SPLIT_NAMES}
    split_levels = int(bool(splits) and (splits == top or any(len(names) > 2 for names in parts if names[0] in splits)))
    if split_levels and splits != top:
        raise DataError(
            f"{source}: split folders ({', '.join(sorted(splits))}) and others ({', '.join(sorted(top - splits))}) "
            "side by side; accepted: split/class/*.jpg or class/*.jpg"
        )
    depth = split_levels + 2
    if not any(len(names) >= depth for names in parts):
        raise DataError(
            f"{source}: no class folders; accepted: {'split/' * split_levels}class/*.jpg; found {images[0]}{hint}"
        )
    rows = []
    for image, names in zip(images, parts, strict=True):
        path = join_source(source, image)
        if len(names) < depth:
            rows.append(Row(path, None, problem="lies outside every class folder"))
        else:
            rows.append(Row(path, names[split_levels], names[0] if split_levels else None))
    return Listing(_printable(rows), warnings=_nested_folders(source, parts, depth, top))


def _printable(rows: list[Row]) -> list[Row]:
    """Turns files whose names are not UTF-8 into bad rows, because Arrow tables cannot contain such names."""
    shown = [row.path.encode("utf-8", "backslashreplace").decode() for row in rows]
    return [
        row if row.path == path else Row(path, None, problem="file name is not UTF-8")
        for row, path in zip(rows, shown, strict=True)
    ]


def _nested_folders(source: str, parts: list[list[str]], depth: int, top: set[str]) -> list[str]:
    nested = [names for names in parts if len(names) > depth]
    if not nested:
        return []
    example = "/".join(nested[0])
    if len(nested) == sum(len(names) >= depth for names in parts):
        hint = (
            f" Did you mean data.source: {join_source(source, next(iter(top)))}?"
            if len(top) == 1 and depth == 2
            else ""
        )
        raise DataError(
            f"{source}: every image lies in a folder within a class folder ({example}), so what is the class cannot be "
            f"told; accepted: split/class/*.jpg or class/*.jpg.{hint}"
        )
    return [f"{count_of(nested, 'image')} in folders within class folders, counted for the outer class: {example}"]


def _list_parquet_folder(source: str, files: list[str], data: "DataConfig") -> Listing:
    """Lists Parquet files with splits from their names, as datasets on the Hugging Face hub have them."""
    splits = {file: _split_of_file(file) for file in files}
    known = [file for file in files if splits[file][0]] or files
    configurations = sorted({splits[file][1] for file in known})
    if len(configurations) > 1:
        raise DataError(
            f"{source}: Parquet files in several folders ({', '.join(name or '.' for name in configurations)}); "
            f"name one, as in data.source: {join_source(source, configurations[-1])}"
        )
    listing = read_parquet_files([(join_source(source, file), splits[file][0]) for file in known], data)
    other = sorted(set(files) - set(known))
    if other:
        listing.warnings.append(f"{count_of(other, 'Parquet file')} of no known split left out: {', '.join(other[:3])}")
    return listing


def _split_of_file(file: str) -> tuple[str | None, str]:
    """Returns split and configuration: train, en for `en/train-00000-of-00002.parquet` and `en/train/0000.parquet`."""
    folder, _, name = file.rpartition("/")
    above, _, last = folder.rpartition("/")
    match = re.match(r"[a-z]+", name.lower())
    if match and match.group() in SPLIT_NAMES:
        return SPLIT_NAMES[match.group()], folder
    return (SPLIT_NAMES[last.lower()], above) if last.lower() in SPLIT_NAMES else (None, folder)


def _kinds(files: Sequence[str]) -> str:
    """Returns the suffixes of files and how many files have each, the most common first."""
    kinds = Counter(os.path.splitext(file)[1].lower() or file.rpartition("/")[2] for file in files)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
