import itertools
import json

import pytest

from raysweep.errors import ConfigError, TrialError
from raysweep.experiment.config import FineTuneSearch, FromScratchSearch, LinearProbeSearch
from raysweep.experiment.space import recommended
from raysweep.sweep.optuna_study import Search, TrialRecord, make_record, population_size, study_space

SOURCES = ["cls", "cls+mean"]
GRID = {"learning_rate": {"choices": [1e-3, 1e-2]}, "epochs": {"low": 5, "high": 7}}


def probe(**keys):
    return LinearProbeSearch.model_validate(keys)


def fine_tune(**keys):
    return FineTuneSearch.model_validate(keys)


def open_search(folder, block=None, name="study", sources=SOURCES, metric="val/accuracy", direction="maximize", seed=1):
    block = block or probe(num_trials=8)
    space = study_space(block, sources, "dinov2")
    return Search(folder / "new" / "optuna.journal", name, block, space, metric, direction, seed)


def record(number, accuracy=0.5, loss=1.0, setting=None, error=None):
    final = {} if error else {"val/accuracy": accuracy, "val/loss": loss}
    return TrialRecord(number, setting or {}, final, [final], f"/trials/{number}", {"train_seconds": 1.0}, error)


def play(search, rounds, size):
    """Asks and tells Populations by a rule; returns the settings in order."""
    settings = []
    for _ in range(rounds):
        trials = search.ask(size)
        settings += [dict(trial.params) for trial in trials]
        for trial in trials:
            score = 1 - abs(trial.params["learning_rate"] - 0.01) - 0.001 * trial.params["epochs"]
            search.tell(trial, record(trial.number, score, setting=dict(trial.params)))
    return settings


# Settings


def test_recommendations_come_first_then_settings_within_the_space(tmp_path):
    settings = play(open_search(tmp_path), 1, 8)
    for setting, expected in zip(settings, recommended("linear_probe"), strict=False):
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
        play(open_search(tmp_path / name, block, seed=seed), 3, 8) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert first == second
    assert first[2:] != other[2:]
    assert first[:2] == other[:2]


def test_a_resumed_search_draws_new_settings(tmp_path):
    block = probe(num_trials=16, sampler="random")
    first = play(open_search(tmp_path, block), 1, 8)
    assert not {setting["learning_rate"] for setting in first} & {
        setting["learning_rate"] for setting in play(open_search(tmp_path, block), 1, 8)
    }


def test_two_studies_share_a_journal(tmp_path):
    play(open_search(tmp_path, name="one"), 1, 4)
    assert open_search(tmp_path, name="two").records == []
    assert len(open_search(tmp_path, name="one").records) == 4


def points(settings):
    return sorted((setting["learning_rate"], setting["epochs"], setting["normalize"]) for setting in settings)


WHOLE_GRID = sorted(itertools.product([1e-3, 1e-2], [5, 6, 7], ["none", "standardize"]))


def test_a_grid_is_covered_once(tmp_path):
    block = probe(sampler="grid", space=GRID)
    assert block.num_trials == 12
    search = open_search(tmp_path, block)
    assert points(play(search, 3, 4)) == WHOLE_GRID
    assert search.num_remaining == 0


def test_a_grid_begun_with_fewer_trials_is_completed_later(tmp_path):
    first = play(open_search(tmp_path, probe(sampler="grid", space=GRID, num_trials=5)), 1, 5)
    search = open_search(tmp_path, probe(sampler="grid", space=GRID))
    assert search.num_remaining == 7
    assert points(first + play(search, 1, 7)) == WHOLE_GRID


def test_a_grid_over_sources_that_the_encoder_lacks_is_smaller(tmp_path):
    block = probe(sampler="grid", space={**GRID, "features": {"choices": ["cls", "pooler"]}})
    assert block.num_trials == 24
    search = open_search(tmp_path, block)
    assert search.num_remaining == search.block.num_trials == 12
    settings = play(search, 1, 12)
    assert points(settings) == WHOLE_GRID
    assert {setting["features"] for setting in settings} == {"cls"}


# Results


