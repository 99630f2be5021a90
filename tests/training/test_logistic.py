import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.training import logistic
from raysweep.training.baseline_task import BaselineTask
from raysweep.training.folds import stratified_folds
from raysweep.training.logistic import FIRST_STRENGTHS, STRENGTHS, prepare_logistic, run_logistic
from raysweep.training.population import FeatureSet, Subsets
from raysweep.training.ranking import Ranking

SOURCES = {"cls": ("cls",), "cls+mean": ("cls", "mean")}


def make_set(num_rows, seed, num_features=30):
    generator = torch.Generator().manual_seed(seed)
    centers = 0.4 * torch.randn(3, num_features, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(num_rows) % 3
    scales = torch.logspace(0, -1.5, num_features)
    parts = {
        name: (scales * (centers[labels] + torch.randn(num_rows, num_features, generator=generator)) + 0.5).half()
        for name in ("cls", "mean")
    }
    return FeatureSet(parts, labels)


TRAIN, VALIDATION, TEST = make_set(150, 0), make_set(45, 1), make_set(900, 2)


def normalized(normalize, train, other):
    if normalize == "l2":
        return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, other)]
    if normalize == "standardize":
        scaler = StandardScaler().fit(train)
        return [scaler.transform(train), scaler.transform(other)]
    return [train, other]


def inputs(features, source, rows=slice(None)):
    return np.concatenate([features.parts[part][rows].double().numpy() for part in SOURCES[source]], 1)


def sklearn_logistic(train, labels, strength):
    """Logistic regression at a strength in mean eigenvalues of the centred covariance."""
    centered = train - train.mean(0)
    unit = (centered**2).sum() / min(centered.shape) / len(train)
    return LogisticRegression(C=1 / (len(train) * strength * unit), tol=1e-8, max_iter=10_000).fit(centered, labels)


def penalised_loss(weight, logits, labels, strength):
    return float(F.cross_entropy(logits, labels)) + strength / 2 * float(weight.square().sum())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("num_rows", [24, 150])
@pytest.mark.parametrize("limits", [{}, {"INPUT_BYTES": 0, "CHUNK_ROWS": 19}, {"LOGIT_BYTES": 4 * 3 * 7}])
def test_every_strength_is_the_regression_of_scikit_learn(monkeypatch, normalize, num_rows, limits):
    for name, limit in limits.items():
        monkeypatch.setattr(logistic, name, limit)
    rows, labels = torch.arange(num_rows), TRAIN.labels[:num_rows]
    fit = prepare_logistic(TRAIN, rows, SOURCES["cls+mean"], normalize, 3)
    train, test = normalized(normalize, inputs(TRAIN, "cls+mean", rows), inputs(TEST, "cls+mean"))
    for strength in STRENGTHS[::4]:
        model = sklearn_logistic(train, labels.numpy(), strength)
        head = fit.head(strength)
        predicted = head(TEST.source(SOURCES["cls+mean"], torch.arange(900))).argmax(1).numpy()
        assert (predicted == model.predict(test - train.mean(0))).mean() >= 0.995
        own = head(TRAIN.source(SOURCES["cls+mean"], rows)).detach()
        theirs = torch.from_numpy(model.decision_function(train - train.mean(0)))
        weights = 1 / (model.C * num_rows)
        expected = penalised_loss(torch.from_numpy(model.coef_), theirs, labels, weights)
        assert penalised_loss(head.weight.detach(), own, labels, weights) == pytest.approx(expected, abs=1e-3, rel=1e-3)


def test_folds_are_fitted_without_their_own_rows(monkeypatch):
    monkeypatch.setattr(logistic, "FOLD_TOLERANCE", 1e-6)
    folds = stratified_folds(TRAIN.labels.numpy(), 5, 0)
    fit = prepare_logistic(TRAIN, torch.arange(150), ("cls",), "none", 3)
    found = fit.fold_losses(STRENGTHS[2::5], torch.from_numpy(folds))
    features, labels = inputs(TRAIN, "cls"), TRAIN.labels.numpy()
    centered = features - features.mean(0)
    unit = (centered**2).sum() / min(centered.shape) / len(centered)
    for strength, loss in zip(STRENGTHS[2::5], found.tolist(), strict=True):
        losses = []
        for fold in range(5):
            seen = folds != fold
            model = LogisticRegression(C=1 / (seen.sum() * strength * unit), tol=1e-8, max_iter=10_000)
            model.fit(features[seen], labels[seen])
            shares = model.predict_log_proba(features[~seen])
            losses.append(-shares[np.arange((~seen).sum()), labels[~seen]])
        assert loss == pytest.approx(np.concatenate(losses).mean(), rel=2e-3)


