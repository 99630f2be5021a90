"""The tables of a folder that are read as one set: train/metadata.csv and test/metadata.csv, train.csv and test.csv."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from raysweep.errors import DataError
from raysweep.images.listed_rows import Listing, Row, Rows, Values
from raysweep.images.parquet import read_parquet_files
from raysweep.images.row_paths import split_suffix
from raysweep.images.row_splits import (
    compare_splits,
    known_split,
    split_of_path,
    split_of_table,
    split_words,
    take_splits_from_paths,
)
from raysweep.images.splits import SPLITS, Split
from raysweep.images.tables import TABLE_SUFFIXES, read_table
from raysweep.images.texts import Lookup, hashes_of
from raysweep.storage.filesystems import join_source, parent_source, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

# Names that published datasets (Hugging Face's imagefolder, Roboflow) give to their tables, the surest first.
TABLE_NAMES = ("metadata", "_classes", "labels", "_annotations", "annotations")
ROOT_TABLE_NAMES = ("metadata", "_classes", "_annotations")


def read_tables(
    source: str, files: Sequence[str], images: Sequence[str], data: "DataConfig"
) -> tuple[Listing | None, list[DataError]]:
    """Reads the tables of splits in a folder as one set, or else the table of all images at its top.

    Args:
        source: Absolute path or URI of the folder.
        files: Sorted relative paths of the files in it.
        images: Those of them that are images.
        data: Names of columns.

    Returns:
        The rows of all tables with their splits, None if there is no such table; and why other tables were not read.

    Raises:
        DataError: several folders have tables for the same splits.
    """
    by_folder: dict[str, dict[Split, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in filter(is_table, files):
        split, folder = split_of_table(file)
        if split:
            by_folder[folder][split].append(file)
    problems: list[DataError] = []
    read: dict[str, list[tuple[str, Split | None, Listing]]] = {}
    for folder, tables in by_folder.items():
        splits = [split for split in SPLITS if split in tables]
        listings = [one for split in splits for one in _read_first(source, tables[split], split, data, problems)]
        if listings:
            read[folder] = listings
    with_train = [folder for folder in read if any(split == "train" for _, split, _ in read[folder])]
    folders = sorted(with_train or read, key=lambda folder: (folder.count("/") + bool(folder), folder))
    if len(folders) > 1 and folders[0] and folders[0].count("/") == folders[1].count("/"):
        raise DataError(
            f"{source}: tables of splits in several folders ({', '.join(folders)}); "
            f"name one, as in data.source: {join_source(source, folders[0])}"
        )
    for file, _, _ in (one for folder, listings in read.items() if folder != folders[0] for one in listings):
        problems.append(DataError(f"{join_source(source, file)}: in another folder than the tables of train"))
    chosen = read[folders[0]] if folders else _read_first(source, _tables_of_all(files, data), None, data, problems)
    return (_as_one(source, chosen, images, data) if chosen else None), problems


def is_table(file: str) -> bool:
    """Returns whether a file may be a table of paths. Parquet files of other names hold images.

    A `sample_submission.csv` has the same label in every row, which whoever competes replaces.
    """
    suffix = os.path.splitext(file)[1].lower()
    if {"submission", "submissions"} & split_words(file.rpartition("/")[2]):
        return False
    return suffix in TABLE_SUFFIXES and (suffix != ".parquet" or _stem(file) in ROOT_TABLE_NAMES)


def _tables_of_all(files: Iterable[str], data: "DataConfig") -> list[str]:
    """Returns the tables that lie highest in the folder: those of known names, or all if columns of one are named."""
    names_column = data.image is not None or data.label is not None
    known = [file for file in files if (names_column or _stem(file) in ROOT_TABLE_NAMES) and file.count("/") < 2]
    named = [file for file in known if is_table(file) and not split_of_table(file)[0]]
    highest = [file for file in named if file.count("/") == min(other.count("/") for other in named)]
    return highest if len({file.rpartition("/")[0] for file in highest}) == 1 else []


def _stem(file: str) -> str:
    return os.path.splitext(file.rpartition("/")[2].lower())[0]


def _read_first(
    source: str, files: Iterable[str], split: Split | None, data: "DataConfig", problems: list[DataError]
) -> list[tuple[str, Split | None, Listing]]:
    """Reads the likeliest table of a split, or all its parts (labels-0.csv, labels-1.csv). Others are not read."""
    groups: dict[tuple[int, str, int], list[str]] = defaultdict(list)
    for file in files:
        stem, suffix = _stem(file), os.path.splitext(file)[1].lower()
        rank = TABLE_NAMES.index(stem) if stem in TABLE_NAMES else len(TABLE_NAMES)
        groups[rank, re.sub(r"\d+", "0", stem), TABLE_SUFFIXES.index(suffix)].append(file)
    for _, parts in sorted(groups.items()):
        try:
            listings = [(file, split, _read_one(join_source(source, file), split, data)) for file in parts]
        except DataError as error:
            problems.append(error)
            continue
        _check_parts(source, listings)
        return listings
    return []


def _check_parts(source: str, listings: Sequence[tuple[str, Split | None, Listing]]) -> None:
    """Checks that tables with numbers in their names are parts of one. Folds and versions name the same images."""
    hashes = [np.unique(hashes_of(listing.rows.paths)[_files(listing.rows)]) for _, _, listing in listings]
    if len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes)):
        return
    read: dict[str, str] = {}
    for file, _, listing in listings:
        paths = {path for path, is_file in zip(listing.rows.paths, _files(listing.rows), strict=True) if is_file}
        if twice := sorted(paths & read.keys()):
            raise DataError(
                f"{source}: {read[twice[0]]} and {file} both name {twice[0]}, so they are no parts of one table; "
                "accepted: one table for each split, the others moved elsewhere; or one table as data.source"
            )
        read.update(dict.fromkeys(paths, file))


def _files(rows: Rows) -> np.ndarray:
    """Returns which rows name files and have no problem, bool `(rows,)`."""
    return rows.usable & (rows.positions < 0)


def _read_one(table: str, split: Split | None, data: "DataConfig") -> Listing:
    if table.lower().partition("?")[0].endswith(".parquet"):
        return read_parquet_files([(table, split)], data)
    return read_table(table, data)


def _as_one(
    source: str, tables: Sequence[tuple[str, Split | None, Listing]], images: Sequence[str], data: "DataConfig"
) -> Listing:
    """Joins the rows of several tables, each with the split of its table where it has no column of splits."""
    whole = Listing()
    for file, split, listing in tables:
        table = join_source(source, file)
        warnings = _find_images(table, split, listing, source, images)
        if split:
            warnings += compare_splits(listing.rows, repeat(split, len(listing.rows)), f"its place ({file})")
            listing.rows.splits = Values(
                row.split if row.split is not None or row.problem else split for row in listing.rows
            )
        else:
            warnings += take_splits_from_paths(listing, data)
        if listing.image_column and whole.image_column not in (None, listing.image_column):
            raise DataError(f"{table}: images in column '{listing.image_column}', elsewhere in '{whole.image_column}'")
        whole.image_column = listing.image_column or whole.image_column
        whole.rows.extend(listing.rows)
        whole.row_groups |= listing.row_groups
        whole.warnings += [*listing.warnings, *warnings]
        whole.tables.append(table)
    _check_splits(source, whole.rows)
    return whole


def _check_splits(source: str, rows: Rows) -> None:
    """Checks that the tables of test and validation do not name the files of train, as those of several folds do."""
    by_value = [known_split(value) for value in rows.splits.distinct]
    numbers = np.array([SPLITS.index(split) if split else -1 for split in by_value], np.int8)[rows.splits.numbers]
    hashes = hashes_of(rows.paths)
    train = hashes[(numbers == 0) & (rows.positions < 0)]
    for number, split in enumerate(SPLITS[1:], 1):
        named = np.flatnonzero((numbers == number) & _files(rows))
        num_named = len(np.unique(hashes[named]))
        twice = named[np.isin(hashes[named], train)]
        num_twice = len(np.unique(hashes[twice]))
        if 2 * num_twice > num_named:
            first = min(rows.paths[place] for place in twice.tolist())
            raise DataError(
                f"{source}: the tables name {num_twice} of {num_named} files of {split} in train too, such as "
                f"{first}; accepted: tables of one fold, the others moved elsewhere; or one table as data.source"
            )


def _find_images(table: str, split: Split | None, listing: Listing, source: str, images: Sequence[str]) -> list[str]:
    """Finds the files that a table names from another folder than its own, or without a suffix. Changes the rows."""
    known = Lookup(images, key=lambda image: _plain(join_source(source, image)))
    is_file = _files(listing.rows)
    if any(of_file and _plain(path) in known for path, of_file in zip(listing.rows.paths, is_file, strict=True)):
        return []
    files = [path for path, of_file in zip(listing.rows.paths, is_file, strict=True) if of_file]
    start = f"{_plain(parent_source(table))}/"
    tails = {path: _plain(path).removeprefix(start) for path in files if _plain(path).startswith(start)}
    has_suffix = any(split_suffix(tail)[1] for tail in tails.values())
    by_name = {image if has_suffix else split_suffix(image)[0]: image for image in images}
    alike = _names_by_end(tails.values(), by_name, split)
    base = _common_folder(alike, split)
    if base is not None:
        place = join_source(source, base.rstrip("/")) if base else source
        found = {tail: base + tail for tail in alike if base + tail in by_name}
    else:
        found = {tail: names[0] for tail, names in alike.items() if len(names) == 1}
        if 2 * sum(map(bool, alike.values())) <= len(tails):
            return []
        if several := next((names for names in alike.values() if len(names) > 1), None):
            raise DataError(
                f"{table}: several images have the name that a row has, such as "
                f"{by_name[several[0]]} and {by_name[several[1]]}; "
                "accepted: rows that name the folder too"
            )
        place = f"{len({name.rpartition('/')[0] for name in found.values()})} folders of {source}"

    def moved(row: Row) -> Row:
        name = found.get(tails.get(row.path, "")) if not row.problem and row.position < 0 else None
        return row._replace(path=join_source(source, by_name[name])) if name is not None else row

    listing.rows = Rows(map(moved, listing.rows))
    ids = "" if has_suffix else ", and have no suffix"
    return [f"{table}: its paths start from {place}{ids}"]


def _names_by_end(tails: Iterable[str], names: Iterable[str], split: Split | None) -> dict[str, list[str]]:
    """Returns the files whose names end as each of `tails`. No file of another split is one of train."""
    wanted = dict.fromkeys(tails)
    by_end: dict[str, list[str]] = defaultdict(list)
    depths = {tail.count("/") + 1 for tail in wanted}
    for name in names:
        if split != "train" or split_of_path(name) in ("train", None):
            for depth in depths:
                by_end["/".join(name.rsplit("/", depth)[-depth:])].append(name)
    return {tail: by_end.get(tail, []) for tail in wanted}


def _common_folder(tails: Mapping[str, Sequence[str]], split: Split | None) -> str | None:
    """Returns the folder, with a slash at its end, in which most of the files lie whose names end as `tails`."""
    counts: Counter[str] = Counter()
    for tail, alike in tails.items():
        counts.update(name.removesuffix(tail) for name in alike)
    likely = [folder for folder, number in counts.items() if number > len(tails) / 2]
    of_split = [folder for folder in likely if split_of_path(folder) == split]
    likely = of_split if split and of_split else likely
    return min(likely, key=len) if len(likely) == 1 or "" in likely else None


def _plain(path: str) -> str:
    """Returns a path or URI without options."""
    if "://" not in path:
        return path
    scheme, inner, _ = split_uri(path)
    return f"{scheme}://{inner}"
