import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.experiment.studies import BASELINES
from raysweep.training import baselines, ridge
from raysweep.training.baselines import run_knn, run_ridge
from raysweep.training.population import FeatureSet, Subsets
from raysweep.training.ranking import Ranking
from raysweep.training.ridge import STRENGTHS

SOURCES = {"cls": ("cls",), "cls+mean": ("cls", "mean")}


def make_set(num_rows, seed, *, num_features=12, num_classes=4, spread=0.6):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_rows) % num_classes
    parts = {
        name: (spread * centers[labels] + torch.randn(num_rows, num_features, generator=generator)).half()
        for name in ("cls", "mean")
    }
    return FeatureSet(parts, labels)


TRAIN, VALIDATION, TEST = make_set(200, 0), make_set(60, 1), make_set(80, 2)


def run(function, train=TRAIN, validation=VALIDATION, test=TEST, **more):
    asked = {"sources": SOURCES, "num_classes": 4, "subsets": None, "ranking": Ranking()} | more
    return function(train, validation, test, **asked)


def inputs(features, source, rows=slice(None)):
    return np.concatenate([features.parts[part][rows].double().numpy() for part in SOURCES[source]], 1)


def normalized(normalize, train, *others):
    if normalize == "l2":
        return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, *others)]
    if normalize == "standardize":
        scaler = StandardScaler().fit(train)
        return [scaler.transform(x) for x in (train, *others)]
    return [train, *others]


def sklearn_votes(train, queries, labels, count):
    votes = KNeighborsClassifier(
        count, weights=lambda distances: np.exp((1 - distances) / 0.07), metric="cosine", algorithm="brute"
    )
    return votes.fit(train, labels).predict_proba(queries)


def sklearn_ridge(train, labels, strength, num_classes):
    """Ridge at a strength in mean eigenvalues of the centred covariance."""
    centered = train - train.mean(0)
    unit = (centered**2).sum() / min(centered.shape)
    return Ridge(alpha=strength * unit, solver="svd").fit(train, np.eye(num_classes)[labels])


def same_but_for_scale(logits, scores):
    """Whether each row of logits is its row of scores divided by one temperature."""
    logits, scores = (np.asarray(x, float) for x in (logits, scores))
    logits, scores = (x - x.mean(1, keepdims=True) for x in (logits, scores))
    temperature = (scores * logits).sum() / (logits * logits).sum()
    np.testing.assert_allclose(logits * temperature, scores, atol=2e-5)
    return temperature


def test_each_baseline_is_run_by_its_own_function():
    assert {"knn": run_knn, "ridge": run_ridge} == baselines.RUN_BASELINE
    assert tuple(baselines.RUN_BASELINE) == BASELINES, "in the order of the experiment file's"


@pytest.mark.parametrize("chunk_rows", [7, 4096])
def test_neighbours_vote_as_scikit_learn_has_it(monkeypatch, chunk_rows):
    monkeypatch.setattr(baselines, "CHUNK_ROWS", chunk_rows)
    result = run(run_knn)
    count, source = result.setting["k"], result.setting["features"]
    expected = sklearn_votes(inputs(TRAIN, source), inputs(TEST, source), TRAIN.labels.numpy(), count)
    (logits,) = result.test_logits
    np.testing.assert_allclose(logits.exp(), (count * expected + 1 / 4) / (count + 1), atol=1e-5)
    assert (result.heads, result.num_settings) == ((), 4)


