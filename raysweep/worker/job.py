"""Frozen dataclasses that the driver sends to Ray's processes and back; Ray pickles them.

Each layer owns what it sends, so some are elsewhere: `PassJob` in `images.pass_tasks`, `StreamJob` in
`images.streaming`, `EncoderSpec` in `encoders.base`, `SampleJob` in `sweep.estimate`, `LoggedTrial` in
`results.tracking`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from pydantic import TypeAdapter

from raysweep.encoders.base import EncoderSpec
from raysweep.experiment.modes import Mode
from raysweep.experiment.sections import ResourcesConfig
from raysweep.experiment.space import Setting
from raysweep.experiment.studies import Baseline
from raysweep.images.pass_tasks import IndexReference
from raysweep.images.rows import Draws, Rows
from raysweep.training.evaluation import TestMetrics
from raysweep.training.intervals import FoldEstimate
from raysweep.training.loop import LoopOptions

ReportT = TypeVar("ReportT")


@dataclass(frozen=True, slots=True)
class StudySpec:
    """The part of a job that is about one study or baseline.

    Attributes:
        name: name of the study.
        folder: location of its checkpoints.
        draws: few-shot draws of its rows; None if it trains on all rows.
        baseline: the baseline; None for a study with trials.
        refit: whether its head is fitted to train and validation together before the test.
        folds: number of folds of all rows that judge a baseline as well; None for none.
    """

    name: str
    folder: str
    draws: Draws | None
    baseline: Baseline | None = None
    refit: bool = False
    folds: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that all work of one study group shares.

    Attributes:
        mode: mode of its studies.
        studies: its studies and baselines, by name.
        data_key: key of the rows: a process keeps loaded data while the key stays the same.
        cache: location of the cache's files of rows.
        index: the images, if pixels are decoded in every epoch; None if they are cached.
        rows: row ids and labels of each split.
        num_classes: number of classes.
        encoder: architecture, preprocessing and feature sources.
        weights: object reference of the encoder's state dict as numpy arrays; None if features are read.
        head: location of the probe's checkpoint that fine-tuning starts from; None for a new head.
        resources: resources of one training run, as configured.
        use_gpu: whether workers use GPUs.
        num_threads: CPU threads of a worker.
        gradient_checkpointing: whether the backward pass computes activations again.
        compile: whether the model is compiled.
        loop: options of the training loop.
    """

    mode: Mode
    studies: Mapping[str, StudySpec]
    data_key: str
    cache: str
    index: IndexReference | None
    rows: Rows
    num_classes: int
    encoder: EncoderSpec
    weights: Any
    head: str | None
    resources: ResourcesConfig
    use_gpu: bool
    num_threads: int
    gradient_checkpointing: bool
    compile: bool
    loop: LoopOptions

    @property
    def num_rows(self) -> int:
        """Rows of all splits."""
        return sum(len(split) for split in self.rows.values())


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """One trial to run.

    Attributes:
        study: name of its study.
        number: its number in the study.
        setting: its hyperparameters.
        continues: number of the interrupted trial with the same setting that it continues, or None.
        stop_file: location of a file whose existence stops the trial; used with several workers.
    """

    study: str
    number: int
    setting: Setting
    continues: int | None
    stop_file: str

    @property
    def folder_name(self) -> str:
        """Name of the folder of its checkpoints, in the study's folder `trials`."""
        return str(self.number if self.continues is None else self.continues)


@dataclass(frozen=True, slots=True)
class TrainWork:
    """Trials that train in one Train run: a Population, or a single trial.

    Attributes:
        group: name of the study group.
        started: `time.time()` when the driver created it.
        trials: trials of one study or of several.
        micro_batch_size: rows per forward pass of a single trial; None if memory has not run out.
    """

    group: str
    started: float
    trials: tuple[TrialSpec, ...]
    micro_batch_size: int | None = None

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of the studies that it works for."""
        return tuple(dict.fromkeys(trial.study for trial in self.trials))

    @property
    def error_folder(self) -> str:
        """Name of the folder for a traceback, in the first study's folder `trials`."""
        return str(self.trials[0].number)


