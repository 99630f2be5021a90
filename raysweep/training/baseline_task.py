"""What every baseline is given and returns, and what several of them do alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raysweep.encoders.head import Head
from raysweep.training.calibration import fit_temperature
from raysweep.training.folds import stratified_folds
from raysweep.training.metrics import MetricSums, validation_metrics
from raysweep.training.population import FeatureRows, FeatureSet, Subsets
from raysweep.training.ranking import Ranking

NUM_FOLDS = 5
# Rows per read.
CHUNK_ROWS = 4096
# More validation rows tell little: the standard error of the accuracy is below 0.4 %; their scores would fill memory.
MAX_VALIDATION_ROWS = 16_384
# Rows of all folds together. More choose hardly better, and the folds would cost more than the fit.
MAX_FOLD_ROWS = 8192
# What a setting says of a classifier that was fitted to the validation rows too.
REFITTED = {"fitted_to": "train+validation"}


class HeldOut(NamedTuple):
    """Train rows to fit a classifier to, and rows of `features` to judge it on."""

    fit: Tensor
    features: FeatureSet
    rows: Tensor


@dataclass(frozen=True)
class BaselineTask:
    """What a baseline is given.

    Attributes:
        train: features to fit.
        validation: features that show how good the chosen setting is; where nothing else is held out, it is chosen on
            them.
        test: features that are classified once, with the chosen setting.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        subsets: few-shot draws, which share one setting; None for all rows.
        ranking: how settings are ranked that have no loss of their own.
        seed: seed of the folds.
        refit: whether the classifier of the test is fitted to train and validation together. Few-shot classifiers
            never are: the number of their images is what they are about.
    """

    train: FeatureSet
    validation: FeatureSet
    test: FeatureSet
    sources: Mapping[str, tuple[str, ...]]
    num_classes: int
    subsets: Subsets | None
    ranking: Ranking
    seed: int
    refit: bool

    def draws(self) -> list[tuple[Tensor, Tensor]]:
        """Returns row numbers in train and in validation, one pair for each classifier."""
        device = self.train.labels.device
        if self.subsets is None:
            return [(all_rows(self.train), thinned(all_rows(self.validation), MAX_VALIDATION_ROWS))]
        pairs = zip(self.subsets.train, self.subsets.validation, strict=True)
        return [(train.to(device), validation.to(device)) for train, validation in pairs]

    def folds(self) -> tuple[Tensor, Tensor] | None:
        """Returns the train rows that a setting is chosen on and the fold of each, or None if they make no folds.

        They make none if there are fewer groups than folds, and in a few-shot study.
        """
        rows = thinned(all_rows(self.train), MAX_FOLD_ROWS)
        groups = None if self.train.groups is None else [str(group) for group in self.train.groups[rows].tolist()]
        if self.subsets is not None or len(rows if groups is None else set(groups)) < NUM_FOLDS:
            return None
        labels = self.train.labels[rows]
        return rows, torch.from_numpy(stratified_folds(labels.cpu().numpy(), NUM_FOLDS, self.seed, groups)).to(labels)

    def held_out(self) -> list[HeldOut]:
        """Returns what a setting is chosen on: the folds, or the validation rows of each draw."""
        folds = self.folds()
        if folds is None:
            return [HeldOut(train, self.validation, validation) for train, validation in self.draws()]
        rows, numbers = folds
        return [HeldOut(rows[numbers != n], self.train, rows[numbers == n]) for n in range(NUM_FOLDS)]

    @property
    def refits(self) -> bool:
        """Whether the classifier of the test is fitted to train and validation together."""
        return self.refit and self.subsets is None


@dataclass(frozen=True)
class BaselineResult:
    """A baseline with its chosen setting.

    Attributes:
        setting: the chosen setting; with `REFITTED` if it was fitted to validation too.
        validation: metrics on the validation split of classifiers that are fitted to train alone, means over the
            subsets.
        test_logits: float32 `(num_test, num_classes)` per subset, on the CPU; for `knn` log-probabilities.
        temperatures: one per subset, fitted on the validation rows of classifiers that are fitted to train alone.
        heads: one per subset, on the CPU; none for `knn`.
        train_heads: the same, fitted to train alone: what fine-tuning starts from.
        seconds: wall time.
        num_settings: number of compared settings.
    """

    setting: dict[str, Any]
    validation: dict[str, float]
    test_logits: list[Tensor]
    temperatures: tuple[float, ...]
    heads: tuple[Head, ...]
    train_heads: tuple[Head, ...]
    seconds: float
    num_settings: int


def head_result(
    task: BaselineTask,
    setting: dict[str, Any],
    fit_head: Callable[[FeatureSet, Tensor], Head],
    num_settings: int,
    started: float,
) -> BaselineResult:
    """Fits heads of the chosen setting, first to train alone, and classifies the test rows.

    Args:
        task: what the baseline was given.
        setting: the chosen setting.
        fit_head: returns the head of that setting for some rows of some features.
        num_settings: number of compared settings.
        started: `time.perf_counter()` when the baseline began.
    """
    parts = task.sources[setting["features"]]
    train_heads, metrics, temperatures = [], [], []
    for rows, seen in task.draws():
        train_heads.append(fit_head(task.train, rows))
        logits, labels = apply_head(train_heads[-1], task.validation, parts, seen), task.validation.labels[seen]
        metrics.append(metrics_of(logits, labels))
        temperatures.append(fit_temperature(logits, labels))
    heads = train_heads
    if task.refits:
        both = joined(task.train, task.validation)
        heads, setting = [fit_head(both, all_rows(both))], setting | REFITTED
    return BaselineResult(
        setting=setting,
        validation=mean_of(metrics),
        test_logits=[apply_head(head, task.test, parts, all_rows(task.test)).cpu() for head in heads],
        temperatures=tuple(temperatures),
        heads=tuple(head.cpu() for head in heads),
        train_heads=tuple(head.cpu() for head in train_heads),
        seconds=time.perf_counter() - started,
        num_settings=num_settings,
    )


@dataclass(frozen=True)
class _JoinedRows:
    """The rows of two matrices, one after the other."""

    first: FeatureRows
    second: FeatureRows

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[0] + self.second.shape[0], self.first.shape[1]

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        in_first = rows < self.first.shape[0]
        found = self.first[rows[in_first]]
        read = found.new_empty(*rows.shape, self.shape[1])
        read[in_first], read[~in_first] = found, self.second[rows[~in_first] - self.first.shape[0]]
        return read


def joined(first: FeatureSet, second: FeatureSet) -> FeatureSet:
    """Returns the rows of both sets, those of the first one first; no features are copied."""
    parts = {name: _JoinedRows(rows, second.parts[name]) for name, rows in first.parts.items()}
    groups = [one.groups for one in (first, second) if one.groups is not None]
    assert len(groups) in (0, 2), "groups are those of one index"
    return FeatureSet(parts, torch.cat([first.labels, second.labels]), torch.cat(groups) if groups else None)


def all_rows(features: FeatureSet) -> Tensor:
    """Returns the numbers of all rows."""
    return torch.arange(len(features.labels), device=features.labels.device)


def thinned(rows: Tensor, limit: int) -> Tensor:
    """Returns at most `limit` rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // limit))]


def mean_of(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric."""
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def metrics_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns the validation metrics of logits `(num_rows, num_classes)`."""
    sums = MetricSums(1, logits.shape[1], logits.device)
    for chunk, chunk_labels in zip(logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        sums.add(chunk[:, None], chunk_labels)
    return validation_metrics(sums.compute())


def apply_head(head: Head, features: FeatureSet, parts: Sequence[str], rows: Tensor) -> Tensor:
    """Returns the logits `(len(rows), num_classes)` of some rows of features."""
    with torch.no_grad():
        return torch.cat([head(features.source(parts, chunk)) for chunk in rows.split(CHUNK_ROWS)])
