"""Folds of rows for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def stratified_folds(
    labels: npt.NDArray[np.integer], num_folds: int, seed: int, groups: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Returns the fold of each row, `(num_rows,)`, 0 to `num_folds - 1`; each fold has about the same share of a class.

    Args:
        labels: class of each row, `(num_rows,)`.
        num_folds: number of folds.
        seed: determines which of the possible folds are made.
        groups: name of each row's group; a group stays in one fold. None: each row is a group of its own.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    folds = np.empty(len(labels), np.int64)
    if groups is None:
        by_class = order[np.argsort(labels[order], kind="stable")]
        folds[by_class] = np.arange(len(labels)) % num_folds
        return folds
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    kinds, classes = np.unique(labels, return_inverse=True)
    counts = np.zeros((members.max() + 1, len(kinds)))
    np.add.at(counts, (members, classes), 1)
    shares = counts / counts.sum(0)
    filled, fold_of = np.zeros((num_folds, len(kinds))), np.empty(len(counts), np.int64)
    # Large groups come first, because small ones can even out what they leave.
    ranks = np.unique(members[order], return_index=True)[1]
    for group in np.lexsort((ranks, -counts.sum(1))):
        growth = ((filled + shares[group]) ** 2 - filled**2).sum(1)
        fold_of[group] = np.lexsort((filled.sum(1), growth))[0]
        filled[fold_of[group]] += shares[group]
    return fold_of[members]
