from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from jobs import make_job
from sklearn.metrics import precision_recall_fscore_support
from states import CACHE, FakeRecorder, make_state, make_tested, text_of

from raysweep.encoders.head import Head
from raysweep.experiment.metrics import TEST_METRICS
from raysweep.images.index import BadRow
from raysweep.results.leaderboard import ClassMetrics
from raysweep.results.model import load_model
from raysweep.results.tracking import Tracker
from raysweep.sweep.best_heads import first_head, offer_head
from raysweep.sweep.leaderboard_entry import open_baseline
from raysweep.sweep.state import StartHead
from raysweep.sweep.study import open_study
from raysweep.training.evaluation import evaluate_test
from raysweep.training.intervals import FoldEstimate
from raysweep.worker.inputs import START_HEAD, load_heads, save_heads
from raysweep.worker.job import BaselineFit

JOB = make_job()


@pytest.fixture
def open_state(tmp_path):
    """Opens the sweep of one frozen encoder, as a resumed invocation would; keys are the experiment's."""
    return partial(make_state, tmp_path, modes=["linear_probe"])


def baseline_of(state, name):
    (config,) = [one for one in state.experiment.baselines_of(state.experiment.studies()[0]) if one.baseline == name]
    return open_baseline(state, config, CACHE)


def baseline_result(setting, checkpoint=None):
    validation = {"val/accuracy": 0.7, "val/loss": 1.0, "val/macro_f1": 0.6}
    return make_tested(fit=BaselineFit(setting, 4, validation, checkpoint, seconds=1.5, peak_memory_bytes=5))


# Signatures


def test_studies_and_baselines_of_this_method_are_found_again(tmp_path):
    """Whatever changes these keys, finished studies are searched again. If they must be, raise METHOD."""
    state = make_state(
        tmp_path,
        data={"source": "s", "shots": [5, "all"]},
        modes=["linear_probe", "fine_tune"],
        train={"precision": "fp32"},
        search={"fine_tune": {"scheduler": "asha"}, "linear_probe": {"refit": False}},
    )
    state.bad_rows = {number: BadRow(number, f"{number}.png", "broken") for number in (7, 3)}
    head = Head(4, 3)
    for tensor in head.state_dict().values():
        torch.nn.init.constant_(tensor, 0.5)
    save_heads(tmp_path / "head.safetensors", [head], "pooled", {})
    state.start_heads["dinov2", 5] = StartHead(tmp_path / "head.safetensors", (0.0, 0.0))
    configs = state.experiment.studies()
    entries = [open_study(state, config, CACHE) for config in configs]
    entries += [open_baseline(state, one, CACHE) for config in configs for one in state.experiment.baselines_of(config)]
    keys = {entry.name: entry.key for entry in entries}
    assert {name: keys[name] for name in KEYS} == KEYS
    assert len(set(keys.values())) == len(keys)


KEYS = {
    "dinov2-linear_probe": "efd1a5d6bc4b1dcb",
    "dinov2-linear_probe-5shot": "9f231701814bd07e",
    "dinov2-fine_tune": "e85a94b60dfab754",
    "dinov2-fine_tune-5shot": "1bcd139e6c703501",
    "dinov2-knn": "0ece08c3266b2225",
    "dinov2-ridge-5shot": "e427c5dac0a6e2a0",
}


# Baselines


def test_a_baseline_that_is_refitted_has_a_key_of_its_own(open_state):
    data = {"source": "s", "shots": [5, "all"]}
    keys = [
        {entry.name: entry.key for entry in map(partial(opened, state), state.experiment.studies())}
        for refit in (True, False)
        for state in [open_state(data=data, search={"linear_probe": {"refit": refit, "baselines": ["ridge"]}})]
    ]
    assert keys[0]["dinov2-ridge"] != keys[1]["dinov2-ridge"]
    assert keys[0]["dinov2-ridge-5shot"] == keys[1]["dinov2-ridge-5shot"]


def test_a_baseline_that_is_judged_by_folds_has_a_key_of_its_own(open_state):
    found = []
    for folds in ({}, {"folds": 5}, {"folds": 6}):
        state = open_state(data={"source": "s", "shots": [5, "all"], **folds})
        configs = [one for study in state.experiment.studies() for one in state.experiment.baselines_of(study)]
        found.append({one.name: open_baseline(state, one, CACHE) for one in configs})
    assert len({entries["dinov2-knn"].key for entries in found}) == 3
    assert len({entries["dinov2-knn-5shot"].key for entries in found}) == 1
    assert [entries["dinov2-knn"].spec.folds for entries in found] == [None, 5, 6]
    assert [entries["dinov2-knn-5shot"].spec.folds for entries in found] == [None] * 3
    keys = [
        open_study(state, state.experiment.studies()[-1], CACHE).key
        for folds in ({}, {"folds": 5})
        for state in [open_state(data={"source": "s", **folds})]
    ]
    assert keys[0] == keys[1], "studies with trials are not judged by folds"


