import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from raysweep.report.class_figures import calibration_bins, class_lines, confusion_counts, most_confused
from raysweep.report.run_files import Predictions


@pytest.fixture
def found():
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=200)
    probabilities = generator.dirichlet(np.ones(4), 200) + np.eye(4)[labels] * 0.4
    probabilities /= probabilities.sum(1, keepdims=True)
    names = ("a", "b", "c", "d")
    return Predictions(
        names, np.arange(200), ("x",) * 200, labels, probabilities.argmax(1), probabilities.astype(np.float32)
    )


def test_figures_by_class_are_scikit_learns(found):
    counts = confusion_counts(found)
    assert counts.tolist() == confusion_matrix(found.labels, found.predicted).tolist()
    lines = {line.name: line for line in class_lines(found.classes, counts)}
    expected = precision_recall_fscore_support(found.labels, found.predicted)
    for number, name in enumerate(found.classes):
        line = lines[name]
        assert (line.precision, line.recall, line.f1, line.support) == pytest.approx([one[number] for one in expected])
    f1 = [line.f1 for line in class_lines(found.classes, counts)]
    assert f1 == sorted(f1)


def test_a_class_without_images_has_no_figures():
    lines = class_lines(("a", "b", "c"), np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert [(line.name, line.precision, line.recall, line.f1) for line in lines] == [
        ("b", None, 0.0, 0.0), ("a", pytest.approx(2 / 3), 1.0, pytest.approx(0.8)), ("c", None, None, None),
    ]  # fmt: skip


def test_pairs_are_sorted_by_their_images():
    pairs = most_confused(("a", "b", "c"), np.array([[5, 1, 0], [3, 7, 0], [0, 2, 0]]), 2)
    assert [(pair.true, pair.predicted, pair.count, pair.share) for pair in pairs] == [
        ("b", "a", 3, 0.3), ("c", "b", 2, 1.0),
    ]  # fmt: skip


def test_calibration_agrees_with_the_leaderboards_error(found):
    import torch

    from raysweep.training.metrics import calibration_error

    expected = calibration_error(torch.from_numpy(found.probabilities).log(), torch.from_numpy(found.labels))
    bins = calibration_bins(found)
    assert bins.error == pytest.approx(expected, abs=1e-6)
    assert bins.counts.sum() == 200
