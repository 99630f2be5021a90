"""One Tune run works through many studies: a search algorithm whose every suggestion is a piece of a group's work.

Ray's own OptunaSearch asks for one setting a suggestion and leaves a trial without a finite value running, hence this
one (docs/decisions/0003); and one Tune run for many studies starts once, and runs them side by side
(docs/decisions/0008).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysweep.cluster.session import joins_cluster, let_tune_use_started_workers
from raysweep.sweep.study_group import StudyGroup
from raysweep.worker.job import EpochReport, Job, Work, WorkReport, from_tune
from raysweep.worker.tune_trial import run_work, work_resources

Trainable = Callable[[Mapping[str, Work], Mapping[str, Job]], None]
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

SECONDS_TO_STOP = 600
LOST_NODES = 3  # under one piece of work, before its trials count as failed


class GroupSearcher(Searcher):  # type: ignore[misc]  # mypy is told not to look into ray
    """Suggests the next piece of work of the first group that has one, and passes on what came of it.

    Args:
        groups: in the order in which they are begun.
        num_groups: groups at a time.
        num_runs: tells how many pieces of work at a time, by now.
    """

    def __init__(self, groups: Sequence[StudyGroup], num_groups: int, num_runs: Callable[[], int]) -> None:
        super().__init__()
        self.groups, self.num_groups, self.num_runs = groups, num_groups, num_runs
        self.running: dict[str, tuple[StudyGroup, Work]] = {}
        self.failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its search algorithm to restore it one day; the study's journal does that job here.
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Returns a piece of work, None when all that is left waits for what is running, or that there is none."""
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
        for group in self.groups:
            num_open = len({running.name for running, _ in self.running.values()} | {group.name})
            if num_open <= self.num_groups and (work := group.next_work()) is not None:
                self.running[trial_id] = group, work
                return {"work": work}  # Tune wants a dict
        return None if self.running else Searcher.FINISHED

    def should_stop(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Passes an epoch of a single trial on; returns whether the trial is to be stopped."""
        report = from_tune(EpochReport, result)
        if report is None:
            return False
        return bool(self._keeping_error(self.running[trial_id][0].on_epoch, report))

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: ARG002
    ) -> None:
        """Tells a group what came of a piece of its work; of a trial that was stopped nothing comes."""
        report = from_tune(WorkReport, result) or WorkReport(error="the worker process died")
        if trial_id in self.running:
            group, work = self.running.pop(trial_id)
            self._keeping_error(group.take, work, report)

    def _keeping_error(
        self, listener: Callable[Arguments, Answer], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Answer | None:
        """Keeps an error for `run_groups`: Tune would wrap it in its own.

        What is still running then is listened to all the same: its results reach the journal before anything can fail.
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
    """Stops what its study wants stopped (docs/decisions/0013).

    It is here that epochs are listened to, because Tune asks its scheduler first, and then hides from its search
    algorithm the result after which a trial is stopped.
    """

    def __init__(self, searcher: GroupSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Returns Tune's word for going on or for stopping."""
        stops = self.searcher.should_stop(trial.trial_id, result)
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)


def _with_time_to_stop(trainable: Trainable) -> Trainable:
    """Gives a stopped trial time to leave its process before the next one gets it.

    Tune waits for two seconds, and then loses the next trial without telling its search algorithm.
    """

    def run(config: Mapping[str, Work], jobs: Mapping[str, Job]) -> None:
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(SECONDS_TO_STOP))
        trainable(config, jobs)

    return run


def run_groups(
    groups: Sequence[StudyGroup], tune_folder: Path, *, num_groups: int, num_runs: Callable[[], int]
) -> None:
    """Works through all that is left of some groups with Ray Tune.

    Args:
        groups: in the order in which they are begun.
        tune_folder: where Tune may write.
        num_groups: groups at a time.
        num_runs: tells how many pieces of work at a time, by now.
    """
    let_tune_use_started_workers()
    num_side_by_side = min(num_groups, len(groups), num_runs())
    jobs = {group.name: group.build_job(num_side_by_side) for group in groups}
    searcher = GroupSearcher(groups, num_groups, num_runs)
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
            # Without it Tune writes the whole population into a folder's name.
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=groups[0].mode.name,
            storage_path=str(tune_folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=LOST_NODES if joins_cluster() else 0),
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if searcher.failure is None:
            raise
    if searcher.failure is not None:
        raise searcher.failure
    shutil.rmtree(tune_folder, ignore_errors=True)  # what matters is in the journal and the studies' folders
