import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from jobs import SMALL_CNN, make_job, make_result
from states import CACHE, FakeRecorder, make_state, make_tested, text_of

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import TrialError
from raysweep.results.model import load_model
from raysweep.results.tracking import Tracker
from raysweep.storage.paths import SweepPaths, read_json
from raysweep.sweep import outcome as outcomes
from raysweep.sweep import stages
from raysweep.sweep import study as module
from raysweep.sweep.outcome import read_outcome
from raysweep.sweep.study import open_study
from raysweep.sweep.study_runs import run_name
from raysweep.training.bias_correction import pack_row_losses, search_optimism
from raysweep.training.checkpoint import save_checkpoint
from raysweep.worker.inputs import load_heads, save_heads
from raysweep.worker.job import EpochReport

JOB = make_job()


@pytest.fixture
def open_state(tmp_path):
    """Opens the sweep of one frozen encoder, as a resumed invocation would; keys are the experiment's."""
    return partial(make_state, tmp_path)


def study_of(state, mode="linear_probe", shots="all"):
    config = next(c for c in state.experiment.studies() if (c.mode.name, c.shots) == (mode, shots))
    return open_study(state, config, CACHE)


def probe(**keys):
    return {"modes": ["linear_probe"], "search": {"linear_probe": keys}}


def fine_tune(**keys):
    return {"modes": ["fine_tune"], "search": {"fine_tune": keys}}


def result_of(trial, accuracy=0.5, checkpoint=None):
    return make_result(trial, accuracy, num_epochs=2, checkpoint=checkpoint)


def tell_all(study, trials, accuracy=0.5):
    for trial in trials:
        study.tell(trial.number, result_of(trial, accuracy), "unused")


def work_through(study):
    """Works through what is left; the checkpoints are real, the last trial is the best."""
    while trials := study.ask():
        for trial in trials:
            path = study.folder / "trials" / str(trial.number) / "best.safetensors"
            save_heads(path, [Head(4, 3)], "pooled", {"trial": trial.number})
            study.tell(trial.number, result_of(trial, 0.5 + 0.01 * trial.number, str(path)), "unused")


def test_a_cache_that_is_made_again_keeps_its_studies_and_another_one_has_others(open_state):
    state = open_state()
    study = study_of(state)
    keys = [
        open_study(state, study.config, replace(CACHE, **where)).key
        for where in (
            {"rows": "features-1/another-pass"},
            {"folder": "/elsewhere/features-1"},
            {"folder": "features-2"},
        )
    ]
    assert [key == study.key for key in keys] == [True, True, False]


def test_what_a_lone_trial_is_told_reaches_the_bucket_before_it_runs(open_state, monkeypatch):
    """Or a sweep that goes on elsewhere would give its number, and with it its checkpoint, to another setting."""
    published = []
    monkeypatch.setattr(module, "publish", lambda path: published.append(path.read_text()))
    study = study_of(open_state(**fine_tune(num_trials=3)), "fine_tune")
    (trial,) = study.ask()
    assert published[0].count('"trial_id":0'), "the journal knows of the trial"
    study.tell(trial.number, result_of(trial), "unused")
    assert len(published) == 2


def test_sweeps_that_share_a_database_share_no_study(open_state, monkeypatch, tmp_path):
    names = []

    class Found(Exception):
        pass

    def find(store, name, *_rest):
        names.append(name)
        raise Found

    monkeypatch.setattr(module, "open_optuna_study", find)
    database = {"tracking": {"optuna_uri": "postgresql://h/optuna"}, **probe()}
    for state in (open_state(**database), open_state(**database), open_state(**probe())):
        with pytest.raises(Found):
            study_of(state)
    monkeypatch.setattr(SweepPaths, "root", tmp_path / "elsewhere" / "x")
    with pytest.raises(Found):
        study_of(open_state(**database))
    assert names[0] == names[1]
    assert names[0].startswith("x-")
    assert len(set(names)) == 3
    assert names[0].endswith(names[2])


def finish(study):
    work_through(study)
    study.choose()
    study.settle(outcome_of_test(study), JOB)
    return study.conclude()


def outcome_of_test(study):
    """The result of a test, with the file of a head that was fitted again where the study asks for one."""
    if not study.spec.refit:
        return make_tested()
    path = study.folder / "best.safetensors"
    save_heads(path, [Head(4, 3)], "pooled", {})
    return make_tested(refitted=str(path))


# Budgets


def test_populations_are_asked_for_until_the_budget_is_spent(open_state):
    study = study_of(open_state(**probe(num_trials=8, population=3)))
    sizes = []
    while trials := study.ask():
        sizes.append(len(trials))
        tell_all(study, trials)
    assert sizes == [3, 3, 2]
    assert (study.num_left, study.optuna_study.num_remaining, study.state.num_new_trials) == (0, 0, 8)
    assert [result.number for result in study.optuna_study.results] == list(range(8))


