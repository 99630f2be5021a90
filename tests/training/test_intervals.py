import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics import SIMULATED, draws_coverage, exact_coverage
from raysweep.training.folds import stratified_folds
from raysweep.training.intervals import accuracy_interval, clopper_pearson, fold_estimate


def answers(num_right, num_rows):
    return (np.arange(num_rows) < num_right)[None]


@pytest.mark.parametrize(
    ("num_right", "num_rows"), [(121, 128), (40, 128), (7, 10), (0, 1), (1, 1), (0, 50), (372, 372)]
)
def test_the_interval_of_one_model_is_exact(num_right, num_rows):
    exact = stats.binomtest(num_right, num_rows).proportion_ci(0.95, "exact")
    assert clopper_pearson(num_right, num_rows) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert accuracy_interval(answers(num_right, num_rows)) == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize("num_rows", [50, 128, 372])
@pytest.mark.parametrize("accuracy", [0.8, 0.9, 0.95, 0.97, 0.99])
def test_the_interval_of_one_model_covers_by_exact_enumeration(num_rows, accuracy):
    assert exact_coverage(num_rows, accuracy) >= 0.95


def test_intervals_grow_with_the_number_of_right_answers():
    lows, highs = zip(*(clopper_pearson(right, 128) for right in range(129)), strict=True)
    assert (np.diff(lows) > 0).all()
    assert (np.diff(highs) > 0).all()


@pytest.mark.parametrize("shots", [1, 5, 25])
def test_the_interval_of_draws_covers_in_a_simulation(shots):
    assert 0.92 <= draws_coverage(SIMULATED, shots, num_rows=128, num_repeats=400, seed=2) <= 0.99


def test_draws_widen_the_interval_by_what_they_vary():
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.random((1, 200)) < 0.8, 5, 0)
    varied = rng.random((5, 200)) < np.array([0.6, 0.7, 0.8, 0.9, 1.0])[:, None]
    low, high = accuracy_interval(alike)
    assert (low, high) == pytest.approx(accuracy_interval(alike[:1]), abs=0.01), "as many as one: the rows alone vary"
    wide = accuracy_interval(varied)
    assert wide[1] - wide[0] > 2 * (high - low)
    assert wide[0] < varied.mean() < wide[1]


def test_the_variance_of_draws_is_that_of_draws_and_of_rows():
    rng = np.random.default_rng(1)
    hits = rng.random((5, 4000)) < np.array([0.45, 0.5, 0.5, 0.5, 0.55])[:, None]
    variance = hits.mean(1).var(ddof=1) / 5 + hits.mean(0).var() / 4000
    freedom = variance**2 / ((hits.mean(1).var(ddof=1) / 5) ** 2 / 4 + (hits.mean(0).var() / 4000) ** 2 / 3999)
    half_width = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    expected = (hits.mean() - half_width, hits.mean() + half_width)
    assert accuracy_interval(hits) == pytest.approx(expected, abs=0.005), "far from 0 and 1, that of Student's t"


@pytest.mark.parametrize("right", [True, False])
def test_draws_that_are_all_right_or_all_wrong_are_no_more_certain_than_one(right):
    assert accuracy_interval(np.full((5, 50), right)) == accuracy_interval(np.full((1, 50), right))


def test_an_interval_stays_within_what_an_accuracy_can_be():
    hits = np.ones((2, 6), bool)
    hits[0, 0] = False
    low, high = accuracy_interval(hits)
    assert 0 <= low < hits.mean() < high <= 1
    low, high = accuracy_interval(np.array([[True], [False]]))
    assert 0 <= low < 0.5 < high <= 1


def folds_of(num_right, num_rows=20):
    return [np.arange(num_rows) < right for right in num_right]


def test_the_interval_over_folds_has_the_corrected_variance():
    rights = [10, 18, 13, 19, 15]
    found = fold_estimate(folds_of(rights))
    accuracies = np.array(rights) / 20
    margin = stats.t.ppf(0.975, 4) * accuracies.std(ddof=1) * np.sqrt(1 / 5 + 20 / 80)
    assert found.accuracies == tuple(accuracies)
    assert found.accuracy == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx((0.75 - margin, min(1, 0.75 + margin)))


@pytest.mark.parametrize("right", [0, 15, 20])
def test_folds_that_agree_are_no_evidence_beyond_their_rows(right):
    found = fold_estimate(folds_of([right] * 5))
    assert (found.low, found.high) == pytest.approx(clopper_pearson(5 * right, 100))


def test_the_interval_over_folds_covers_in_a_simulation():
    """Least squares on 60 images of three classes in six dimensions; `s / sqrt(k)` covers less."""
    rng = np.random.default_rng(0)

    def draw(num_rows):
        labels = np.arange(num_rows) % 3
        return rng.normal(size=(num_rows, 6)) + 1.5 * np.eye(6)[labels], labels

    def hits(train, test):
        weights = np.linalg.lstsq(np.c_[train[0], np.ones(len(train[0]))], np.eye(3)[train[1]], rcond=None)[0]
        return (np.c_[test[0], np.ones(len(test[0]))] @ weights).argmax(1) == test[1]

    population = draw(6000)
    truth = np.mean([hits(draw(48), population).mean() for _ in range(50)])
    covered, covered_uncorrected = [], []
    for repeat in range(300):
        features, labels = draw(60)
        folds = stratified_folds(labels, 5, repeat)
        rest = [(features[folds != fold], labels[folds != fold]) for fold in range(5)]
        found = fold_estimate([hits(rest[fold], (features[folds == fold], labels[folds == fold])) for fold in range(5)])
        covered.append(found.low <= truth <= found.high)
        margin = stats.t.ppf(0.975, 4) * np.std(found.accuracies, ddof=1) / np.sqrt(5)
        covered_uncorrected.append(abs(found.accuracy - truth) <= margin)
    assert np.mean(covered) >= 0.95 > np.mean(covered_uncorrected)
