import os
import pickle
import signal
import time
from types import SimpleNamespace

import pytest
from jobs import make_job, make_trial, train_work

from raysweep.cluster.session import ray_session
from raysweep.experiment.modes import MODES
from raysweep.sweep import tune_run as module
from raysweep.sweep.tune_run import EpochScheduler, GroupSearcher, run_groups
from raysweep.worker.job import EpochReport, TrialResult, WorkReport, to_tune

FINISHED = GroupSearcher.FINISHED


class FakeGroup:
    """Hands out its pieces of work; `None` among them waits for all that runs."""

    def __init__(self, name, pieces, mode="fine_tune", last_epoch=None):
        self.name, self.mode, self.pieces, self.last_epoch = name, MODES[mode], list(pieces), last_epoch
        self.num_running, self.taken, self.epochs = 0, [], []

    def next_work(self):
        if not self.pieces or (self.pieces[0] is None and self.num_running):
            return None
        if self.pieces[0] is None:
            self.pieces.pop(0)
        self.num_running += 1
        return train_work(make_trial(self.pieces.pop(0), self.name), group=self.name)

    def on_epoch(self, report):
        self.epochs.append(report)
        return report.epoch == self.last_epoch

    def take(self, work, report):
        self.num_running -= 1
        self.taken.append((piece_of(work), report))

    def build_job(self, num_side_by_side):
        self.num_side_by_side = num_side_by_side
        return make_job(self.mode.name, [self.name])


def piece_of(work):
    return work.trials[0].number


def suggest_all(searcher, prefix="t"):
    """Suggests until there is nothing for now; returns the suggestions by trial id, and what ended them."""
    found = {}
    while isinstance(config := searcher.suggest(f"{prefix}{len(found)}"), dict):
        found[f"{prefix}{len(found)}"] = config["work"]
    return found, config


def pieces(suggestions):
    return [(work.group, piece_of(work)) for work in suggestions.values()]


def done(*trials):
    return to_tune(WorkReport(trials=trials))


def epoch_of(epoch, number=0):
    return EpochReport(number, epoch, {"val/loss": 0.5})


LOST = WorkReport(error="the worker process died")


# Order


def test_work_goes_side_by_side_until_all_runs_are_taken():
    searcher = GroupSearcher([FakeGroup("a", [1, 2]), FakeGroup("b", [1, 2])], num_groups=2, num_runs=lambda: 3)
    running, end = suggest_all(searcher)
    assert (pieces(running), end) == ([("a", 1), ("a", 2), ("b", 1)], None)
    searcher.on_trial_complete("t1", done())
    running, end = suggest_all(searcher, "u")
    assert (pieces(running), end) == ([("b", 2)], None)
    for trial_id in ("t0", "t2"):
        searcher.on_trial_complete(trial_id, done())
        assert searcher.suggest("v") is None, "u0 still runs"
    searcher.on_trial_complete("u0", done())
    assert searcher.suggest("v") == FINISHED


def test_no_more_groups_are_begun_than_may_be_open():
    searcher = GroupSearcher([FakeGroup(name, [1, 2]) for name in "abc"], num_groups=2, num_runs=lambda: 9)
    running, end = suggest_all(searcher)
    assert (pieces(running), end) == ([("a", 1), ("a", 2), ("b", 1), ("b", 2)], None)
    searcher.on_trial_complete("t0", done())
    assert searcher.suggest("u") is None, "the second piece of a still runs"
    searcher.on_trial_complete("t1", done())
    running, end = suggest_all(searcher, "v")
    assert (pieces(running), end) == ([("c", 1), ("c", 2)], None)


def test_groups_go_one_after_another_when_one_may_be_open():
    searcher = GroupSearcher([FakeGroup("a", [1, None, 2]), FakeGroup("b", [1])], num_groups=1, num_runs=lambda: 9)
    order = []
    for _ in range(3):
        running, end = suggest_all(searcher)
        assert (len(running), end) == (1, None)
        order += pieces(running)
        searcher.on_trial_complete("t0", done())
    assert order == [("a", 1), ("a", 2), ("b", 1)]
    assert searcher.suggest("t0") == FINISHED


