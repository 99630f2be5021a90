import numpy as np
import pytest

from raysweep.images.feature_copies import describe_feature_copies, find_feature_copies, spread


@pytest.fixture
def train():
    """Two classes with images of their own, in half floats."""
    random = np.random.default_rng(0)
    labels = np.arange(200) % 2
    return (random.normal(size=(200, 64)) + 4 * labels[:, None] + 10).astype(np.float16), labels


def test_copies_are_found_and_other_images_of_the_class_are_not(train):
    features, labels = train
    random = np.random.default_rng(1)
    others = random.normal(size=(50, 64)) + 4 * (np.arange(50) % 2)[:, None] + 10
    copies = features[[7, 30, 199]] + random.normal(size=(3, 64)) * 0.1
    found = find_feature_copies(np.concatenate([others, copies]).astype(np.float16), features, labels)
    assert {(copy.row, copy.train_row) for copy in found} == {(50, 7), (51, 30), (52, 199)}
    assert all(0.98 < copy.similarity <= 1 for copy in found)
    assert found == sorted(found, key=lambda copy: -copy.similarity)


def test_several_copies_in_train_do_not_hide_one_another(train):
    features, labels = train
    features, labels = np.concatenate([features, features[[7] * 8]]), np.concatenate([labels, labels[[7] * 8]])
    assert [copy.row for copy in find_feature_copies(features[7:8] + 0.01, features, labels)] == [0]


def test_a_class_whose_images_are_all_near_one_another_has_no_copies(train):
    """Five photos of one product among many other products."""
    features, labels = train
    random = np.random.default_rng(2)
    product = random.normal(size=64) * 3 + 10
    photos = product + random.normal(size=(6, 64)) * 0.3
    known = np.concatenate([features, photos[:5]])
    assert find_feature_copies(photos[5:], known, np.concatenate([labels, [2] * 5])) == []
    assert find_feature_copies(photos[5:], known, np.concatenate([labels, [2, 2, 3, 3, 3]])) == []  # too few to tell


def test_nothing_to_compare_with_or_features_that_are_all_equal(train):
    features, labels = train
    assert find_feature_copies(features[:0], features, labels) == []
    assert find_feature_copies(features, features[:0], labels[:0]) == []
    find_feature_copies(np.ones((3, 8)), np.ones((20, 8)), np.zeros(20))  # no warning about a division by zero


def test_spread_rows():
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(10, 4).tolist() == [0, 3, 6, 9]


def test_the_warning_counts_and_gives_examples():
    text = describe_feature_copies("test", 60, 60, [("a.png", "b.png")])
    assert text.startswith(
        "1 of 60 test images has nearly the features of one in train (leakage), such as a.png and b.png. If"
    )
    pairs = [(f"{number}.png", f"t{number}.png") for number in range(1200)]
    assert describe_feature_copies("test", 2000, 9000, pairs).startswith(
        "1,200 of 2,000 checked test images have nearly the features of one in train (leakage), such as 0.png and "
        "t0.png; 1.png and t1.png; 2.png and t2.png. If"
    )
