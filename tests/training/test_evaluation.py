import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from raysweep.training.evaluation import bootstrap_interval, differs, evaluate_test


def answers(num_right, num_rows, seed=0):
    correct = np.arange(num_rows) < num_right
    return np.random.default_rng(seed).permutation(correct)


def resample(values, num_resamples=4_000):
    """Means over rows drawn with replacement, the way that a textbook has it."""
    rows = np.random.default_rng(1).integers(0, len(values), (num_resamples, len(values)))
    return values[rows].mean(1)


@pytest.mark.parametrize(("num_right", "num_rows"), [(121, 128), (40, 128), (7, 10)])
def test_the_interval_is_that_of_resampling_rows(num_right, num_rows):
    correct = answers(num_right, num_rows)
    low, high = bootstrap_interval(correct, seed=3)
    expected = np.quantile(resample(correct), [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=1.01 / num_rows)
    assert low < correct.mean() < high


def test_the_interval_follows_the_seed_and_not_the_order():
    correct = answers(90, 128)
    assert bootstrap_interval(correct, 5) == bootstrap_interval(correct[::-1], 5) == bootstrap_interval(correct, 5)


@pytest.mark.parametrize("num_rows", [1, 10, 128])
@pytest.mark.parametrize("right", [True, False])
def test_rows_that_are_all_alike_have_the_exact_interval(right, num_rows):
    exact = stats.binomtest(num_rows * right, num_rows).proportion_ci(0.95, "exact")
    assert bootstrap_interval(np.full(num_rows, right), 0) == pytest.approx((exact.low, exact.high))


def shifted(correct, num_gained, num_lost):
    """Another model's answers: so many of the first one's mistakes right, so many of its right answers wrong."""
    other = correct.copy()
    other[np.flatnonzero(~correct)[:num_gained]] = True
    other[np.flatnonzero(correct)[:num_lost]] = False
    return other


@pytest.mark.parametrize(
    ("num_gained", "num_lost", "expected"),
    [(0, 0, False), (4, 3, False), (20, 0, True), (2, 20, True), (25, 18, False)],
)
def test_paired_answers_differ_when_resampled_differences_leave_zero_out(num_gained, num_lost, expected):
    first = answers(90, 128)
    second = shifted(first, num_gained, num_lost)
    low, high = np.quantile(resample(first.astype(int) - second), [0.025, 0.975])
    assert (low > 0 or high < 0) == expected
    assert differs(first, second, seed=2) == differs(second, first, seed=2) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.0, False), (0.02, False), (0.2, True)])
def test_shares_of_seeds_differ_when_resampled_differences_leave_zero_out(gain, expected):
    rng = np.random.default_rng(6)
    chance = rng.random(128)
    first, second = ((rng.random((128, 5)) < np.clip(chance + more, 0, 1)[:, None]).mean(1) for more in (0.0, gain))
    low, high = np.quantile(resample(first - second), [0.025, 0.975])
    assert (low > 0 or high < 0) == expected
    assert differs(first, second, 2) == differs(second, first, 2) == expected


def test_shares_that_are_whole_are_bools():
    first = answers(90, 128)
    for num_lost in range(30):
        second = shifted(first, 4, num_lost)
        assert differs(first, second, 0) == differs(first.astype(float), second.astype(float), 0)


def test_a_difference_that_rounding_makes_is_none():
    thirds = np.array([0.1 + 0.2] * 40)
    assert not differs(thirds, np.array([0.3] * 40), 0)


def test_pairing_finds_what_two_intervals_would_hide():
    first = answers(100, 128)
    second = shifted(first, 10, 0)
    assert bootstrap_interval(first, 0)[1] > bootstrap_interval(second, 0)[0]
    assert differs(first, second, 0)


def test_one_test_row_tells_nothing_apart_but_opposites():
    right, wrong = np.array([True]), np.array([False])
    assert not differs(right, right, 0)
    assert differs(right, wrong, 0)


def test_metrics_of_the_test_rows_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    result = evaluate_test(logits, labels, seed=0)
    predicted = logits.argmax(1)
    assert result.num_rows == 50
    assert result.values["accuracy"] == pytest.approx((predicted == labels).mean())
    assert result.values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    expected = log_loss(labels, torch.from_numpy(logits).softmax(1).numpy())
    assert result.values["loss"] == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(result.confusion_matrix, confusion_matrix(labels, predicted))
    assert result.correct == tuple(predicted == labels)
    assert (result.num_seeds, result.accuracies) == (1, (pytest.approx(result.values["accuracy"]),))
    assert result.accuracy_low < result.values["accuracy"] < result.accuracy_high


def test_one_test_row_of_three_classes():
    result = evaluate_test(np.array([[0.0, 5.0, 0.0]], np.float32), np.array([1]), seed=0)
    assert (result.values["accuracy"], result.accuracy_low, result.accuracy_high) == (1.0, pytest.approx(0.025), 1.0)
    assert result.values["macro_f1"] == 1.0
    assert result.confusion_matrix == ((0, 0, 0), (0, 1, 0), (0, 0, 0))


def few_shot(num_seeds, seed=0, num_rows=60):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, num_rows)
    logits = [(rng.normal(size=(num_rows, 4)) + 1.5 * np.eye(4)[labels]).astype(np.float32) for _ in range(num_seeds)]
    return logits, labels


def test_figures_of_several_seeds_are_means_of_those_of_each():
    logits, labels = few_shot(5)
    result = evaluate_test(logits, labels, seed=0)
    alone = [evaluate_test(each, labels, seed=0) for each in logits]
    for name in ("accuracy", "macro_f1", "loss"):
        assert result.values[name] == pytest.approx(np.mean([each.values[name] for each in alone]))
    assert result.accuracies == pytest.approx(tuple(each.values["accuracy"] for each in alone))
    assert result.correct == pytest.approx(tuple(np.mean([each.correct for each in alone], 0)))
    assert np.array_equal(result.confusion_matrix, sum(np.array(each.confusion_matrix) for each in alone))
    assert (result.num_seeds, result.num_rows) == (5, 60)


def test_the_interval_of_several_seeds_is_students():
    logits, labels = few_shot(5)
    result = evaluate_test(logits, labels, seed=0)
    accuracies = result.accuracies
    expected = stats.t.interval(0.95, 4, np.mean(accuracies), stats.sem(accuracies))
    assert (result.accuracy_low, result.accuracy_high) == pytest.approx(expected)


def test_an_interval_stays_within_what_an_accuracy_can_be():
    logits = [np.array([[0.0, 1.0], [1.0, 0.0]], np.float32), np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)]
    result = evaluate_test(logits, np.array([1, 0]), seed=0)
    assert result.accuracies == (1.0, 0.5)
    assert (result.accuracy_low, result.accuracy_high) == (0.0, 1.0)


def test_one_seed_in_a_list_is_one_model():
    (logits,), labels = few_shot(1)
    assert evaluate_test([logits], labels, seed=3) == evaluate_test(logits, labels, seed=3)


@pytest.mark.parametrize("num_right", [60, 45, 0])
def test_seeds_that_agree_fall_back_on_the_rows(num_right):
    correct = answers(num_right, 60)
    logits = np.stack([~correct, correct], 1).astype(np.float32)
    result = evaluate_test([logits] * 3, np.ones(60, int), seed=0)
    assert (result.accuracy_low, result.accuracy_high) == bootstrap_interval(correct, 0)
    assert result.accuracy_low < result.accuracy_high