def test_the_estimate_over_folds_is_in_the_row_and_in_mlflow(open_state):
    recorder = FakeRecorder()
    baseline = baseline_of(open_state(recorder, data={"source": "s", "folds": 3}), "knn")
    tested = baseline_result({"k": 10, "features": "pooled"})
    estimate = FoldEstimate(0.85, 0.8, 0.9, (0.8, 0.9, 0.85))
    baseline.settle(replace(tested, fit=replace(tested.fit, folds=estimate)), JOB)
    assert baseline.conclude().row.folds == estimate
    ((_, logged),) = recorder.of(Tracker.log_outcome)
    of_folds = {name: value for name, value in logged.metrics.items() if name.startswith("folds/")}
    assert of_folds == {"folds/accuracy": 0.85, "folds/accuracy_low": 0.8, "folds/accuracy_high": 0.9}
    assert logged.metrics["test/accuracy"] == 0.8, "that of the given test split stays"
    assert "accuracy over 3 folds 0.850 [0.800, 0.900]" in text_of(baseline.state)
    again = baseline_of(open_state(data={"source": "s", "folds": 3}), "knn")
    assert again.is_settled
    assert again.conclude().row.folds == estimate


def opened(state, study):
    (config,) = state.experiment.baselines_of(study)
    return open_baseline(state, config, CACHE)


def test_a_baseline_without_a_model_is_a_row(open_state):
    recorder = FakeRecorder()
    baseline = baseline_of(open_state(recorder), "knn")
    assert not baseline.is_settled
    baseline.settle(baseline_result({"k": 10, "features": "pooled"}), JOB)
    row = baseline.conclude().row
    assert (row.study, row.mode, row.num_trials) == ("dinov2-knn", "knn", 4)
    assert (row.val_accuracy, row.train_seconds, row.model_path) == (0.7, 3.5, None)
    ((_, logged),) = recorder.of(Tracker.log_outcome)
    assert logged.model is None
    assert baseline_of(open_state(), "knn").is_settled
    assert not baseline_of(open_state(), "ridge").is_settled


def test_a_baseline_that_is_a_head_is_exported(open_state, tmp_path):
    recorder = FakeRecorder()
    baseline = baseline_of(open_state(recorder), "ridge")
    save_heads(tmp_path / "best.safetensors", [Head(4, 3)], "pooled", {})
    setting = {"strength": 0.3, "features": "pooled", "normalize": "none"}
    tested = baseline_result(setting, str(tmp_path / "best.safetensors"))
    tested = replace(tested, metrics=replace(tested.metrics, temperatures=(0.25,)))
    baseline.settle(tested, JOB)
    outcome = baseline.conclude()
    assert outcome.model_uri == "models:/m-1"
    model = load_model(baseline.state.paths.model("dinov2-ridge"))
    assert (model.labels, model.temperature) == (("a", "b", "c"), 0.25)
    ((_, logged),) = recorder.of(Tracker.log_outcome)
    assert logged.metrics["val/temperature"] == 0.25
    again = baseline_of(open_state(), "ridge")
    assert again.is_settled
    assert again.conclude().row.best_params == setting


WITH_FINE_TUNE = {"modes": ["linear_probe", "fine_tune"]}


def settled_with_start(state, loss):
    """A ridge baseline that was refitted; its head of train alone has this loss on validation."""
    baseline = baseline_of(state, "ridge")
    tested = baseline_result({"strength": 0.3, "features": "pooled"}, str(baseline.folder / "best.safetensors"))
    tested = replace(tested, fit=replace(tested.fit, validation={"val/accuracy": 0.7, "val/loss": loss}))
    for name, value in (("best.safetensors", 1.0), (START_HEAD, 2.0)):
        head = Head(4, 3)
        torch.nn.init.constant_(head.weight, value)
        save_heads(baseline.folder / name, [head], "pooled", {})
    baseline.settle(tested, JOB)
    baseline.conclude()
    return baseline


@pytest.mark.parametrize(("loss", "is_start"), [(0.3, True), (0.5, False), (0.7, False)])
def test_fine_tuning_starts_from_the_head_with_the_least_loss_on_validation(open_state, tmp_path, loss, is_start):
    state = open_state(**WITH_FINE_TUNE)
    probe, fine_tune = state.experiment.studies()
    save_heads(tmp_path / "probe.safetensors", [Head(4, 3)], "pooled", {})
    offer_head(state, probe, tmp_path / "probe.safetensors", {"val/accuracy": 0.9, "val/loss": 0.5})
    baseline = settled_with_start(state, loss)
    baseline.offer_start()
    start = first_head(state, fine_tune)
    assert start.checkpoint == (baseline.folder / START_HEAD if is_start else tmp_path / "probe.safetensors")
    assert open_study(state, fine_tune, CACHE).head == start.checkpoint


