"""Which rows of an index a sweep uses: usable rows of each split, few-shot draws, and the list of bad rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import DataError
from raysweep.images.index import BadRow, ImageIndex
from raysweep.images.splits import SPLITS, Split, few_shot
from raysweep.storage.paths import write_csv

MIN_FEW_SHOT_VALIDATION = 16


@dataclass(frozen=True, eq=False, slots=True)
class SplitRows:
    """The usable rows of one split.

    Attributes:
        ids: int64 `(num_rows,)`, row ids.
        labels: int64 `(num_rows,)`, indices into the classes.
        groups: int32 `(num_rows,)`, `ImageIndex.groups` of these rows.
    """

    ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Any) -> SplitRows:
        """Returns the rows at some positions, given as anything that can index a numpy array."""
        return SplitRows(self.ids[places], self.labels[places], None if self.groups is None else self.groups[places])


Rows = Mapping[Split, SplitRows]


@dataclass(frozen=True, eq=False, slots=True)
class Draws:
    """Few-shot draws: which rows each draw trains and validates on. The test split is always used as a whole.

    Attributes:
        train: int64 `(num_draws, num_rows)`, positions in the `SplitRows` of train.
        validation: int64 `(num_draws, num_rows)`, positions in the `SplitRows` of validation.
    """

    train: np.ndarray
    validation: np.ndarray

    @property
    def num_draws(self) -> int:
        """Number of draws."""
        return len(self.train)


def select_rows(index: ImageIndex, bad_rows: Sequence[BadRow]) -> Rows:
    """Returns the rows of each split, without the bad ones.

    Raises:
        DataError: a split has no usable image.
    """
    ids, labels = (index.table[name].to_numpy().astype(np.int64) for name in ("row_id", "label"))
    everything = SplitRows(ids, labels, index.groups)
    splits = np.array(index.table["split"].to_pylist())
    usable = ~np.isin(everything.ids, [row.row_id for row in bad_rows])
    rows: dict[Split, SplitRows] = {}
    for split in SPLITS:
        rows[split] = everything.take((splits == split) & usable)
        if not len(rows[split]):
            num_lost = int((splits == split).sum())
            lost = f" left of {num_lost}: see quarantine.csv" if num_lost else ""
            hint = "each split needs one; splits the source lacks are taken from train, where it has enough images"
            raise DataError(f"data: no {split} images{lost}; {hint}")
    return rows


def count_groups(index: ImageIndex, bad_rows: Sequence[BadRow]) -> list[int]:
    """Returns the number of groups of each class, or of images where none belong together, without the bad rows."""
    table = index.table
    usable = ~np.isin(table["row_id"].to_numpy(), [row.row_id for row in bad_rows])
    groups = np.arange(len(usable)) if index.groups is None else index.groups
    pairs = np.unique(np.stack([table["label"].to_numpy(), groups])[:, usable], axis=1)
    return [int(count) for count in np.bincount(pairs[0], minlength=len(index.classes))]


def draw_subsets(rows: Rows, shots: int | str, num_draws: int, seed: int) -> Draws | None:
    """Draws few-shot subsets of `rows`; returns None for the shots `all`.

    Each draw trains on `shots` rows of each class. It validates on at most max(shots, 16) rows of each class, because
    nobody who has five images of a class has a thousand to validate on. Validation rows never join the training rows.
    The rows of draw k with 5 shots are among its rows with 10.
    """
    if shots == "all":
        return None

    def draw(split: Split, limit: int) -> np.ndarray:
        return np.stack([few_shot(rows[split].labels, limit, seed + number) for number in range(num_draws)])

    return Draws(draw("train", int(shots)), draw("validation", max(int(shots), MIN_FEW_SHOT_VALIDATION)))


def write_quarantine(path: Path, bad_rows: Sequence[BadRow]) -> None:
    """Writes the bad rows and their reasons as CSV. Without bad rows, the file has only a header."""
    write_csv(path, ["row_id", "source", "reason"], [(row.row_id, row.source, row.reason) for row in bad_rows])