def test_a_resumed_budget_is_what_is_left(open_state):
    first = study_of(open_state(**probe(num_trials=8, population=6)))
    tell_all(first, first.ask())
    again = study_of(open_state(**probe(num_trials=8, population=6)))
    assert (again.num_left, again.progress.num_done) == (2, 6)
    assert len(again.ask()) == 2
    assert again.ask() == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=50.0, time=time.time, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_no_population_starts_after_the_time_budget(open_state, clock):
    study = study_of(open_state(**probe(num_trials=30, population=2, time_budget_s=60)))
    clock.now += 1000
    for _ in range(2):  # the budget starts with the first Population
        trials = study.ask()
        assert len(trials) == 2
        tell_all(study, trials)
        clock.now += 59
    clock.now += 2
    assert study.ask() == []
    assert study.num_left == 0


def test_the_first_population_runs_whatever_the_budget(open_state, clock, monkeypatch):
    monkeypatch.setattr(module.OptunaStudy, "seconds_spent", 1000.0)  # on trials that were interrupted
    study = study_of(open_state(**probe(num_trials=30, population=2, time_budget_s=60)))
    trials = study.ask()
    assert len(trials) == 2
    clock.now += 1
    tell_all(study, trials)
    assert study.ask() == []


def test_time_that_an_earlier_invocation_spent_counts(open_state, clock, monkeypatch):
    keys = probe(num_trials=30, population=2, time_budget_s=60)
    first = study_of(open_state(**keys))
    tell_all(first, first.ask())
    monkeypatch.setattr(module.OptunaStudy, "seconds_spent", 59.0)
    again = study_of(open_state(**keys))
    tell_all(again, again.ask())
    clock.now += 2
    assert again.ask() == []


def test_a_time_budget_that_is_spent_leaves_the_trials_that_there_are(open_state):
    keys = probe(num_trials=30, population=2, time_budget_s=1e-9)
    finish(study_of(open_state(**keys)))
    again = study_of(open_state(**keys))
    assert again.is_settled
    assert again.ask() == []
    assert again.conclude().row.num_trials == 2
    assert "all 2 trials are there, nothing left to do" in text_of(again.state)


# Trials


def test_a_continued_trial_says_which_it_continues(open_state):
    study_of(open_state(**fine_tune(num_trials=2)), "fine_tune").ask()  # and is killed
    again = study_of(open_state(**fine_tune(num_trials=2)), "fine_tune")
    suggested = [again.ask()[0].continues for _ in range(2)]
    assert sorted(suggested, key=str) == [0, None]


def test_a_lost_population_fails_with_its_reason(open_state):
    state = open_state(**probe(num_trials=4, population=2))
    study = study_of(state)
    for trial in study.ask():
        study.tell(trial.number, None, "DataError: no such cache")
    assert [result.error for result in study.optuna_study.results] == ["DataError: no such cache"] * 2
    assert [trial.state.name for trial in study.optuna_study.study.get_trials()][:2] == ["FAIL"] * 2
    assert [(result.final, result.history) for result in study.optuna_study.results] == [({}, ())] * 2
    assert study.optuna_study.num_remaining == 4, "they are tried again by the next invocation"
    assert text_of(state).count("trial 0 failed: DataError: no such cache") == 1
    assert "trial 1 failed" not in text_of(state), "the same reason is said once"
    failed = [trial for *_, trial in state.recorder.of(Tracker.log_trial)]
    assert [(trial.status, trial.error) for trial in failed] == [("FAILED", "DataError: no such cache")] * 2


def test_a_trial_missing_from_the_results_fails_alone(open_state):
    study = study_of(open_state(**probe(num_trials=2)))
    first, second = study.ask()
    study.tell(first.number, None, "the worker process died")
    study.tell(second.number, result_of(second), "the worker process died")
    assert [result.error is None for result in study.optuna_study.results] == [False, True]
    assert study.progress.num_done == 2


def test_a_trial_without_a_finite_metric_is_logged_as_failed(open_state):
    state = open_state(**probe(num_trials=2))
    study = study_of(state)
    tell_all(study, study.ask(), float("nan"))
    assert [trial.status for *_, trial in state.recorder.of(Tracker.log_trial)] == ["FAILED", "FAILED"]
    assert study.choose() is None


