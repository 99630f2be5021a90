"""Groups of near copies: images that look the same, though their files differ, by the hashes of `image_hashes`.

Photos of one thing from two sides, or rotated by more than two degrees, have other hashes: see `feature_copies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raysweep.images.image_hashes import find_pairs
from raysweep.images.index import ImageIndex
from raysweep.images.splits import SPLITS, Split, count_of

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with groups of near copies.

    Attributes:
        leaks: For test and validation, pairs of row ids: each image that has near copies in train and no exact one,
            with the first of them.
        conflicts: The first two row ids of each group in which labels differ that have different labels.
    """

    leaks: dict[Split, list[tuple[int, int]]]
    conflicts: list[tuple[int, int]]


def group_near_copies(index: ImageIndex, hashes: np.ndarray, bad_rows: Sequence[int]) -> Groups:
    """Returns the row ids of each group of near copies, ascending, in the order of their first row.

    Exact copies of its images belong to a group. Images that have exact copies only are in none.

    Args:
        index: The images.
        hashes: uint8 `(rows, 32)`, of each row of the index.
        bad_rows: Ids of rows that cannot be used.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    usable = np.flatnonzero(~np.isin(index.table["row_id"].to_numpy(), bad_rows))
    contents = index.table["content_hash"].to_numpy(zero_copy_only=False)[usable]
    _, firsts, numbers = np.unique(contents, return_index=True, return_inverse=True)
    pairs = find_pairs(hashes[usable[firsts]])
    if not len(pairs):
        return ()
    links = coo_array((np.ones(len(pairs), np.int8), tuple(pairs.T)), shape=(len(firsts), len(firsts)))
    _, joined = connected_components(links, directed=False)
    of_row = joined[numbers]
    is_grouped = np.isin(of_row, joined[pairs[:, 0]])
    row_ids, of_row = index.table["row_id"].to_numpy()[usable[is_grouped]], of_row[is_grouped]
    order = np.argsort(of_row, kind="stable")
    starts = np.flatnonzero(np.diff(of_row[order])) + 1
    return tuple(sorted(tuple(sorted(group.tolist())) for group in np.split(row_ids[order], starts)))


def judge_groups(index: ImageIndex, groups: Groups) -> Trouble:
    """Finds the groups that are in several splits, or that have several labels."""
    row_ids = index.table["row_id"].to_numpy()
    hashes, splits, labels = (index.table[name].to_pylist() for name in ("content_hash", "split", "label"))
    leaks: dict[Split, list[tuple[int, int]]] = {split: [] for split in SPLITS if split != "train"}
    conflicts = []
    for group in groups:
        rows = np.searchsorted(row_ids, group).tolist()
        train = [row for row in rows if splits[row] == "train"]
        exact = {hashes[row] for row in train}
        for row in rows:
            # Exact copies have their own warning, from the index.
            if train and splits[row] != "train" and hashes[row] not in exact:
                leaks[splits[row]].append((int(row_ids[row]), int(row_ids[train[0]])))
        other = next((row for row in rows if labels[row] != labels[rows[0]]), None)
        if other is not None:
            conflicts.append((group[0], int(row_ids[other])))
    return Trouble(leaks, conflicts)


def join_groups(index: ImageIndex, groups: Groups) -> ImageIndex:
    """Returns the index with groups of near copies joined to the groups that it has, so that folds keep them whole."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not groups:
        return index
    num_rows = len(index.table)
    numbers = np.arange(num_rows, dtype=np.int32) if index.groups is None else index.groups
    rows = np.searchsorted(index.table["row_id"].to_numpy(), np.concatenate(groups))
    first_rows = np.repeat(rows[np.cumsum([0, *map(len, groups[:-1])])], [len(group) for group in groups])
    num_groups = int(numbers.max()) + 1
    ends = numbers[rows], numbers[first_rows]
    links = coo_array((np.ones(len(rows), np.int8), ends), shape=(num_groups, num_groups))
    return replace(index, groups=connected_components(links, directed=False)[1][numbers].astype(np.int32))


def describe_leaks(split: Split, num_images: int, num_found: int, image: str, copy: str) -> str:
    """Returns the warning about one split.

    Args:
        split: Name of the split.
        num_images: Number of its images.
        num_found: How many of them have a near copy in train; at least one.
        image: One of them.
        copy: Its near copy in train.
    """
    verb = "has" if num_found == 1 else "have"
    return (
        f"{num_found:,} of {num_images:,} {split} images {verb} a near copy in train (leakage), such as {image} and "
        f"{copy}; remove them, or set data.group to keep them in one split; all are in near_copies.json"
    )


def describe_conflicts(num_groups: int, images: tuple[str, str], classes: tuple[str, str]) -> str:
    """Returns the warning about groups with several labels, with two images of one of them as an example."""
    groups = count_of(range(num_groups), "group")
    examples = " and ".join(f"{image} ({name})" for image, name in zip(images, classes, strict=True))
    return (
        f"{groups} of near copies in more than one class (conflicting labels): {examples}; all are in near_copies.json"
    )
