"""Which classifiers may be the best, as far as the test split can tell: multiple comparisons with the best.

A classifier is left out if another one is better by more than chance explains. Chance is judged for all pairs at once,
by the studentised maximum of a paired bootstrap (Hsu 1981; Romano & Wolf 2005). So of ten equal classifiers all stay
in 95 % of cases. If each pair were judged alone, all would stay in less than half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from raysweep.training.intervals import CONFIDENCE

NUM_RESAMPLES = 2_000
CHUNK_VALUES = 2**22  # elements of the largest array
# Two normal standard errors, as between two classifiers on many rows. Resamples of very few rows may be all alike.
LEAST_CRITICAL = 1.96

Floats = npt.NDArray[np.float64]


def may_be_best(hits: Sequence[npt.NDArray[np.bool_]], seed: int) -> npt.NDArray[np.bool_]:
    """Returns for each classifier whether no other one is significantly better, `(num_classifiers,)`.

    Two classifiers are compared on their common few-shot draws only, draw by draw. Such a difference varies with the
    test rows and with the draws.

    Args:
        hits: per classifier, `(num_draws, num_rows)`: whether the model of a draw is right on a test row. Test rows are
            the same for all. Draw number d of all classifiers has the same training images; one model has one draw.
        seed: seed of the bootstrap.
    """
    pairs = [(one, other, min(len(hits[one]), len(hits[other]))) for one, other in combinations(range(len(hits)), 2)]
    may_be = np.ones(len(hits), bool)
    if not pairs:
        return may_be
    # One column per classifier and number of draws that it has in common with another one.
    columns = sorted({(number, count) for one, other, count in pairs for number in (one, other)})
    first, second = ([columns.index((pair[side], pair[2])) for pair in pairs] for side in (0, 1))
    shares = np.stack([hits[number][:count].mean(0) for number, count in columns], 1)
    num_rows, num_common = len(shares), np.array([count for *_, count in pairs])

    noise = draw_noise(hits)
    difference = shares[:, second].mean(0) - shares[:, first].mean(0)
    products = shares.T @ shares / num_rows
    squares = products[first, first] + products[second, second] - 2 * products[first, second]
    # Without the last term, two classifiers that hardly ever disagree would have an error of almost 0.
    error = np.sqrt((squares - difference**2) / num_rows + noise.variance / num_common + 1 / num_rows**2)

    generator = np.random.default_rng(seed)
    deviations = _resampled_means(shares, generator) - shares.mean(0) + noise.sample(columns, generator)
    largest = np.zeros(NUM_RESAMPLES)
    for one, other, pair_error in zip(first, second, error, strict=True):
        np.maximum(largest, np.abs(deviations[:, other] - deviations[:, one]) / pair_error, out=largest)
    critical = max(float(np.quantile(largest, CONFIDENCE)), LEAST_CRITICAL)
    for (one, other, _), score in zip(pairs, difference / error, strict=True):
        if abs(score) > critical:
            may_be[one if score > 0 else other] = False
    return may_be


@dataclass(frozen=True, slots=True)
class DrawNoise:
    """How differences of accuracies vary from one few-shot draw to the next.

    Attributes:
        variance: variance of the difference of two classifiers in one draw; 0 if it cannot be known.
        freedom: degrees of freedom of its estimate.
    """

    variance: float
    freedom: int

    def sample(self, columns: Sequence[tuple[int, int]], generator: np.random.Generator) -> Floats:
        """Returns deviations `(NUM_RESAMPLES, num_columns)` of means over draws; a column is (classifier, draws).

        They are normal, with a variance that is as uncertain as its estimate: their differences have Student's t.
        """
        if self.variance == 0:
            return np.zeros((NUM_RESAMPLES, len(columns)))
        shape = NUM_RESAMPLES, 1 + max(number for number, _ in columns), max(count for _, count in columns)
        deviations = generator.normal(scale=np.sqrt(self.variance / 2), size=shape)
        deviations /= np.sqrt(generator.chisquare(self.freedom, NUM_RESAMPLES) / self.freedom)[:, None, None]
        return np.stack([deviations[:, number, :count].mean(1) for number, count in columns], 1)


def draw_noise(hits: Sequence[npt.NDArray[np.bool_]]) -> DrawNoise:
    """Estimates the noise of the draws: the interaction in a table of accuracies, classifiers x draws.

    All pairs share one estimate, because five draws say little about a single pair. Classifiers with one draw have no
    part in it.

    Args:
        hits: as of `may_be_best`.
    """
    several = [one for one in hits if len(one) > 1]
    num_draws = min((len(one) for one in several), default=1)
    freedom = (len(several) - 1) * (num_draws - 1)
    if freedom < 1:
        return DrawNoise(0.0, 0)
    table = np.stack([one[:num_draws].mean(1) for one in several])
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return DrawNoise(2 * float((residuals**2).sum()) / freedom, freedom)


def _resampled_means(values: Floats, generator: np.random.Generator) -> Floats:
    """Returns means of `values` `(num_rows, num_columns)` over rows drawn anew: `(NUM_RESAMPLES, num_columns)`."""
    # Rows that are alike are drawn together: a multinomial of a few patterns costs less than one of all rows.
    patterns, counts = np.unique(values, axis=0, return_counts=True)
    step = max(1, CHUNK_VALUES // len(patterns))
    means = [
        generator.multinomial(len(values), counts / len(values), min(step, NUM_RESAMPLES - start)) @ patterns
        for start in range(0, NUM_RESAMPLES, step)
    ]
    return np.concatenate(means) / len(values)
