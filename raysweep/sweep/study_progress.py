"""What the terminal shows of a study: how many trials have ended, the best so far, and errors of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from raysweep.errors import TrialError
from raysweep.results.progress import Progress, Stage
from raysweep.storage.copies import location
from raysweep.sweep.optuna_study import OptunaStudy
from raysweep.worker.job import TrialResult


class StudyProgress:
    """Progress of one study.

    Args:
        progress: progress of the sweep.
        name: name of the study.
        folder: folder of the study.
        optuna_study: its trials in Optuna.
        metric: the metric that is shown.
    """

    def __init__(self, progress: Progress, name: str, folder: Path, optuna_study: OptunaStudy, metric: str) -> None:
        self._progress, self._name, self._folder, self._optuna_study = progress, name, folder, optuna_study
        self._metric, self._scheduler = metric, optuna_study.block.scheduler
        self.num_done, self.total = optuna_study.num_done, optuna_study.block.num_trials
        self._errors: set[str] = set()
        self._stage: Stage | None = None

    def show(self, note: str) -> None:
        """Shows a note beside the number of trials that have ended."""
        if self._stage is None:
            self._stage = self._progress.stage(self._name, self.total)
        self._stage.update(self.num_done, note)

    def show_epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Shows an epoch of a trial that is still running."""
        self.show(f"trial {number} epoch {epoch + 1}: {self._metric} {metrics.get(self._metric, math.nan):.3f}")

    def show_end(self, result: TrialResult, *, is_last: bool) -> None:
        """Shows the end of a trial; the best so far, if it is the last of those that ran."""
        if result.error and result.error not in self._errors:
            self._errors.add(result.error)
            self._progress.warn(f"{self._name}: trial {result.number} failed: {result.error}")
            self._progress.say(f"its traceback is in {location(self._folder)}/trials/")
        if result.pruned:
            self.show(f"trial {result.number} stopped after epoch {len(result.history)} ({self._scheduler})")
        if is_last:
            self.show(self._best_so_far())

    def finish(self) -> None:
        """Ends the progress bar, if there is one; says how many trials were stopped early."""
        if self._stage is None:
            return
        self._stage.finish()
        if stopped := self._describe_stopped():
            self._progress.say(f"{self._name}: {stopped} ({self._scheduler})")

    def _best_so_far(self) -> str:
        try:
            value = self._optuna_study.best().final[self._metric]
        except TrialError:
            return "no trial has succeeded yet"
        return ", ".join(filter(None, [f"best trial: {self._metric} {value:.3f}", self._describe_stopped()]))

    def _describe_stopped(self) -> str:
        num_stopped = sum(result.pruned for result in self._optuna_study.results)
        return f"{num_stopped} of {self.num_done} trials stopped early" if num_stopped else ""
