"""Splits that names of folders and tables say (train, training_set, val2017), and those of the rows of a table."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from raysweep.errors import DataError
from raysweep.images.listed_rows import Listing, Rows, Values
from raysweep.images.splits import SPLIT_NAMES, SPLITS, Split, count_of, normalize_split

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

# Words that stand beside the name of a split in names of folders: training_set, test_images, train2017.
_BESIDE = {
    "set",
    "images",
    "image",
    "imgs",
    "img",
    "data",
    "split",
    "input",
    "pictures",
    "photos",
    "jpg",
    "jpeg",
    "png",
}


def split_of_folder(name: str) -> Split | None:
    """Returns the split that a folder's name says, if it says nothing else."""
    lower = name.lower()
    if lower in SPLIT_NAMES or lower.removesuffix("set") in SPLIT_NAMES:
        return SPLIT_NAMES.get(lower) or SPLIT_NAMES[lower.removesuffix("set")]
    words = split_words(name)
    named = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return named.pop() if len(named) == 1 and all(word in SPLIT_NAMES or word in _BESIDE for word in words) else None


def split_words(name: str) -> set[str]:
    """Returns the words of a name in lower case: train and labels of `trainLabels_2`."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def split_of_path(path: str) -> Split | None:
    """Returns the split that the outermost folder of a relative path with the name of a split says."""
    return next((split for split in map(split_of_folder, path.split("/")[:-1]) if split), None)


def split_of_table(file: str) -> tuple[Split | None, str]:
    """Returns the split that a table's folder or name says, and the folder that the split's tables have in common.

    `data/train/metadata.csv` and `data/train.csv` are of train, in `data`. `labels.csv` is of no split.
    """
    folder, _, name = file.rpartition("/")
    above, _, last = folder.rpartition("/")
    if split := split_of_folder(last):
        return split, above
    split = _only_split_in(os.path.splitext(name)[0])
    # ISIC2018_Training_GroundTruth/ISIC2018_Training_GroundTruth.csv lies beside such a folder of each other split.
    return split, above if split and _only_split_in(last) == split else folder


def _only_split_in(name: str) -> Split | None:
    named = {SPLIT_NAMES[word] for word in split_words(name) if word in SPLIT_NAMES}
    return named.pop() if len(named) == 1 else None


def take_splits_from_paths(listing: Listing, data: "DataConfig") -> list[str]:
    """Gives the rows of a table without a column of splits those that their paths name. Changes the listing.

    Returns:
        Warnings about it.
    """
    rows = listing.rows
    folders = Values(path.rpartition("/")[0] for path in rows.paths)
    is_named = rows.usable & (rows.positions < 0)
    counts = folders.counts(is_named)
    named = _splits_in({folders.distinct[number]: count for number, count in counts.items()})
    found = set(named.values()) - {None}
    if len(found) < 2 or data.split is None:
        return []
    by_folder = [named.get(folder) for folder in folders.distinct]
    by_row = (by_folder[number] if is_file else None for number, is_file in zip(folders.numbers, is_named, strict=True))
    if any(rows.splits.distinct[number] is not None for number in rows.splits.counts()):
        return compare_splits(rows, by_row, "their paths")
    by_split: Counter[Split | None] = Counter()
    for number, count in counts.items():
        by_split[named[folders.distinct[number]]] += count
    counted = ", ".join(f"{by_split[split]} {split}" for split in SPLITS if by_split[split])
    if None in by_split or "train" not in found:
        reason = "others name none" if None in by_split else "none names train"
        return [f"paths name splits ({counted}), but {reason}: the splits are drawn anew"]
    rows.splits = Values(by_row)
    return [f"splits taken from the folders in the paths ({counted}); data.split: null draws them anew"]


def compare_splits(rows: Rows, by_row: Iterable[Split | None], place: str) -> list[str]:
    """Returns a warning about rows whose column of splits says something else than `by_row`, if there are any."""
    others = (
        row for row, split in zip(rows, by_row, strict=True) if split and known_split(row.split) not in (None, split)
    )
    first = next(others, None)
    if first is None:
        return []
    num_others = 1 + sum(1 for _ in others)
    return [
        f"{count_of(range(num_others), 'row')} with another split in the column of splits, which is used, than by "
        f"{place}: {first.source} ({first.split})"
    ]


def known_split(value: object) -> Split | None:
    """Returns the split that a value stands for; None for other values, which stop the sweep later."""
    try:
        return normalize_split(value)
    except DataError:
        return None


def _splits_in(folders: Mapping[str, int]) -> dict[str, Split | None]:
    """Returns the split that each folder names, on the level on which most files have one, below what all share.

    Args:
        folders: Number of files in each folder.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    if not parts:
        return {}
    first, last = min(parts.values()), max(parts.values())
    shared = next(
        (n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), min(len(first), len(last))
    )
    levels: list[dict[str, Split | None]] = [
        {folder: split_of_folder(names[level]) if len(names) > level else None for folder, names in parts.items()}
        for level in range(shared, max(map(len, parts.values())))
    ]
    return max(
        levels,
        key=lambda named: sum(folders[folder] for folder, split in named.items() if split is not None),
        default=dict.fromkeys(parts),
    )