def test_epochs_are_logged_as_they_come_and_not_again_at_the_end(open_state):
    state = open_state(**fine_tune(num_trials=1))
    study = study_of(state, "fine_tune")
    (trial,) = study.ask()
    metrics = {"val/accuracy": 0.5, "val/loss": 1.0}
    study.on_epoch(EpochReport(trial.number, 0, metrics))
    key, name = f"{study.key}/0", run_name(study.config, trial.setting)
    ((*sent, started),) = state.recorder.of(Tracker.log_epoch)
    params = {"encoder": "dinov2", "mode": "fine_tune", "shots": "all", "weights": study.run_params["weights"]}
    assert sent == [study.run_id, key, name, {**params, **trial.setting}, 0, metrics]
    tell_all(study, [trial])
    ((run_id, *named, logged),) = state.recorder.of(Tracker.log_trial)
    assert (run_id, named) == (study.run_id, [key, name])
    assert (len(logged.history), logged.first_epoch) == (1, 1)
    assert started == logged.started <= logged.ended
    assert logged.params == {**params, **trial.setting}
    assert "time/epoch_s" in logged.history[0]


def report(study, trial, accuracies):
    """Passes epochs of a trial on until it is to be stopped; returns how many there were."""
    details = {"time/epoch_s": 2.0, "train/images_per_second": 50.0}
    for epoch, accuracy in enumerate(accuracies):
        if study.on_epoch(
            EpochReport(trial.number, epoch, {"val/accuracy": accuracy, "val/loss": 1 - accuracy, **details})
        ):
            return epoch + 1
    return len(accuracies)


def scheduled(num_trials=3, **keys):
    block = fine_tune(num_trials=num_trials, scheduler="asha", space={"epochs": 3}, **keys)
    return {**block, "train": {"warmup_fraction": 0}}


def test_an_epoch_that_is_passed_on_again_is_not_logged_again(open_state):
    state = open_state(**fine_tune(num_trials=1))
    study = study_of(state, "fine_tune")
    (trial,) = study.ask()
    report(study, trial, [0.5, 0.6])
    report(study, trial, [0.5, 0.6, 0.7])  # its memory ran out in the third epoch, and it began again
    assert [epoch for *_, epoch, _, _ in state.recorder.of(Tracker.log_epoch)] == [0, 1, 2]


def test_a_stopped_trial_is_told_logged_and_shown_as_such_and_leaves_no_weights(open_state):
    state = open_state(**scheduled())
    study = study_of(state, "fine_tune")
    (good,), (bad,) = study.ask(), study.ask()
    assert report(study, good, [0.5, 0.6, 0.7]) == 3
    last = study.folder / "trials" / str(bad.number) / "last.safetensors"
    last.parent.mkdir(parents=True)
    last.write_text("")
    shown = []
    study.progress.show = shown.append
    assert report(study, bad, [0.4, 0.4, 0.4]) == 1
    study.tell(bad.number, None, "the worker process died")
    assert not last.parent.exists()
    assert shown[1:] == ["trial 1 stopped after epoch 1 (asha)"]
    study.tell(good.number, result_of(good, 0.7, "/trials/0"), "unused")
    assert shown[2:] == ["best trial: val/accuracy 0.700, 1 of 2 trials stopped early"]
    (*_, logged), _ = state.recorder.of(Tracker.log_trial)
    assert (logged.status, logged.error, logged.history, logged.first_epoch) == ("KILLED", None, [], 1)
    assert logged.final["val/accuracy"] == 0.4
    assert "failed" not in text_of(state)
    assert [result.pruned for result in study.optuna_study.results] == [False, True]


def test_a_resumed_study_counts_stopped_trials_as_done_and_logs_them_as_stopped(open_state):
    study = study_of(open_state(**scheduled()), "fine_tune")
    (good,), (bad,) = study.ask(), study.ask()
    report(study, good, [0.5])
    report(study, bad, [0.4])
    study.tell(bad.number, None, "unused")
    study.tell(good.number, result_of(good, 0.7), "unused")
    state = open_state(**scheduled())
    again = study_of(state, "fine_tune")
    assert again.num_left == 1
    ((_, trials),) = state.recorder.of(Tracker.log_missing_trials)
    assert sorted((trial.status, len(trial.history)) for *_, trial in trials) == [("FINISHED", 2), ("KILLED", 1)]


def test_a_stopped_trial_that_continued_another_gives_up_its_folder(open_state):
    killed = study_of(open_state(**scheduled()), "fine_tune")
    (lost,) = killed.ask()
    again = study_of(open_state(**scheduled()), "fine_tune")
    trials = [again.ask()[0] for _ in range(2)]
    trials.sort(key=lambda trial: trial.continues is None)
    report(again, trials[1], [0.9])
    folder = again.folder / "trials" / str(lost.number)
    folder.mkdir(parents=True)
    assert report(again, trials[0], [0.4]) == 1
    again.tell(trials[0].number, None, "unused")
    assert not folder.exists()