def test_a_group_that_waits_for_its_own_results_does_not_hold_up_the_next():
    searcher = GroupSearcher([FakeGroup("a", [1, None, 2]), FakeGroup("b", [1])], num_groups=2, num_runs=lambda: 9)
    running, end = suggest_all(searcher)
    assert (pieces(running), end) == ([("a", 1), ("b", 1)], None)
    searcher.on_trial_complete("t0", done())
    assert pieces(suggest_all(searcher, "u")[0]) == [("a", 2)]


# Results


def test_results_go_to_the_group_they_belong_to():
    groups = [FakeGroup("a", [1]), FakeGroup("b", [2])]
    searcher = GroupSearcher(groups, 2, lambda: 2)
    suggest_all(searcher)
    result = TrialResult("b", 2, {"epochs": 3}, ({"val/loss": 0.5},), {"val/loss": 0.5}, 0)
    searcher.on_trial_complete("t1", done(result))
    assert (groups[0].taken, groups[1].taken) == ([], [(2, WorkReport(trials=(result,)))])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (to_tune(WorkReport(error="DataError: no such cache")), WorkReport(error="DataError: no such cache")),
        (None, LOST),
        ({}, LOST),
        (to_tune(epoch_of(1)), LOST),
    ],
)
def test_lost_work_is_passed_on_once_with_its_reason(result, expected):
    group = FakeGroup("a", [1, 2])
    searcher = GroupSearcher([group], 1, lambda: 1)
    searcher.suggest("t0")
    searcher.on_trial_complete("t0", result, error=result is None)
    searcher.on_trial_complete("t0", None, error=True)  # told twice, it counts once
    assert group.taken == [(1, expected)]
    assert piece_of(searcher.suggest("t1")["work"]) == 2


def test_work_whose_process_died_runs_again_with_the_same_settings_a_few_times():
    group, said = FakeGroup("a", [1, 2]), []
    searcher = GroupSearcher([group], 1, lambda: 1, max_failures=2, warn=said.append)
    first = searcher.suggest("t0")["work"]
    for number in range(2):
        searcher.on_trial_complete(f"t{number}", to_tune(epoch_of(1)) if number else None, error=True)
        assert group.taken == []
        assert searcher.suggest(f"t{number + 1}")["work"] is first
        assert searcher.suggest("more") is None, "it counts as running"
    assert said[1:] == ["a: a worker process or its node was lost; its work runs again (2 of 2 times)"]
    searcher.on_trial_complete("t2", None, error=True)
    assert group.taken == [(1, LOST)]
    assert piece_of(searcher.suggest("t3")["work"]) == 2
    searcher.on_trial_complete("t3", None, error=True)
    assert len(said) == 3, "each piece of work has its own number of tries"


def test_work_that_reported_an_error_or_was_stopped_does_not_run_again():
    group = FakeGroup("a", [1, 2])
    searcher = GroupSearcher([group], 1, lambda: 1, max_failures=3)
    searcher.suggest("t0")
    searcher.on_trial_complete("t0", to_tune(WorkReport(error="out of memory")), error=True)
    searcher.suggest("t1")
    searcher.on_trial_complete("t1", to_tune(epoch_of(1)))
    assert [number for number, _ in group.taken] == [1, 2]
    assert searcher.suggest("t2") == FINISHED


def decision(searcher, trial_id, result):
    return EpochScheduler(searcher).on_trial_result(None, SimpleNamespace(trial_id=trial_id), result)


def test_epochs_are_passed_on_and_results_are_not_taken_for_one():
    groups = [FakeGroup("a", [1]), FakeGroup("b", [2])]
    searcher = GroupSearcher(groups, 2, lambda: 2)
    suggest_all(searcher)
    epoch = EpochReport(3, 4, {"val/loss": 0.5})
    assert decision(searcher, "t1", to_tune(epoch)) is EpochScheduler.CONTINUE
    assert decision(searcher, "t1", done()) is EpochScheduler.CONTINUE
    assert (groups[0].epochs, groups[1].epochs) == ([], [epoch])


