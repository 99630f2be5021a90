"""Confidence intervals of figures on the test split, and over folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def accuracy_interval(hits: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the 95 % interval of the accuracy of one model, or of the mean over models of several few-shot draws.

    For one model, this is the exact interval of Clopper & Pearson 1934. Several draws vary in two ways: by the training
    images and by the test rows. The variance of their mean is about `s_draws^2 / S + s_rows^2 / n`, with the degrees of
    freedom of Satterthwaite 1946. An interval of Student's t around the mean covers too rarely near accuracy 1, where
    the mean's distribution is skewed. So the variance is converted to the number of independent hits that would have
    the same one, lowered for the degrees of freedom, and the interval is Clopper-Pearson's of that number (Korn &
    Graubard 1998).

    Args:
        hits: `(num_draws, num_rows)`, whether a draw's model is right on a test row; one draw for one model.
    """
    from scipy.special import stdtrit  # takes a training worker a tenth of a second that it has no use for

    num_draws, num_rows = hits.shape
    accuracy = float(hits.mean())
    rows = hits.mean(0).var() / num_rows
    draws = hits.mean(1).var(ddof=1) / num_draws if num_draws > 1 else 0.0
    variance = rows + draws
    if num_draws == 1 or variance == 0:
        # Draws that agree on all rows are no evidence beyond one draw.
        return clopper_pearson(accuracy * num_rows, num_rows)
    row_freedom = max(num_rows - 1, 1)
    freedom = variance**2 / (draws**2 / (num_draws - 1) + rows**2 / row_freedom)
    lowered = min(1.0, (stdtrit(row_freedom, TAILS[1]) / stdtrit(freedom, TAILS[1])) ** 2)
    effective = min(accuracy * (1 - accuracy) / variance * lowered, hits.size)
    return clopper_pearson(accuracy * effective, effective)


def clopper_pearson(num_right: float, num_rows: float) -> tuple[float, float]:
    """Returns the 95 % interval of Clopper & Pearson 1934 of a share; the counts need not be whole numbers."""
    from scipy.special import betaincinv

    num_wrong = num_rows - num_right
    low = betaincinv(num_right, num_wrong + 1, TAILS[0]) if num_right > 0 else 0.0
    high = betaincinv(num_right + 1, num_wrong, TAILS[1]) if num_wrong > 0 else 1.0
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class FoldEstimate:
    """Accuracy by cross-validation.

    Attributes:
        accuracy: mean over the folds.
        low: lower end of its 95 % interval.
        high: upper end of it.
        accuracies: accuracy on each fold.
    """

    accuracy: float
    low: float
    high: float
    accuracies: tuple[float, ...]

    def describe(self) -> str:
        """Returns `0.913 [0.861, 0.952]`."""
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def figures(self) -> dict[str, float]:
        """Returns mean and interval, named as metrics."""
        return {"accuracy": self.accuracy, "accuracy_low": self.low, "accuracy_high": self.high}


def fold_estimate(hits: Sequence[npt.NDArray[np.bool_]]) -> FoldEstimate:
    """Returns the mean accuracy over folds and its 95 % interval.

    The folds' classifiers share most of their images, so that the folds vary too little. The variance of the mean is
    therefore not `s^2 / k` but `(1 / k + num_test / num_train) s^2`, with Student's t of k - 1 degrees of freedom
    (Nadeau & Bengio 2003, Inference for the generalization error). The interval is never narrower than
    Clopper-Pearson's of all rows: folds that happen to agree are no evidence beyond their rows.

    Args:
        hits: for each fold, whether its classifier is right on a row of the fold.
    """
    from scipy.special import stdtrit

    accuracies, num_folds, num_rows = [float(fold.mean()) for fold in hits], len(hits), sum(map(len, hits))
    mean = float(np.mean(accuracies))
    # Of k folds, one has 1 / (k - 1) of the rows that the others have.
    variance = (1 / num_folds + 1 / (num_folds - 1)) * float(np.var(accuracies, ddof=1))
    margin = float(stdtrit(num_folds - 1, TAILS[1])) * math.sqrt(variance)
    low, high = clopper_pearson(mean * num_rows, num_rows)
    return FoldEstimate(mean, max(0.0, min(low, mean - margin)), min(1.0, max(high, mean + margin)), tuple(accuracies))