def test_records_survive_reopening(tmp_path):
    search = open_search(tmp_path)
    good, bad = search.ask(2)
    search.tell(good, record(good.number, 0.75, setting=dict(good.params)))
    search.tell(bad, record(bad.number, error="out of memory"))
    again = open_search(tmp_path)
    assert (
        again.records
        == search.records
        == [
            record(0, 0.75, setting=dict(good.params)),
            record(1, error="out of memory"),
        ]
    )
    assert again.num_remaining == 7, "a trial that an error ended is tried again"
    assert again.best().number == 0


def states(search):
    return [trial.state.name for trial in search.optuna_study.get_trials() if trial.state.name != "WAITING"]


def test_a_trial_without_a_finite_metric_failed(tmp_path):
    search = open_search(tmp_path)
    trials = search.ask(4)
    results = [record(0, float("nan")), record(1, float("inf")), record(2, error="lost"), record(3, 0.1, float("nan"))]
    for trial, result in zip(trials, results, strict=True):
        search.tell(trial, result)
    assert states(search) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert search.best().number == 3
    assert search.num_remaining == 5


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
    search = open_search(tmp_path, metric=metric, direction=direction)
    for trial, (accuracy, loss) in zip(search.ask(3), results, strict=True):
        search.tell(trial, record(trial.number, accuracy, loss))
    assert search.best().number == expected


def test_a_study_without_a_success_says_why(tmp_path):
    search = open_search(tmp_path, name="dinov2-linear_probe-f00")
    with pytest.raises(TrialError, match="dinov2-linear_probe-f00: no trial succeeded; none was run"):
        search.best()
    for trial, result in zip(
        search.ask(2), [record(0, error="CUDA out of memory"), record(1, float("nan"))], strict=True
    ):
        search.tell(trial, result)
    with pytest.raises(TrialError, match="CUDA out of memory; val/accuracy was not a finite number"):
        search.best()


# Resuming


def test_interrupted_trials_are_failed_and_go_on_as_new_ones(tmp_path):
    block = fine_tune(num_trials=4)
    killed = open_search(tmp_path, block)
    done, lost = killed.ask(2)
    killed.tell(done, record(done.number))
    search = open_search(tmp_path, block)
    assert states(search) == ["COMPLETE", "FAIL"]
    assert [one.number for one in search.records] == [0]
    assert search.num_remaining == 3
    (again,) = search.ask(1)
    assert again.params == lost.params
    assert again.user_attrs["continues"] == lost.number
    # Killed once more, it still continues the first attempt, whose checkpoint is the one there is.
    (third,) = open_search(tmp_path, block).ask(1)
    assert third.params == lost.params
    assert third.user_attrs["continues"] == lost.number
    assert third.number not in (lost.number, again.number)


def test_a_trial_killed_between_its_record_and_its_end_is_not_run_again(tmp_path, monkeypatch):
    killed = open_search(tmp_path)
    (trial,) = killed.ask(1)
    monkeypatch.setattr(killed, "_tell", lambda *result: None)
    killed.tell(trial, record(trial.number, 0.9))
    search = open_search(tmp_path)
    assert states(search) == ["COMPLETE"]
    assert (len(search.records), search.best().number) == (1, 0)
    assert all("continues" not in waiting.user_attrs for waiting in search.optuna_study.get_trials())


def test_recommendations_are_not_tried_again_when_the_budget_grows(tmp_path):
    first = play(open_search(tmp_path, probe(num_trials=1)), 1, 1)
    second = play(open_search(tmp_path, probe(num_trials=3)), 1, 2)
    assert first[0]["learning_rate"] == recommended("linear_probe")[0]["learning_rate"]
    assert second[0]["learning_rate"] == recommended("linear_probe")[1]["learning_rate"]
    assert second[1]["learning_rate"] not in (first[0]["learning_rate"], second[0]["learning_rate"])


# Schedulers


def epoch_of(accuracy, loss=1.0):
    return {"val/accuracy": accuracy, "val/loss": loss, "time/epoch_s": 2.0, "train/images_per_second": 50.0}


def run_epochs(search, trial, accuracies, begin=0):
    """Reports epochs from `begin` on; returns how many the trial had in the end, and whether it was stopped."""
    history = [epoch_of(accuracy) for accuracy in accuracies]
    for epoch in range(begin, len(history)):
        if search.should_stop(trial, history[: epoch + 1]):
            return epoch + 1, True
    return len(history), False


