"""Figures of a study by class, and of its probabilities, from its predictions for the test images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysweep.report.run_files import Predictions

NUM_BINS = 15  # as in `training.metrics.calibration_error`


@dataclass(frozen=True, slots=True)
class ClassLine:
    """Precision, recall and F1 of a class; None where it is not defined. `support` is its number of images."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many images of a true class are predicted to be of another one."""

    true: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True, eq=False, slots=True)
class CalibrationBins:
    """Bins of equal width of the confidence: their mean confidence, accuracy and number of rows, `(num_bins,)`."""

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017)."""
        return float((np.abs(self.confidence - self.accuracy) * self.counts).sum() / self.counts.sum())


def confusion_counts(found: Predictions) -> np.ndarray:
    """Returns counts `(num_classes, num_classes)`: row true class, column predicted class."""
    num_classes = len(found.classes)
    flat = found.labels * num_classes + found.predicted
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_lines(classes: tuple[str, ...], counts: np.ndarray) -> list[ClassLine]:
    """Returns the figures of each class, the lowest F1 first; a class without images comes last."""
    lines = []
    for number, name in enumerate(classes):
        right, support, predicted = (
            int(n) for n in (counts[number, number], counts[number].sum(), counts[:, number].sum())
        )
        lines.append(
            ClassLine(
                name,
                precision=right / predicted if predicted else None,
                recall=right / support if support else None,
                f1=2 * right / (predicted + support) if predicted + support else None,
                support=support,
            )
        )
    return sorted(lines, key=lambda line: (line.support == 0, 1.0 if line.f1 is None else line.f1))


def most_confused(classes: tuple[str, ...], counts: np.ndarray, most: int) -> list[Confusion]:
    """Returns the pairs of classes that are confused most often, the most frequent first."""
    wrong = counts - np.diag(np.diag(counts))
    places = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in places]
    return [
        Confusion(
            classes[true], classes[other], int(wrong[true, other]), float(wrong[true, other] / counts[true].sum())
        )
        for true, other in pairs
        if wrong[true, other]
    ]


def calibration_bins(found: Predictions) -> CalibrationBins:
    """Returns the bins that have rows. A bin has its upper edge, not its lower one."""
    confidence = found.confidence.astype(np.float64)
    place = np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence)
    counts = np.bincount(place, minlength=NUM_BINS)
    kept = counts > 0
    right = np.bincount(place, found.predicted == found.labels, NUM_BINS)
    sums = np.bincount(place, confidence, NUM_BINS)
    return CalibrationBins(sums[kept] / counts[kept], right[kept] / counts[kept], counts[kept])
