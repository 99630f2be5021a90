"""Classifiers that cost almost nothing once features exist: k nearest neighbours, and ridge regression.

Neither is trained step by step: neighbours are searched, and one eigendecomposition serves every ridge strength
(big_vision, evaluators/fewshot_lsr.py). Each has a row of the leaderboard beside the probe's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.encoders.head import Head
from raysweep.training.metrics import MetricSums, validation_metrics
from raysweep.training.population import FeatureSet, Subsets
from raysweep.training.ranking import Ranking
from raysweep.training.ridge import STRENGTHS, RidgePath, fit_ridge_path

if TYPE_CHECKING:
    from raysweep.experiment.studies import Baseline

NEIGHBOURS = (10, 20)
VOTE_TEMPERATURE = 0.07
# Similarities are computed for blocks of so many queries and so many train rows.
CHUNK_ROWS = 4096
# More rows do not choose better (the standard error of the accuracy is below 0.4 %); their scores would fill memory.
MAX_CHOICE_ROWS = 16_384


@dataclass(frozen=True)
class BaselineResult:
    """A baseline with the setting that was best on validation.

    Attributes:
        setting: the best setting.
        validation: metrics on the validation split, means over the subsets.
        test_logits: float32 `(num_test, num_classes)` per subset, on the CPU; for `knn` log-probabilities.
        heads: one per subset, on the CPU; none for `knn`.
        seconds: wall time.
        num_settings: number of compared settings.
    """

    setting: dict[str, Any]
    validation: dict[str, float]
    test_logits: list[Tensor]
    heads: tuple[Head, ...]
    seconds: float
    num_settings: int


def run_knn(
    train: FeatureSet,
    validation: FeatureSet,
    test: FeatureSet,
    *,
    sources: Mapping[str, tuple[str, ...]],
    num_classes: int,
    subsets: Subsets | None,
    ranking: Ranking,
) -> BaselineResult:
    """Classifies by the nearest train rows: cosine similarity, votes with weight exp(similarity / 0.07).

    Wu et al. 2018 (Unsupervised feature learning via non-parametric instance discrimination); DINO's eval_knn.py.

    Args:
        train: features of the possible neighbours.
        validation: features on which the number of neighbours and the source are chosen.
        test: features that are classified once, with the chosen setting.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        subsets: few-shot draws, which share one setting; None for all rows.
        ranking: how settings are ranked, by means over the subsets.
    """
    started = time.perf_counter()
    train_rows, validation_rows = _rows(train, validation, subsets)
    counts = sorted({min(count, len(train_rows[0])) for count in NEIGHBOURS})
    num_settings, best = len(sources) * len(counts), None
    for source, parts in sources.items():
        nearest = [
            _neighbours(train, candidates, validation, queries, parts, counts[-1])
            for candidates, queries in zip(train_rows, validation_rows, strict=True)
        ]
        for count in counts:
            votes = [_votes(*near, count, num_classes) for near in nearest]
            labels = [validation.labels[rows] for rows in validation_rows]
            metrics = _mean([_metrics(*each) for each in zip(votes, labels, strict=True)])
            rank = ranking.key(metrics)
            if best is None or rank > best[0]:
                best = rank, count, source, metrics
    assert best is not None, "an encoder has at least one feature source"
    _, count, source, metrics = best
    nearest = [_neighbours(train, rows, test, _all_rows(test), sources[source], count) for rows in train_rows]
    logits = [_votes(*near, count, num_classes).cpu() for near in nearest]
    setting = {"k": count, "features": source}
    return BaselineResult(setting, metrics, logits, (), time.perf_counter() - started, num_settings)


def run_ridge(
    train: FeatureSet,
    validation: FeatureSet,
    test: FeatureSet,
    *,
    sources: Mapping[str, tuple[str, ...]],
    num_classes: int,
    subsets: Subsets | None,
    ranking: Ranking,
) -> BaselineResult:
    """Regresses one-hot targets on features, with intercept; chooses source, normalisation, strength on validation.

    As big_vision's evaluators/fewshot_lsr.py, but with a search over the strength. Then a temperature per subset, part
    of the heads, calibrates the logits on validation (Guo et al. 2017).

    Args:
        train: features to fit.
        validation: features on which setting and temperature are chosen.
        test: features that are classified once, with the chosen heads.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        subsets: few-shot draws, which share one setting; None for all rows.
        ranking: how settings are ranked, by means over the subsets; the lower squared error breaks ties.
    """
    started = time.perf_counter()
    train_rows, validation_rows = _rows(train, validation, subsets)
    best: tuple[tuple[float, float], dict[str, Any], list[RidgePath]] | None = None
    combinations = [(source, normalize) for source in sources for normalize in NORMALIZATIONS]
    for source, normalize in combinations:
        paths = [fit_ridge_path(train, rows, sources[source], normalize, num_classes) for rows in train_rows]
        tables = [
            path.metrics(validation, rows, ranking.metric) for path, rows in zip(paths, validation_rows, strict=True)
        ]
        for strength, *per_subset in zip(STRENGTHS, *tables, strict=True):
            rank = ranking.key(_mean(per_subset), "squared_error")
            if best is None or rank > best[0]:
                best = rank, {"strength": strength, "features": source, "normalize": normalize}, paths
    assert best is not None, "an encoder has at least one feature source"
    _, setting, paths = best
    parts = sources[setting["features"]]
    heads, metrics = [], []
    for path, rows in zip(paths, validation_rows, strict=True):
        labels = validation.labels[rows]
        heads.append(path.head(setting["strength"], validation, rows))
        metrics.append(_metrics(_apply(heads[-1], validation, parts, rows), labels))
    logits = [_apply(head, test, parts, _all_rows(test)).cpu() for head in heads]
    num_settings, seconds = len(combinations) * len(STRENGTHS), time.perf_counter() - started
    on_cpu = tuple(head.cpu() for head in heads)
    return BaselineResult(setting, _mean(metrics), logits, on_cpu, seconds, num_settings)


class RunBaseline(Protocol):
    """A function that chooses a baseline's setting on validation and classifies the test rows, as `run_knn`."""

    def __call__(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        test: FeatureSet,
        *,
        sources: Mapping[str, tuple[str, ...]],
        num_classes: int,
        subsets: Subsets | None,
        ranking: Ranking,
    ) -> BaselineResult:
        """Returns the baseline with its best setting."""
        ...


