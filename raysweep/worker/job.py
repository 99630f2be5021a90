"""What crosses from the driver to Ray's processes and back: frozen dataclasses, which Ray pickles.

What a pass over the images sends to its tasks is in `images.pass_tasks`, and `EncoderSpec` in `encoders.base`: each
floor owns what it sends.
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
from raysweep.training.loop import LoopOptions

ReportT = TypeVar("ReportT")


@dataclass(frozen=True, slots=True)
class StudySpec:
    """What a worker needs to know of one study or baseline alone, beside the job that it shares with others.

    Attributes:
        name: of the study.
        folder: location of its checkpoints.
        draws: few-shot draws of its rows; None where it takes all rows.
        baseline: which one it is; None for a study with trials.
    """

    name: str
    folder: str
    draws: Draws | None
    baseline: Baseline | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What all work of one study group shares.

    Attributes:
        mode: of its studies.
        studies: its studies and baselines, by name.
        data_key: changes with the rows: a process keeps what it has loaded while this stays the same.
        cache: location of the cache's files of rows.
        index: the images, where pixels are decoded anew in every epoch; None where they are cached.
        rows: row ids and labels of each split.
        num_classes: number of classes.
        encoder: architecture, preprocessing and feature sources.
        weights: object reference of the encoder's state dict as numpy arrays; None where features are read.
        head: location of the probe's checkpoint that fine-tuning starts from; None for a new head.
        resources: what one training run takes, as configured.
        use_gpu: whether workers use GPUs.
        num_threads: CPU threads of a worker.
        gradient_checkpointing: whether activations are computed again in the backward pass.
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
    """One trial to be run.

    Attributes:
        study: name of its study.
        number: its number in the study.
        setting: its hyperparameters.
        continues: number of the interrupted trial of the same setting that it continues, or None.
        stop_file: location of a file that appears once the trial is to be stopped; several workers look for it.
    """

    study: str
    number: int
    setting: Setting
    continues: int | None
    stop_file: str

    @property
    def folder_name(self) -> str:
        """Name of the folder, among the study's trials, that its checkpoints lie in."""
        return str(self.number if self.continues is None else self.continues)


@dataclass(frozen=True, slots=True)
class TrainWork:
    """Trials that train in one Train run: a Population, or a single trial.

    Attributes:
        group: name of the study group.
        started: `time.time()` at which it was handed out.
        trials: of one study or of several.
        micro_batch_size: rows at once of a single trial; None where memory has not run out.
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
        """Name of the folder, among the first study's trials, that a traceback goes to."""
        return str(self.trials[0].number)


@dataclass(frozen=True, slots=True)
class TestWork:
    """The test of what studies chose, and of baselines, which are chosen on validation first.

    Attributes:
        group: name of the study group.
        started: `time.time()` at which it was handed out.
        checkpoints: location of what each study chose, by its name.
        baselines: names of the baselines.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

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
        """Name of the folder, among the first study's trials, that a traceback goes to."""
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
    """A trial that is over: what the worker returns, and what Optuna's journal keeps.

    Attributes:
        study: name of its study.
        number: its number in the study.
        setting: its hyperparameters.
        history: metrics of each epoch.
        final: the metrics that it is ranked by: of a probe's last epoch, otherwise of the best one.
        best_epoch: place in `history` of the epoch that `final` is from; -1 where there is none.
        checkpoint: location of its weights; None where none are kept.
        train_seconds: wall time of its training.
        images_per_second: speed of its training loop.
        peak_memory_bytes: largest resident set of the worker process.
        peak_gpu_memory_bytes: most GPU memory that tensors took.
        error: why there is no result, or None.
        pruned: whether a scheduler stopped it; then `history` is what it reported, and it has no checkpoint.
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


@dataclass(frozen=True, slots=True)
class BaselineFit:
    """How a baseline was chosen.

    Attributes:
        setting: the best one.
        num_settings: how many were compared.
        validation: metrics of the validation split.
        checkpoint: location of its heads; None where it has none.
        seconds: wall time.
        peak_memory_bytes: largest resident set of the worker process.
    """

    setting: Setting
    num_settings: int
    validation: Mapping[str, float]
    checkpoint: str | None
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class TestResult:
    """What came of one study's test: its `metrics`, or the `error` that ended it; of a baseline also its `fit`."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    metrics: TestMetrics | None = None
    peak_gpu_memory_bytes: int = 0
    fit: BaselineFit | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What came of a piece of work: `trials` of a TrainWork, `tested` by study of a TestWork, or the `error`."""

    trials: tuple[TrialResult, ...] = ()
    tested: Mapping[str, TestResult] = field(default_factory=dict)
    error: str | None = None


class TrainLoopConfig(TypedDict):
    """What a worker of a Train run is given; `report` passes epochs on, None in a process of its own."""

    job: Job
    work: TrainWork
    report: Callable[[dict[str, str]], None] | None


def field_values(record: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, without the deep copy of `dataclasses.asdict`: histories are long."""
    return {one.name: getattr(record, one.name) for one in fields(record)}


def to_tune(report: EpochReport | WorkReport) -> dict[str, str]:
    """Returns a report in the form that Tune passes on: as JSON text, because Tune flattens nested results."""
    return {type(report).__name__: json.dumps(report, default=field_values)}


def from_tune(kind: type[ReportT], result: Mapping[str, Any] | None) -> ReportT | None:
    """Gives back a report of a kind that `to_tune` was given; None where the result holds none."""
    text = (result or {}).get(kind.__name__)
    return None if text is None else TypeAdapter(kind).validate_json(text)
