"""What the test split says of a classifier: metrics, intervals, and comparisons between two classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit

from raysweep.experiment.metrics import METRICS
from raysweep.training.metrics import MetricSums, confusion_matrix

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
# Sums of shares that are equal on paper differ in their last digits.
DIGITS = 9


@dataclass(frozen=True, slots=True)
class TestMetrics:
    """Metrics of one model, or of one model per few-shot seed, on the test rows.

    Attributes:
        values: every metric of `METRICS`, means over the few-shot seeds.
        num_rows: test rows.
        num_seeds: models; 1 where all images train.
        accuracy_low: lower end of the accuracy's 95 % interval: over rows for one model, over seeds for several.
        accuracy_high: upper end of that interval.
        accuracies: one per seed.
        confusion_matrix: counts, row the true class, column the predicted one, summed over the seeds.
        correct: per row the share of the models that are right: 0 or 1 of one model.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    values: Mapping[str, float]
    num_rows: int
    num_seeds: int
    accuracy_low: float
    accuracy_high: float
    accuracies: tuple[float, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    correct: tuple[float, ...]


def evaluate_test(logits: np.ndarray | Sequence[np.ndarray], labels: np.ndarray, seed: int) -> TestMetrics:
    """Metrics of a study's model, or of its models by few-shot seed, on the test rows.

    Args:
        logits: `(num_test, num_classes)`, or one such array per few-shot seed.
        labels: `(num_test,)`.
        seed: of the bootstrap.
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
    """95 % percentile bootstrap interval (Efron 1979) of the mean of a bool per row.

    Resampling n bools with replacement gives a binomial count, so it is drawn as one. When all rows are right, or none
    is, every resample is alike and would claim certainty; there the interval is the exact one of Clopper & Pearson
    1934, whose open end is at (2.5 %)^(1/n) in closed form.
    """
    num_rows, num_right = len(correct), int(correct.sum())
    if num_right in (0, num_rows):
        bound = ((1 - CONFIDENCE) / 2) ** (1 / num_rows)
        return (bound, 1.0) if num_right else (0.0, 1 - bound)
    means = np.random.default_rng(seed).binomial(num_rows, correct.mean(), NUM_RESAMPLES) / num_rows
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def seeds_interval(accuracies: np.ndarray) -> tuple[float, float]:
    """95 % interval (Student's t) of the mean accuracy over few-shot seeds `(num_seeds,)`, within 0 and 1.

    It is about which images are drawn for training; seeds that all agree say nothing of that.
    """
    num_seeds = len(accuracies)
    reach = stdtrit(num_seeds - 1, (1 + CONFIDENCE) / 2) * accuracies.std(ddof=1) / np.sqrt(num_seeds)
    low, high = np.clip([accuracies.mean() - reach, accuracies.mean() + reach], 0, 1)
    return float(low), float(high)


def differs(first: np.ndarray, second: np.ndarray, seed: int) -> bool:
    """Whether two studies' accuracies on the same rows differ: the 95 % paired bootstrap interval leaves 0 out.

    A row counts as right by a bool, or by the share of few-shot seeds whose model got it right. Resampling rows in
    pairs gives multinomial counts of the distinct differences.
    """
    num_rows = len(first)
    differences = np.round(np.asarray(first, float) - np.asarray(second, float), DIGITS)
    values, counts = np.unique(differences, return_counts=True)
    resampled = np.random.default_rng(seed).multinomial(num_rows, counts / num_rows, NUM_RESAMPLES)
    sums = np.round(resampled @ values, DIGITS)
    low, high = np.quantile(sums, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return bool(low > 0 or high < 0)