RUN_BASELINE: Mapping[Baseline, RunBaseline] = {"knn": run_knn, "ridge": run_ridge}


def _rows(train: FeatureSet, validation: FeatureSet, subsets: Subsets | None) -> tuple[list[Tensor], list[Tensor]]:
    """Returns row numbers in train and in validation, one tensor per subset."""
    if subsets is not None:
        train_rows, validation_rows = list(subsets.train), list(subsets.validation)
    else:
        train_rows, validation_rows = [_all_rows(train)], [_all_rows(validation)]
    step = -(-len(validation_rows[0]) // MAX_CHOICE_ROWS)
    device = train.labels.device
    return [rows.to(device) for rows in train_rows], [rows[::step].to(device) for rows in validation_rows]


def _all_rows(features: FeatureSet) -> Tensor:
    return torch.arange(len(features.labels), device=features.labels.device)


def _mean(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    sums = MetricSums(1, logits.shape[1], logits.device)
    for chunk, chunk_labels in zip(logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        sums.add(chunk[:, None], chunk_labels)
    return validation_metrics(sums.compute())


def _neighbours(
    train: FeatureSet, train_rows: Tensor, queries: FeatureSet, rows: Tensor, parts: Sequence[str], count: int
) -> tuple[Tensor, Tensor]:
    """Returns similarities and labels `(len(rows), count)` of the nearest train rows, nearest row first."""
    similarities, labels = [], []
    for block in rows.split(CHUNK_ROWS):
        query_features = F.normalize(queries.source(parts, block), dim=-1)
        near = torch.empty(len(block), 0, device=query_features.device)
        classes = torch.empty(len(block), 0, dtype=torch.int64, device=query_features.device)
        for chunk in train_rows.split(CHUNK_ROWS):
            similarity = query_features @ F.normalize(train.source(parts, chunk), dim=-1).T
            top, indices = similarity.topk(min(count, len(chunk)), 1)
            merged = torch.cat([near, top], 1)
            near, order = merged.topk(min(count, merged.shape[1]), 1)
            classes = torch.cat([classes, train.labels[chunk][indices]], 1).gather(1, order)
        similarities.append(near)
        labels.append(classes)
    return torch.cat(similarities), torch.cat(labels)


def _votes(similarities: Tensor, labels: Tensor, count: int, num_classes: int) -> Tensor:
    """Returns log-probabilities `(num_rows, num_classes)`: shares of the votes, plus one vote split over all classes.

    Without that vote, a class without neighbours would have probability 0, and the loss could be infinite.
    """
    weights = (similarities[:, :count] / VOTE_TEMPERATURE).softmax(1)
    shares = torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels[:, :count], weights)
    return ((count * shares + 1 / num_classes) / (count + 1)).log()


def _apply(head: Head, features: FeatureSet, parts: Sequence[str], rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([head(features.source(parts, chunk)) for chunk in rows.split(CHUNK_ROWS)])