def test_workers_that_are_asked_to_stop_may_report_once_more_or_be_done_already(open_state):
    study = study_of(open_state(**scheduled()), "fine_tune")
    good, slow, done = (study.ask()[0] for _ in range(3))
    report(study, good, [0.9])
    for trial in (slow, done):
        assert report(study, trial, [0.4]) == 1
        study.ask_to_stop(trial.number)
        assert Path(trial.stop_file).exists()
        once_more = {**result_of(trial, 0.5).final, "train/images_per_second": 50.0}
        assert study.on_epoch(EpochReport(trial.number, 1, once_more))
    study.tell(slow.number, None, "TrialError: stopped early")
    study.tell(done.number, result_of(done, 0.5), "unused")
    assert [(result.pruned, len(result.history)) for result in study.optuna_study.results] == [(True, 2), (False, 2)]
    assert not Path(slow.stop_file).exists()


def test_the_curve_of_a_head_has_no_times(open_state):
    state = open_state(**probe(num_trials=1))
    study = study_of(state)
    tell_all(study, study.ask())
    ((*_, logged),) = state.recorder.of(Tracker.log_trial)
    assert logged.history == [{"val/accuracy": 0.5, "val/loss": 1.0}] * 2


def test_a_resumed_study_sees_to_it_that_every_trial_is_logged(open_state):
    first = study_of(open_state(**probe(num_trials=2)))
    tell_all(first, first.ask())
    state = open_state(**probe(num_trials=2))
    study = study_of(state)
    ((run_id, trials),) = state.recorder.of(Tracker.log_missing_trials)
    assert run_id == study.run_id
    assert [(key, name, len(trial.history)) for key, name, trial in trials] == [
        (f"{study.key}/{result.number}", run_name(study.config, result.setting), 2)
        for result in first.optuna_study.results
    ]
    assert all(trial.started <= trial.ended for *_, trial in trials)


# What a study is


def test_its_run_says_what_it_is_of(open_state):
    state = open_state(data={"source": "s", "shots": [5]}, **probe())
    study = study_of(state, shots=5)
    ((key, *_, params),) = state.recorder.of(Tracker.start_run)
    assert key == study.key
    assert (params["encoder"], params["mode"], params["shots"]) == ("dinov2", "linear_probe", 5)
    assert (params["num_train"], params["num_validation"], params["num_test"]) == (15, 30, 30)


def key_of(open_state, shots="all", mode="linear_probe", **keys):
    data = {"source": "s", "shots": [5, "all"], **keys.pop("data", {})}
    return study_of(open_state(**{"modes": [mode], "data": data, **keys}), mode, shots).key


def test_its_signature_holds_what_its_results_depend_on_and_not_how_much_is_tried(open_state):
    base = key_of(open_state)
    for more in ({"num_trials": 3}, {"time_budget_s": 9}, {"population": 2}, {"baselines": []}, {"refit": False}):
        assert key_of(open_state, search={"linear_probe": more}) == base
    assert key_of(open_state, resources={"num_workers": 2}) == base
    assert key_of(open_state, data={"few_shot_seeds": 3}) == base
    others = [
        key_of(open_state, seed=7),
        key_of(open_state, metric="val/loss"),
        key_of(open_state, shots=5),
        key_of(open_state, shots=5, data={"few_shot_seeds": 3}),
        key_of(open_state, search={"linear_probe": {"sampler": "random"}}),
        key_of(open_state, search={"linear_probe": {"space": {"epochs": 9}}}),
        key_of(open_state, train={"batch_size": 16}),
        key_of(open_state, mode="fine_tune"),
        key_of(open_state, mode="fine_tune", search={"fine_tune": {"space": {"epochs": 20}}}),
        key_of(open_state, mode="fine_tune", search={"fine_tune": {"scheduler": "asha"}}),
        key_of(open_state, mode="fine_tune", search={"fine_tune": {"scheduler": "median"}}),
    ]
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("mode", ["fine_tune", "from_scratch"])
def test_few_shot_probes_draw_often_and_what_trains_all_weights_takes_their_first_draw(open_state, mode):
    keys = {
        "data": {"source": "s", "shots": [5, "all"], "few_shot_seeds": 3},
        "encoders": [{"type": "dinov2", "use_pretrained": mode == "fine_tune"}],
    }
    probes = study_of(open_state(modes=["linear_probe"], **keys), shots=5)
    other = study_of(open_state(modes=[mode], **keys), mode, 5)
    assert (probes.draws.train.shape, other.draws.train.shape) == ((3, 15), (1, 15))
    assert other.draws.train[0].tolist() == probes.draws.train[0].tolist()
    assert study_of(open_state(modes=["linear_probe"], **keys)).draws is None


def test_fine_tuning_starts_from_the_best_head_and_depends_on_it(open_state, tmp_path):
    keys = {"modes": ["linear_probe", "fine_tune"], "search": {"linear_probe": {"num_trials": 2}}}
    state = open_state(**keys)
    alone = study_of(open_state(**keys), "fine_tune")
    probes = study_of(state)
    work_through(probes)
    best = probes.choose()
    assert best.endswith("trials/1/best.safetensors")
    tune = study_of(state, "fine_tune")
    assert str(tune.head) == best
    assert alone.head is None
    assert tune.key != alone.key


