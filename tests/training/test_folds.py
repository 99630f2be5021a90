import numpy as np

from raysweep.training.folds import stratified_folds

LABELS = np.random.default_rng(0).choice(4, 203, p=[0.5, 0.3, 0.15, 0.05])


def counts_of(labels, folds, num_folds=5):
    return np.stack([np.bincount(labels[folds == fold], minlength=4) for fold in range(num_folds)])


def test_every_fold_has_its_share_of_every_class():
    counts = counts_of(LABELS, stratified_folds(LABELS, 5, 0))
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp(counts.sum(1)) <= 1


def test_the_seed_determines_the_folds():
    first, same, other = (stratified_folds(LABELS, 5, seed) for seed in (1, 1, 2))
    assert (first == same).all()
    assert (first != other).any()


def test_groups_stay_together_and_classes_even():
    rng = np.random.default_rng(1)
    groups = [f"patient-{number}" for number in rng.integers(0, 60, len(LABELS))]
    folds = stratified_folds(LABELS, 5, 0, groups)
    for group in set(groups):
        assert len({fold for fold, name in zip(folds, groups, strict=True) if name == group}) == 1
    counts = counts_of(LABELS, folds)
    shares = counts / counts.sum(0)
    assert np.abs(shares[:, :3] - 0.2).max() < 0.07
    assert (folds == stratified_folds(LABELS, 5, 0, groups)).all()
    assert (folds != stratified_folds(LABELS, 5, 3, groups)).any()


def test_groups_of_one_are_as_even_as_rows():
    folds = stratified_folds(LABELS, 5, 0, [str(number) for number in range(len(LABELS))])
    assert (np.ptp(counts_of(LABELS, folds), axis=0) <= 1).all()


def test_one_large_group_has_a_fold_of_its_own():
    labels = np.zeros(50, int)
    folds = stratified_folds(labels, 5, 0, ["large"] * 26 + [str(number) for number in range(24)])
    assert len(set(folds[:26])) == 1
    assert folds[0] not in folds[26:]
    assert sorted(np.bincount(folds)) == [6, 6, 6, 6, 26]


def test_a_class_of_fewer_rows_than_folds():
    folds = stratified_folds(np.array([0] * 20 + [1] * 2), 5, 0)
    assert folds[20] != folds[21]