def end(search, trial, accuracies):
    """Runs a trial and tells how it ended; returns how many epochs it had."""
    num_epochs, stopped = run_epochs(search, trial, accuracies)
    history = [epoch_of(accuracy) for accuracy in accuracies[:num_epochs]]
    if stopped:
        search.tell(trial, search.stopped_record(trial, history))
    else:
        best = max(history, key=lambda epoch: epoch["val/accuracy"])
        search.tell(trial, TrialRecord(trial.number, dict(trial.params), best, history, f"/trials/{trial.number}", {}))
    return num_epochs


def scheduled(scheduler="asha", epochs=9, num_trials=8, **keys):
    return fine_tune(scheduler=scheduler, num_trials=num_trials, space={"epochs": epochs}, **keys)


def test_asha_stops_a_trial_that_is_not_among_the_best_third_after_one_three_or_nine_epochs(tmp_path):
    search = open_search(tmp_path, scheduled(epochs=12))
    one, two, three, four = search.ask(4)
    assert end(search, one, [0.5] * 12) == 12
    assert end(search, two, [0.4] * 12) == 1
    assert end(search, three, [0.6, 0.6, 0.4] + [0.4] * 9) == 12, "its best epoch is the best of all"
    assert end(search, four, [0.7, 0.7, 0.7] + [0.6] * 9) == 12
    (five,) = search.ask(1)
    assert end(search, five, [0.7, 0.7, 0.65, 0.65] + [0.6] * 8) == 12
    (six,) = search.ask(1)
    assert end(search, six, [0.65, 0.66, 0.66, 0.8] + [0.8] * 8) == 1
    assert states(search) == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    assert (search.num_done, search.num_remaining) == (6, 2)


def test_median_stops_what_is_below_the_median_once_four_ran_to_their_end(tmp_path):
    search = open_search(tmp_path, scheduled("median", epochs=3))
    for trial, level in zip(search.ask(4), (0.2, 0.4, 0.6, 0.1), strict=True):
        assert end(search, trial, [level, level + 0.1, level + 0.2]) == 3
    worse, better = search.ask(2)
    assert end(search, worse, [0.2, 0.2, 0.2]) == 1
    assert end(search, better, [0.35, 0.35, 0.9]) == 2


def test_a_scheduler_knows_the_direction(tmp_path):
    search = open_search(tmp_path, scheduled(), metric="val/loss", direction="minimize")
    one, two, three = search.ask(3)
    assert not search.should_stop(one, [epoch_of(0.5, 0.4)])
    assert search.should_stop(two, [epoch_of(0.9, 0.5)])
    assert not search.should_stop(three, [epoch_of(0.1, 0.3)])


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_without_a_finite_value_is_stopped(tmp_path, scheduler, recwarn):
    search = open_search(tmp_path, scheduled(scheduler), metric="val/loss", direction="minimize")
    for trial in search.ask(4):
        search.should_stop(trial, [epoch_of(0.5, 0.5)])
        search.tell(trial, record(trial.number, 0.5, 0.5, dict(trial.params)))
    (bad,) = search.ask(1)
    assert search.should_stop(bad, [epoch_of(0.5, float("nan"))])
    search.tell(bad, search.stopped_record(bad, [epoch_of(0.5, float("nan"))]))
    again = open_search(tmp_path, scheduled(scheduler), metric="val/loss", direction="minimize")
    assert states(again)[-1] == "PRUNED"
    assert again.optuna_study.trials[-1].value is None
    assert again.num_done == 5


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_the_last_epoch_is_never_a_reason_to_stop(tmp_path, scheduler):
    search = open_search(tmp_path, scheduled(scheduler, epochs=1))
    ends = [end(search, trial, [0.9 - 0.1 * trial.number]) for trial in search.ask(6)]
    assert ends == [1] * 6
    assert states(search) == ["COMPLETE"] * 6


def test_without_a_scheduler_nothing_is_stopped_or_reported(tmp_path):
    search = open_search(tmp_path, fine_tune(num_trials=4))
    for trial in search.ask(4):
        assert not search.should_stop(trial, [epoch_of(1.0 - 0.2 * trial.number)])
    assert all(not trial.intermediate_values for trial in search.optuna_study.trials)