# How it ends


def test_an_outcome_is_kept_and_found_by_the_next_invocation(open_state):
    recorder = FakeRecorder()
    study = study_of(open_state(recorder, **probe(num_trials=3)))
    assert not study.is_settled
    outcome = finish(study)
    row = outcome.row
    assert (row.study, row.num_trials, row.test_accuracy) == ("dinov2-linear_probe", 3, 0.8)
    assert row.val_accuracy == pytest.approx(0.52)
    assert (row.encoder_passes, row.train_seconds, row.mlflow_run_id) == (1, 5.0, study.run_id)
    assert (outcome.model_uri, outcome.best_trial) == ("models:/m-1", 2)
    assert recorder.of(Tracker.finish) == [[study.run_id]]
    again = study_of(open_state(recorder, **probe(num_trials=3)))
    assert again.is_settled
    before = len(recorder.of(Tracker.log_outcome))
    result = again.state.paths.study_result(again.config.name, again.key)
    concluded = again.conclude()
    assert concluded == again.earlier_outcome()
    stored = read_outcome(result)
    assert stored.checkpoint == f"studies/{again.name}/{again.key}/best.safetensors"
    assert stored.row.model_path == f"models/{again.name}"
    assert concluded.checkpoint == str(again.state.paths.root / stored.checkpoint)
    assert read_json(result)["row"]["mlflow_run_id"] == again.run_id
    assert again.conclude().test.hits == outcome.test.hits
    assert len(recorder.of(Tracker.log_outcome)) == before == 1, "what is there is not logged again"
    assert "all 3 trials are there, nothing left to do" in text_of(again.state)


def test_more_trials_or_a_lost_model_leave_something_to_do(open_state):
    study = study_of(open_state(**probe(num_trials=2)))
    finish(study)
    assert not study_of(open_state(**probe(num_trials=3))).is_settled
    description = study.state.paths.model(study.config.name) / "model.json"
    content = json.loads(description.read_text())
    for about in ({"trial": 0}, {"key": "another"}):
        description.write_text(json.dumps(content | {"about": content["about"] | about}))
        assert not study_of(open_state(**probe(num_trials=2))).is_settled
    description.unlink()
    assert not study_of(open_state(**probe(num_trials=2))).is_settled


@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss", "val/macro_f1"])
def test_the_optimism_of_the_search_is_taken_off_what_ranks_a_study(open_state, metric):
    state = open_state(metric=metric, search={"linear_probe": {"num_trials": 8}})
    study, generator = study_of(state), torch.Generator().manual_seed(0)
    rows = torch.arange(len(state.rows["validation"]))
    labels, kept = rows % 3, {}
    for trial in study.ask():
        path = study.folder / "trials" / str(trial.number) / "best.safetensors"
        save_heads(path, [Head(4, 3)], "pooled", {})
        kept[trial.number] = pack_row_losses(torch.randn(len(rows), 3, generator=generator), labels)
        result = result_of(trial, 0.5 + 0.01 * trial.number, str(path))
        final = dict(result.final) | {"val/macro_f1": 0.5}
        study.tell(trial.number, replace(result, final=final, row_losses=kept[trial.number]), "unused")
    study.choose()
    study.settle(outcome_of_test(study), JOB)
    outcome, best = study.conclude(), study.optuna_study.best()
    luck = search_optimism(metric, kept, best.number, rows[None].numpy(), state.experiment.seed)
    if metric == "val/macro_f1":
        assert (outcome.corrected, luck, outcome.row.val_accuracy_corrected) == (None, None, None)
        assert outcome.ranking_metrics(metric) == outcome.validation
        return
    assert luck != 0
    assert outcome.corrected == pytest.approx(best.final[metric] - luck)
    assert outcome.ranking_metrics(metric) == {**outcome.validation, metric: outcome.corrected}
    assert outcome.row.val_accuracy == best.final["val/accuracy"], "what is shown of the search stays"
    assert outcome.row.val_accuracy_corrected == (outcome.corrected if metric == "val/accuracy" else None)
    again = study_of(open_state(metric=metric, search={"linear_probe": {"num_trials": 8}}))
    assert again.is_settled
    assert again.conclude().corrected == outcome.corrected


