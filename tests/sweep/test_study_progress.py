import io
from types import SimpleNamespace

import pytest
from jobs import make_result, make_trial
from rich.console import Console

from raysweep.errors import TrialError
from raysweep.results.progress import Progress
from raysweep.sweep.study_progress import StudyProgress
from raysweep.training.ranking import Ranking
from raysweep.worker.job import TrialResult


class FakeOptunaStudy:
    ranking = Ranking("val/accuracy", "maximize")
    block = SimpleNamespace(scheduler="asha", num_trials=3)
    num_done = 1

    def __init__(self):
        self.results = []

    def best(self):
        usable = [result for result in self.results if not result.pruned and not result.error]
        if not usable:
            raise TrialError("no trial succeeded")
        return usable[0]


@pytest.fixture
def shown(tmp_path):
    """The progress of a study, its trials, its notes, and what the terminal has."""
    console = Console(file=io.StringIO(), width=200)
    optuna_study = FakeOptunaStudy()
    progress = StudyProgress(Progress(console), "study", tmp_path, optuna_study, "val/accuracy")
    notes, show = [], progress.show
    progress.show = lambda note: (notes.append(note), show(note))
    return SimpleNamespace(progress=progress, trials=optuna_study, notes=notes, text=console.file.getvalue)


def end(shown, result, is_last=True):
    shown.trials.results.append(result)
    shown.progress.num_done += 1
    shown.progress.show_end(result, is_last=is_last)


def test_an_epoch_is_shown_with_its_metric_or_without(shown):
    shown.progress.show_epoch(4, 0, {"val/accuracy": 0.25})
    shown.progress.show_epoch(4, 1, {"val/loss": 0.5})
    assert shown.notes == ["trial 4 epoch 1: val/accuracy 0.250", "trial 4 epoch 2: val/accuracy nan"]


def test_the_end_of_the_last_running_trial_shows_the_best_so_far(shown):
    end(shown, TrialResult("study", 0, {}, history=({},), pruned=True))
    end(shown, make_result(make_trial(1), 0.75), is_last=False)
    end(shown, make_result(make_trial(2), 0.5))
    assert shown.notes == [
        "trial 0 stopped after epoch 1 (asha)",
        "no trial has succeeded yet",
        "best trial: val/accuracy 0.750, 1 of 4 trials stopped early",
    ]
    shown.progress.finish()
    assert "study: 1 of 4 trials stopped early (asha)" in shown.text()


def test_an_error_is_shown_once(shown):
    for number in range(3):
        end(shown, TrialResult("study", number, {}, error="out of memory"))
    assert shown.text().count("failed: out of memory") == 1
    assert "study: trial 0 failed" in shown.text()


def test_a_study_without_a_new_trial_shows_nothing_at_its_end(shown):
    shown.trials.results.append(TrialResult("study", 0, {}, pruned=True))
    shown.progress.finish()
    assert not shown.text()
