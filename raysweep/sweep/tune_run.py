"""Runs many studies in one Tune run, with a search algorithm that suggests pieces of work of study groups.

Ray's own OptunaSearch suggests one setting at a time, and leaves a trial without a finite value RUNNING
(docs/decisions/0003). One Tune run for many studies starts only once and runs them in parallel (docs/decisions/0008).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysweep.cluster.session import give_tune_no_variables
from raysweep.sweep.study_group import StudyGroup
from raysweep.worker.job import EpochReport, Job, Work, WorkReport, from_tune
from raysweep.worker.tune_trial import run_work, work_resources

Trainable = Callable[[Mapping[str, Work], Mapping[str, Job]], None]
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

SECONDS_TO_STOP = 600


class GroupSearcher(Searcher):  # type: ignore[misc]  # mypy is told not to look into ray
    """Suggests the next piece of work of the first group that has one, and passes its report to the group.

    Args:
        groups: study groups, in the order in which they start.
        num_groups: largest number of groups at a time.
        num_runs: returns the largest number of pieces of work at a time, which may change.
        max_failures: how often a piece of work runs again after its process died.
        warn: is told each time.
    """

    def __init__(
        self,
        groups: Sequence[StudyGroup],
        num_groups: int,
        num_runs: Callable[[], int],
        max_failures: int = 0,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        super().__init__()
        self.groups, self.num_groups, self.num_runs = groups, num_groups, num_runs
        self.max_failures, self.warn = max_failures, warn
        self.running: dict[str, tuple[StudyGroup, Work]] = {}
        self.lost: list[tuple[StudyGroup, Work]] = []  # whose process died; they run again first
        self.num_failures: Counter[int] = Counter()  # by id of the work, which lives as long as the group waits for it
        self.failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its search algorithm to restore it later; here Optuna's journal does that.
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Returns a piece of work, None if the rest depends on running work, or `FINISHED`."""
        if self.failure is not None:
            return Searcher.FINISHED
        try:
            return self._next(trial_id)
        except Exception as error:
            self.failure = error
            raise

    def _next(self, trial_id: str) -> Any:
        if len(self.running) >= self.num_runs():
            return None
        if self.lost:
            self.running[trial_id] = self.lost.pop(0)
            return {"work": self.running[trial_id][1]}
        for group in self.groups:
            num_open = len({running.name for running, _ in self.running.values()} | {group.name})
            if num_open <= self.num_groups and (work := group.next_work()) is not None:
                self.running[trial_id] = group, work
                return {"work": work}  # Tune wants a dict
        return None if self.running else Searcher.FINISHED

    def should_stop(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Passes an epoch of a single trial to its group; returns whether to stop the trial."""
        report = from_tune(EpochReport, result)
        if report is None:
            return False
        return bool(self._call_keeping_error(self.running[trial_id][0].on_epoch, report))

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,
    ) -> None:
        """Passes the report of a piece of work to its group. A stopped trial has no report.

        Work whose process died runs again, with the same settings: they are not the cause.
        """
        report = from_tune(WorkReport, result)
        if trial_id not in self.running:
            return
        group, work = self.running.pop(trial_id)
        if report is None and error and self.num_failures[id(work)] < self.max_failures and self.failure is None:
            self.num_failures[id(work)] += 1
            self.lost.append((group, work))
            again = f"its work runs again ({self.num_failures[id(work)]} of {self.max_failures} times)"
            self.warn(f"{group.name}: a worker process or its node was lost; {again}")
            return
        self.num_failures.pop(id(work), None)
        self._call_keeping_error(group.take, work, report or WorkReport(error="the worker process died"))

    def _call_keeping_error(
        self, listener: Callable[Arguments, Answer], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Answer | None:
        """Calls a function, and keeps its error for `run_groups`, because Tune would wrap it in its own error.

        Later results are still passed on: they reach the journal before anything can fail.
        """
        try:
            return listener(*arguments, **options)
        except Exception as error:
            self.failure = self.failure or error
            return None

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: see `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: see `__getstate__`."""


class EpochScheduler(FIFOScheduler):  # type: ignore[misc]  # mypy is told not to look into ray
    """Stops trials that their study stops (docs/decisions/0013).

    Epochs are handled here and not in the search algorithm: Tune calls its scheduler first, and does not pass the
    result that stops a trial to the search algorithm.
    """

    def __init__(self, searcher: GroupSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Returns Tune's decision, `CONTINUE` or `STOP`."""
        stops = self.searcher.should_stop(trial.trial_id, result)
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)


def _with_time_to_stop(trainable: Trainable) -> Trainable:
    """Gives a stopped trial time to end before the next trial uses its process.

    By default Tune waits two seconds, and then loses the next trial without a call of its search algorithm.
    """

    def run(config: Mapping[str, Work], jobs: Mapping[str, Job]) -> None:
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(SECONDS_TO_STOP))
        trainable(config, jobs)

    return run


def run_groups(
    groups: Sequence[StudyGroup],
    tune_folder: Path,
    *,
    num_groups: int,
    num_runs: Callable[[], int],
    max_failures: int = 0,
    warn: Callable[[str], None] = lambda _text: None,
) -> None:
    """Runs all remaining work of study groups in one Tune run.

    Args:
        groups: study groups, in the order in which they start.
        tune_folder: folder for Tune's files; removed at the end.
        num_groups: largest number of groups at a time.
        num_runs: returns the largest number of pieces of work at a time, which may change.
        max_failures: how often a piece of work runs again after its process died.
        warn: is told each time.
    """
    give_tune_no_variables()
    num_side_by_side = min(num_groups, len(groups), num_runs())
    jobs = {group.name: group.build_job(num_side_by_side) for group in groups}
    searcher = GroupSearcher(groups, num_groups, num_runs, max_failures, warn)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_with_time_to_stop(run_work), jobs=jobs),
            lambda config: tune.PlacementGroupFactory([work_resources(jobs[config["work"].group], config["work"])]),
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=EpochScheduler(searcher),
            num_samples=-1,
            reuse_actors=all(job.resources.num_workers == 1 for job in jobs.values()),
            # By default Tune writes the whole Population into the folder's name.
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=groups[0].mode.name,
            storage_path=str(tune_folder),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if searcher.failure is None:
            raise
    if searcher.failure is not None:
        raise searcher.failure
    shutil.rmtree(tune_folder, ignore_errors=True)  # all results are in the journal and the studies' folders
