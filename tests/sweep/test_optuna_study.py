import itertools
import json
import math
from dataclasses import replace
from datetime import UTC
from types import SimpleNamespace

import pytest
from jobs import make_result, make_trial
from optuna.trial import TrialState

from raysweep.errors import TrialError
from raysweep.experiment.modes import MODES
from raysweep.experiment.search_blocks import FineTuneSearch, LinearProbeSearch, study_space
from raysweep.sweep import optuna_study as module
from raysweep.sweep import sampling
from raysweep.sweep.optuna_study import open_optuna_study
from raysweep.sweep.optuna_trials import continuation_of
from raysweep.sweep.schedulers import stopped_result
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult

SOURCES = ["cls", "cls+mean"]
GRID = {"learning_rate": {"choices": [1e-3, 1e-2]}, "epochs": {"low": 5, "high": 7}}


def probe(**keys):
    return LinearProbeSearch.model_validate(keys)


def fine_tune(**keys):
    return FineTuneSearch.model_validate(keys)


def open_study(folder, block=None, name="study", sources=SOURCES, metric="val/accuracy", direction="maximize", seed=1):
    block = block or probe(num_trials=8)
    space = study_space(block, sources, "dinov2")
    journal = folder / "new" / "optuna.journal"
    return open_optuna_study(journal, name, block, space, Ranking(metric, direction), seed)


def spec_of(trial):
    """A trial of Optuna's as a worker is told of it."""
    return replace(make_trial(trial.number), setting=dict(trial.params))


def result_of(trial, accuracy=0.5, loss=1.0):
    return make_result(spec_of(trial), accuracy, loss, checkpoint=f"/trials/{trial.number}")


def failure_of(trial, error):
    return TrialResult("study", trial.number, dict(trial.params), error=error)


def play(study, rounds, size):
    """Asks and tells Populations by a rule; returns the settings in order."""
    settings = []
    for _ in range(rounds):
        trials = study.ask(size)
        settings += [dict(trial.params) for trial in trials]
        for trial in trials:
            score = 1 - abs(trial.params["learning_rate"] - 0.01) - 0.001 * trial.params["epochs"]
            study.tell(trial, result_of(trial, score))
    return settings


# Settings


def test_a_small_budget_learns_from_its_first_trials(tmp_path):
    """Optuna's sampler draws at random until ten trials have ended, which is the whole budget of fine_tune."""
    third = []
    for best in (3e-6, 3e-5):
        study = open_study(tmp_path / str(best), fine_tune(num_trials=8))
        for trial in study.ask(2):
            study.tell(trial, result_of(trial, 0.9 if trial.params["learning_rate"] == best else 0.1))
        third.append(study.ask(1)[0].params["learning_rate"])
    assert third[0] != third[1]


def test_the_sampler_learns_from_trained_epochs_and_the_best_trial_may_be_its_start(tmp_path):
    study = open_study(tmp_path, fine_tune(num_trials=8))
    first, second, third = study.ask(3)
    study.tell(first, replace(result_of(first, 0.7), final={"val/accuracy": 0.8, "val/loss": 1.0}, best_epoch=-1))
    study.tell(second, result_of(second, 0.75))
    lost = ({"val/accuracy": math.nan, "val/loss": math.nan},)
    study.tell(third, replace(result_of(third, 0.8, loss=2.0), history=lost, best_epoch=-1))
    told = [trial.value for trial in study.study.trials[:3]]
    assert told == [0.7, 0.75, None]
    assert study.study.trials[2].state.name == "FAIL"
    assert study.num_done == 3  # none of them is tried again
    assert study.best().number == first.number


