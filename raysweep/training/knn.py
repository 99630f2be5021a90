"""Classification by the k nearest neighbours among the train rows, which needs no fit."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.training.baseline_task import (
    CHUNK_ROWS,
    REFITTED,
    BaselineResult,
    BaselineTask,
    all_rows,
    joined,
    mean_of,
    metrics_of,
)
from raysweep.training.calibration import fit_temperature
from raysweep.training.population import FeatureSet

NEIGHBOURS = (10, 20)
VOTE_TEMPERATURE = 0.07


def run_knn(task: BaselineTask) -> BaselineResult:
    """Classifies by the nearest train rows: cosine similarity, votes with weight exp(similarity / 0.07).

    The number of neighbours and the feature source are chosen on validation, by the experiment's metric.

    Wu et al. 2018 (Unsupervised feature learning via non-parametric instance discrimination); DINO's eval_knn.py.
    """
    started = time.perf_counter()
    draws, validation = task.draws(), task.validation
    counts = sorted({min(count, len(draws[0][0])) for count in NEIGHBOURS})
    labels, best = [validation.labels[seen] for _, seen in draws], None
    for source, parts in task.sources.items():
        nearest = [_neighbours(task.train, rows, validation, seen, parts, counts[-1]) for rows, seen in draws]
        for count in counts:
            votes = [_votes(*near, count, task.num_classes) for near in nearest]
            metrics = mean_of([metrics_of(*each) for each in zip(votes, labels, strict=True)])
            rank = task.ranking.key(metrics)
            if best is None or rank > best[0]:
                best = rank, count, source, metrics, votes
    assert best is not None, "an encoder has at least one feature source"
    _, count, source, metrics, votes = best
    temperatures = tuple(fit_temperature(*each) for each in zip(votes, labels, strict=True))
    setting, known, rows_of = {"k": count, "features": source}, task.train, [rows for rows, _ in draws]
    if task.refits:
        known, setting = joined(known, validation), setting | REFITTED
        rows_of = [all_rows(known)]
    parts, seen = task.sources[source], all_rows(task.test)
    nearest = [_neighbours(known, rows, task.test, seen, parts, count) for rows in rows_of]
    logits = [_votes(*near, count, task.num_classes).cpu() for near in nearest]
    return BaselineResult(
        setting=setting,
        validation=metrics,
        test_logits=logits,
        temperatures=temperatures,
        heads=(),
        train_heads=(),
        seconds=time.perf_counter() - started,
        num_settings=len(task.sources) * len(counts),
    )


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
