"""Whether intervals cover, whether ties are ties, and whether the shown winner is as good as it looks: simulations.

Each number is from data whose truth is known. Coverage of one model is enumerated exactly; the rest is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.figures import Figure, Options, make_figure
from raysweep.training.best_set import may_be_best
from raysweep.training.bias_correction import optimism_of_best
from raysweep.training.intervals import accuracy_interval, clopper_pearson

NUM_DRAWS = 5
TEST_ROWS = (50, 128, 372)
ACCURACIES = tuple(number / 100 for number in range(80, 100))

Bools = npt.NDArray[np.bool_]


def exact_coverage(num_rows: int, accuracy: float) -> float:
    """Returns how often the interval of one model covers its accuracy, summed over all counts of right answers."""
    intervals = [clopper_pearson(num_right, num_rows) for num_right in range(num_rows + 1)]
    covers = [low <= accuracy <= high for low, high in intervals]
    return float(stats.binom.pmf(np.arange(num_rows + 1), num_rows, accuracy)[covers].sum())


@dataclass(frozen=True)
class NearestMeans:
    """Few-shot classifiers by nearest class means, on normal features around one point per class.

    With `distance` 2, their accuracies at 1, 5 and 25 shots are .55, .75 and .84, as of probes on beans.
    """

    distance: float = 2.0
    num_classes: int = 3
    num_features: int = 16

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """Returns the points of the classes, `(num_classes, num_features)`."""
        return self.distance * np.eye(self.num_classes, self.num_features)

    def hits(self, shape: tuple[int, int], shots: int, num_rows: int, generator: np.random.Generator) -> Bools:
        """Returns whether classifiers are right, `(repeats, draws, num_rows)`; `shape` is `(repeats, draws)`."""
        noise = generator.normal(size=(*shape, *self.centers.shape))
        means = self.centers + noise / np.sqrt(shots)
        labels = generator.integers(0, self.num_classes, (shape[0], num_rows))
        features = self.centers[labels] + generator.normal(size=(*labels.shape, self.num_features))
        scores = np.einsum("rnf,rdcf->rdnc", features, means) - (means**2).sum(-1)[:, :, None] / 2
        return scores.argmax(-1) == labels[:, None]

    def accuracy(self, shots: int, seed: int) -> float:
        """Returns the mean accuracy over all draws, from 2,000 draws that are tested on 4,000 rows each."""
        generator = np.random.default_rng([seed, shots])
        return float(np.mean([self.hits((1, 100), shots, 4000, generator).mean() for _ in range(20)]))


SIMULATED = NearestMeans()


def draws_coverage(classes: NearestMeans, shots: int, num_rows: int, num_repeats: int, seed: int) -> float:
    """Returns how often the interval of few-shot draws covers their expected accuracy."""
    truth, generator = classes.accuracy(shots, seed), np.random.default_rng([seed, shots, num_rows])
    blocks = [classes.hits((100, NUM_DRAWS), shots, num_rows, generator) for _ in range(num_repeats // 100)]
    intervals = [accuracy_interval(hits) for block in blocks for hits in block]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@dataclass(frozen=True)
class EqualRows:
    """Classifiers of the same expected accuracy that tend to be wrong on the same rows.

    Attributes:
        accuracy: their accuracy.
        correlation: of the latent variables by which they are right or wrong. Of classifiers with accuracy .9, two
            disagree on 8 % of the rows with .8, on 13 % with .5.
        num_classifiers: their number.
        num_draws: few-shot draws of each.
        draw_deviation: how much a classifier varies from draw to draw, in units of the latent variable.
    """

    accuracy: float
    correlation: float = 0.8
    num_classifiers: int = 10
    num_draws: int = 1
    draw_deviation: float = 0.0

    def hits(self, num_rows: int, generator: np.random.Generator) -> Bools:
        """Returns whether classifiers are right, `(num_classifiers, num_draws, num_rows)`."""
        shape = self.num_classifiers, self.num_draws, num_rows
        shared, own = generator.normal(size=num_rows), generator.normal(size=shape)
        latent = np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * own
        skill = self.draw_deviation * generator.normal(size=(*shape[:2], 1))
        # With skills that vary, the threshold keeps the expected accuracy.
        threshold = stats.norm.ppf(self.accuracy) * np.sqrt(1 + self.draw_deviation**2)
        return latent < threshold + skill

    def hits_of_trials(self, num_trials: int, num_rows: int, generator: np.random.Generator) -> Bools:
        """Returns whether each classifier's trials are right, `(num_classifiers, num_trials, num_rows)`."""
        return EqualRows(self.accuracy, self.correlation, self.num_classifiers, num_trials).hits(num_rows, generator)


