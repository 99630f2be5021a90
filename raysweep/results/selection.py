"""What the test split says of a study's chosen trial: metrics, intervals, and comparisons between studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raysweep.training.metrics import MetricSums, confusion_matrix

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


def evaluate_test(logits: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Metrics of one model on the test rows.

    Args:
        logits: `(num_test, num_classes)`.
        labels: `(num_test,)`.
        seed: of the bootstrap.

    Returns:
        `accuracy` with its 95 % interval `accuracy_low`, `accuracy_high`; `macro_f1`, `loss`, `num_rows`;
        `confusion_matrix` as lists, row the true class; `correct`, one bool per row.
    """
    scores, targets = torch.from_numpy(logits), torch.from_numpy(labels).long()
    num_classes = scores.shape[1]
    sums = MetricSums(1, num_classes)
    sums.add(scores[:, None], targets)
    metrics = {name: float(values[0]) for name, values in sums.compute().items()}
    predicted = scores.argmax(1)
    correct = (predicted == targets).numpy()
    low, high = bootstrap_interval(correct, seed)
    return {
        **metrics,
        "num_rows": len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        "confusion_matrix": confusion_matrix(predicted, targets, num_classes).tolist(),
        "correct": correct.tolist(),
    }


def bootstrap_interval(correct: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of a bool per row.

    Resampling n bools with replacement gives a binomial count, so it is drawn as one.
    """
    num_rows = len(correct)
    means = np.random.default_rng(seed).binomial(num_rows, correct.mean(), NUM_RESAMPLES) / num_rows
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def differs(first: np.ndarray, second: np.ndarray, seed: int) -> bool:
    """Whether two models' accuracies on the same rows differ: the 95 % paired bootstrap interval leaves 0 out.

    Resampling rows in pairs gives multinomial counts of (only first right, only second right, agree).
    """
    num_rows = len(first)
    only_first, only_second = (first & ~second).mean(), (second & ~first).mean()
    probabilities = [only_first, only_second, 1 - only_first - only_second]
    counts = np.random.default_rng(seed).multinomial(num_rows, np.clip(probabilities, 0, 1), NUM_RESAMPLES)
    low, high = np.quantile(counts[:, 0] - counts[:, 1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return bool(low > 0 or high < 0)
