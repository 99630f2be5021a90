import numpy as np
import pytest

from raysweep.errors import DataError
from raysweep.images.contents import Together, contents_of
from raysweep.images.listed_rows import Row, Rows, Values
from raysweep.images.splits import (
    SPLITS,
    describe_copies,
    describe_few_images,
    few_shot,
    grouped_split,
    normalize_split,
    settle_splits,
    stratified_split,
)


def data(per_class=(100, 50, 10)):
    labels = np.repeat(np.arange(len(per_class)), per_class).astype(np.int32)
    return labels, Together.of([f"hash{row}" for row in range(len(labels))])


@pytest.mark.parametrize(
    ("value", "split"),
    [
        *(("train", "train"), (" Training ", "train"), (0, "train"), ("0", "train")),
        *(("VAL", "validation"), ("valid", "validation"), ("dev", "validation"), ("eval", "validation")),
        *((1.0, "validation"), (np.int64(2), "test"), ("testing", "test"), ("2", "test")),
    ],
)
def test_names_of_splits(value, split):
    assert normalize_split(value) == split


@pytest.mark.parametrize("value", ["holdout", 3, "", None, -1, 0.5, "0.1"])
def test_what_names_no_split_says_what_does(value):
    with pytest.raises(DataError, match="accepted: train, validation"):
        normalize_split(value)


def test_a_near_miss_is_named():
    with pytest.raises(DataError, match="did you mean 'train'"):
        normalize_split("tain")


def test_split_takes_the_fraction_of_every_class():
    labels, groups = data()
    mask = stratified_split(labels, groups, 0.1, seed=3)
    assert np.bincount(labels[mask]).tolist() == [10, 5, 1]


def test_split_depends_on_the_seed_and_on_nothing_else():
    labels, groups = data()
    mask = stratified_split(labels, groups, 0.2, seed=3)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = stratified_split(labels[order], Together.of([f"hash{row}" for row in order]), 0.2, seed=3)
    assert (mask[order] == shuffled).all()
    assert (stratified_split(labels, groups, 0.2, seed=4) != mask).any()


def test_split_keeps_copies_together():
    labels = np.zeros(60, np.int32)
    groups = [f"hash{row // 3}" for row in range(60)]
    mask = stratified_split(labels, Together.of(groups), 0.25, seed=0)
    assert mask.sum() == 15
    assert {groups[row] for row in np.flatnonzero(mask)}.isdisjoint(groups[row] for row in np.flatnonzero(~mask))


def test_copies_under_two_labels_stay_together_too():
    labels = np.array([0, 1] * 10, np.int32)
    groups = [f"hash{row // 2}" for row in range(20)]
    mask = stratified_split(labels, Together.of(groups), 0.3, seed=0)
    assert mask.any()
    assert (mask[0::2] == mask[1::2]).all()


def test_every_class_gives_one_and_keeps_one_where_it_can():
    labels = np.array([0, 1, 1, 2, 2, 2], np.int32)
    for fraction in (0.01, 0.5, 0.99):
        mask = stratified_split(labels, Together.of("abcdef"), fraction, seed=1)
        assert not mask[0]  # a class with a single image keeps it
        assert mask[1:3].sum() == 1
        assert 1 <= mask[3:].sum() <= 2


def test_a_class_of_large_groups_gives_the_smallest():
    groups = ["a"] * 40 + ["b"] * 30 + ["c"] * 35
    mask = stratified_split(np.zeros(105, np.int32), Together.of(groups), 0.1, seed=0)
    assert {groups[row] for row in np.flatnonzero(mask)} == {"b"}


def test_no_fraction_takes_nothing():
    labels, groups = data()
    assert not stratified_split(labels, groups, 0.0, seed=0).any()


def test_few_shot_is_nested_exact_and_by_seed():
    labels, _ = data((30, 20, 3))
    five, ten = few_shot(labels, 5, seed=7), few_shot(labels, 10, seed=7)
    assert np.bincount(labels[five]).tolist() == [5, 5, 3]
    assert np.bincount(labels[ten]).tolist() == [10, 10, 3]
    assert set(five.tolist()) < set(ten.tolist())
    assert (few_shot(labels, 5, seed=7) == five).all()
    assert few_shot(labels, 5, seed=8).tolist() != five.tolist()
    assert (np.diff(ten) > 0).all()


def test_few_shot_of_nothing_is_nothing():
    assert few_shot(np.empty(0, np.int32), 5, seed=0).shape == (0,)


FRACTIONS = {"test": 0.2, "validation": 0.1}


def test_missing_splits_are_shares_of_the_original_train_rows():
    labels, hashes = data((100, 50))
    splits, derived = settle_splits(Values([None] * 150), labels, hashes, FRACTIONS, seed=0)
    assert np.bincount(splits).tolist() == [105, 15, 30]
    assert derived == ("test", "validation")


