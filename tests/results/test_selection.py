import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from raysweep.results.selection import bootstrap_interval, differs, evaluate_test


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


@pytest.mark.parametrize("right", [True, False])
def test_a_single_test_row_has_an_interval(right):
    assert bootstrap_interval(np.array([right]), 0) == (float(right), float(right))


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
    assert result["num_rows"] == 50
    assert result["accuracy"] == pytest.approx((predicted == labels).mean())
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert result["loss"] == pytest.approx(log_loss(labels, torch.from_numpy(logits).softmax(1).numpy()), rel=1e-4)
    assert result["confusion_matrix"] == confusion_matrix(labels, predicted).tolist()
    assert result["correct"] == (predicted == labels).tolist()
    assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"]


def test_one_test_row_of_three_classes():
    result = evaluate_test(np.array([[0.0, 5.0, 0.0]], np.float32), np.array([1]), seed=0)
    assert (result["accuracy"], result["accuracy_low"], result["accuracy_high"]) == (1.0, 1.0, 1.0)
    assert result["macro_f1"] == 1.0
    assert result["confusion_matrix"] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
