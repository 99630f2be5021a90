import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.experiment.studies import BASELINES
from raysweep.training import baseline_task, baselines, eigenbasis, knn, ridge
from raysweep.training.baseline_task import REFITTED, BaselineTask, HeldOut
from raysweep.training.calibration import fit_temperature
from raysweep.training.folds import stratified_folds
from raysweep.training.knn import run_knn
from raysweep.training.logistic import run_logistic
from raysweep.training.population import FeatureSet, Subsets
from raysweep.training.ranking import Ranking
from raysweep.training.ridge import STRENGTHS, run_ridge

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
    asked = {"sources": SOURCES, "num_classes": 4, "subsets": None, "ranking": Ranking(), "seed": 3, "refit": False}
    return function(BaselineTask(train, validation, test, **(asked | more)))


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
    assert {"knn": run_knn, "ridge": run_ridge, "logistic": run_logistic} == baselines.RUN_BASELINE
    assert tuple(baselines.RUN_BASELINE) == BASELINES, "in the order of the experiment file's"


@pytest.mark.parametrize("chunk_rows", [7, 4096])
def test_neighbours_vote_as_scikit_learn_has_it(monkeypatch, chunk_rows):
    monkeypatch.setattr(knn, "CHUNK_ROWS", chunk_rows)
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
            first = (-smoothed.round(6)).argsort(1, kind="stable")[:, :3]  # of equal votes, the first class
            rows[count, source] = {
                "val/accuracy": (votes.argmax(1) == VALIDATION.labels.numpy()).mean(),
                "val/macro_f1": f1_score(VALIDATION.labels, votes.argmax(1), average="macro"),
                "val/loss": log_loss(VALIDATION.labels, smoothed),
                "val/balanced_accuracy": balanced_accuracy_score(VALIDATION.labels, votes.argmax(1)),
                "val/top_k_accuracy": np.mean(
                    [label in row for label, row in zip(VALIDATION.labels, first, strict=True)]
                ),
                "val/brier": brier_score_loss(VALIDATION.labels, smoothed),
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
    for module in (ridge, eigenbasis):
        monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    rows, labels = torch.arange(num_rows), TRAIN.labels[:num_rows].numpy()
    path = ridge.fit_ridge_path(TRAIN, rows, SOURCES["cls+mean"], normalize, 4)
    held_out = HeldOut(rows, VALIDATION, torch.arange(60))
    errors = path.squared_errors(held_out)
    train, validation = normalized(normalize, inputs(TRAIN, "cls+mean", rows), inputs(VALIDATION, "cls+mean"))
    for index in (0, 30, 60, 96):
        model = sklearn_ridge(train, labels, STRENGTHS[index], 4)
        scores = model.predict(validation)
        assert float(errors[index]) == pytest.approx(((scores - np.eye(4)[VALIDATION.labels]) ** 2).mean())
        np.testing.assert_allclose(path.scores(held_out, [STRENGTHS[index]])[:, 0], scores, atol=2e-5)
        head = path.head(STRENGTHS[index], temperature=0.5)
        np.testing.assert_allclose(head.weight.detach() / 2, model.coef_, atol=1e-3 * abs(model.coef_).max())
        logits = head(VALIDATION.source(SOURCES["cls+mean"], torch.arange(60))).detach()
        np.testing.assert_allclose(logits / 2, scores, atol=2e-5)


def test_strengths_are_scored_the_same_in_pieces(monkeypatch):
    path = ridge.fit_ridge_path(TRAIN, torch.arange(200), ("cls",), "none", 4)
    held_out = HeldOut(torch.arange(200), VALIDATION, torch.arange(60))
    whole = path.squared_errors(held_out)
    monkeypatch.setattr(ridge, "MAX_SCORES", 60 * 4 * 5)
    assert len(whole) == len(STRENGTHS)
    torch.testing.assert_close(path.squared_errors(held_out), whole)


def fold_errors(source, normalize, folds):
    """Squared errors of scikit-learn's ridge on held-out folds, `(num_strengths,)`."""
    numbers, labels, errors = stratified_folds(TRAIN.labels.numpy(), 5, 3), TRAIN.labels.numpy(), []
    for fold in folds:
        seen, unseen = np.flatnonzero(numbers != fold), np.flatnonzero(numbers == fold)
        train, rest = normalized(normalize, inputs(TRAIN, source, seen), inputs(TRAIN, source, unseen))
        scores = [sklearn_ridge(train, labels[seen], strength, 4).predict(rest) for strength in STRENGTHS]
        errors.append([((one - np.eye(4)[labels[unseen]]) ** 2).mean() for one in scores])
    return np.mean(errors, 0)


def test_ridge_chooses_the_setting_with_the_least_squared_error_on_folds():
    first = {
        (source, normalize): fold_errors(source, normalize, range(2)).min()
        for source in SOURCES
        for normalize in NORMALIZATIONS
    }
    result = run(run_ridge)
    source, normalize = result.setting["features"], result.setting["normalize"]
    assert (source, normalize) == min(first, key=first.__getitem__)
    assert result.setting["strength"] == STRENGTHS[fold_errors(source, normalize, range(5)).argmin()]
    assert result.num_settings == 6 * len(STRENGTHS)
    train, validation = normalized(normalize, inputs(TRAIN, source), inputs(VALIDATION, source))
    scores = sklearn_ridge(train, TRAIN.labels.numpy(), result.setting["strength"], 4).predict(validation)
    assert result.validation["val/accuracy"] == pytest.approx((scores.argmax(1) == VALIDATION.labels.numpy()).mean())


@pytest.mark.parametrize("function", [run_ridge, run_logistic])
def test_the_head_gives_the_logits_of_test(function):
    result = run(function)
    (head,), (logits,) = result.heads, result.test_logits
    assert head.normalize == result.setting["normalize"]
    assert torch.equal(head(TEST.source(SOURCES[result.setting["features"]], torch.arange(80))), logits)
    assert (logits.argmax(1) == TEST.labels).float().mean() > 0.7


@pytest.mark.parametrize("function", [run_ridge, run_logistic])
def test_validation_decides_nothing_where_folds_do(function):
    other = FeatureSet(TEST.parts, TEST.labels.flip(0))
    one, two = run(function), run(function, validation=other)
    assert one.setting == two.setting
    assert torch.equal(one.heads[0].weight, two.heads[0].weight)
    assert one.validation != two.validation


def test_ridge_is_calibrated():
    result = run(run_ridge)
    loss = torch.nn.functional.cross_entropy(result.test_logits[0], TEST.labels)
    for factor in (0.4, 2.5):
        assert torch.nn.functional.cross_entropy(result.test_logits[0] * factor, TEST.labels) > loss


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
@pytest.mark.parametrize("refit", [False, True])
def test_a_temperature_is_fitted_on_validation_to_a_classifier_of_train_alone(function, refit):
    on_validation = run(function, test=VALIDATION)
    (temperature,) = run(function, refit=refit).temperatures
    assert temperature == pytest.approx(fit_temperature(on_validation.test_logits[0], VALIDATION.labels), rel=1e-4)


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
def test_each_draw_has_a_temperature_of_its_own_validation_rows(function):
    on_validation = run(function, test=VALIDATION, subsets=SUBSETS)
    expected = [
        fit_temperature(logits[rows], VALIDATION.labels[rows])
        for logits, rows in zip(on_validation.test_logits, SUBSETS.validation, strict=True)
    ]
    assert run(function, subsets=SUBSETS).temperatures == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == len(SUBSETS.validation)


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


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
def test_the_test_split_is_read_once_after_the_choice(function):
    LOG.clear()
    result = run(function, validation=Watched(VALIDATION.parts, VALIDATION.labels), test=Unopened(LOG))
    first = next(index for index, (split, *_) in enumerate(LOG) if split == "test")
    assert first > 0
    assert LOG[first:] == [("test", SOURCES[result.setting["features"]], 80)]


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
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
    result = run(run_ridge, subsets=SUBSETS, refit=True)
    parts, errors, scores, labels = SOURCES[result.setting["features"]], [], [], []
    paths = []
    for own, seen in zip(SUBSETS.train, SUBSETS.validation, strict=True):
        path = ridge.fit_ridge_path(sliced(TRAIN, own), torch.arange(16), parts, result.setting["normalize"], 4)
        held_out = HeldOut(torch.arange(16), sliced(VALIDATION, seen), torch.arange(20))
        errors.append(path.squared_errors(held_out))
        scores.append(path.scores(held_out, [result.setting["strength"]])[:, 0])
        labels.append(VALIDATION.labels[seen])
        paths.append(path)
    assert result.setting["strength"] == STRENGTHS[int(torch.stack(errors).mean(0).argmin())]
    temperature = fit_temperature(torch.cat(scores), torch.cat(labels))
    for path, logits, head in zip(paths, result.test_logits, result.heads, strict=True):
        expected = path.head(result.setting["strength"], temperature)
        torch.testing.assert_close(head.weight, expected.weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(expected(TEST.source(parts, torch.arange(80))), logits, atol=1e-4, rtol=1e-4)
    right = [(one.argmax(1) == own).float().mean() for one, own in zip(scores, labels, strict=True)]
    assert result.validation["val/accuracy"] == pytest.approx(float(np.mean(right)))


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
def test_few_shot_classifiers_are_not_refitted(function):
    asked, kept = run(function, subsets=SUBSETS, refit=True), run(function, subsets=SUBSETS, refit=False)
    assert asked.setting == kept.setting
    for one, other in zip(asked.test_logits, kept.test_logits, strict=True):
        assert torch.equal(one, other)


def both(first, second):
    parts = {name: torch.cat([part, second.parts[name]]) for name, part in first.parts.items()}
    return FeatureSet(parts, torch.cat([first.labels, second.labels]))


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
def test_a_refit_adds_the_validation_rows_once_the_setting_is_chosen(function):
    plain, refitted = run(function), run(function, refit=True)
    assert refitted.setting == plain.setting | REFITTED
    assert refitted.validation == pytest.approx(plain.validation)
    assert refitted.num_settings == plain.num_settings
    assert not torch.equal(refitted.test_logits[0], plain.test_logits[0])
    for one, other in zip(plain.heads, refitted.train_heads, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_a_refitted_neighbour_search_knows_both_splits():
    result = run(run_knn, refit=True)
    count, source = result.setting["k"], result.setting["features"]
    known = both(TRAIN, VALIDATION)
    expected = sklearn_votes(inputs(known, source), inputs(TEST, source), known.labels.numpy(), count)
    np.testing.assert_allclose(result.test_logits[0].exp(), (count * expected + 1 / 4) / (count + 1), atol=1e-5)


def test_a_refitted_ridge_is_that_of_both_splits():
    plain, result = run(run_ridge), run(run_ridge, refit=True)
    strength, source, normalize = (result.setting[name] for name in ("strength", "features", "normalize"))
    known = both(TRAIN, VALIDATION)
    train, test = normalized(normalize, inputs(known, source), inputs(TEST, source))
    scores = sklearn_ridge(train, known.labels.numpy(), strength, 4).predict(test)
    temperature = same_but_for_scale(result.test_logits[0], scores)
    train, test = normalized(normalize, inputs(TRAIN, source), inputs(TEST, source))
    before = sklearn_ridge(train, TRAIN.labels.numpy(), strength, 4).predict(test)
    assert temperature == pytest.approx(same_but_for_scale(plain.test_logits[0], before), rel=1e-3)


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
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
    one = plain.head(1.0, 1.0)
    other = padded.head(13 / 12, 1.0)
    torch.testing.assert_close(one.weight, other.weight[:, :-1], atol=1e-4, rtol=1e-4)
    assert other.weight[:, -1].abs().max() < 1e-6


@pytest.mark.parametrize("function", [run_knn, run_ridge, run_logistic])
def test_a_large_validation_split_is_thinned_evenly(monkeypatch, function):
    monkeypatch.setattr(baseline_task, "MAX_VALIDATION_ROWS", 20)
    thinned = FeatureSet({name: part[::3] for name, part in VALIDATION.parts.items()}, VALIDATION.labels[::3])
    one, other = run(function), run(function, validation=thinned)
    assert one.setting == other.setting
    assert one.validation == pytest.approx(other.validation)


@pytest.mark.parametrize("function", [run_ridge, run_logistic])
def test_a_setting_of_many_train_rows_is_chosen_on_some_of_them(monkeypatch, function):
    monkeypatch.setattr(baseline_task, "MAX_FOLD_ROWS", 70)
    thin = FeatureSet({name: part[::3] for name, part in TRAIN.parts.items()}, TRAIN.labels[::3])
    result, chosen = run(function), run(function, train=thin)
    assert result.setting == chosen.setting
    whole = run(function, sources={result.setting["features"]: SOURCES[result.setting["features"]]})
    assert torch.equal(whole.heads[0].weight, result.heads[0].weight)
    assert not torch.equal(chosen.heads[0].weight, result.heads[0].weight)


def asked_folds(**more):
    asked = {"sources": SOURCES, "num_classes": 4, "subsets": None, "ranking": Ranking(), "seed": 3, "refit": False}
    return BaselineTask(more.pop("train", TRAIN), VALIDATION, TEST, **(asked | more))


def test_folds_hold_out_each_row_once_and_keep_groups_together():
    groups = torch.arange(200) // 4
    held_out = asked_folds(train=replace(TRAIN, groups=groups)).held_out()
    assert torch.equal(torch.cat([held.rows for held in held_out]).sort().values, torch.arange(200))
    for held in held_out:
        assert not set(groups[held.rows].tolist()) & set(groups[held.fit].tolist())
        assert len(held.fit) + len(held.rows) == 200


@pytest.mark.parametrize("groups", [torch.zeros(200, dtype=torch.int64), torch.arange(200) % 4])
def test_groups_too_few_for_folds_leave_the_choice_to_validation(groups):
    task = asked_folds(train=replace(TRAIN, groups=groups))
    assert task.folds() is None
    ((fit, features, rows),) = task.held_out()
    assert features is VALIDATION
    assert (len(fit), len(rows)) == (200, 60)
    assert asked_folds(train=make_set(4, 0)).folds() is None
