"""Evaluation on the test split: metrics, confidence intervals, and comparison of two classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raysweep.experiment.metrics import METRICS
from raysweep.training.metrics import MetricSums, confusion_matrix

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
# Sums of shares that are mathematically equal differ in their last digits.
NUM_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class TestMetrics:
    """Metrics of one model, or of one model per few-shot seed, on the test rows.

    Attributes:
        values: every metric of `METRICS`, means over the few-shot seeds.
        num_rows: number of test rows.
        num_seeds: number of models; 1 if all images train.
        accuracy_low: lower end of the accuracy's 95 % interval: over rows for one model, over seeds for several.
        accuracy_high: upper end of that interval.
        accuracies: accuracy per seed.
        confusion_matrix: counts summed over the seeds, `(num_classes, num_classes)`: row true, column predicted class.
        correct: per row, the share of correct models: 0 or 1 for one model.
    """

    __test__ = False  # not a test class, despite its name

    values: Mapping[str, float]
    num_rows: int
    num_seeds: int
    accuracy_low: float
    accuracy_high: float
    accuracies: tuple[float, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    correct: tuple[float, ...]


def evaluate_test(logits: np.ndarray | Sequence[np.ndarray], labels: np.ndarray, seed: int) -> TestMetrics:
    """Returns the metrics of a study's model, or of its models per few-shot seed, on the test rows.

    Args:
        logits: float32 `(num_test, num_classes)`, or one such array per few-shot seed.
        labels: integers `(num_test,)`.
        seed: seed of the bootstrap.
    """
    targets = torch.from_numpy(labels).long()
    models = [logits] if isinstance(logits, np.ndarray) else list(logits)
    scores = torch.stack([torch.from_numpy(each) for each in models], 1)
    num_seeds, num_classes = scores.shape[1:]
    sums = MetricSums(num_seeds, num_classes)
    sums.add(scores, targets)
    metrics = sums.compute()
    predicted = scores.argmax(-1)
    hits = (predicted == targets[:, None]).numpy()
    accuracies = hits.mean(0)
    low, high = bootstrap_interval(hits[:, 0], seed) if np.ptp(accuracies) == 0 else seeds_interval(accuracies)
    matrix = confusion_matrix(predicted.flatten(), targets.repeat_interleave(num_seeds), num_classes)
    return TestMetrics(
        values={name: float(metrics[name].mean()) for name in METRICS},
        num_rows=len(labels),
        num_seeds=num_seeds,
        accuracy_low=low,
        accuracy_high=high,
        accuracies=tuple(accuracies.tolist()),
        confusion_matrix=tuple(map(tuple, matrix.tolist())),
        correct=tuple(hits.mean(1).tolist()),
    )


def bootstrap_interval(correct: np.ndarray, seed: int) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval (Efron 1979) of the mean of bools `(num_rows,)`.

    Resampling n bools with replacement gives a binomial count, so a binomial is drawn. If all rows are right, or none,
    all resamples are equal and the interval would have length 0. Then the exact interval of Clopper & Pearson 1934 is
    used; in closed form, its other end is (2.5 %)^(1/n), or 1 minus that.
    """
    num_rows, num_right = len(correct), int(correct.sum())
    if num_right in (0, num_rows):
        bound = ((1 - CONFIDENCE) / 2) ** (1 / num_rows)
        return (bound, 1.0) if num_right else (0.0, 1 - bound)
    means = np.random.default_rng(seed).binomial(num_rows, correct.mean(), NUM_RESAMPLES) / num_rows
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def seeds_interval(accuracies: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval (Student's t) of the mean of accuracies `(num_seeds,)`, clipped to [0, 1].

    It measures the variation from the choice of training images, which equal accuracies would not show.
    """
    from scipy.special import stdtrit  # takes a training worker a fifth of a second that it has no use for

    num_seeds = len(accuracies)
    half_width = stdtrit(num_seeds - 1, (1 + CONFIDENCE) / 2) * accuracies.std(ddof=1) / np.sqrt(num_seeds)
    low, high = np.clip([accuracies.mean() - half_width, accuracies.mean() + half_width], 0, 1)
    return float(low), float(high)


def differs(first: np.ndarray, second: np.ndarray, seed: int) -> bool:
    """Whether two accuracies on the same rows differ: the 95 % paired bootstrap interval does not contain 0.

    Each row's value in `first` and `second`, `(num_rows,)`, is a bool, or the share of few-shot seeds whose model is
    right. Resampling pairs gives multinomial counts of the distinct differences, so a multinomial is drawn.
    """
    num_rows = len(first)
    differences = np.round(np.asarray(first, float) - np.asarray(second, float), NUM_DECIMALS)
    values, counts = np.unique(differences, return_counts=True)
    resampled = np.random.default_rng(seed).multinomial(num_rows, counts / num_rows, NUM_RESAMPLES)
    sums = np.round(resampled @ values, NUM_DECIMALS)
    low, high = np.quantile(sums, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return bool(low > 0 or high < 0)