def test_a_trial_is_stopped_when_its_group_says_so():
    group = FakeGroup("a", [1], last_epoch=2)
    searcher = GroupSearcher([group], 1, lambda: 1)
    searcher.suggest("t0")
    decisions = [decision(searcher, "t0", to_tune(epoch_of(epoch))) for epoch in range(3)]
    assert decisions == ["CONTINUE", "CONTINUE", "STOP"]
    assert decisions[-1] is EpochScheduler.STOP, "Tune compares by identity"
    searcher.on_trial_complete("t0", to_tune(epoch_of(2)))
    assert group.taken == [(1, LOST)], "its study knows better"


def test_tune_may_pickle_the_searcher_and_the_scheduler_whatever_their_groups_hold():
    searcher = GroupSearcher([lambda: "no pickle can hold this"], 1, lambda: 1)
    assert isinstance(pickle.loads(pickle.dumps(searcher)), GroupSearcher)
    assert isinstance(pickle.loads(pickle.dumps(EpochScheduler(searcher))), EpochScheduler)


# What goes wrong in the driver


class BrokenStoreError(Exception):
    pass


def fail(*_arguments):
    raise BrokenStoreError("the disk is full")


@pytest.mark.parametrize("listener", ["take", "on_epoch"])
def test_an_error_of_a_listener_stops_the_search(listener):
    group = FakeGroup("a", range(9))
    setattr(group, listener, fail)
    searcher = GroupSearcher([group], 1, lambda: 2)
    suggest_all(searcher)
    if listener == "on_epoch":
        assert decision(searcher, "t0", to_tune(epoch_of(0))) == "CONTINUE"
    else:
        searcher.on_trial_complete("t0", done())
    assert isinstance(searcher.failure, BrokenStoreError)
    assert searcher.suggest("t2") == FINISHED
    first = searcher.failure
    searcher.on_trial_complete("t1", done())  # what still runs may reach the journal
    assert searcher.failure is first
    assert len(group.taken) == (1 if listener == "on_epoch" else 0)


def test_an_error_while_work_is_sought_stops_the_search():
    group = FakeGroup("a", [1])
    group.next_work = fail
    searcher = GroupSearcher([group], 1, lambda: 1)
    with pytest.raises(BrokenStoreError):
        searcher.suggest("t0")
    assert isinstance(searcher.failure, BrokenStoreError)
    assert searcher.suggest("t1") == FINISHED


class FakeTuner:
    """Works through a search algorithm as Tune does, and wraps its errors as Tune does."""

    error: Exception | None = None

    def __init__(self, trainable, tune_config, run_config):
        self.searcher, self.folder = tune_config.search_alg, run_config.storage_path
        self.reuse_actors = tune_config.reuse_actors

    def fit(self):
        if self.error:
            raise self.error
        number = 0
        while True:
            try:
                work = self.searcher.suggest(f"t{number}")
            except Exception as error:
                raise RuntimeError("Tune's own") from error
            if work == FINISHED:
                return
            self.searcher.on_trial_complete(f"t{number}", done())
            number += 1


@pytest.fixture
def fake_tune(monkeypatch):
    fake = SimpleNamespace(
        Tuner=FakeTuner,
        TuneConfig=SimpleNamespace,
        RunConfig=SimpleNamespace,
        FailureConfig=SimpleNamespace,
        with_resources=lambda trainable, resources: trainable,
        with_parameters=lambda trainable, **parameters: trainable,
    )
    monkeypatch.setattr(module, "tune", fake)
    return fake


