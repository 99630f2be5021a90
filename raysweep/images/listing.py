"""The rows of a source: a folder of images, tables or Parquet files, a single table, or scikit-learn's digits."""

import io
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pyarrow import fs

from raysweep.errors import DataError, did_you_mean
from raysweep.images.class_folders import compare_labels, list_class_folders
from raysweep.images.folder_files import FolderFiles, kinds_of, list_folder
from raysweep.images.formats import IMAGE_SUFFIXES
from raysweep.images.labels import check_classes, spelling_key
from raysweep.images.listed_rows import Listing, Row, Rows
from raysweep.images.parquet import read_parquet_files
from raysweep.images.row_splits import (
    known_split,
    split_of_path,
    split_of_table,
    take_splits_from_paths,
)
from raysweep.images.splits import SPLIT_NAMES, count_of
from raysweep.images.table_sets import is_table, read_tables
from raysweep.images.tables import TABLE_SUFFIXES, read_table, reading, suffix_of
from raysweep.images.texts import Lookup, Texts, hashes_of
from raysweep.storage.filesystems import absolute_source, join_source, open_filesystem, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

SKLEARN_SOURCES = ("sklearn://digits",)
TEXT_TABLES = tuple(suffix for suffix in TABLE_SUFFIXES if suffix != ".parquet")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
PROBLEMS_SHOWN = 3


def list_source(data: "DataConfig") -> Listing:
    """Lists the rows of a source. Opens no image.

    Raises:
        DataError: the source does not exist, or contains nothing that raysweep can read.
    """
    source = absolute_source(data.source)
    if source.startswith("sklearn://"):
        return _list_sklearn(source)
    listing = _list_files(source, data)
    check_classes(source, listing.rows)
    return listing


def _list_files(source: str, data: "DataConfig") -> Listing:
    with reading(source):
        filesystem, inner = open_filesystem(source)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.NotFound:
            raise DataError(f"data.source: {source}: no such file or folder")
        if kind != fs.FileType.Directory:
            return _list_table(source, data)
        found = list_folder(source)
    images = Texts(file for file in found.files if file.lower().endswith(IMAGE_SUFFIXES))
    shards = [file for file in found.files if file.lower().endswith(".parquet") and not is_table(file)]
    # Repositories of Parquet files often contain one or two images for their README.
    if shards and (not images or any(_split_of_shard(shard)[0] for shard in shards)):
        listing = _list_shards(source, shards, data)
    else:
        listing = _list_images(source, images, found, data)
    used = np.concatenate([hashes_of(listing.rows.paths), hashes_of(listing.tables)])
    is_used = np.isin(hashes_of(join_source(source, file) for file in found.files), used)
    left_out = Texts(file for file, is_known in zip(found.files, is_used, strict=True) if not is_known)
    if left_out:
        listing.warnings.append(f"{count_of(left_out, 'file')} left out: {kinds_of(left_out)}")
    archives = [file for file in left_out if file.lower().endswith(ARCHIVE_SUFFIXES)]
    if archives:
        listing.warnings.append(f"{count_of(archives, 'archive')} not unpacked, not read: {', '.join(archives[:3])}")
    listing.warnings += found.describe_ignored()
    return _warn_of_one_split(listing, SPLIT_NAMES.get(_names(source)[-1].lower()), "folder")


def _list_table(source: str, data: "DataConfig") -> Listing:
    is_parquet = suffix_of(source) == ".parquet"
    listing = read_parquet_files([(source, None)], data) if is_parquet else read_table(source, data)
    listing.warnings += take_splits_from_paths(listing, data)
    split, _ = split_of_table("/".join(_names(source)[-2:]))
    return _warn_of_one_split(listing, split, "table")


def _names(source: str) -> list[str]:
    return (split_uri(source)[1] if "://" in source else source).split("/")


def _warn_of_one_split(listing: Listing, split: str | None, place: str) -> Listing:
    if split not in (None, "train") and not any(listing.rows.splits.distinct):
        listing.warnings.append(
            f"data.source names the {place} of the {split} split alone, whose images are split anew; to use every "
            "split as published, name the folder that contains all of them"
        )
    return listing


def _list_images(source: str, images: Texts, found: FolderFiles, data: "DataConfig") -> Listing:
    """Lists a folder of images by its tables, or, where it has none that can be used, by the names of its folders."""
    tables, problems = read_tables(source, found.files, images, data)
    if tables and (tables.image_column or _names_any(tables, source, images)):
        listing = _add_class_folders(source, tables, images, found, problems)
    else:
        try:
            listing = list_class_folders(source, images, found, _hint(source, found.files))
        except DataError as error:
            if tables is None:
                raise DataError("\n  and ".join(map(str, [*problems[:PROBLEMS_SHOWN], error]))) from None
            return tables
        if tables is None and problems and (data.image is not None or data.label is not None):
            raise DataError("\n  and ".join(map(str, problems[:PROBLEMS_SHOWN])))
        listing.warnings += _unused_columns(source, data)
        told = "".join(map(str, problems))
        if unread := [file for file in _tables_to_name(found.files) if file not in told]:
            tables_unread = f"{count_of(unread, 'table')} not read ({', '.join(unread[:PROBLEMS_SHOWN])})"
            listing.warnings.append(f"the classes are the names of folders; {tables_unread}{_hint(source, unread)}")
        if tables:
            problems.append(DataError(f"{', '.join(tables.tables)}: no image of theirs is in {source}"))
    listing.warnings += [f"not used: {problem}" for problem in problems[:PROBLEMS_SHOWN]]
    return listing


