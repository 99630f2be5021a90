"""The temperature that divides a classifier's logits, so that its probabilities are as often right as they say."""

from __future__ import annotations

from torch import Tensor

# Unit: the standard deviation of the scores. Few held-out rows cannot justify a temperature below the first.
LOWEST, HIGHEST = 10**-1.5, 10**1.5
NUM_STEPS = 25  # halvings of that range: to a relative 2e-7
# Weight of an added row whose target is uniform over the classes. On 133 rows of 3 classes, at 99 % accuracy, the test
# loss was 76 % above its minimum with weight 0, 10 % with 0.3, 39 % with 1; if classes overlap, it hardly matters.
UNIFORM_ROW_WEIGHT = 0.3


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Returns the temperature with the lowest cross-entropy for held-out rows (Guo et al. 2017).

    The added uniform row keeps logits bounded if all of a few rows are right, as the targets of Platt 1999 do. Scores
    that are not finite get temperature 1.

    Args:
        scores: logits, or ridge's estimates of one-hot targets, `(num_rows, num_classes)`.
        labels: int64 `(num_rows,)`.
    """
    scores = scores.double()
    spread = float(scores.std(correction=0))
    if not 0 < spread < float("inf"):
        return 1.0
    target = scores.gather(1, labels[:, None]).sum() + UNIFORM_ROW_WEIGHT * scores.mean()
    lowest, highest = spread * LOWEST, spread * HIGHEST
    for _ in range(NUM_STEPS):
        middle: float = (lowest * highest) ** 0.5
        expected = ((scores / middle).softmax(1) * scores).sum(1)
        # The loss is convex in 1 / temperature, and this is its slope there.
        if expected.sum() + UNIFORM_ROW_WEIGHT * expected.mean() > target:
            lowest = middle
        else:
            highest = middle
    return float((lowest * highest) ** 0.5)