def test_groups_are_worked_through_and_what_tune_wrote_is_deleted(fake_tune, tmp_path):
    groups = [FakeGroup("a", [1, 2]), FakeGroup("b", [3])]
    (tmp_path / "tune").mkdir()
    run_groups(groups, tmp_path / "tune", num_groups=2, num_runs=lambda: 2)
    assert [[piece for piece, _ in group.taken] for group in groups] == [[1, 2], [3]]
    assert [group.num_side_by_side for group in groups] == [2, 2]
    assert not (tmp_path / "tune").exists()


@pytest.mark.parametrize("listener", ["take", "next_work"])
def test_an_error_of_ours_is_raised_as_it_is(fake_tune, tmp_path, listener):
    group = FakeGroup("a", [1, 2])
    setattr(group, listener, fail)
    with pytest.raises(BrokenStoreError, match="the disk is full"):
        run_groups([group], tmp_path / "tune", num_groups=1, num_runs=lambda: 1)


def test_an_error_of_tune_is_not_swallowed(fake_tune, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTuner, "error", ValueError("no such resource"))
    with pytest.raises(ValueError, match="no such resource"):
        run_groups([FakeGroup("a", [1])], tmp_path / "tune", num_groups=1, num_runs=lambda: 1)


# With Tune itself


class ThriftyGroup(FakeGroup):
    """Stops its first piece after its second epoch."""

    def on_epoch(self, report):
        self.epochs.append((report.number, report.epoch))
        return self.epochs[-1] == (0, 1)


@pytest.mark.ray
def test_tune_stops_a_bad_trial_and_goes_on_with_the_next_in_the_same_process(tmp_path, monkeypatch):
    def train(config, jobs):
        from ray import tune

        (trial,) = config["work"].trials
        assert list(jobs) == [trial.study]
        try:
            for epoch in range(4):
                tune.report(to_tune(EpochReport(trial.number, epoch, {"val/loss": 0.5})))
        finally:
            if trial.number == 0:
                time.sleep(4)  # Tune would wait for two seconds, and then lose the next trial
            (tmp_path / f"{trial.number} has let go").touch()
        # A trial's checkpoint stands in for the process that it ran in.
        result = TrialResult(trial.study, trial.number, trial.setting, checkpoint=str(os.getpid()))
        tune.report(to_tune(WorkReport(trials=(result,))))

    monkeypatch.setattr(module, "run_work", train)
    group = ThriftyGroup("a", [0, 1, 2])
    with ray_session(verbose=False):
        run_groups([group], tmp_path / "tune", num_groups=1, num_runs=lambda: 1)
    assert group.epochs == [(0, 0), (0, 1), *((piece, epoch) for piece in (1, 2) for epoch in range(4))]
    (stopped, lost), (one, first), (two, second) = group.taken
    assert (stopped, one, two) == (0, 1, 2)
    assert lost == LOST
    ((first,), (second,)) = first.trials, second.trials
    assert (first.number, second.number) == (1, 2)
    assert first.checkpoint == second.checkpoint, "the process is used again"
    assert sorted(path.name[0] for path in tmp_path.glob("* has let go")) == ["0", "1", "2"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_process_is_replaced_and_its_work_runs_again(tmp_path, monkeypatch):
    def train(config, jobs):
        from ray import tune

        (trial,) = config["work"].trials
        tries = tmp_path / f"{trial.number} was tried"
        tries.write_text(f"{tries.read_text() if tries.exists() else ''}{os.getpid()} ")
        if trial.number == 1 and len(tries.read_text().split()) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        result = TrialResult(trial.study, trial.number, trial.setting)
        tune.report(to_tune(WorkReport(trials=(result,))))

    monkeypatch.setattr(module, "run_work", train)
    group, said = FakeGroup("a", [0, 1, 2]), []
    with ray_session(verbose=False):
        run_groups([group], tmp_path / "tune", num_groups=1, num_runs=lambda: 1, max_failures=2, warn=said.append)
    assert [(number, report.error) for number, report in group.taken] == [(0, None), (1, None), (2, None)]
    assert len(set((tmp_path / "1 was tried").read_text().split())) == 3
    assert len(said) == 2
