import numpy as np
import pytest
import torch

from benchmarks.statistics import EqualRows, optimism_of_winner
from raysweep.training import bias_correction
from raysweep.training.bias_correction import (
    kept_positions,
    optimism_of_best,
    pack_row_losses,
    search_optimism,
    unpack_row_losses,
)


def make_hits(num_settings, num_rows, accuracy=0.9, seed=0):
    return np.random.default_rng(seed).random((num_settings, num_rows)) < accuracy


def textbook(scores, costs, num_resamples=3000):
    """The bootstrap, row by row and setting by setting."""
    rng, num_rows, found = np.random.default_rng(9), scores.shape[1], []
    winner = min(range(len(scores)), key=lambda one: costs[one].sum())
    for _ in range(num_resamples):
        drawn = rng.integers(0, num_rows, num_rows)
        left = np.setdiff1d(np.arange(num_rows), drawn)
        best = min(range(len(scores)), key=lambda one: costs[one, drawn].sum())
        found.append(scores[winner, left].mean() - scores[best, left].mean())
    return np.mean(found)


def test_the_optimism_is_what_the_winner_loses_on_rows_that_were_not_drawn():
    hits, losses = make_hits(8, 40), np.random.default_rng(1).random((8, 40))
    assert optimism_of_best(hits, losses, 0, num_resamples=3000) == pytest.approx(textbook(hits, losses), abs=0.003)
    assert optimism_of_best(losses, losses, 0, num_resamples=3000) == pytest.approx(textbook(losses, losses), abs=0.003)


def test_one_setting_needs_no_correction():
    hits = make_hits(1, 200)
    assert optimism_of_best(hits, 1.0 - hits, 0) == 0


def by_hits(hits, seed, num_resamples=1000):
    """The accuracy of the best setting, corrected."""
    return hits.mean(1).max() - optimism_of_best(hits, 1.0 - hits, seed, num_resamples=num_resamples)


def test_luck_is_taken_off_and_merit_is_not():
    lucky = np.mean([by_hits(make_hits(64, 128, seed=seed), seed, 200) for seed in range(20)])
    shown = np.mean([make_hits(64, 128, seed=seed).mean(1).max() for seed in range(20)])
    assert shown > 0.94
    assert lucky == pytest.approx(0.9, abs=0.01)
    better = np.concatenate([make_hits(63, 500, 0.5), make_hits(1, 500, 0.9)])
    assert by_hits(better, 0) == pytest.approx(better[-1].mean(), abs=0.005)


def test_a_loss_that_is_not_finite_is_never_the_least():
    hits = make_hits(3, 40)
    for bad in (np.nan, np.inf):
        losses = np.array([[1.0], [0.5], [bad]]).repeat(40, 1)
        assert optimism_of_best(hits, losses, 0) == optimism_of_best(hits[:2], losses[:2], 0)


def test_blocks_of_any_size_give_the_same(monkeypatch):
    hits = make_hits(16, 60)
    whole = by_hits(hits, 5)
    monkeypatch.setattr(bias_correction, "CHUNK_VALUES", 600)
    assert by_hits(hits, 5) == pytest.approx(whole)


@pytest.mark.parametrize("right", [True, False])
def test_a_single_row(right):
    hits = np.full((3, 1), right)
    assert by_hits(hits, 0) == float(right)


def test_of_trials_with_the_same_loss_the_one_that_was_chosen_counts():
    rows = np.arange(18)[None]
    right, wrong = torch.tensor([[0.0, -9.0], [-9.0, 0.0]] * 9), torch.zeros(18, 2)
    packed = {n: pack_row_losses(one, torch.arange(18) % 2) for n, one in enumerate((right, right, wrong))}
    assert (
        search_optimism("val/accuracy", packed, 1, rows, 0) == search_optimism("val/accuracy", packed, 0, rows, 0) == 0
    )


