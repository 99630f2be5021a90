"""Nested cross-validation of a baseline, over the images of all splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raysweep.training.baseline_task import BaselineResult, BaselineTask, all_rows, joined
from raysweep.training.folds import stratified_folds
from raysweep.training.intervals import FoldEstimate, fold_estimate
from raysweep.training.population import FeatureRows, FeatureSet

# One of so many parts of a fold's other rows is their validation split.
NUM_PARTS = 8


def estimate_by_folds(
    run: Callable[[BaselineTask], BaselineResult], task: BaselineTask, num_folds: int
) -> FoldEstimate:
    """Returns the accuracy of a baseline by nested cross-validation: train, validation and test are only names here.

    Each fold is classified once, by a classifier whose setting is chosen on the other folds alone, and which is fitted
    to all of them (Varma & Simon 2006, Bias in error estimation when using cross-validation for model selection).

    Args:
        run: the baseline.
        task: what it was given for its test.
        num_folds: number of folds; each class has at least as many groups.
    """
    everything = joined(joined(task.train, task.validation), task.test)
    folds, hits = _folds(everything, num_folds, task.seed), []
    for fold in range(num_folds):
        rest, test = _take(everything, folds != fold), _take(everything, folds == fold)
        parts = _folds(rest, NUM_PARTS, task.seed)
        # The last part is the smallest where groups are few.
        train, validation = _take(rest, parts != parts.max()), _take(rest, parts == parts.max())
        one = replace(task, train=train, validation=validation, test=test, subsets=None, refit=True)
        (logits,) = run(one).test_logits
        hits.append((logits.argmax(-1) == test.labels.cpu()).numpy())
    return fold_estimate(hits)


def _folds(features: FeatureSet, num_folds: int, seed: int) -> Tensor:
    """Returns the fold of each row. A single group is divided, because something must be left to validate on."""
    groups = None if features.groups is None else features.groups.cpu().numpy()
    if groups is not None and len(np.unique(groups)) == 1:
        groups = None
    names = None if groups is None else groups.astype(str).tolist()
    return torch.from_numpy(stratified_folds(features.labels.cpu().numpy(), num_folds, seed, names)).to(features.labels)


def _take(features: FeatureSet, chosen: Tensor) -> FeatureSet:
    """Returns the rows that bools `(num_rows,)` choose; no features are copied."""
    rows = all_rows(features)[chosen]
    parts = {name: _TakenRows(part, rows) for name, part in features.parts.items()}
    return FeatureSet(parts, features.labels[rows], None if features.groups is None else features.groups[rows])


@dataclass(frozen=True)
class _TakenRows:
    """Some rows of a matrix."""

    matrix: FeatureRows
    taken: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.taken), self.matrix.shape[1]

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        return self.matrix[self.taken[rows]]