def test_a_head_that_is_fitted_again_is_the_one_that_is_exported(open_state):
    search = {"linear_probe": {"num_trials": 2}}
    row = finish(study_of(open_state(search=search))).row
    assert row.best_params["fitted_to"] == "train+validation"
    study = study_of(open_state(search=search))
    assert study.is_settled
    (head,), _ = load_heads(study.folder / "best.safetensors")
    model = load_model(study.state.paths.model(study.name))
    torch.testing.assert_close(model.classifier.head.weight, head.weight)
    assert study.optuna_study.best().checkpoint == f"studies/{study.name}/{study.key}/trials/1/best.safetensors"
    without = {"linear_probe": {"num_trials": 2, "refit": False}}
    again = study_of(open_state(search=without))
    assert (again.key, again.is_settled) == (study.key, False), "its trials are the same, its test is not"
    assert "fitted_to" not in finish(again).row.best_params
    assert not study_of(open_state(search=search)).is_settled


def test_a_new_store_is_told_the_outcome_again(open_state):
    finish(study_of(open_state(**probe(num_trials=2))))
    recorder = FakeRecorder()
    recorder.runs["another"] = "run0"  # so that the run ids are others
    again = study_of(open_state(recorder, **probe(num_trials=2)))
    assert again.conclude().row.mlflow_run_id == again.run_id
    ((run_id, logged),) = recorder.of(Tracker.log_outcome)
    assert (run_id, logged.metrics["test/accuracy"]) == (again.run_id, 0.8)
    assert Path(logged.checkpoint).exists()
    assert Path(logged.model).exists()


def test_a_study_with_stopped_trials_says_how_many_and_what_it_had_of_them(open_state, monkeypatch):
    monkeypatch.setattr(
        outcomes, "build_classifier", lambda job: Classifier(build_encoder(SMALL_CNN, 0), Head(4, 3), "pooled")
    )
    state = open_state(**scheduled())
    study = study_of(state, "fine_tune")
    paths = []
    while trials := study.ask():
        (trial,) = trials
        paths.append(study.folder / "trials" / str(trial.number) / "best.safetensors")
        save_checkpoint(paths[-1], outcomes.build_classifier(None).state_dict(), {})
        stopped = report(study, trial, [0.9 - 0.1 * trial.number] * 3) < 3
        study.tell(trial.number, None if stopped else result_of(trial, 0.9, str(paths[-1])), "unused")
    assert study.choose() == str(paths[0])
    assert "dinov2-fine_tune: 2 of 3 trials stopped early (asha)" in text_of(state)
    paths[1].parent.mkdir()  # a worker on its way out wrote once more
    study.settle(make_tested(), JOB)
    row = study.conclude().row
    assert (row.num_trials, row.encoder_passes, row.peak_memory_bytes) == (3, 2 + 1 + 1, 10**9)
    assert [path.parent.exists() for path in paths] == [True, False, False]
    again = study_of(open_state(**scheduled()), "fine_tune")
    assert again.is_settled


def test_only_the_chosen_weights_are_kept(open_state):
    study = study_of(open_state(**probe(num_trials=3)))
    finish(study)
    assert [path.parent.name for path in study.folder.glob("trials/*/best.safetensors")] == ["2"]


def test_the_time_of_a_study_adds_up_over_invocations(open_state, clock):
    for num_trials, expected in ((1, 12.0), (2, 24.0)):  # two of them its encoder pass
        study = study_of(open_state(**probe(num_trials=num_trials)))
        study.seconds += 10  # as its group counts its pieces of work
        assert finish(study).row.study_seconds == pytest.approx(expected)


def test_a_study_whose_trials_all_failed_says_why(open_state):
    study = study_of(open_state(**probe(num_trials=2)))
    for trial in study.ask():
        study.tell(trial.number, None, "CUDA out of memory")
    assert study.choose() is None
    assert study.state.start_heads == {}
    with pytest.raises(TrialError, match=r"dinov2-linear_probe.*: no trial succeeded; CUDA out of memory"):
        study.conclude()


def test_a_test_that_failed_leaves_no_outcome(open_state):
    study = study_of(open_state(**probe(num_trials=1)))
    work_through(study)
    study.failure = f"{study.config.name}: its test failed: CUDA out of memory"
    with pytest.raises(TrialError, match="its test failed"):
        study.conclude()
    assert not study_of(open_state(**probe(num_trials=1))).is_settled


# Checkpoints that are lost


HEADS = {"modes": ["linear_probe", "fine_tune"], "search": {"linear_probe": {"num_trials": 2}}}


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-9], "empty": b"", "garbled": content[:-4] + b"oops"}[how])