def test_recommendations_come_first_then_settings_within_the_space(tmp_path):
    settings = play(open_study(tmp_path), 1, 8)
    for setting, expected in zip(settings, MODES["linear_probe"].recommendations, strict=False):
        assert expected.items() <= setting.items()
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == 8
    for setting in settings:
        assert set(setting) == {"learning_rate", "epochs", "weight_decay", "normalize", "features"}
        assert 1e-4 <= setting["learning_rate"] <= 1e-1
        assert 5 <= setting["epochs"] <= 50
        assert isinstance(setting["epochs"], int)
        assert setting["features"] in SOURCES


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_seed_gives_one_sequence(tmp_path, sampler):
    block = probe(num_trials=24, sampler=sampler)
    first, second, other = (
        play(open_study(tmp_path / name, block, seed=seed), 3, 8) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert first == second
    assert first[2:] != other[2:]
    assert first[:2] == other[:2]


def test_a_resumed_search_draws_new_settings(tmp_path):
    block = probe(num_trials=16, sampler="random")
    first = play(open_study(tmp_path, block), 1, 8)
    assert not {setting["learning_rate"] for setting in first} & {
        setting["learning_rate"] for setting in play(open_study(tmp_path, block), 1, 8)
    }


def test_two_studies_share_a_journal(tmp_path):
    play(open_study(tmp_path, name="one"), 1, 4)
    assert open_study(tmp_path, name="two").results == []
    assert len(open_study(tmp_path, name="one").results) == 4


def points(settings):
    return sorted((setting["learning_rate"], setting["epochs"], setting["normalize"]) for setting in settings)


WHOLE_GRID = sorted(itertools.product([1e-3, 1e-2], [5, 6, 7], ["none", "standardize"]))


def test_a_grid_is_covered_once(tmp_path):
    block = probe(sampler="grid", space=GRID)
    assert block.num_trials == 12
    study = open_study(tmp_path, block)
    assert points(play(study, 3, 4)) == WHOLE_GRID
    assert study.num_remaining == 0


def test_a_grid_begun_with_fewer_trials_is_completed_later(tmp_path):
    first = play(open_study(tmp_path, probe(sampler="grid", space=GRID, num_trials=5)), 1, 5)
    study = open_study(tmp_path, probe(sampler="grid", space=GRID))
    assert study.num_remaining == 7
    assert points(first + play(study, 1, 7)) == WHOLE_GRID


def test_a_grid_over_sources_that_the_encoder_lacks_is_smaller(tmp_path):
    block = probe(sampler="grid", space={**GRID, "features": {"choices": ["cls", "pooler"]}})
    assert block.num_trials == 24
    study = open_study(tmp_path, block)
    assert study.num_remaining == study.block.num_trials == 12
    settings = play(study, 1, 12)
    assert points(settings) == WHOLE_GRID
    assert {setting["features"] for setting in settings} == {"cls"}


# Results


def test_results_survive_reopening(tmp_path):
    study = open_study(tmp_path)
    good, bad = study.ask(2)
    study.tell(good, result_of(good, 0.75))
    study.tell(bad, failure_of(bad, "out of memory"))
    again = open_study(tmp_path)
    assert again.results == study.results == [result_of(good, 0.75), failure_of(bad, "out of memory")]
    assert again.num_remaining == 7, "a trial that an error ended is tried again"
    assert again.best().number == 0


def states(study):
    return [trial.state.name for trial in study.study.get_trials() if trial.state.name != "WAITING"]


def test_a_trial_without_a_finite_metric_failed(tmp_path):
    study = open_study(tmp_path)
    trials = study.ask(4)
    study.tell(trials[0], result_of(trials[0], float("nan")))
    study.tell(trials[1], result_of(trials[1], float("inf")))
    study.tell(trials[2], failure_of(trials[2], "lost"))
    study.tell(trials[3], result_of(trials[3], 0.1, float("nan")))
    assert states(study) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert study.best().number == 3
    assert study.num_remaining == 5


@pytest.mark.parametrize(
    ("metric", "direction", "results", "expected"),
    [
        ("val/accuracy", "maximize", [(0.5, 0.1), (0.9, 3.0), (0.7, 0.2)], 1),
        ("val/loss", "minimize", [(0.5, 0.3), (0.9, 3.0), (0.4, 0.2)], 2),
        ("val/accuracy", "maximize", [(0.9, 0.5), (0.9, 0.4), (0.9, 0.6)], 1),
        ("val/accuracy", "maximize", [(0.8, 0.4), (0.9, 0.4), (0.9, 0.4)], 1),
        ("val/accuracy", "maximize", [(0.9, float("nan")), (0.9, 0.4), (0.9, 9.0)], 1),
        ("val/accuracy", "maximize", [(0.9, 0.4), (0.9, float("nan")), (0.9, 9.0)], 0),
    ],
)
def test_the_best_among_equals_has_the_lowest_loss_then_the_lowest_number(
    tmp_path, metric, direction, results, expected
):
    study = open_study(tmp_path, metric=metric, direction=direction)
    for trial, (accuracy, loss) in zip(study.ask(3), results, strict=True):
        study.tell(trial, result_of(trial, accuracy, loss))
    assert study.best().number == expected


def test_a_study_without_a_success_says_why(tmp_path):
    study = open_study(tmp_path, name="dinov2-linear_probe-f00")
    with pytest.raises(TrialError, match="dinov2-linear_probe-f00: no trial succeeded; none was run"):
        study.best()
    lost, endless = study.ask(2)
    study.tell(lost, failure_of(lost, "CUDA out of memory"))
    study.tell(endless, result_of(endless, float("nan")))
    with pytest.raises(TrialError, match="CUDA out of memory; val/accuracy was not a finite number"):
        study.best()


# Resuming


def test_interrupted_trials_are_failed_and_go_on_as_new_ones(tmp_path):
    block = fine_tune(num_trials=4)
    killed = open_study(tmp_path, block)
    done, lost = killed.ask(2)
    killed.tell(done, result_of(done))
    study = open_study(tmp_path, block)
    assert states(study) == ["COMPLETE", "FAIL"]
    assert [one.number for one in study.results] == [0]
    assert study.num_remaining == 3
    (again,) = study.ask(1)
    assert again.params == lost.params
    assert again.user_attrs["continues"] == lost.number
    # Killed once more, it still continues the first attempt, whose checkpoint is the one there is.
    (third,) = open_study(tmp_path, block).ask(1)
    assert third.params == lost.params
    assert third.user_attrs["continues"] == lost.number
    assert third.number not in (lost.number, again.number)


def test_a_trial_killed_between_its_result_and_its_end_is_not_run_again(tmp_path, monkeypatch):
    killed = open_study(tmp_path)
    (trial,) = killed.ask(1)
    monkeypatch.setattr(killed, "_tell", lambda *result: None)
    killed.tell(trial, result_of(trial, 0.9))
    study = open_study(tmp_path)
    assert states(study) == ["COMPLETE"]
    assert (len(study.results), study.best().number) == (1, 0)
    assert all("continues" not in waiting.user_attrs for waiting in study.study.get_trials())


def test_recommendations_are_not_tried_again_when_the_budget_grows(tmp_path):
    first = play(open_study(tmp_path, probe(num_trials=1)), 1, 1)
    second = play(open_study(tmp_path, probe(num_trials=3)), 1, 2)
    assert first[0]["learning_rate"] == MODES["linear_probe"].recommendations[0]["learning_rate"]
    assert second[0]["learning_rate"] == MODES["linear_probe"].recommendations[1]["learning_rate"]
    assert second[1]["learning_rate"] not in (first[0]["learning_rate"], second[0]["learning_rate"])


# Schedulers


def epoch_of(accuracy, loss=1.0):
    return {"val/accuracy": accuracy, "val/loss": loss, "time/epoch_s": 2.0, "train/images_per_second": 50.0}


def run_epochs(study, trial, accuracies, begin=0):
    """Reports epochs from `begin` on; returns how many the trial had in the end, and whether it was stopped."""
    history = [epoch_of(accuracy) for accuracy in accuracies]
    for epoch in range(begin, len(history)):
        if study.should_stop(trial, history[: epoch + 1]):
            return epoch + 1, True
    return len(history), False


def end(study, trial, accuracies):
    """Runs a trial and tells how it ended; returns how many epochs it had."""
    num_epochs, stopped = run_epochs(study, trial, accuracies)
    history = [epoch_of(accuracy) for accuracy in accuracies[:num_epochs]]
    if stopped:
        study.tell(trial, stopped_result(trial, "study", history, study.ranking))
    else:
        best = max(history, key=lambda epoch: epoch["val/accuracy"])
        study.tell(trial, replace(result_of(trial), final=best, history=tuple(history)))
    return num_epochs


def scheduled(scheduler="asha", epochs=9, num_trials=8, **keys):
    return fine_tune(scheduler=scheduler, num_trials=num_trials, space={"epochs": epochs}, **keys)


def test_asha_stops_a_trial_that_is_not_among_the_best_third_after_one_three_or_nine_epochs(tmp_path):
    study = open_study(tmp_path, scheduled(epochs=12))
    one, two, three, four = study.ask(4)
    assert end(study, one, [0.5] * 12) == 12
    assert end(study, two, [0.4] * 12) == 1
    assert end(study, three, [0.6, 0.6, 0.4] + [0.4] * 9) == 12, "its best epoch is the best of all"
    assert end(study, four, [0.7, 0.7, 0.7] + [0.6] * 9) == 12
    (five,) = study.ask(1)
    assert end(study, five, [0.7, 0.7, 0.65, 0.65] + [0.6] * 8) == 12
    (six,) = study.ask(1)
    assert end(study, six, [0.65, 0.66, 0.66, 0.8] + [0.8] * 8) == 1
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    assert (study.num_done, study.num_remaining) == (6, 2)


def test_median_stops_what_is_below_the_median_once_four_ran_to_their_end(tmp_path):
    study = open_study(tmp_path, scheduled("median", epochs=3))
    for trial, level in zip(study.ask(4), (0.2, 0.4, 0.6, 0.1), strict=True):
        assert end(study, trial, [level, level + 0.1, level + 0.2]) == 3
    worse, better = study.ask(2)
    assert end(study, worse, [0.2, 0.2, 0.2]) == 1
    assert end(study, better, [0.35, 0.35, 0.9]) == 2


def test_a_scheduler_knows_the_direction(tmp_path):
    study = open_study(tmp_path, scheduled(), metric="val/loss", direction="minimize")
    one, two, three = study.ask(3)
    assert not study.should_stop(one, [epoch_of(0.5, 0.4)])
    assert study.should_stop(two, [epoch_of(0.9, 0.5)])
    assert not study.should_stop(three, [epoch_of(0.1, 0.3)])


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_without_a_finite_value_is_stopped(tmp_path, scheduler, recwarn):
    study = open_study(tmp_path, scheduled(scheduler), metric="val/loss", direction="minimize")
    for trial in study.ask(4):
        study.should_stop(trial, [epoch_of(0.5, 0.5)])
        study.tell(trial, result_of(trial, 0.5, 0.5))
    (bad,) = study.ask(1)
    assert study.should_stop(bad, [epoch_of(0.5, float("nan"))])
    study.tell(bad, stopped_result(bad, "study", [epoch_of(0.5, float("nan"))], study.ranking))
    again = open_study(tmp_path, scheduled(scheduler), metric="val/loss", direction="minimize")
    assert states(again)[-1] == "PRUNED"
    assert again.study.trials[-1].value is None
    assert again.num_done == 5


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_the_last_epoch_is_never_a_reason_to_stop(tmp_path, scheduler):
    study = open_study(tmp_path, scheduled(scheduler, epochs=1))
    ends = [end(study, trial, [0.9 - 0.1 * trial.number]) for trial in study.ask(6)]
    assert ends == [1] * 6
    assert states(study) == ["COMPLETE"] * 6


def test_without_a_scheduler_nothing_is_stopped_or_reported(tmp_path):
    study = open_study(tmp_path, fine_tune(num_trials=4))
    for trial in study.ask(4):
        assert not study.should_stop(trial, [epoch_of(1.0 - 0.2 * trial.number)])
    assert all(not trial.intermediate_values for trial in study.study.trials)


def test_a_stopped_trial_is_done_but_neither_chosen_nor_tried_again(tmp_path):
    block = scheduled(epochs=6, num_trials=3)
    study = open_study(tmp_path, block)
    one, two = study.ask(2)
    end(study, one, [0.5] * 6)
    assert end(study, two, [0.4, 0.9]) == 1
    again = open_study(tmp_path, block)
    kept, stopped = again.results
    assert (kept.pruned, stopped.pruned, stopped.checkpoint, stopped.error) == (False, True, None, None)
    assert (stopped.final, stopped.history) == (epoch_of(0.4), (epoch_of(0.4),))
    assert (stopped.best_epoch, stopped.train_seconds, stopped.images_per_second) == (0, 2.0, 50.0)
    assert (stopped.peak_memory_bytes, stopped.peak_gpu_memory_bytes) == (0, 0), "nobody has measured it"
    assert again.study.trials[1].value == 0.4
    assert (again.num_done, again.num_remaining, again.best().number) == (2, 1, 0)
    assert again.ask(1)[0].params not in [one.params, two.params]


def test_only_stopped_trials_are_no_success(tmp_path):
    study = open_study(tmp_path, scheduled(), name="tune")
    one, two = study.ask(2)
    study.should_stop(one, [epoch_of(0.9)])
    study.tell(one, failure_of(one, "the worker process died"))
    assert end(study, two, [0.1]) == 1
    with pytest.raises(TrialError, match="tune: no trial succeeded; asha stopped some early; the worker process died"):
        study.best()


def test_a_trial_killed_between_its_stop_and_its_end_is_not_run_again(tmp_path, monkeypatch):
    killed = open_study(tmp_path, scheduled())
    one, two = killed.ask(2)
    end(killed, one, [0.5] * 9)
    monkeypatch.setattr(killed, "_tell", lambda *result: None)
    assert end(killed, two, [0.4]) == 1
    study = open_study(tmp_path, scheduled())
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert study.study.trials[1].value == 0.4
    assert study.num_remaining == 6


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_what_was_reported_survives_a_kill_and_is_not_judged_again(tmp_path, scheduler):
    block = scheduled(scheduler)
    killed = open_study(tmp_path, block)
    done, lost = killed.ask(2)
    end(killed, done, [0.5] * 9)
    assert run_epochs(killed, lost, [0.6] * 4) == (4, False)
    study = open_study(tmp_path, block)
    better = [study.ask(1)[0] for _ in range(2)]
    (again,) = [trial for trial in better if trial.user_attrs.get("continues") == lost.number]
    (other,) = [trial for trial in better if trial is not again]
    assert end(study, other, [0.9] * 9) == 9
    before = study.study.trials[again.number]
    assert before.intermediate_values == dict.fromkeys(range(1, 5), 0.6)
    # It passes its first epochs again; those that are worse than the other's by now are no reason to stop it.
    assert run_epochs(study, again, [0.6] * 4) == (4, False)
    assert study.study.trials[again.number].intermediate_values == before.intermediate_values
    assert run_epochs(study, again, [0.6] * 9, begin=4) == (9, False)
    assert study.folder_number(again.number) == lost.number
    assert study.folder_number(other.number) == other.number


def test_a_continued_trial_is_judged_at_the_next_rung(tmp_path):
    block = scheduled(epochs=12)
    killed = open_study(tmp_path, block)
    (lost,) = killed.ask(1)
    assert run_epochs(killed, lost, [0.6] * 4) == (4, False)
    study = open_study(tmp_path, block)
    one, two = study.ask(1)[0], study.ask(1)[0]
    again, other = (one, two) if "continues" in one.user_attrs else (two, one)
    assert end(study, other, [0.9] * 12) == 12
    assert run_epochs(study, again, [0.6] * 12, begin=4) == (9, True)


def test_a_trial_that_was_to_be_stopped_when_the_sweep_was_killed_is_not_trained_on(tmp_path):
    killed = open_study(tmp_path, scheduled())
    good, bad = killed.ask(2)
    assert end(killed, good, [0.9] * 9) == 9
    num_epochs, stopped = run_epochs(killed, bad, [0.5] * 9)
    assert stopped
    study = open_study(tmp_path, scheduled())
    (again,) = [trial for trial in study.ask(2) if trial.user_attrs.get("continues") == bad.number]
    assert run_epochs(study, again, [0.5] * 9) == (num_epochs, True)


# Journals of version 0.1


def record_of(trial, accuracy=0.5):
    """A trial's result as version 0.1 kept it."""
    epoch = {"val/accuracy": accuracy, "val/loss": 1.0, "time/epoch_s": 0.1}
    return {
        "number": trial.number,
        "setting": dict(trial.params),
        "final": epoch,
        "history": [epoch, epoch],
        "checkpoint": f"/trials/{trial.number}",
        "details": {
            "best_epoch": 1,
            "train_seconds": 3.0,
            "images_per_second": 7.0,
            "peak_memory_bytes": 5,
            "peak_gpu_memory_bytes": 6,
        },
        "error": None,
        "pruned": False,
    }


def tell_as_before(study, trial, record, value=None, state=None):
    trial.set_user_attr("record", record)
    study.study.tell(trial.number, value, state=state)


def test_a_journal_of_version_0_1_is_read(tmp_path):
    study = open_study(tmp_path)
    trials = study.ask(3)
    tell_as_before(study, trials[0], record_of(trials[0]), 0.5)
    lost = {"final": {}, "history": [], "checkpoint": None, "details": {}, "error": "out of memory"}
    tell_as_before(study, trials[1], record_of(trials[1]) | lost, state=TrialState.FAIL)
    costs = {"best_epoch": 0, "train_seconds": 2.0, "images_per_second": 50.0}
    stopped = {"history": [epoch_of(0.4)], "final": epoch_of(0.4), "checkpoint": None, "details": costs, "pruned": True}
    tell_as_before(study, trials[2], record_of(trials[2]) | stopped, state=TrialState.PRUNED)
    whole = make_result(spec_of(trials[0]), num_epochs=2, checkpoint="/trials/0", peak_gpu_memory_bytes=6)
    assert open_study(tmp_path).results == [
        replace(whole, study=""),  # nobody asks it of a trial that is over
        replace(failure_of(trials[1], "out of memory"), study=""),
        stopped_result(trials[2], "", [epoch_of(0.4)], study.ranking),
    ]


def test_a_journal_from_before_there_were_schedulers_is_read(tmp_path):
    study = open_study(tmp_path)
    (trial,) = study.ask(1)
    old = {key: value for key, value in record_of(trial).items() if key != "pruned"}
    tell_as_before(study, trial, old, 0.5)
    (result,) = open_study(tmp_path).results
    assert (result.number, result.final["val/accuracy"], result.train_seconds) == (0, 0.5, 3.0)
    assert result.pruned is False


@pytest.mark.parametrize("block", [probe(num_trials=4), fine_tune(num_trials=4)])
def test_a_study_that_version_0_1_has_begun_goes_on_with_its_trials(tmp_path, block):
    study = open_study(tmp_path, block)
    one, two, untold, lost = study.ask(4)
    tell_as_before(study, one, record_of(one, 0.6), 0.6)
    tell_as_before(study, two, record_of(two, 0.8), 0.8)
    untold.set_user_attr("record", record_of(untold, 0.7))  # and was killed before Optuna was told
    again = open_study(tmp_path, block)
    assert states(again) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    assert (again.num_done, again.num_remaining, again.best().number) == (3, 1, 1)
    assert (again.best().checkpoint, again.best().train_seconds) == ("/trials/1", 3.0)
    (next_one,) = again.ask(1)
    assert next_one.params == lost.params
    again.tell(next_one, result_of(next_one, 0.9))
    last = open_study(tmp_path, block)
    assert (last.num_remaining, last.best()) == (0, result_of(next_one, 0.9))
    assert [result.setting for result in last.results] == [one.params, two.params, untold.params, lost.params]


# Budgets


def test_a_time_budget_that_is_spent_stays_spent(tmp_path):
    study = open_study(tmp_path, probe(num_trials=30, time_budget_s=1e-9))
    (trial,) = study.ask(1)
    study.tell(trial, result_of(trial, 0.5))
    assert study.seconds_spent > 0
    assert open_study(tmp_path, probe(num_trials=30, time_budget_s=1e-9)).num_remaining == 0
    assert open_study(tmp_path, probe(num_trials=30)).num_remaining == 29


def test_a_grid_tries_failed_points_again(tmp_path):
    block = probe(sampler="grid", space={"epochs": {"choices": (1, 2, 3)}, "normalize": "none"})
    study = open_study(tmp_path, block)
    trials = study.ask(study.num_remaining)
    for trial in trials:
        study.tell(trial, failure_of(trial, "lost") if trial.params["epochs"] == 2 else result_of(trial))
    again = open_study(tmp_path, block)
    assert again.num_remaining == 1
    assert again.ask(1)[0].params["epochs"] == 2


def test_an_interrupted_point_that_then_failed_is_tried_again(tmp_path):
    block = probe(sampler="grid", space={"epochs": {"choices": (1, 2, 3)}, "normalize": "none"})
    open_study(tmp_path, block).ask(3)  # and is killed
    study = open_study(tmp_path, block)
    for trial in study.ask(3):
        study.tell(trial, failure_of(trial, "lost") if trial.params["epochs"] == 2 else result_of(trial))
    again = open_study(tmp_path, block)
    assert [trial.params["epochs"] for trial in again.ask(again.num_remaining)] == [2]


def test_a_recommendation_that_was_interrupted_is_not_enqueued_beside_its_continuation(tmp_path):
    block = probe(num_trials=3)
    settings = [dict(trial.params) for trial in open_study(tmp_path, block).ask(3)]  # and is killed
    study = open_study(tmp_path, block)
    assert [dict(trial.params) for trial in study.ask(3)] == settings
    assert states(study) == ["FAIL"] * 3 + ["RUNNING"] * 3
    assert len(study.study.trials) == 6


@pytest.mark.parametrize("num_drawn", [0, 1, 3])
def test_a_setting_that_was_drawn_in_part_when_the_sweep_was_killed_is_drawn_to_its_end(
    tmp_path, monkeypatch, num_drawn
):
    block = probe(sampler="grid", space=GRID)
    whole = [dict(trial.params) for trial in open_study(tmp_path / "whole", block).ask(12)]
    killed = open_study(tmp_path, block)
    killed.distributions = dict(list(killed.distributions.items())[:num_drawn])
    killed.study.ask(killed.distributions)  # and is killed
    study = open_study(tmp_path, block)
    assert study.study.trials[0].state == TrialState.FAIL
    asked = [trial for _ in range(2) for trial in study.ask(12)][:12]
    assert sorted(map(str, whole)) == sorted(str(dict(trial.params)) for trial in asked)


def test_a_kill_between_a_continuation_and_the_end_of_what_it_continues_doubles_no_setting(tmp_path, monkeypatch):
    killed = open_study(tmp_path, fine_tune(num_trials=1))
    (lost,) = killed.ask(1)
    again = open_study(tmp_path / "other", fine_tune(num_trials=1))
    again.study = killed.study
    again.study.add_trial(continuation_of(killed.study.trials[lost.number]))  # and is killed
    study = open_study(tmp_path, fine_tune(num_trials=1))
    continued = [trial for trial in study.study.trials if "continues" in trial.user_attrs]
    assert [trial.state.name for trial in continued] == ["WAITING"]
    assert states(study) == ["FAIL"]


# Time that was worked


@pytest.fixture
def clock(monkeypatch):
    """Optuna's clock and ours; it stands still until it is set."""
    from datetime import datetime

    from optuna.storages.journal import _storage

    clock = SimpleNamespace(now=1_800_000_000.0)
    clock.time = lambda: clock.now
    fake = SimpleNamespace(
        now=lambda tz=None: datetime.fromtimestamp(clock.now, tz or UTC), fromisoformat=datetime.fromisoformat
    )
    monkeypatch.setattr(_storage, "datetime", fake)
    monkeypatch.setattr(module, "time", clock)
    return clock


def budget(seconds=100):
    return fine_tune(num_trials=3, time_budget_s=seconds)


def test_time_in_which_a_killed_sweep_lay_idle_is_not_spent(tmp_path, clock):
    study = open_study(tmp_path, budget())
    done, _lost = study.ask(2)
    clock.now += 30
    study.tell(done, result_of(done))
    clock.now += 20  # of the other trial, which is killed
    clock.now += 86400
    again = open_study(tmp_path, budget())
    assert again.seconds_spent == pytest.approx(30)
    assert again.num_remaining == 2


def test_a_trial_killed_between_its_result_and_its_end_has_spent_no_idle_time(tmp_path, clock, monkeypatch):
    study = open_study(tmp_path, budget())
    (trial,) = study.ask(1)
    clock.now += 30
    monkeypatch.setattr(study, "_tell", lambda *result: None)
    study.tell(trial, result_of(trial))
    clock.now += 86400
    again = open_study(tmp_path, budget())
    assert states(again) == ["COMPLETE"]
    assert again.seconds_spent == pytest.approx(30)
    assert again.num_remaining == 2


def test_epochs_of_an_interrupted_trial_that_were_kept_are_spent(tmp_path, clock):
    open_study(tmp_path, budget()).ask(3)
    clock.now += 86400
    again = open_study(tmp_path, budget())
    (trial,) = again.ask(1)
    clock.now += 40
    again.tell(trial, replace(result_of(trial), train_seconds=90.0))
    assert again.seconds_spent == pytest.approx(90)
    assert open_study(tmp_path, budget(90)).num_remaining == 0
    assert open_study(tmp_path, budget(91)).num_remaining == 2


def test_trials_side_by_side_spend_their_time_once(tmp_path, clock):
    study = open_study(tmp_path, budget())
    one, two = study.ask(2)
    clock.now += 30
    study.tell(one, result_of(one))
    clock.now += 10
    study.tell(two, result_of(two))
    assert study.seconds_spent == pytest.approx(40)


def test_a_failed_trial_spends_its_time_too(tmp_path, clock):
    study = open_study(tmp_path, budget())
    (trial,) = study.ask(1)
    clock.now += 30
    study.tell(trial, failure_of(trial, "lost"))
    assert study.seconds_spent == pytest.approx(30)


# Many trials


def test_a_setting_is_compared_with_so_many_trials_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_COMPARED", 12)
    monkeypatch.setattr(sampling, "MAX_BEST", 2)
    study = open_study(tmp_path, probe(num_trials=40))
    play(study, 5, 6)
    compared = study._sampler._compared(study.study.get_trials())
    best = sorted(study.study.trials, key=lambda trial: -trial.value)[:2]
    assert {trial.number for trial in compared} == {*range(20, 30), *(trial.number for trial in best)}
    assert len(study.ask(4)) == 4


def test_the_parameter_that_decides_has_the_largest_importance(tmp_path):
    study = open_study(tmp_path, probe(num_trials=24, sampler="random"))
    for size in (15, 9):
        assert study.importances() == {}  # too few
        for trial in study.ask(size):
            loss = abs(math.log10(trial.params["learning_rate"]) + 2)
            study.tell(trial, result_of(trial, 1 - loss))
    found = study.importances()
    assert max(found, key=lambda name: found[name]) == "learning_rate"
    assert sum(found.values()) == pytest.approx(1)


def test_parameters_of_trials_that_are_all_alike_have_no_importance(tmp_path):
    study = open_study(tmp_path, probe(num_trials=20))
    for trial in study.ask(20):
        study.tell(trial, result_of(trial, 0.5))
    assert study.importances() == {}