def test_an_earlier_baseline_offers_its_head_again(open_state):
    settled_with_start(open_state(**WITH_FINE_TUNE), 0.3)
    state = open_state(**WITH_FINE_TUNE)
    baseline = baseline_of(state, "ridge")
    assert baseline.is_settled
    baseline.offer_start()
    assert first_head(state, state.experiment.studies()[1]).checkpoint == baseline.folder / START_HEAD


@pytest.mark.parametrize(("modes", "is_settled"), [(["linear_probe"], True), (["linear_probe", "fine_tune"], False)])
def test_a_baseline_is_made_again_if_fine_tuning_may_start_from_a_head_that_is_lost(open_state, modes, is_settled):
    baseline = settled_with_start(open_state(**WITH_FINE_TUNE), 0.3)
    (baseline.folder / START_HEAD).unlink()
    state = open_state(modes=modes)
    assert baseline_of(state, "ridge").is_settled is is_settled


def test_fine_tuning_stays_the_same_study_if_its_start_is_fitted_again_with_other_last_bits(open_state):
    keys = []
    for change in (0.0, 1e-6):
        state = open_state(**WITH_FINE_TUNE)
        baseline = settled_with_start(state, 0.3)
        (head,), _ = load_heads(baseline.folder / START_HEAD)
        head.weight.data += change
        save_heads(baseline.folder / START_HEAD, [head], "pooled", {})
        baseline.offer_start()
        keys.append(open_study(state, state.experiment.studies()[1], CACHE).key)
    assert keys[0] == keys[1]


def test_a_baseline_whose_head_is_lost_or_that_failed_now_offers_none(open_state):
    state = open_state(**WITH_FINE_TUNE)
    baseline = settled_with_start(state, 0.3)
    baseline.failure = "ridge: its test failed"
    baseline.offer_start()
    baseline.failure = None
    (baseline.folder / START_HEAD).unlink()
    baseline.offer_start()
    assert state.start_heads == {}


def test_a_baseline_without_a_head_offers_none(open_state):
    state = open_state(**WITH_FINE_TUNE)
    baseline = baseline_of(state, "knn")
    baseline.settle(baseline_result({"k": 10}), JOB)
    baseline.offer_start()
    assert state.start_heads == {}


def test_a_row_has_every_metric_and_those_of_each_class(open_state):
    recorder = FakeRecorder()
    baseline = baseline_of(open_state(recorder), "knn")
    tested = baseline_result({"k": 10})
    # Nothing is predicted as c, and no row is of b.
    counts = ((6, 2, 0), (0, 0, 0), (1, 1, 0))
    baseline.settle(replace(tested, metrics=replace(tested.metrics, confusion_matrix=counts)), JOB)
    row = baseline.conclude().row
    assert row.test_metrics == tested.metrics.values
    assert row.test_per_class == {
        "a": ClassMetrics(6 / 7, 6 / 8), "b": ClassMetrics(0.0, None), "c": ClassMetrics(None, 0.0)
    }  # fmt: skip
    ((_, logged),) = recorder.of(Tracker.log_outcome)
    assert {name: logged.metrics[f"test/{name}"] for name in TEST_METRICS} == row.test_metrics
    assert logged.confusion_matrix == {
        "labels": ["a", "b", "c"], "counts": counts, "precision": [6 / 7, 0.0, None], "recall": [6 / 8, None, 0.0]
    }  # fmt: skip


def test_precision_and_recall_are_those_of_scikit_learn(open_state):
    baseline = baseline_of(open_state(), "knn")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 3)).astype(np.float32), rng.integers(0, 3, 60)
    baseline.settle(replace(baseline_result({"k": 10}), metrics=evaluate_test(logits, labels)), JOB)
    found = baseline.conclude().row.test_per_class
    precision, recall, _, _ = precision_recall_fscore_support(labels, logits.argmax(1))
    assert [one.precision for one in found.values()] == pytest.approx(precision, abs=1e-6)
    assert [one.recall for one in found.values()] == pytest.approx(recall, abs=1e-6)


def test_a_worker_is_told_which_baseline_it_is(open_state):
    baseline = baseline_of(open_state(data={"source": "s", "shots": [5], "few_shot_seeds": 2}), "knn")
    spec = baseline.spec
    assert (spec.name, spec.baseline, spec.folder) == ("dinov2-knn-5shot", "knn", str(baseline.folder))
    assert not spec.refit
    assert baseline_of(open_state(), "knn").spec.refit
    assert spec.draws is baseline.draws
    assert spec.draws.num_draws == 2


def test_a_reused_baseline_says_what_this_invocation_did_for_it(open_state):
    first = baseline_of(open_state(), "knn")
    first.settle(baseline_result({"k": 10}), JOB)
    assert first.conclude().row.encoder_passes == 1
    state = open_state()
    (config,) = [one for one in state.experiment.baselines_of(state.experiment.studies()[0]) if one.baseline == "knn"]
    again = open_baseline(state, config, replace(CACHE, made_now=False))
    assert again.conclude().row.encoder_passes == 0
