import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from raysweep.experiment.studies import BASELINES
from raysweep.training.baseline_task import BaselineTask
from raysweep.training.baselines import RUN_BASELINE
from raysweep.training.folds import stratified_folds
from raysweep.training.knn import VOTE_TEMPERATURE, run_knn
from raysweep.training.nested_folds import estimate_by_folds
from raysweep.training.population import FeatureSet
from raysweep.training.ranking import Ranking
from raysweep.training.ridge import run_ridge


def make_task(sizes, groups=None, num_classes=3, seed=0):
    """Splits of these sizes; each row's first feature is its number among the rows of all splits."""
    num_rows = sum(sizes)
    labels = torch.arange(num_rows) % num_classes
    noise = torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(seed))
    features = 1.5 * F.one_hot(labels, 6) + noise
    parts = {"cls": features, "number": torch.arange(num_rows)[:, None].float()}
    ends = np.cumsum(sizes)
    splits = []
    for start, end in zip([0, *ends], ends, strict=False):
        of_split = None if groups is None else torch.as_tensor(groups)[start:end]
        splits.append(FeatureSet({name: part[start:end] for name, part in parts.items()}, labels[start:end], of_split))
    task = BaselineTask(
        *splits,
        sources={"cls": ("cls",)},
        num_classes=num_classes,
        subsets=None,
        ranking=Ranking(),
        seed=3,
        refit=False,
    )
    return task, features, labels


def numbers(features):
    return features.source(("number",), torch.arange(len(features.labels)))[:, 0].int().tolist()


def tasks_of(task, num_folds, run=run_ridge):
    """The tasks that the baseline was given, with their results, and the estimate."""
    seen = []

    def spy(one):
        seen.append((one, run(one)))
        return seen[-1][1]

    return estimate_by_folds(spy, task, num_folds), seen


@pytest.mark.parametrize("num_folds", [2, 5])
def test_every_image_is_a_test_image_once(num_folds):
    task, _, labels = make_task((50, 13, 20))
    _, seen = tasks_of(task, num_folds)
    assert len(seen) == num_folds
    assert sorted(number for one, _ in seen for number in numbers(one.test)) == list(range(83))
    for one, result in seen:
        parts = [numbers(part) for part in (one.train, one.validation, one.test)]
        assert sorted(number for rows in parts for number in rows) == list(range(83))
        rest = len(parts[0]) + len(parts[1])
        assert len(parts[1]) == pytest.approx(rest / 8, abs=1)
        assert result.setting["fitted_to"] == "train+validation"
        for part, rows in zip((one.train, one.validation, one.test), parts, strict=True):
            assert part.labels.tolist() == labels[rows].tolist()


def test_groups_stay_together_across_the_splits():
    groups = np.random.default_rng(0).integers(0, 25, 90)
    _, seen = tasks_of(make_task((60, 12, 18), groups)[0], 4)
    assert sorted(number for one, _ in seen for number in numbers(one.test)) == list(range(90))
    for one, _ in seen:
        parts = [set(groups[numbers(part)]) for part in (one.train, one.validation, one.test)]
        assert sum(map(len, parts)) == len(set(groups))
        for part in (one.train, one.validation, one.test):
            assert part.groups.tolist() == groups[numbers(part)].tolist()


def test_the_accuracies_are_those_of_a_direct_computation():
    task, features, labels = make_task((70, 20, 30))
    found, seen = tasks_of(task, 5, run_knn)
    folds = stratified_folds(labels.numpy(), 5, task.seed)
    expected = []
    for fold, (_, result) in enumerate(seen):
        known = KNeighborsClassifier(
            result.setting["k"],
            metric="cosine",
            algorithm="brute",
            weights=lambda distances: np.exp((1 - distances) / VOTE_TEMPERATURE),
        ).fit(features[folds != fold], labels[folds != fold])
        predicted = known.predict(features[folds == fold].numpy())
        assert result.test_logits[0].argmax(-1).tolist() == predicted.tolist()
        expected.append((predicted == labels[folds == fold].numpy()).mean())
    assert found.accuracies == pytest.approx(expected)
    assert found.accuracy == pytest.approx(np.mean(expected))
    assert 0.5 < found.accuracy < 1


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("groups", [None, [0] * 6 + [1] * 6], ids=["rows", "two groups"])
def test_every_baseline_takes_the_fewest_images(baseline, groups):
    task, _, _ = make_task((6, 2, 4), groups)
    found = estimate_by_folds(RUN_BASELINE[baseline], task, 2)
    assert len(found.accuracies) == 2
    assert 0 <= found.low <= found.accuracy <= found.high <= 1


def test_labels_by_chance_are_not_predicted():
    """An estimate whose setting had seen the test images would be too good."""
    task, _, _ = make_task((160, 40, 40), seed=1)
    shuffled = torch.randperm(240, generator=torch.Generator().manual_seed(0)) % 3
    parts = shuffled.split([160, 40, 40])
    splits = [
        FeatureSet(old.parts, new) for old, new in zip((task.train, task.validation, task.test), parts, strict=True)
    ]
    by_chance = BaselineTask(*splits, task.sources, 3, None, task.ranking, task.seed, refit=False)
    found = estimate_by_folds(run_ridge, by_chance, 5)
    assert found.low < 1 / 3 < found.high
