"""Classifiers that cost nothing once features exist: k nearest neighbours, and ridge regression of every strength.

Neither is trained step by step: neighbours are looked up, and one eigendecomposition serves every ridge strength
(big_vision, evaluators/fewshot_lsr.py). Each gets a row of the leaderboard beside the probe's.
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
# Queries, and train rows, whose similarities are held at once.
CHUNK_ROWS = 4096
# More rows choose no better (their accuracy has a standard error below 0.4 %), and their scores would fill memory.
MAX_CHOICE_ROWS = 16_384


@dataclass(frozen=True)
class BaselineResult:
    """A baseline with the setting that was best on validation.

    Attributes:
        setting: the best one.
        validation: metrics of the validation split, means over the subsets.
        test_logits: one float32 `(num_test, num_classes)` per subset, log-probabilities of `knn`; on the CPU.
        heads: one per subset, on the CPU; none of `knn`.
        seconds: wall time.
        num_settings: how many were compared.
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
    """Classifies by the nearest train rows: cosine similarity, votes of weight exp(similarity / 0.07).

    Wu et al. 2018 (Unsupervised feature learning via non-parametric instance discrimination); DINO's eval_knn.py.

    Args:
        train: features that are looked among.
        validation: features that the number of neighbours and the source are chosen on.
        test: features that are classified once, with the setting chosen.
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
            _neighbours(train, own, validation, seen, parts, counts[-1])
            for own, seen in zip(train_rows, validation_rows, strict=True)
        ]
        for count in counts:
            votes = [_votes(*near, count, num_classes) for near in nearest]
            labels = [validation.labels[seen] for seen in validation_rows]
            metrics = _mean([_metrics(*each) for each in zip(votes, labels, strict=True)])
            rank = ranking.key(metrics)
            if best is None or rank > best[0]:
                best = rank, count, source, metrics
    assert best is not None, "an encoder has at least one feature source"
    _, count, source, metrics = best
    nearest = [_neighbours(train, own, test, _all_rows(test), sources[source], count) for own in train_rows]
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
    """Regresses one-hot targets on features with an intercept; source, normalisation, strength chosen on validation.

    big_vision's evaluators/fewshot_lsr.py, with the strength searched. A temperature per subset then turns the scores
    into logits that are calibrated on validation; it is folded into the heads.

    Args:
        train: features that the regression is fitted to.
        validation: features that setting and temperature are chosen on.
        test: features that are classified once, with the heads chosen.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        subsets: few-shot draws, which share one setting; None for all rows.
        ranking: how settings are ranked, by means over the subsets; the lower squared error decides between equals.
    """
    started = time.perf_counter()
    train_rows, validation_rows = _rows(train, validation, subsets)
    best: tuple[tuple[float, float], dict[str, Any], list[RidgePath]] | None = None
    combinations = [(source, normalize) for source in sources for normalize in NORMALIZATIONS]
    for source, normalize in combinations:
        paths = [fit_ridge_path(train, own, sources[source], normalize, num_classes) for own in train_rows]
        tables = [
            path.metrics(validation, seen, ranking.metric) for path, seen in zip(paths, validation_rows, strict=True)
        ]
        for strength, *per_subset in zip(STRENGTHS, *tables, strict=True):
            rank = ranking.key(_mean(per_subset), "squared_error")
            if best is None or rank > best[0]:
                best = rank, {"strength": strength, "features": source, "normalize": normalize}, paths
    assert best is not None, "an encoder has at least one feature source"
    _, setting, paths = best
    parts = sources[setting["features"]]
    heads, metrics = [], []
    for path, seen in zip(paths, validation_rows, strict=True):
        labels = validation.labels[seen]
        heads.append(path.head(setting["strength"], validation, seen))
        metrics.append(_metrics(_apply(heads[-1], validation, parts, seen), labels))
    logits = [_apply(head, test, parts, _all_rows(test)).cpu() for head in heads]
    num_settings, seconds = len(combinations) * len(STRENGTHS), time.perf_counter() - started
    on_cpu = tuple(head.cpu() for head in heads)
    return BaselineResult(setting, _mean(metrics), logits, on_cpu, seconds, num_settings)


class RunBaseline(Protocol):
    """A function that chooses a baseline's setting on validation and classifies the test rows; see `run_knn`."""

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


BASELINES: Mapping[Baseline, RunBaseline] = {"knn": run_knn, "ridge": run_ridge}


def _rows(train: FeatureSet, validation: FeatureSet, subsets: Subsets | None) -> tuple[list[Tensor], list[Tensor]]:
    """Returns positions in train and in validation, one tensor per subset."""
    if subsets is not None:
        own, seen = list(subsets.train), list(subsets.validation)
    else:
        own, seen = [_all_rows(train)], [_all_rows(validation)]
    step = -(-len(seen[0]) // MAX_CHOICE_ROWS)
    device = train.labels.device
    return [rows.to(device) for rows in own], [rows[::step].to(device) for rows in seen]


def _all_rows(features: FeatureSet) -> Tensor:
    return torch.arange(len(features.labels), device=features.labels.device)


def _mean(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    sums = MetricSums(1, logits.shape[1], logits.device)
    for chunk, own in zip(logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        sums.add(chunk[:, None], own)
    return validation_metrics(sums.compute())


def _neighbours(
    train: FeatureSet, own: Tensor, queries: FeatureSet, rows: Tensor, parts: Sequence[str], count: int
) -> tuple[Tensor, Tensor]:
    """Returns similarities and labels `(len(rows), count)` of the nearest train rows, nearest first."""
    similarities, labels = [], []
    for block in rows.split(CHUNK_ROWS):
        wanted = F.normalize(queries.source(parts, block), dim=-1)
        near = torch.empty(len(block), 0, device=wanted.device)
        classes = torch.empty(len(block), 0, dtype=torch.int64, device=wanted.device)
        for chunk in own.split(CHUNK_ROWS):
            offered = wanted @ F.normalize(train.source(parts, chunk), dim=-1).T
            top, places = offered.topk(min(count, len(chunk)), 1)
            merged = torch.cat([near, top], 1)
            near, order = merged.topk(min(count, merged.shape[1]), 1)
            classes = torch.cat([classes, train.labels[chunk][places]], 1).gather(1, order)
        similarities.append(near)
        labels.append(classes)
    return torch.cat(similarities), torch.cat(labels)


def _votes(similarities: Tensor, labels: Tensor, count: int, num_classes: int) -> Tensor:
    """Returns log-probabilities `(num_rows, num_classes)`: shares of the votes and of one more for all classes alike.

    Without that one, a class that no neighbour has would have probability 0, and the loss would be infinite.
    """
    weights = (similarities[:, :count] / VOTE_TEMPERATURE).softmax(1)
    shares = torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels[:, :count], weights)
    return ((count * shares + 1 / num_classes) / (count + 1)).log()


def _apply(head: Head, features: FeatureSet, parts: Sequence[str], rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([head(features.source(parts, chunk)) for chunk in rows.split(CHUNK_ROWS)])