def false_exclusions(rows: EqualRows, num_rows: int, num_repeats: int, seed: int) -> float:
    """Returns how often at least one of equal classifiers is left out of the set that may be the best."""
    generator = np.random.default_rng([seed, num_rows])
    found = [may_be_best(list(rows.hits(num_rows, generator)), repeat).all() for repeat in range(num_repeats)]
    return 1 - float(np.mean(found))


@dataclass
class Optimism:
    """By how much figures of a winner among equal rows exceed the truth, a value per repeat.

    Attributes:
        by_test: test accuracy of the row that is best on test.
        by_validation: test accuracy of the row that is best by corrected validation.
        recommended: test accuracy of the cheapest row that may be the best; costs are random.
        validation: validation accuracy of a row, the maximum over its trials.
        corrected: the same, corrected.
    """

    by_test: list[float] = field(default_factory=list)
    by_validation: list[float] = field(default_factory=list)
    recommended: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    corrected: list[float] = field(default_factory=list)


def optimism_of_winner(rows: EqualRows, num_trials: int, num_rows: int, num_repeats: int, seed: int) -> Optimism:
    """Simulates sweeps whose rows are equally good, and in a row all trials, with as many validation as test rows."""
    generator, found = np.random.default_rng([seed, num_rows]), Optimism()
    for repeat in range(num_repeats):
        validation = rows.hits_of_trials(num_trials, num_rows, generator)
        test = rows.hits(num_rows, generator)  # of the chosen trials
        shown = test[:, 0].mean(1) - rows.accuracy
        optimism = [optimism_of_best(hits, 1.0 - hits, repeat, num_resamples=200) for hits in validation]
        corrected = validation.mean(2).max(1) - np.array(optimism)
        found.by_test.append(shown.max())
        found.by_validation.append(shown[corrected.argmax()])
        found.recommended.append(shown[np.flatnonzero(may_be_best(list(test), repeat))[0]])
        found.validation.append(validation.mean(2).max(1).mean() - rows.accuracy)
        found.corrected.append(corrected.mean() - rows.accuracy)
    return found


def run(options: Options) -> Iterator[Figure]:
    """Yields coverage of one model and of draws, false exclusions, and the optimism of a winner."""
    repeats = 100 if options.quick else 1000
    for num_rows in TEST_ROWS:
        coverages = {accuracy: exact_coverage(num_rows, accuracy) for accuracy in ACCURACIES}
        least = min(coverages, key=coverages.__getitem__)
        name = f"one model, least coverage, n {num_rows}"
        yield make_figure("statistics", name, coverages[least], "", ">= 0.95", accuracy=least)
    for distance in (2.0, 3.0):
        yield from coverages_of_draws(NearestMeans(distance), repeats)
    for kind, rows in EQUAL_ROWS.items():
        for num_rows in TEST_ROWS[1:]:
            share = false_exclusions(rows, num_rows, repeats, 0)
            yield make_figure("statistics", f"{kind}: any left out, n {num_rows}", share, "", "<= 0.07")
    for num_rows in TEST_ROWS[1:]:
        yield from figures_of_winner(optimism_of_winner(EqualRows(0.9), 16, num_rows, repeats // 2, 0), num_rows)


def coverages_of_draws(classes: NearestMeans, repeats: int) -> Iterator[Figure]:
    """Yields the coverage of five draws with few and with more shots."""
    for shots in (1, 5, 25):
        for num_rows in TEST_ROWS[1:]:
            coverage = draws_coverage(classes, shots, num_rows, repeats, 0)
            name = (
                f"{NUM_DRAWS} draws, {shots} shots, accuracy {classes.accuracy(shots, 0):.2f}: coverage, n {num_rows}"
            )
            yield make_figure("statistics", name, coverage, "", ">= 0.93")


EQUAL_ROWS = {
    "ten equal models at .8": EqualRows(0.8),
    "ten equal models at .9": EqualRows(0.9),
    "ten equal models at .97": EqualRows(0.97),
    "ten that disagree more, at .8": EqualRows(0.8, correlation=0.5),
    "ten equal few-shot rows at .8": EqualRows(0.8, num_draws=NUM_DRAWS, draw_deviation=0.4),
    "ten that vary less by draw, at .8": EqualRows(0.8, num_draws=NUM_DRAWS, draw_deviation=0.1),
}


def figures_of_winner(found: Optimism, num_rows: int) -> Iterator[Figure]:
    """Yields the mean optimism of each figure, in points."""
    for kind, values, target in (
        ("test accuracy of the best by test", found.by_test, None),
        ("test accuracy of the best by corrected validation", found.by_validation, "<= 0.5"),
        ("test accuracy of the recommended", found.recommended, "<= 0.5"),
        ("validation accuracy of the best of 16 trials", found.validation, None),
        ("its corrected validation accuracy", found.corrected, "<= 0.5"),
    ):
        name = f"{kind}: too high by, n {num_rows}"
        yield make_figure("statistics", name, 100 * float(np.mean(values)), "points", target)