def train_again(study, trial, offset=0.0):
    """Trains a lost head again; `offset` is how far its weights are from what they were."""
    head = Head(4, 3)
    with torch.no_grad():
        head.weight.fill_(0.5 + offset)
    path = study.folder / "trials" / trial.folder_name / "best.safetensors"
    save_heads(path, [head], "pooled", {})
    study.tell(trial.number, result_of(trial, 0.9, str(path)), "unused")


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "garbled"])
def test_a_lost_head_is_trained_again_under_its_number_and_fine_tuning_stays_the_same_study(open_state, how):
    study = study_of(open_state(**HEADS))
    finish(study)
    key = study_of(study.state, "fine_tune").key
    (checkpoint,) = study.folder.glob("trials/*/best.safetensors")
    damage(checkpoint, how)
    again = study_of(open_state(**HEADS))
    lost = again.find_lost_trial()
    assert (lost.number, lost.setting, lost.folder_name) == (1, again.optuna_study.best().setting, "1")
    assert again.find_lost_trial() is None, "it is trained again once"
    before = again.optuna_study.results
    train_again(again, lost, offset=1e-6)
    assert again.on_epoch(EpochReport(lost.number, 0, {"val/accuracy": 0.5})) is False
    assert again.optuna_study.results == before, "its result is what it was"
    assert again.state.num_new_trials == 0
    again.choose()
    assert study_of(again.state, "fine_tune").key == key
    assert "dinov2-linear_probe: trial 1, its best, is trained again: " in text_of(again.state)
    assert study_of(open_state(**HEADS)).find_lost_trial() is None


def test_a_lost_head_that_cannot_be_trained_again_costs_the_study_that_starts_from_it(open_state):
    study = study_of(open_state(**HEADS))
    finish(study)
    damage(next(study.folder.glob("trials/*/best.safetensors")), "cut")
    state = open_state(**HEADS)
    again = study_of(state)
    lost = again.find_lost_trial()
    again.tell(lost.number, None, "CUDA out of memory")
    assert "trial 1 could not be trained again: CUDA out of memory" in text_of(state)
    again.choose()
    config = next(config for config in state.experiment.studies() if config.mode.name == "fine_tune")
    assert stages.open_study_if_possible(state, config, CACHE) is None
    (failure,) = state.failures
    assert "best.safetensors: not a readable raysweep checkpoint" in failure
    assert again.conclude().row.num_trials == 2, "the probe keeps its row"


def test_a_checkpoint_that_nothing_needs_any_more_is_not_made_again(open_state):
    study = study_of(open_state(**probe(num_trials=2)))
    finish(study)
    damage(next(study.folder.glob("trials/*/best.safetensors")), "missing")
    again = study_of(open_state(**probe(num_trials=2)))
    assert again.is_settled
    assert again.find_lost_trial() is None


def test_what_is_still_to_be_tested_is_trained_again_from_the_beginning(open_state):
    keys = fine_tune(num_trials=1)
    killed = study_of(open_state(**keys), "fine_tune")
    killed.ask()
    study = study_of(open_state(**keys), "fine_tune")
    (trial,) = study.ask()
    path = study.folder / "trials" / trial.folder_name / "best.safetensors"
    save_checkpoint(path, {"weight": torch.ones(3)}, {})
    study.tell(trial.number, result_of(trial, 0.9, str(path)), "unused")
    damage(path, "cut")
    path.with_name("last.safetensors").write_text("of a process that was killed")
    again = study_of(open_state(**keys), "fine_tune")
    lost = again.find_lost_trial()
    assert (lost.number, lost.folder_name) == (trial.number, "0")
    assert list(path.parent.iterdir()) == []


# Folders that move


def test_a_study_whose_project_was_renamed_goes_on(tmp_path):
    keys = {**HEADS, "search": {"linear_probe": {"num_trials": 3}}}
    study = study_of(make_state(tmp_path / "old", **keys))
    finish(study)
    assert str(tmp_path) not in study.state.paths.optuna_journal.read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    state = make_state(tmp_path / "new", **keys)
    again = study_of(state)
    assert again.is_settled
    assert again.find_lost_trial() is None
    assert Path(again.choose()).is_relative_to(tmp_path / "new")
    outcome = again.conclude()
    assert Path(outcome.checkpoint).exists()
    assert Path(outcome.row.model_path).exists()


def test_whole_paths_of_earlier_versions_are_understood_after_a_move(tmp_path):
    study = study_of(make_state(tmp_path / "old", **HEADS))
    finish(study)
    root = study.state.paths.root
    for path in (study.state.paths.optuna_journal, study._result_path):
        text = path.read_text()
        assert '"studies/' in text
        path.write_text(text.replace('"studies/', f'"{root}/studies/').replace('"models/', f'"{root}/models/'))
    (tmp_path / "old").rename(tmp_path / "new")
    again = study_of(make_state(tmp_path / "new", **HEADS))
    assert again.is_settled
    assert again.find_lost_trial() is None
    assert Path(again.choose()).exists()
    assert Path(again.conclude().row.model_path).exists()


# State that is damaged


