"""Studies that share one job, split into pieces of work for Ray Tune.

The probes of one encoder, with every number of shots, form one group: they read the same features, so one Population
holds the next settings of each. A study that trains on pixels forms a group alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from raysweep.cluster.resources import uses_gpu
from raysweep.cluster.session import cpus_and_memory_by_node
from raysweep.experiment.config import Experiment
from raysweep.experiment.modes import Mode
from raysweep.images.features import HALF_BYTES
from raysweep.images.pass_processes import PROCESS_BYTES
from raysweep.images.rows import Rows
from raysweep.images.streaming import DECODING_CPUS
from raysweep.storage.copies import location
from raysweep.sweep.caches import precision_of
from raysweep.sweep.leaderboard_entry import BaselineEntry, LeaderboardEntry
from raysweep.sweep.state import SweepState
from raysweep.sweep.study import Study
from raysweep.sweep.training_runs import TrainingRuns, bytes_of_trial, choose_runs
from raysweep.training.augment import Augmentation
from raysweep.training.loop import CPU_MICRO_BATCH, LoopOptions
from raysweep.training.ranking import Ranking
from raysweep.worker.job import EpochReport, Job, TestResult, TestWork, TrainWork, TrialSpec, Work, WorkReport
from raysweep.worker.tune_trial import initial_micro_batch_size

# Weights x rows x epochs: about five seconds of one thread. With less, a second process does not repay its start.
WORK_PER_PROCESS = 2**36
# Elements of the train features: baselines that read more take longer than a second process needs to start.
FEATURES_PER_PROCESS = 2**22


class StudyGroup:
    """Returns Populations until the budget of its studies is spent, then the test of the chosen classifiers.

    Args:
        state: state that all studies share.
        studies: studies of one encoder and mode.
        baselines: baselines on the same features.
    """

    def __init__(self, state: SweepState, studies: Sequence[Study], baselines: Sequence[BaselineEntry] = ()) -> None:
        self.state, self.studies, self.baselines = state, list(studies), list(baselines)
        self.first = self.studies[0]
        self.name, self.mode = self.first.name, self.first.config.mode
        self.num_running, self.is_tested = 0, False  # pieces of training
        self.num_beside = 0  # pieces of work for baselines beside them
        self._open_baselines = [entry for entry in baselines if not entry.is_settled]
        self.micro_batch_size: int | None = None  # the largest that fits; None before memory runs out
        self.most_running: int | None = None  # training runs at a time; None if the CPUs are the limit
        self.num_processes = 1  # that share the heads of a Population
        self._parts: list[tuple[TrialSpec, ...]] = []  # of a Population, that have not been handed out
        self._lost_trials: list[TrialSpec] = []
        self._job: Job | None = None

    @property
    def entries(self) -> list[LeaderboardEntry]:
        """Its studies and baselines."""
        return [*self.studies, *self.baselines]

    @property
    def has_work(self) -> bool:
        """Whether a study or baseline has work left."""
        return not all(entry.is_settled for entry in self.entries) or bool(self._find_lost_trials())

    @property
    def reserved_cpus(self) -> int:
        """CPUs that training runs must leave free."""
        return DECODING_CPUS if self.first.cache.streamed else 0

    @property
    def job(self) -> Job:
        """The job that all its work shares, from `build_job`."""
        assert self._job is not None, "build_job comes first"
        return self._job

    def next_work(self) -> Work | None:
        """Returns the next piece of work; None while the rest depends on running work, or if none is left.

        Baselines wait for no trial: long ones run beside the trials where a worker is free, others with the test.
        """
        if work := self._next_training():
            return work
        if self.num_running and self._open_baselines and self._are_baselines_long and not self._is_memory_taken:
            self.num_beside = 1
            return TestWork(self.name, time.time(), {}, self._take_baselines())
        return self._next_test()

    def _next_training(self) -> TrainWork | None:
        trials: tuple[TrialSpec, ...] = ()
        if self._parts:
            trials = () if self._is_memory_taken else self._parts.pop(0)
        # Populations run one after another, because the sampler learns from each.
        elif not (self.is_tested or self._is_memory_taken or (self.mode.trains_together and self.num_running)):
            trials, *self._parts = self._split([t for study in self.studies if study.num_left for t in study.ask()])
        if not trials and not self.num_running and not self.is_tested:
            trials, self._lost_trials = tuple(self._find_lost_trials()), []
        if not trials:
            return None
        self.num_running += 1
        return TrainWork(self.name, time.time(), trials, self.micro_batch_size)

    def _next_test(self) -> TestWork | None:
        if self.num_running or self.is_tested:
            return None
        chosen, names = self.choose(), self._take_baselines()
        return TestWork(self.name, time.time(), chosen, names) if chosen or names else None

    @property
    def _are_baselines_long(self) -> bool:
        return len(self.job.rows["train"]) * self.job.encoder.widest >= FEATURES_PER_PROCESS

    @property
    def _is_memory_taken(self) -> bool:
        return self.most_running is not None and self.num_running + self.num_beside >= self.most_running

    def _take_baselines(self) -> tuple[str, ...]:
        """Returns the names of the baselines that have work left, once."""
        names = tuple(entry.name for entry in self._open_baselines)
        self._open_baselines = []
        return names

    def _split(self, trials: Sequence[TrialSpec]) -> list[tuple[TrialSpec, ...]]:
        """Returns the parts of a Population: each trains in a process of one thread, and none waits for another.

        The weights of a head do not depend on the heads that train beside it.
        """
        if not trials:
            return [()]
        num_parts = max(1, min(self.num_processes, len(trials), self._work_of(trials) // WORK_PER_PROCESS))
        return [tuple(trials[start::num_parts]) for start in range(num_parts)]

    def _work_of(self, trials: Sequence[TrialSpec]) -> int:
        """Returns weights x rows x epochs of heads."""
        job = self.job
        draws = {name: study.draws for name, study in job.studies.items()}
        num_rows = {name: len(job.rows["train"]) if one is None else one.train.size for name, one in draws.items()}
        num_weights = job.num_classes * job.encoder.widest
        return num_weights * sum(int(trial.setting["epochs"]) * num_rows[trial.study] for trial in trials)

    def _find_lost_trials(self) -> list[TrialSpec]:
        """Returns the best trials whose checkpoints are needed and cannot be read, each once."""
        found = [study.find_lost_trial() for study in self.studies]
        self._lost_trials += [trial for trial in found if trial is not None]
        return self._lost_trials

    def choose(self) -> dict[str, str]:
        """Ends the searches; returns the checkpoints that still need a test, by study."""
        self.is_tested = True
        checkpoints = {study: study.choose() for study in self.studies}
        return {study.name: path for study, path in checkpoints.items() if path and not study.is_settled}

    def on_epoch(self, report: EpochReport) -> bool:
        """Passes an epoch of a single trial to its study; returns whether to stop the trial."""
        self._note_micro_batch_size(report.metrics.get("train/micro_batch_size"))
        stops = self.first.on_epoch(report)
        if stops and self.job.resources.num_workers > 1:
            # Tune would end only its own process, and Train's placement group would stay (docs/decisions/0013).
            self.first.ask_to_stop(report.number)
            return False
        return stops

    def _note_micro_batch_size(self, size: float | None) -> None:
        """Makes later trials start with the size that fits, after memory ran out."""
        if size is not None and size < (before := self.micro_batch_size or initial_micro_batch_size(self.job)):
            self.micro_batch_size = int(size)
            batch_size = self.job.loop.batch_size
            self.state.progress.warn(
                f"{self.name}: out of memory with {before} images at once; a worker takes {int(size)} and accumulates "
                f"(the batch stays {batch_size}); train.micro_batch_size: {int(size)} would begin with that"
            )

    def take(self, work: Work, report: WorkReport) -> None:
        """Records the report of a piece of work from `next_work`."""
        if isinstance(work, TrainWork):
            self.num_running -= 1
        elif not work.checkpoints:
            self.num_beside = 0
        entries = {entry.name: entry for entry in self.entries}
        for name in work.studies:
            entries[name].seconds += (time.time() - work.started) / len(work.studies)
        if isinstance(work, TrainWork):
            self._take_trials(work.trials, report)
            return
        for name in work.studies:
            tested = TestResult(error=report.error) if report.error is not None else report.tested[name]
            if tested.error is not None:
                entries[name].failure = f"{name}: its test failed: {tested.error}"
            else:
                entries[name].settle(tested, self.job)

    def _take_trials(self, trials: Sequence[TrialSpec], report: WorkReport) -> None:
        studies = {study.name: study for study in self.studies}
        found = {(result.study, result.number): result for result in report.trials}
        for trial in trials:
            result = found.get((trial.study, trial.number))
            studies[trial.study].tell(trial.number, result, report.error or "no result came back")

    def build_job(self, num_side_by_side: int) -> Job:
        """Builds the job that all work of the group shares.

        Args:
            num_side_by_side: number of groups that may run at the same time.
        """
        state, first = self.state, self.first
        experiment, spec = state.experiment, first.encoder.spec
        reads_features = self.mode.reads == "features"
        runs = self._choose_runs(num_side_by_side)
        self._job = Job(
            mode=self.mode,
            studies={entry.name: entry.spec for entry in self.entries},
            data_key=first.key,
            cache=first.cache.rows,
            index=state.index_reference if first.cache.streamed else None,
            rows=self._rows(),
            num_classes=len(state.index.classes),
            encoder=spec,
            weights=None if reads_features else first.encoder.put(),
            head=location(first.head) if first.head else None,
            resources=experiment.resources,
            use_gpu=uses_gpu(experiment.resources, state.resources),
            num_threads=runs.num_threads,
            gradient_checkpointing=self._checkpoints_gradients(),
            compile=experiment.train.compile,
            loop=loop_options(experiment, self.mode, state.ranking.within_study, precision_of(state, first.config)),
        )
        return self._job

    def _choose_runs(self, num_side_by_side: int) -> TrainingRuns:
        """Chooses how many training runs work at the same time, given the number of groups that do."""
        resources, present, together = self.state.experiment.resources, self.state.resources, self.mode.trains_together
        on_gpu = uses_gpu(resources, present)
        worker_bytes = 0 if on_gpu else self._worker_bytes()
        nodes = [] if on_gpu else cpus_and_memory_by_node()
        num_wanted = num_side_by_side * (1 if together else max(1, self.first.num_left))
        runs = choose_runs(resources, present, nodes, worker_bytes, num_wanted, self.reserved_cpus)
        # Other groups take their share of the memory, also if it is not short for this one alone.
        share = [(num_cpus, free / num_side_by_side) for num_cpus, free in nodes]
        own = choose_runs(resources, present, share, worker_bytes, num_wanted, self.reserved_cpus)
        if own.is_memory_short:
            self.most_running = own.num_fitting
        if together and not on_gpu and resources.num_workers == 1:
            self.num_processes = max(1, runs.num_fitting // num_side_by_side)
        if not together and not on_gpu and self.first.num_left:
            self.state.progress.say(f"{self.name}: trains {runs} on CPUs, about {worker_bytes / 1e9:.1f} GB each")
        return runs

    def _worker_bytes(self) -> int:
        """Returns the memory of a worker on a CPU."""
        experiment, encoder = self.state.experiment, self.first.encoder
        if self.mode.reads == "features":
            num_features = sum(encoder.spec.parts.values()) * sum(len(rows) for rows in self._rows().values())
            return PROCESS_BYTES + min(int(experiment.resources.feature_memory_gb * 1e9), HALF_BYTES * num_features)
        share = -(-experiment.train.batch_size // experiment.resources.num_workers)
        return bytes_of_trial(encoder.model, min(share, experiment.train.micro_batch_size or CPU_MICRO_BATCH))

    def _checkpoints_gradients(self) -> bool:
        """Whether to use gradient checkpointing; warns if the experiment asks for it and the encoder cannot."""
        if self.mode.trains != "all" or not self.state.experiment.train.gradient_checkpointing:
            return False
        if not self.first.encoder.model.supports_gradient_checkpointing:
            self.state.progress.warn(f"{self.name}: its encoder knows no gradient checkpointing and is trained without")
            return False
        return True

    def _rows(self) -> Rows:
        """Returns the rows to read: probes read all rows, and use draws as positions; others read only their draw."""
        rows, draws = self.state.rows, self.first.draws
        if self.mode.reads == "features" or draws is None:
            return rows
        train, validation = draws.train[0], draws.validation[0]
        return {
            "train": rows["train"].take(train),
            "validation": rows["validation"].take(validation),
            "test": rows["test"],
        }


def loop_options(experiment: Experiment, mode: Mode, ranking: Ranking, precision: str) -> LoopOptions:
    """Returns the options of the training loop in one mode."""
    train, has_start = experiment.train, mode.starts_from == "best_head"
    return LoopOptions(
        batch_size=train.batch_size,
        seed=experiment.seed,
        ranking=ranking,
        patience=train.early_stopping_patience,
        evaluates_start=has_start,
        freezes_batch_norm=has_start and train.freeze_batch_norm,
        precision=precision,
        augmentation=Augmentation(**train.augmentation.model_dump()) if train.augmentation else None,
        warmup_fraction=train.warmup_fraction,
        gradient_clip=train.gradient_clip,
        label_smoothing=train.label_smoothing,
        ema_decay=None if train.ema_decay == "auto" and mode.starts_from_random else train.ema_decay,
        micro_batch_size=train.micro_batch_size,
    )