def test_a_stopped_trial_is_done_but_neither_chosen_nor_tried_again(tmp_path):
    block = scheduled(epochs=6, num_trials=3)
    search = open_search(tmp_path, block)
    one, two = search.ask(2)
    end(search, one, [0.5] * 6)
    assert end(search, two, [0.4, 0.9]) == 1
    again = open_search(tmp_path, block)
    kept, stopped = again.records
    assert (kept.pruned, stopped.pruned, stopped.checkpoint, stopped.error) == (False, True, None, None)
    assert (stopped.final, stopped.history) == (epoch_of(0.4), [epoch_of(0.4)])
    assert stopped.details == {"best_epoch": 0, "train_seconds": 2.0, "images_per_second": 50.0}
    assert again.optuna_study.trials[1].value == 0.4
    assert (again.num_done, again.num_remaining, again.best().number) == (2, 1, 0)
    assert again.ask(1)[0].params not in [one.params, two.params]


def test_the_record_of_a_stopped_trial_holds_its_best_epoch(tmp_path):
    search = open_search(tmp_path, scheduled())
    (trial,) = search.ask(1)
    history = [epoch_of(0.4, 1.0), epoch_of(0.6, 1.0), epoch_of(0.6, 0.9), epoch_of(0.5, 0.1), epoch_of(0.6, 0.9)]
    stopped = search.stopped_record(trial, history)
    assert (stopped.final, stopped.details["best_epoch"]) == (history[2], 2)


def test_only_stopped_trials_are_no_success(tmp_path):
    search = open_search(tmp_path, scheduled(), name="tune")
    one, two = search.ask(2)
    search.should_stop(one, [epoch_of(0.9)])
    search.tell(one, record(one.number, error="the worker process died"))
    assert end(search, two, [0.1]) == 1
    with pytest.raises(TrialError, match="tune: no trial succeeded; asha stopped some early; the worker process died"):
        search.best()


def test_a_trial_killed_between_its_stop_and_its_end_is_not_run_again(tmp_path, monkeypatch):
    killed = open_search(tmp_path, scheduled())
    one, two = killed.ask(2)
    end(killed, one, [0.5] * 9)
    monkeypatch.setattr(killed, "_tell", lambda *result: None)
    assert end(killed, two, [0.4]) == 1
    search = open_search(tmp_path, scheduled())
    assert states(search) == ["COMPLETE", "PRUNED"]
    assert search.optuna_study.trials[1].value == 0.4
    assert search.num_remaining == 6


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_what_was_reported_survives_a_kill_and_is_not_judged_again(tmp_path, scheduler):
    block = scheduled(scheduler)
    killed = open_search(tmp_path, block)
    done, lost = killed.ask(2)
    end(killed, done, [0.5] * 9)
    assert run_epochs(killed, lost, [0.6] * 4) == (4, False)
    search = open_search(tmp_path, block)
    better = [search.ask(1)[0] for _ in range(2)]
    (again,) = [trial for trial in better if trial.user_attrs.get("continues") == lost.number]
    (other,) = [trial for trial in better if trial is not again]
    assert end(search, other, [0.9] * 9) == 9
    before = search.optuna_study.trials[again.number]
    assert before.intermediate_values == dict.fromkeys(range(1, 5), 0.6)
    # It passes its first epochs again; those that are worse than the other's by now are no reason to stop it.
    assert run_epochs(search, again, [0.6] * 4) == (4, False)
    assert search.optuna_study.trials[again.number].intermediate_values == before.intermediate_values
    assert run_epochs(search, again, [0.6] * 9, begin=4) == (9, False)
    assert search.folder_number(again.number) == lost.number
    assert search.folder_number(other.number) == other.number


def test_a_continued_trial_is_judged_at_the_next_rung(tmp_path):
    block = scheduled(epochs=12)
    killed = open_search(tmp_path, block)
    (lost,) = killed.ask(1)
    assert run_epochs(killed, lost, [0.6] * 4) == (4, False)
    search = open_search(tmp_path, block)
    one, two = search.ask(1)[0], search.ask(1)[0]
    again, other = (one, two) if "continues" in one.user_attrs else (two, one)
    assert end(search, other, [0.9] * 12) == 12
    assert run_epochs(search, again, [0.6] * 12, begin=4) == (9, True)