@pytest.mark.parametrize("content", ["", '{"row": {"study"', "\0\0\0"])
def test_a_result_that_was_cut_off_is_made_again(open_state, content):
    study = study_of(open_state(**probe(num_trials=2)))
    finish(study)
    study._result_path.write_text(content)
    again = study_of(open_state(**probe(num_trials=2)))
    assert not again.is_settled
    assert again.num_left == 0
    assert "result.json: not readable as JSON" in text_of(again.state)
    assert "dinov2-linear_probe is tested again" in text_of(again.state)
    assert finish(again).row.num_trials == 2
    assert study_of(open_state(**probe(num_trials=2))).is_settled


@pytest.mark.parametrize("content", ["", '{"about": {"key"', "[]", "{}", '{"about": 3}'])
def test_a_model_whose_description_was_cut_off_is_exported_again(open_state, content):
    study = study_of(open_state(**probe(num_trials=2)))
    finish(study)
    (study.state.paths.model(study.name) / "model.json").write_text(content)
    again = study_of(open_state(**probe(num_trials=2)))
    assert not again.is_settled
    finish(again)
    assert study_of(open_state(**probe(num_trials=2))).is_settled


# Trials that fail


def test_a_study_is_stopped_once_more_than_half_of_its_trials_failed_with_the_first_error_in_full(open_state):
    state = open_state(**probe(num_trials=8, population=2))
    study = study_of(state)
    first = study.folder / "trials" / "0" / "error.txt"
    first.parent.mkdir(parents=True)
    first.write_text("Traceback (most recent call last):\n  ...\nValueError: a very long reason\n")
    for number in range(3):
        for trial in study.ask():
            study.tell(trial.number, None, f"ValueError: reason {trial.number}")
        assert bool(study.num_left) is (number < 2)
    assert study.ask() == []
    assert "stopped, because 5 of 8 trials failed; the first error (trial 0):" in text_of(state)
    assert "Traceback (most recent call last):" in text_of(state)
    assert "ValueError: a very long reason" in text_of(state)
    assert study.shortfall == (
        "dinov2-linear_probe: 6 of 8 trials failed (trial 0: ValueError: reason 0); the same command runs what is left "
        "of its budget"
    )
    again = study_of(open_state(**probe(num_trials=8, population=2)))
    assert (again.num_left, again.shortfall) == (8, None)


def test_half_of_the_trials_may_fail_and_those_that_diverge_have_not_failed(open_state):
    study = study_of(open_state(**probe(num_trials=8, population=4)))
    for trial in study.ask():
        study.tell(trial.number, None, "lost")
    assert study.num_left == 4
    tell_all(study, study.ask(), float("nan"))
    assert len(study.failed) == 4
    assert "stopped, because" not in text_of(study.state)


def test_an_epoch_without_its_metric_ends_nothing(open_state):
    state = open_state(**scheduled())
    study = study_of(state, "fine_tune")
    (trial,) = study.ask()
    assert study.on_epoch(EpochReport(trial.number, 0, {"val/accuracy": 0.5})) is False
    study.tell(trial.number, replace(result_of(trial), final={"val/accuracy": 0.5}), "unused")
    assert study.choose() is None
    assert "val/loss was not a finite number" in study.failure


def test_what_a_failed_or_killed_trial_left_of_its_training_is_removed(open_state):
    keys = fine_tune(num_trials=3)
    study = study_of(open_state(**keys), "fine_tune")
    trials = [trial for _ in range(3) for trial in study.ask()]
    for trial in trials:
        folder = study.folder / "trials" / trial.folder_name
        for name in ("best.safetensors", "last.safetensors", ".last.safetensors.k1ll3d"):
            save_checkpoint(folder / name, {"weight": torch.ones(3)}, {})
    study.tell(trials[0].number, None, "out of memory")
    left = sorted(path.name for path in (study.folder / "trials" / "0").iterdir())
    assert left == [".last.safetensors.k1ll3d"]
    path = str(study.folder / "trials" / "1" / "best.safetensors")
    study.optuna_study.tell(study.waiting[1], result_of(trials[1], checkpoint=path))  # and is killed
    study_of(open_state(**keys), "fine_tune")
    left = sorted(str(path.relative_to(study.folder / "trials")) for path in study.folder.glob("trials/*/*"))
    assert left == ["1/best.safetensors", "2/best.safetensors", "2/last.safetensors"], "trial 2 goes on"


# Many trials


@pytest.mark.slow
@pytest.mark.parametrize("num_trials", [1000, 5000])
def test_many_trials_need_little_memory_and_disk(open_state, num_trials):
    study = study_of(open_state(**probe(num_trials=num_trials)))
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    while study.num_left:
        for trial in study.ask():
            result = make_result(trial, 1 - trial.setting["learning_rate"], num_epochs=20)
            study.tell(trial.number, result, "unused")
    assert study.optuna_study.num_done == num_trials
    growth = (process.memory_info().rss - before) / num_trials
    size = study.state.paths.optuna_journal.stat().st_size / num_trials
    assert growth < 200_000
    assert size < 5_000