def test_a_split_that_is_there_is_left_alone():
    labels, hashes = data((100, 50))
    given = ["val" if row % 5 == 0 else "Train" for row in range(150)]
    splits, derived = settle_splits(Values(given), labels, hashes, FRACTIONS, seed=0)
    assert derived == ("test",)
    assert np.flatnonzero(splits == SPLITS.index("validation")).tolist() == list(range(0, 150, 5))
    assert (splits == SPLITS.index("test")).sum() == 24  # a fifth of the 120 train rows


@pytest.mark.parametrize(
    ("given", "fractions", "message"),
    [
        ("test", FRACTIONS, "no training images; found only test"),
        ("holdout", FRACTIONS, "150 rows in split 'holdout'"),
        (None, {"test": 0.5, "validation": 0.5}, "nothing to train on"),
        (None, {"test": 0.2, "validation": 0.0}, "no validation images"),
    ],
)
def test_splits_that_cannot_work(given, fractions, message):
    labels, hashes = data((100, 50))
    with pytest.raises(DataError, match=message):
        settle_splits(Values([given] * 150), labels, hashes, fractions, seed=0)


def copies_described(labels, splits, hashes):
    rows = Rows(Row(f"{name}.jpg", None) for name in "abcd"[: len(labels)])
    numbers = np.array(["xy".index(label) for label in labels], np.int32)
    return describe_copies(rows, contents_of(hashes), numbers_of(splits), numbers, ("x", "y"))


def numbers_of(splits):
    return np.array([SPLITS.index(split) for split in splits], np.int8)


def test_copies_are_counted_by_image_with_an_example():
    hashes = [b"2" * 32, b"2" * 32, b"2" * 32, b"1" * 32]
    leakage, conflict = copies_described("xyxx", ["train", "train", "test", "test"], hashes)
    assert leakage == "1 image in more than one split (leakage): a.jpg (train) and c.jpg (test)"
    assert conflict == "1 image in more than one class (conflicting labels): a.jpg (x) and b.jpg (y)"


def test_of_several_copies_the_first_row_is_the_example():
    hashes = [b"2" * 32, b"1" * 32, b"2" * 32, b"1" * 32]
    leakage, conflict = copies_described("xxyy", ["train", "train", "test", "test"], hashes)
    assert leakage == "2 images in more than one split (leakage): a.jpg (train) and c.jpg (test)"
    assert conflict == "2 images in more than one class (conflicting labels): a.jpg (x) and c.jpg (y)"


def test_copies_within_one_split_and_class_are_no_trouble():
    assert copies_described("xx", ["train", "train"], [b"1" * 32] * 2) == []


def test_thin_places_are_pointed_out():
    labels = np.array([0] * 40 + [1] * 3 + [0] * 50 + [0] * 4 + [2], np.int32)
    splits = ["train"] * 43 + ["validation"] * 50 + ["test"] * 5
    warnings = "\n".join(describe_few_images(labels, numbers_of(splits), ["a", "b", "c"], 0))
    assert "1 class without train images: c" in warnings
    assert "2 classes without validation images: b, c" in warnings
    assert "only 5 test images: each is 20.0% of accuracy" in warnings


def test_shots_beyond_what_a_class_has_are_pointed_out():
    labels = np.repeat([0, 1, 0, 1, 0, 1], [40, 3, 20, 20, 20, 20]).astype(np.int32)
    splits = ["train"] * 43 + ["validation"] * 40 + ["test"] * 40
    assert describe_few_images(labels, numbers_of(splits), ["a", "b"], 3) == []
    assert describe_few_images(labels, numbers_of(splits), ["a", "b"], 5) == [
        "data.shots asks for 5 images per class; b has 3 to train on"
    ]


def test_groups_of_several_classes_come_as_close_to_each_share_as_they_can():
    random = np.random.default_rng(0)
    groups = np.repeat([f"patient {number}" for number in range(60)], random.integers(1, 12, 60))
    labels = np.where(random.random(len(groups)) < 0.1, 1, 0)  # a rare class in groups of the other
    mask = grouped_split(labels, Together.of(groups.tolist()), 0.2, seed=0)
    for label in (0, 1):
        assert abs(mask[labels == label].mean() - 0.2) < 0.03
    assert all(len(set(mask[groups == group])) == 1 for group in groups)
    order = random.permutation(len(groups))
    assert np.array_equal(grouped_split(labels[order], Together.of(groups[order].tolist()), 0.2, seed=0), mask[order])
    assert not np.array_equal(grouped_split(labels, Together.of(groups.tolist()), 0.2, seed=1), mask)


def test_of_two_large_groups_one_is_taken_and_of_one_none():
    labels = np.array([0, 1] * 10)
    assert grouped_split(labels, Together.of(["a"] * 14 + ["b"] * 6), 0.1, seed=0).tolist() == [False] * 14 + [True] * 6
    assert not grouped_split(labels, Together.of(["a"] * 20), 0.5, seed=0).any()