def test_a_trial_that_was_to_be_stopped_when_the_sweep_was_killed_is_not_trained_on(tmp_path):
    killed = open_search(tmp_path, scheduled())
    good, bad = killed.ask(2)
    assert end(killed, good, [0.9] * 9) == 9
    num_epochs, stopped = run_epochs(killed, bad, [0.5] * 9)
    assert stopped
    search = open_search(tmp_path, scheduled())
    (again,) = [trial for trial in search.ask(2) if trial.user_attrs.get("continues") == bad.number]
    assert run_epochs(search, again, [0.5] * 9) == (num_epochs, True)


def test_a_journal_from_before_there_were_schedulers_is_read(tmp_path):
    search = open_search(tmp_path)
    (trial,) = search.ask(1)
    old = {key: value for key, value in vars(record(trial.number)).items() if key != "pruned"}
    trial.set_user_attr("record", old)
    search.optuna_study.tell(trial.number, 0.5)
    assert open_search(tmp_path).records == [record(trial.number)]


# Sizes and spaces


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (probe(num_trials=64), 16),
        (probe(num_trials=16), 8),
        (probe(num_trials=5), 5),
        (probe(num_trials=1000), 64),
        (probe(num_trials=64, population=3), 3),
        (probe(num_trials=2, population=3), 2),
        (fine_tune(num_trials=8), 1),
        (FromScratchSearch(), 1),
    ],
)
def test_population_sizes(block, expected):
    assert population_size(block) == expected


def test_features_are_those_that_the_encoder_has():
    assert study_space(probe(), SOURCES, "dinov2")["features"].choices == ("cls", "cls+mean")
    grid = probe(sampler="grid", space={"learning_rate": 0.1})
    assert study_space(grid, SOURCES, "dinov2")["features"].choices == ("cls",)
    asked = probe(space={"features": {"choices": ["pooler", "cls+mean"]}})
    assert study_space(asked, SOURCES, "dinov2")["features"].choices == ("cls+mean",)
    assert "features" not in study_space(fine_tune(), SOURCES, "dinov2")


def test_features_that_the_encoder_lacks_are_refused():
    asked = probe(space={"features": {"choices": ["pooler", "projected"]}})
    with pytest.raises(ConfigError) as error:
        study_space(asked, SOURCES, "dinov2-small")
    assert str(error.value) == (
        "search.linear_probe.space.features: dinov2-small has no pooler, projected; accepted: cls, cls+mean"
    )


def test_a_result_becomes_a_record():
    result = {"number": 3, "final": {"val/loss": 1.0}, "history": [{"val/loss": 1.0}], "checkpoint": None,
              "best_epoch": 0, "train_seconds": 2.0, "images_per_second": 9.0, "peak_memory_bytes": 5,
              "peak_gpu_memory_bytes": 0}  # fmt: skip
    made = make_record(3, {"epochs": 1}, result, "unused")
    assert (made.final, made.checkpoint, made.error) == ({"val/loss": 1.0}, None, None)
    assert made.details["train_seconds"] == 2.0
    lost = make_record(3, {"epochs": 1}, None, "why")
    assert (lost.final, lost.history, lost.error) == ({}, [], "why")


# Budgets


def test_a_time_budget_that_is_spent_stays_spent(tmp_path):
    search = open_search(tmp_path, probe(num_trials=30, time_budget_s=1e-9))
    (trial,) = search.ask(1)
    search.tell(trial, record(trial.number, 0.5, setting=dict(trial.params)))
    assert search.seconds_spent > 0
    assert open_search(tmp_path, probe(num_trials=30, time_budget_s=1e-9)).num_remaining == 0
    assert open_search(tmp_path, probe(num_trials=30)).num_remaining == 29


def test_a_grid_tries_failed_points_again(tmp_path):
    block = probe(sampler="grid", space={"epochs": {"choices": (1, 2, 3)}, "normalize": "none"})
    search = open_search(tmp_path, block)
    trials = search.ask(search.num_remaining)
    for trial in trials:
        search.tell(trial, record(trial.number, 0.5, error="lost" if trial.params["epochs"] == 2 else None))
    again = open_search(tmp_path, block)
    assert again.num_remaining == 1
    assert again.ask(1)[0].params["epochs"] == 2