def test_problems_that_do_not_fit_into_memory_together_are_solved_one_after_another(monkeypatch):
    folds = torch.from_numpy(stratified_folds(TRAIN.labels.numpy(), 5, 0))
    fit = prepare_logistic(TRAIN, torch.arange(150), ("cls",), "none", 3)
    together = fit.fold_losses(STRENGTHS, folds)
    monkeypatch.setattr(logistic, "SOLVER_BYTES", 0)
    torch.testing.assert_close(fit.fold_losses(STRENGTHS, folds), together, rtol=1e-4, atol=1e-4)


def run(train=TRAIN, **more):
    asked = {"sources": SOURCES, "num_classes": 3, "subsets": None, "ranking": Ranking(), "seed": 3, "refit": False}
    return run_logistic(BaselineTask(train, VALIDATION, TEST, **(asked | more)))


def test_the_setting_has_the_least_cross_validated_loss():
    folds = torch.from_numpy(stratified_folds(TRAIN.labels.numpy(), 5, 3))
    fits = {
        (source, normalize): prepare_logistic(TRAIN, torch.arange(150), SOURCES[source], normalize, 3)
        for source in SOURCES
        for normalize in NORMALIZATIONS
    }
    first = {key: float(fit.fold_losses(FIRST_STRENGTHS, folds).min()) for key, fit in fits.items()}
    result = run()
    key = result.setting["features"], result.setting["normalize"]
    assert key == min(first, key=first.__getitem__)
    assert result.setting["strength"] == STRENGTHS[int(fits[key].fold_losses(STRENGTHS, folds).argmin())]
    assert result.num_settings == 6 * 3 + 13
    head = fits[key].head(result.setting["strength"])
    torch.testing.assert_close(result.heads[0].weight, head.weight, rtol=1e-3, atol=1e-3)


def test_a_refit_is_the_regression_on_both_splits():
    result = run(refit=True)
    strength, source, normalize = (result.setting[name] for name in ("strength", "features", "normalize"))
    labels = torch.cat([TRAIN.labels, VALIDATION.labels])
    parts = {name: torch.cat([part, VALIDATION.parts[name]]) for name, part in TRAIN.parts.items()}
    fit = prepare_logistic(FeatureSet(parts, labels), torch.arange(195), SOURCES[source], normalize, 3)
    expected = fit.head(strength)(TEST.source(SOURCES[source], torch.arange(900)))
    torch.testing.assert_close(result.test_logits[0], expected, rtol=1e-3, atol=1e-3)


def test_few_shot_regressions_choose_nothing():
    train = torch.tensor([[0, 1, 2], [30, 31, 32]])
    result = run(subsets=Subsets(train, torch.arange(20).expand(2, -1)), refit=True)
    assert result.setting == {"strength": pytest.approx(10**-1.25), "features": "cls", "normalize": "l2"}
    assert result.num_settings == 1
    for rows, head in zip(train, result.heads, strict=True):
        expected = prepare_logistic(TRAIN, rows, ("cls",), "l2", 3).head(10**-1.25)
        torch.testing.assert_close(head.weight, expected.weight)


def test_rows_of_one_class_need_few_steps(monkeypatch):
    """Their loss has no minimum: a larger bias is always better."""
    asked = []
    original = logistic._Problems.__call__
    monkeypatch.setattr(logistic._Problems, "__call__", lambda *given: asked.append(1) or original(*given))
    fit = prepare_logistic(TRAIN, torch.arange(0, 150, 3), ("cls",), "none", 3)
    head = fit.head(STRENGTHS[0])
    assert len(asked) < 60
    logits = head(TEST.source(("cls",), torch.arange(900)))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == 0).all()


def test_strengths_are_weaker_where_one_direction_holds_nearly_all_the_variance():
    def hidden(features):
        common = 20 * torch.randn(len(features.labels), 1, generator=torch.Generator().manual_seed(4))
        return FeatureSet({"cls": features.parts["cls"].float() + common}, features.labels)

    sources = {"cls": ("cls",)}
    asked = BaselineTask(hidden(TRAIN), hidden(VALIDATION), hidden(TEST), sources, 3, None, Ranking(), 3, False)
    result = run_logistic(asked)
    assert result.setting["strength"] < STRENGTHS[0]
    assert result.num_settings == 3 * 3 + 13 + 12
    assert (result.test_logits[0].argmax(1) == TEST.labels).float().mean() > 0.6