def test_row_losses_are_kept_as_text():
    logits, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
    logits[3], logits[4] = torch.nan, torch.tensor([1000.0, 0, 0, 0])
    logits[5] = torch.tensor([0.0, 1e5, 0, 0])
    hits, losses = unpack_row_losses(pack_row_losses(logits, labels))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").nan_to_num(nan=torch.inf).numpy()
    np.testing.assert_array_equal(hits, (logits.argmax(1) == labels).numpy())
    np.testing.assert_allclose(losses, np.where(expected > 65504, np.inf, expected), rtol=2e-3, atol=1e-4)


def test_a_row_that_is_wrong_by_a_tie_is_wrong():
    logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    hits, losses = unpack_row_losses(pack_row_losses(logits, labels))
    assert (hits.tolist(), losses.tolist()) == ([True, False], pytest.approx([np.log(2)] * 2, rel=1e-3))


def tables(num_trials, num_rows, seed=0):
    """Packed losses of trials by number, and their hits and losses."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 3
    packed = {}
    for number in range(num_trials):
        logits = torch.randn(num_rows, 3, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)
        packed[10 + number] = pack_row_losses(logits, labels)
    hits, losses = (np.stack(one) for one in zip(*map(unpack_row_losses, packed.values()), strict=True))
    return packed, hits, losses


@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss"])
def test_the_optimism_of_a_search_is_what_is_shown_less_what_it_is_worth(metric):
    packed, hits, losses = tables(8, 90)
    best = int(losses.mean(1).argmin())
    scores = hits if metric == "val/accuracy" else losses
    expected = optimism_of_best(scores, losses, 4)
    assert search_optimism(metric, packed, 10 + best, np.arange(90)[None], 4) == pytest.approx(expected)
    assert (expected > 0) == (metric == "val/accuracy"), "the loss of the best is too low"


def test_luck_falls_with_the_root_of_the_rows(monkeypatch):
    monkeypatch.setattr(bias_correction, "MAX_ROWS", 90)
    packed, _hits, losses = tables(8, 90)
    best = int(losses.mean(1).argmin())
    kept = kept_positions(np.arange(360)[None])
    assert kept.tolist() == list(range(0, 360, 4))
    whole = search_optimism("val/accuracy", packed, 10 + best, np.arange(90)[None], 4)
    assert search_optimism("val/accuracy", packed, 10 + best, np.arange(360)[None], 4) == pytest.approx(whole / 2)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_draws_share_the_kept_rows(monkeypatch, kind):
    draws = np.arange(24).reshape(3, 8)
    assert kept_positions(kind(draws)).tolist() == list(range(24))
    monkeypatch.setattr(bias_correction, "MAX_ROWS", 12)
    assert kept_positions(kind(draws)).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    monkeypatch.setattr(bias_correction, "MAX_ROWS", 2)
    assert kept_positions(kind(draws)).tolist() == [0, 8, 16], "each draw keeps a row"


def test_images_of_several_draws_are_drawn_together():
    """Five draws that validate on the same images are no more images: the luck of the best stays as large."""
    luck = {"same": [], "others": []}
    for seed in range(30):
        one = make_hits(16, 48, seed=seed)
        same, images = np.tile(one, 5), np.tile(np.arange(48), 5)
        luck["same"].append(optimism_of_best(same, 1.0 - same, seed, images, 200))
        luck["others"].append(optimism_of_best(one, 1.0 - one, seed, None, 200))
        alone = optimism_of_best(same, 1.0 - same, seed, None, 200)
        assert alone < luck["same"][-1]
    assert np.mean(luck["same"]) == pytest.approx(np.mean(luck["others"]), rel=0.05)


def test_what_is_not_known_is_not_corrected():
    rows = np.arange(30)[None]
    packed, *_ = tables(3, 30)
    assert search_optimism("val/accuracy", packed | {20: ""}, 10, rows, 0) is None, "a trial that kept none"
    other, *_ = tables(1, 20)
    assert search_optimism("val/macro_f1", packed, 10, rows, 0) is None
    assert search_optimism("val/accuracy", packed, 99, rows, 0) is None, "the best one kept none"
    assert search_optimism("val/accuracy", packed | {20: other[10]}, 10, rows, 0) is None
    assert search_optimism("val/accuracy", packed | {20: "damaged!"}, 10, rows, 0) is None
    assert search_optimism("val/accuracy", {}, 10, rows, 0) is None


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
