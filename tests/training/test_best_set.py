import numpy as np
import pytest

from benchmarks.statistics import EqualRows, false_exclusions
from raysweep.training import best_set
from raysweep.training.best_set import draw_noise, may_be_best


def answers(*num_right, num_rows=128):
    """One model per number of right answers; whoever has fewer is also wrong where the others are."""
    return [(np.arange(num_rows) < right)[None] for right in num_right]


def test_who_is_clearly_worse_leaves():
    assert may_be_best(answers(120, 119, 60), 0).tolist() == [True, True, False]
    assert may_be_best(answers(60, 120, 119), 0).tolist() == [False, True, True]


def test_equal_and_single_classifiers_stay():
    assert may_be_best(answers(100), 0).tolist() == [True]
    assert may_be_best(answers(100, 100, 100), 0).all()
    assert may_be_best(answers(0, 0), 0).all()


def test_two_are_compared_as_a_paired_bootstrap_does():
    """With one pair there is no maximum: the share of resamples beyond the difference is all that counts."""
    rng = np.random.default_rng(0)
    first = rng.random(128) < 0.8
    for num_gained in range(0, 26, 5):
        second = first.copy()
        second[np.flatnonzero(~first)[:num_gained]] = True
        second[np.flatnonzero(first)[:4]] = False
        difference = second.astype(float) - first
        resampled = difference[rng.integers(0, 128, (4000, 128))].mean(1) - difference.mean()
        share = (np.abs(resampled) >= abs(difference.mean())).mean()
        if abs(share - 0.05) > 0.02:
            assert may_be_best([first[None], second[None]], 0).all() == (share > 0.05)


def test_more_classifiers_need_a_larger_difference():
    first, second = np.ones(100, bool), np.ones(100, bool)
    second[:13] = False
    first[13:15] = False
    pair = [first[None], second[None]]
    rng = np.random.default_rng(0)
    others = [rng.permutation(np.arange(100) < 93)[None] for _ in range(20)]
    assert may_be_best(pair, 0).tolist() == [True, False]
    assert may_be_best([*pair, *others], 0)[1]


def test_one_test_row_leaves_nobody_out():
    right, wrong = np.array([[True]]), np.array([[False]])
    assert may_be_best([right, wrong], 0).all()
    assert may_be_best([right, right], 0).all()


def test_the_seed_determines_the_result_in_blocks_of_any_size(monkeypatch):
    hits = list(EqualRows(0.8).hits(372, np.random.default_rng(4)))
    whole = best_set._resampled_means(np.stack([one[0] for one in hits], 1).astype(float), np.random.default_rng(1))
    monkeypatch.setattr(best_set, "CHUNK_VALUES", 5000)
    parts = best_set._resampled_means(np.stack([one[0] for one in hits], 1).astype(float), np.random.default_rng(1))
    np.testing.assert_array_equal(whole, parts)
    assert (may_be_best(hits, 3) == may_be_best(hits, 3)).all()


def test_resampled_means_are_those_of_rows_drawn_anew():
    values = np.random.default_rng(0).random((60, 3)).round(1)
    means = best_set._resampled_means(values, np.random.default_rng(1))
    expected = values[np.random.default_rng(2).integers(0, 60, (20_000, 60))].mean(1)
    np.testing.assert_allclose(means.mean(0), expected.mean(0), atol=0.005)
    np.testing.assert_allclose(np.cov(means.T), np.cov(expected.T), atol=2e-4)


# Few-shot draws


def test_draws_are_compared_with_the_same_draws_only():
    """The method is the same, and its first draw is unlucky: five draws are not compared with that one."""
    rng = np.random.default_rng(0)
    five = rng.random((5, 200)) < np.array([0.5, 0.9, 0.9, 0.9, 0.9])[:, None]
    assert may_be_best([five, five[:1]], 0).all()
    worse = five[:1] & (rng.random((1, 200)) < 0.6)
    assert may_be_best([five, worse], 0).tolist() == [True, False]


def test_what_varies_from_draw_to_draw_is_no_difference_between_methods():
    rng = np.random.default_rng(1)
    accuracies = np.array([[0.9, 0.6, 0.9, 0.6, 0.9], [0.7, 0.7, 0.7, 0.7, 0.7]])
    first, second = rng.random((2, 5, 1000)) < accuracies[:, :, None]
    assert first.mean() > second.mean() + 0.05
    assert may_be_best([first, second], 0).all()
    steady = rng.random((5, 1000)) < 0.78
    assert may_be_best([steady, second], 0).tolist() == [True, False]


def test_the_noise_of_draws_is_the_variance_of_a_difference():
    rng = np.random.default_rng(2)
    hits = list(rng.random((3, 4, 50)) < 0.7)
    pairs = [(0, 1), (0, 2), (1, 2)]
    variances = [np.var(hits[b].mean(1) - hits[a].mean(1), ddof=1) for a, b in pairs]
    found = draw_noise([*hits, hits[0][:1]])
    assert (found.variance, found.freedom) == (pytest.approx(np.mean(variances)), 6)
    assert draw_noise([hits[0], hits[1][:1]]).variance == 0, "one has a single draw"


def test_sampled_noise_has_students_spread():
    noise = best_set.DrawNoise(0.01, 4)
    sampled = noise.sample([(0, 5), (1, 5), (1, 1)], np.random.default_rng(0))
    difference = (sampled[:, 1] - sampled[:, 0]) / np.sqrt(0.01 / 5)
    assert np.quantile(np.abs(difference), 0.95) == pytest.approx(2.776, rel=0.12)
    assert sampled[:, 2].std() > 1.5 * sampled[:, 1].std()


@pytest.mark.parametrize(
    "rows", [EqualRows(0.9), EqualRows(0.8, num_draws=5, draw_deviation=0.4)], ids=["models", "draws"]
)
def test_of_ten_equal_rows_hardly_ever_one_is_left_out(rows):
    assert false_exclusions(rows, num_rows=128, num_repeats=300, seed=1) <= 0.07