def test_neighbours_choose_the_setting_that_is_best_on_validation():
    rows = {}
    for source in SOURCES:
        for count in (10, 20):
            votes = sklearn_votes(inputs(TRAIN, source), inputs(VALIDATION, source), TRAIN.labels.numpy(), count)
            smoothed = (count * votes + 1 / 4) / (count + 1)
            rows[count, source] = {
                "val/accuracy": (votes.argmax(1) == VALIDATION.labels.numpy()).mean(),
                "val/macro_f1": f1_score(VALIDATION.labels, votes.argmax(1), average="macro"),
                "val/loss": log_loss(VALIDATION.labels, smoothed),
            }
    for metric, direction in (("val/accuracy", "maximize"), ("val/macro_f1", "maximize"), ("val/loss", "minimize")):
        result = run(run_knn, ranking=Ranking(metric, direction))
        sign = 1 if direction == "maximize" else -1
        best = max(rows, key=lambda key: (sign * rows[key][metric], -rows[key]["val/loss"]))
        assert (result.setting["k"], result.setting["features"]) == best
        assert result.validation == pytest.approx(rows[best], abs=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("num_rows", [20, 200])
@pytest.mark.parametrize("chunk_rows", [33, 4096])
def test_every_strength_is_the_ridge_of_scikit_learn(monkeypatch, normalize, num_rows, chunk_rows):
    monkeypatch.setattr(ridge, "CHUNK_ROWS", chunk_rows)
    rows, labels = torch.arange(num_rows), TRAIN.labels[:num_rows].numpy()
    path = ridge.fit_ridge_path(TRAIN, rows, SOURCES["cls+mean"], normalize, 4)
    table = path.metrics(VALIDATION, torch.arange(60), "val/accuracy")
    train, validation = normalized(normalize, inputs(TRAIN, "cls+mean", rows), inputs(VALIDATION, "cls+mean"))
    for index in (0, 30, 60, 96):
        model = sklearn_ridge(train, labels, STRENGTHS[index], 4)
        scores = model.predict(validation)
        assert table[index]["squared_error"] == pytest.approx(((scores - np.eye(4)[VALIDATION.labels]) ** 2).mean())
        assert table[index]["val/accuracy"] == (scores.argmax(1) == VALIDATION.labels.numpy()).mean()
        head = path.head(STRENGTHS[index], VALIDATION, torch.arange(60))
        temperature = same_but_for_scale(
            head(VALIDATION.source(SOURCES["cls+mean"], torch.arange(60))).detach(), scores
        )
        np.testing.assert_allclose(head.weight.detach() * temperature, model.coef_, atol=1e-3 * abs(model.coef_).max())


def test_strengths_are_scored_the_same_in_pieces(monkeypatch):
    path = ridge.fit_ridge_path(TRAIN, torch.arange(200), ("cls",), "none", 4)
    whole = path.metrics(VALIDATION, torch.arange(60), "val/loss")
    monkeypatch.setattr(ridge, "MAX_SCORES", 60 * 4 * 5)
    pieces = path.metrics(VALIDATION, torch.arange(60), "val/loss")
    assert len(whole) == len(pieces) == len(STRENGTHS)
    for one, other in zip(whole, pieces, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_ridge_chooses_the_setting_that_is_best_on_validation():
    best = {}
    for source in SOURCES:
        for normalize in NORMALIZATIONS:
            train, validation = normalized(normalize, inputs(TRAIN, source), inputs(VALIDATION, source))
            for strength in STRENGTHS:
                scores = sklearn_ridge(train, TRAIN.labels.numpy(), strength, 4).predict(validation)
                accuracy = (scores.argmax(1) == VALIDATION.labels.numpy()).mean()
                error = ((scores - np.eye(4)[VALIDATION.labels]) ** 2).mean()
                best[strength, source, normalize] = (accuracy, -error)
    result = run(run_ridge)
    found = result.setting["strength"], result.setting["features"], result.setting["normalize"]
    assert found == max(best, key=best.__getitem__)
    assert result.validation["val/accuracy"] == pytest.approx(best[found][0])
    assert result.num_settings == 6 * len(STRENGTHS)


def test_the_head_gives_the_logits_of_test():
    result = run(run_ridge)
    (head,), (logits,) = result.heads, result.test_logits
    assert head.normalize == result.setting["normalize"]
    assert torch.equal(head(TEST.source(SOURCES[result.setting["features"]], torch.arange(80))), logits)
    assert (logits.argmax(1) == TEST.labels).float().mean() > 0.7


def test_logits_are_calibrated_on_validation():
    result = run(run_ridge)
    source = SOURCES[result.setting["features"]]
    logits = result.heads[0](VALIDATION.source(source, torch.arange(60))).detach()
    loss = torch.nn.functional.cross_entropy(logits, VALIDATION.labels)
    assert result.validation["val/loss"] == pytest.approx(float(loss), rel=1e-4)
    # Beyond a step of the grid either way; 0.3 of an even row asks for somewhat softer logits than the rows alone.
    for factor in (0.5, 0.7, 2.0, 4.0):
        assert torch.nn.functional.cross_entropy(logits * factor, VALIDATION.labels) > loss


@pytest.mark.parametrize("strength", [0, 48, 72, 96])
def test_strengths_are_compared_by_their_calibrated_loss(strength):
    path, rows = ridge.fit_ridge_path(TRAIN, torch.arange(200), ("cls",), "none", 4), torch.arange(60)
    logits = path.head(STRENGTHS[strength], VALIDATION, rows)(VALIDATION.source(("cls",), rows)).detach()
    loss = torch.nn.functional.cross_entropy(logits, VALIDATION.labels)
    assert path.metrics(VALIDATION, rows, "val/loss")[strength]["val/loss"] == pytest.approx(float(loss), rel=0.05)


def test_the_loss_can_be_what_is_minimised():
    result = run(run_ridge, ranking=Ranking("val/loss", "minimize"))
    by_accuracy = run(run_ridge)
    assert result.validation["val/loss"] <= by_accuracy.validation["val/loss"] * 1.02


def test_few_rows_that_are_all_right_do_not_make_it_certain():
    sets = [make_set(num_rows, seed, spread=8.0) for seed, num_rows in enumerate((40, 12, 80))]
    result = run(run_ridge, *sets)
    assert result.validation["val/accuracy"] == 1.0
    assert result.test_logits[0].softmax(1).max(1).values.mean() < 0.9999


class Unopened:
    """A test split that may not be read before the choice is made."""

    def __init__(self, log):
        self.log, self.labels, self.parts = log, TEST.labels, TEST.parts

    def source(self, parts, rows):
        self.log.append(("test", parts, len(rows)))
        return TEST.source(parts, rows)


class Watched(FeatureSet):
    """A validation split that notes each reading of it."""

    def source(self, parts, rows):
        LOG.append(("validation", parts, len(rows)))
        return super().source(parts, rows)


LOG = []


@pytest.mark.parametrize("function", [run_knn, run_ridge])
def test_the_test_split_is_read_once_after_the_choice(function):
    LOG.clear()
    result = run(function, validation=Watched(VALIDATION.parts, VALIDATION.labels), test=Unopened(LOG))
    first = next(index for index, (split, *_) in enumerate(LOG) if split == "test")
    assert first > 0
    assert LOG[first:] == [("test", SOURCES[result.setting["features"]], 80)]


@pytest.mark.parametrize("function", [run_knn, run_ridge])
def test_the_labels_of_test_decide_nothing(function):
    other = run(function, test=replace(TEST, labels=TEST.labels.flip(0)))
    assert torch.equal(other.test_logits[0], run(function).test_logits[0])


def draws(num_rows, num_drawn):
    generator = torch.Generator().manual_seed(num_rows)
    return torch.stack([torch.randperm(num_rows, generator=generator)[:num_drawn] for _ in range(3)])


SUBSETS = Subsets(draws(200, 16), draws(60, 20))


def sliced(features, rows):
    return FeatureSet({name: part[rows] for name, part in features.parts.items()}, features.labels[rows])


def test_neighbours_are_looked_up_in_each_subset_alone():
    result = run(run_knn, subsets=SUBSETS)
    count, source = result.setting["k"], result.setting["features"]
    accuracies = []
    for own, seen, logits in zip(SUBSETS.train, SUBSETS.validation, result.test_logits, strict=True):
        train, labels = inputs(TRAIN, source, own), TRAIN.labels[own].numpy()
        expected = np.zeros((80, 4))
        expected[:, np.unique(labels)] = sklearn_votes(train, inputs(TEST, source), labels, count)
        np.testing.assert_allclose(logits.exp(), (count * expected + 1 / 4) / (count + 1), atol=1e-5)
        votes = sklearn_votes(train, inputs(VALIDATION, source, seen), labels, count)
        accuracies.append((np.unique(labels)[votes.argmax(1)] == VALIDATION.labels[seen].numpy()).mean())
    assert result.validation["val/accuracy"] == pytest.approx(np.mean(accuracies))


def test_ridge_is_fitted_to_each_subset_alone_with_one_setting():
    result = run(run_ridge, subsets=SUBSETS)
    parts, tables = SOURCES[result.setting["features"]], []
    for own, seen, logits, head in zip(
        SUBSETS.train, SUBSETS.validation, result.test_logits, result.heads, strict=True
    ):
        path = ridge.fit_ridge_path(sliced(TRAIN, own), torch.arange(16), parts, result.setting["normalize"], 4)
        validation = sliced(VALIDATION, seen)
        tables.append(path.metrics(validation, torch.arange(20), "val/accuracy"))
        expected = path.head(result.setting["strength"], validation, torch.arange(20))
        torch.testing.assert_close(head.weight, expected.weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(expected(TEST.source(parts, torch.arange(80))), logits, atol=1e-4, rtol=1e-4)
    means = [np.mean([line["val/accuracy"] for line in lines]) for lines in zip(*tables, strict=True)]
    assert result.validation["val/accuracy"] == pytest.approx(max(means))
    assert means[STRENGTHS.index(result.setting["strength"])] == pytest.approx(max(means))


@pytest.mark.parametrize("function", [run_knn, run_ridge])
def test_odd_features_give_finite_logits(function):
    constant = FeatureSet({name: torch.full((8, 12), 3.0).half() for name in ("cls", "mean")}, torch.arange(8) % 4)
    zero = FeatureSet({name: torch.zeros(8, 12).half() for name in ("cls", "mean")}, torch.arange(8) % 4)
    twice = FeatureSet({name: part[:3].repeat(2, 1) for name, part in TRAIN.parts.items()}, TRAIN.labels[:3].repeat(2))
    for train in (constant, zero, twice):  # the last one also lacks a class
        for validation in (VALIDATION, constant):
            result = run(function, train, validation)
            assert all(logits.isfinite().all() for logits in result.test_logits)
            assert all(math.isfinite(value) for value in result.validation.values())


def test_there_are_no_more_neighbours_than_rows():
    train = make_set(3, 5, num_classes=3)
    result = run(run_knn, train)
    assert result.setting["k"] == 3
    assert result.num_settings == 2
    twelve = run(run_knn, make_set(12, 5))
    assert twelve.num_settings == 4
    assert twelve.setting["k"] in (10, 12)


def test_a_constant_feature_beside_others_changes_nothing():
    def with_constant(features):
        return FeatureSet(
            {
                name: torch.cat([part, torch.full((len(part), 1), 7.0).half()], 1)
                for name, part in features.parts.items()
            },
            features.labels,
        )

    plain = ridge.fit_ridge_path(TRAIN, torch.arange(200), ("cls",), "standardize", 4)
    padded = ridge.fit_ridge_path(with_constant(TRAIN), torch.arange(200), ("cls",), "standardize", 4)
    # The mean eigenvalue counts the constant feature, of no variance, as well.
    one = plain.head(1.0, VALIDATION, torch.arange(60))
    other = padded.head(13 / 12, with_constant(VALIDATION), torch.arange(60))
    torch.testing.assert_close(one.weight, other.weight[:, :-1], atol=1e-4, rtol=1e-4)
    assert other.weight[:, -1].abs().max() < 1e-6


@pytest.mark.parametrize("function", [run_knn, run_ridge])
def test_a_large_validation_split_is_thinned_evenly(monkeypatch, function):
    monkeypatch.setattr(baselines, "MAX_CHOICE_ROWS", 20)
    thinned = FeatureSet({name: part[::3] for name, part in VALIDATION.parts.items()}, VALIDATION.labels[::3])
    one, other = run(function), run(function, validation=thinned)
    assert one.setting == other.setting
    assert one.validation == pytest.approx(other.validation)