def _names_any(tables: Listing, source: str, images: Texts) -> bool:
    paths = Lookup(images, key=lambda image: join_source(source, image))
    return any(path in paths for path in tables.rows.paths)


def _hint(source: str, files: Iterable[str]) -> str:
    """Returns the advice to use a table. The table of one split is none to use alone."""
    tables = _tables_to_name(files)
    return f"; to use its table, set data.source to {join_source(source, tables[0])}" if tables else ""


def _tables_to_name(files: Iterable[str]) -> list[str]:
    return [f for f in files if f.lower().endswith(TEXT_TABLES) and is_table(f) and not split_of_table(f)[0]]


def _unused_columns(source: str, data: "DataConfig") -> list[str]:
    named = [f"data.{key}" for key in ("image", "label", "split") if getattr(data, key) not in (None, "split")]
    return [f"{', '.join(named)} not used: {source} is a folder of images, not a table"] if named else []


def _add_class_folders(
    source: str, tables: Listing, images: Texts, found: FolderFiles, problems: list[DataError]
) -> Listing:
    """Adds the images of class folders in split folders for which there is no table, such as train/class/*.jpg.

    Raises:
        DataError: there are no training images, because their table cannot be used.
    """
    tables.warnings += compare_labels(source, tables.rows, images)
    by_path = Lookup(images, key=lambda image: join_source(source, image))
    covered = {known_split(split) for split in tables.rows.splits.distinct}
    for row in tables.rows:  # those without a split count as train, unless their folders say something else
        if row.split is None:
            place = by_path.find(row.path)
            covered.add(split_of_path(images[place] if place >= 0 else ""))
    is_read = np.isin(hashes_of(join_source(source, image) for image in images), hashes_of(tables.rows.paths))
    rest = Texts(
        image
        for image, is_known in zip(images, is_read, strict=True)
        if not is_known and split_of_path(image) not in (*covered, None)
    )
    folders = _class_folders_like(source, tables, rest, found)
    if problems:
        usable = [split for one in (tables, folders) for split in _usable_splits(one.rows)]
        if not any(split is None or known_split(split) == "train" for split in usable):
            raise problems[0]
    tables.rows.extend(folders.rows)
    tables.warnings += folders.warnings
    is_listed = np.isin(hashes_of(join_source(source, image) for image in rest), hashes_of(folders.rows.paths))
    num_left = len(rest) - int(is_listed.sum())
    if num_left:
        left = (image for image, is_known in zip(rest, is_listed, strict=True) if not is_known)
        splits = ", ".join(sorted({str(split_of_path(image)) for image in left}))
        tables.warnings.append(
            f"{count_of(range(num_left), 'image')} of {splits} in no table and in no folder of a class that a table has"
        )
    return tables


def _usable_splits(rows: Rows) -> list[Any]:
    """Returns the distinct splits of the rows that have no problem."""
    return [rows.splits.distinct[number] for number in rows.splits.counts(rows.usable)]


def _class_folders_like(source: str, tables: Listing, images: Texts, found: FolderFiles) -> Listing:
    """Lists images of split folders by their class folders, if there are such and a table has some of their classes."""
    images = Texts(image for image in images if split_of_path(image.rpartition("/")[0]))
    try:
        listing = list_class_folders(source, images, replace(found, folders=[]))
    except DataError:
        return Listing()
    classes = {spelling_key(str(label)) for label in tables.rows.labels.distinct}
    return listing if any(spelling_key(str(label)) in classes for label in listing.rows.labels.distinct) else Listing()


def _list_sklearn(source: str) -> Listing:
    if source not in SKLEARN_SOURCES:
        raise DataError(f"data.source: no source '{source}'; {did_you_mean(source, SKLEARN_SOURCES)}")
    if threading.active_count() > 1:  # scipy, imported while Ray's thread is halfway through importing torch, fails
        import torch  # noqa: F401
    from sklearn.datasets import load_digits

    digits = load_digits()
    listing = Listing()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(buffer, "PNG")
        listing.rows.append(Row(f"{source}/{number}", int(label), inline=buffer.getvalue()))
    return listing


def _list_shards(source: str, files: list[str], data: "DataConfig") -> Listing:
    """Lists Parquet files with splits from their names, as datasets on the Hugging Face hub have them."""
    splits = {file: _split_of_shard(file) for file in files}
    known = [file for file in files if splits[file][0]] or files
    configurations = sorted({splits[file][1] for file in known})
    if len(configurations) > 1:
        raise DataError(
            f"{source}: Parquet files in several folders ({', '.join(name or '.' for name in configurations)}); "
            f"name one, as in data.source: {join_source(source, configurations[-1])}"
        )
    listing = read_parquet_files([(join_source(source, file), splits[file][0]) for file in known], data)
    listing.tables = [join_source(source, file) for file in known]
    other = sorted(set(files) - set(known))
    if other:
        listing.warnings.append(f"{count_of(other, 'Parquet file')} of no known split left out: {', '.join(other[:3])}")
    return listing


def _split_of_shard(file: str) -> tuple[str | None, str]:
    """Returns split and configuration: train, en for `en/train-00000-of-00002.parquet` and `en/train/0000.parquet`."""
    folder, _, name = file.rpartition("/")
    above, _, last = folder.rpartition("/")
    match = re.match(r"[a-z]+", name.lower())
    if match and match.group() in SPLIT_NAMES:
        return SPLIT_NAMES[match.group()], folder
    return (SPLIT_NAMES[last.lower()], above) if last.lower() in SPLIT_NAMES else (None, folder)
