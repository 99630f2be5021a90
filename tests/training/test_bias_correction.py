import numpy as np
import pytest

from benchmarks.statistics import EqualRows, optimism_of_winner
from raysweep.training import bias_correction
from raysweep.training.bias_correction import corrected_score


def make_hits(num_settings, num_rows, accuracy=0.9, seed=0):
    return np.random.default_rng(seed).random((num_settings, num_rows)) < accuracy


def textbook(hits, losses, num_resamples=3000):
    """The bootstrap, row by row and setting by setting."""
    rng, num_rows, scores = np.random.default_rng(9), hits.shape[1], []
    for _ in range(num_resamples):
        drawn = rng.integers(0, num_rows, num_rows)
        left = np.setdiff1d(np.arange(num_rows), drawn)
        best = max(range(len(hits)), key=lambda one: (hits[one, drawn].sum(), -losses[one, drawn].sum()))
        scores.append(hits[best, left].mean())
    return np.mean(scores)


def test_it_is_the_mean_over_rows_that_were_not_drawn():
    hits, losses = make_hits(8, 40), np.random.default_rng(1).random((8, 40))
    assert corrected_score(hits, 0, losses, 3000) == pytest.approx(textbook(hits, losses), abs=0.005)
    assert corrected_score(hits, 0, num_resamples=3000) == pytest.approx(textbook(hits, np.zeros((8, 40))), abs=0.005)


def test_one_setting_needs_no_correction():
    hits = make_hits(1, 200)
    assert corrected_score(hits, 0) == pytest.approx(hits.mean(), abs=0.005)


def test_luck_is_taken_off_and_merit_is_not():
    lucky = np.mean([corrected_score(make_hits(64, 128, seed=seed), seed, num_resamples=200) for seed in range(20)])
    shown = np.mean([make_hits(64, 128, seed=seed).mean(1).max() for seed in range(20)])
    assert shown > 0.94
    assert lucky == pytest.approx(0.9, abs=0.01)
    better = np.concatenate([make_hits(63, 500, 0.5), make_hits(1, 500, 0.9)])
    assert corrected_score(better, 0) == pytest.approx(better[-1].mean(), abs=0.005)


def test_the_lower_loss_chooses_among_equals():
    hits = np.array([[True, False] * 20, [False, True] * 20])
    hits = np.concatenate([hits, hits[:1]])
    losses = np.array([[1.0], [1.0], [0.5]]).repeat(40, 1)
    alone = corrected_score(hits[1:], 0, losses[1:])
    assert corrected_score(hits, 0, losses) == alone, "a copy with a higher loss is never chosen"
    losses[0] = np.nan
    assert corrected_score(hits, 0, losses) == alone


def test_blocks_of_any_size_give_the_same(monkeypatch):
    hits = make_hits(16, 60)
    whole = corrected_score(hits, 5)
    monkeypatch.setattr(bias_correction, "CHUNK_VALUES", 600)
    assert corrected_score(hits, 5) == pytest.approx(whole)


@pytest.mark.parametrize("right", [True, False])
def test_a_single_row(right):
    assert corrected_score(np.full((3, 1), right), 0) == float(right)


def test_the_shown_winner_of_ten_equal_rows_is_as_good_as_it_looks():
    found = optimism_of_winner(EqualRows(0.9), num_trials=16, num_rows=128, num_repeats=60, seed=3)
    by_test, by_validation, recommended, validation, corrected = (
        100 * np.mean(values)
        for values in (found.by_test, found.by_validation, found.recommended, found.validation, found.corrected)
    )
    assert by_test > 2.0, "what is avoided"
    assert validation > 2.0
    assert abs(corrected) <= 0.5
    # The mean of 60 accuracies on 128 rows has a standard error of .34 points.
    assert by_validation <= 0.5 + 2 * 0.34
    assert recommended <= 0.5 + 2 * 0.34