@dataclass(frozen=True, slots=True)
class TestWork:
    """The test of studies' chosen trials, and of baselines, which first choose a setting on validation.

    Attributes:
        group: name of the study group.
        started: `time.time()` when the driver created it.
        checkpoints: location of each study's chosen checkpoint, by study name.
        baselines: names of the baselines.
    """

    __test__ = False  # not a test class, despite its name

    group: str
    started: float
    checkpoints: Mapping[str, str]
    baselines: tuple[str, ...] = ()

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of the studies and baselines that it works for."""
        return (*self.checkpoints, *self.baselines)

    @property
    def error_folder(self) -> str:
        """Name of the folder for a traceback, in the first study's folder `trials`."""
        return "test"


Work = TrainWork | TestWork


@dataclass(frozen=True, slots=True)
class EpochReport:
    """An epoch of a trial that is still running."""

    number: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The result of a trial that ended: returned by the worker, and stored in Optuna's journal.

    Attributes:
        study: name of its study.
        number: its number in the study.
        setting: its hyperparameters.
        history: metrics of each epoch.
        final: metrics that rank it: those of a probe's last epoch, otherwise of the best epoch, or of the start.
        best_epoch: index in `history` of the epoch of `final`; -1 if no epoch was better than the start.
        checkpoint: location of its weights; None if they are not kept.
        train_seconds: wall time of its training.
        images_per_second: speed of its training loop.
        peak_memory_bytes: largest resident set of the worker process.
        peak_gpu_memory_bytes: most GPU memory that tensors took.
        error: reason why it failed, or None.
        pruned: whether a scheduler stopped it; then `history` has its reported epochs, and there is no checkpoint.
        row_losses: losses of `final` by validation row, from `pack_row_losses`; empty if they are not known. Of many
            rows, evenly spaced ones.
    """

    study: str
    number: int
    setting: Setting
    history: tuple[Mapping[str, float], ...] = ()
    final: Mapping[str, float] = field(default_factory=dict)
    best_epoch: int = -1
    checkpoint: str | None = None
    train_seconds: float = 0.0
    images_per_second: float = 0.0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0
    error: str | None = None
    pruned: bool = False
    row_losses: str = ""


@dataclass(frozen=True, slots=True)
class BaselineFit:
    """A baseline's choice of a setting.

    Attributes:
        setting: the best setting.
        num_settings: number of compared settings.
        validation: metrics on the validation split.
        checkpoint: location of its heads; None if it has none.
        seconds: wall time.
        peak_memory_bytes: largest resident set of the worker process.
        folds: its accuracy by nested cross-validation; None where no folds were asked for.
    """

    setting: Setting
    num_settings: int
    validation: Mapping[str, float]
    checkpoint: str | None
    seconds: float
    peak_memory_bytes: int
    folds: FoldEstimate | None = None


@dataclass(frozen=True, slots=True)
class TestResult:
    """The result of one study's test: its `metrics`, or the `error` that ended it.

    Attributes:
        metrics: metrics on the test split.
        peak_gpu_memory_bytes: most GPU memory that tensors took.
        fit: for a baseline, how it was chosen.
        refitted: for a probe, location of its head if that was fitted to train and validation together.
        error: reason why there are no metrics, or None.
    """

    __test__ = False  # not a test class, despite its name

    metrics: TestMetrics | None = None
    peak_gpu_memory_bytes: int = 0
    fit: BaselineFit | None = None
    refitted: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WorkReport:
    """The result of a piece of work: `trials` of a TrainWork, `tested` by study of a TestWork, or the `error`."""

    trials: tuple[TrialResult, ...] = ()
    tested: Mapping[str, TestResult] = field(default_factory=dict)
    error: str | None = None


class TrainLoopConfig(TypedDict):
    """The config of a Train worker. `report` passes epochs on; None if the worker has its own process."""

    job: Job
    work: TrainWork
    report: Callable[[dict[str, str]], None] | None


def field_values(record: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name. `dataclasses.asdict` would copy the long histories."""
    return {one.name: getattr(record, one.name) for one in fields(record)}


def to_tune(report: EpochReport | WorkReport) -> dict[str, str]:
    """Returns a report as JSON text, because Tune flattens nested results."""
    return {type(report).__name__: json.dumps(report, default=field_values)}


def from_tune(kind: type[ReportT], result: Mapping[str, Any] | None) -> ReportT | None:
    """Returns the report of this kind that `to_tune` converted; None if the result has none."""
    text = (result or {}).get(kind.__name__)
    return None if text is None else TypeAdapter(kind).validate_json(text)
