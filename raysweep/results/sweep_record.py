"""What a report says of a whole sweep, and the table of its trials. The sweep writes both; the report reads them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from raysweep.errors import DataError, one_line
from raysweep.experiment.metrics import Direction
from raysweep.experiment.space import Setting
from raysweep.storage.copies import publish, replacing
from raysweep.storage.paths import read_json, write_json

TrialState = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class EncoderRecord:
    """An encoder: where its weights come from, and what it reads and returns."""

    type: str
    weights: str | None
    revision: str | None
    image_size: int
    num_features: int


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """An exported model: number of its weights, head included, and bytes of its file."""

    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """What a report says of a whole sweep.

    Attributes:
        name: name of the experiment.
        source: where the images come from.
        metric: what ranks the studies, such as `val/accuracy`.
        direction: `maximize` or `minimize`.
        seed: seed of splits, draws and training.
        counts: number of images by class, by split.
        derived_splits: splits that the source did not have, taken from train.
        num_bad_rows: images that could not be used.
        warnings: what a user should know of the data.
        encoders: by name.
        importances: how much each hyperparameter decides whether a trial is among the best, by study.
        models: exported models by study; without those whose files are not on the machine that wrote this.
        versions: versions of packages, and the git commit of the working directory, by name.
        machine: the machine that drove the sweep: operating system, CPUs and GPUs.
        command: the command that started it, word by word.
        failures: studies without a result, with the reason.
    """

    name: str
    source: str
    metric: str
    direction: Direction
    seed: int
    counts: Mapping[str, Mapping[str, int]]
    derived_splits: tuple[str, ...]
    num_bad_rows: int
    warnings: tuple[str, ...]
    encoders: Mapping[str, EncoderRecord]
    importances: Mapping[str, Mapping[str, float]]
    models: Mapping[str, ModelRecord]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    command: tuple[str, ...]
    failures: tuple[str, ...] = ()

    @property
    def command_line(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial that ended.

    Attributes:
        study: name of its study.
        number: its number in the study.
        state: whether it ran to its end, a scheduler stopped it, or an error ended it.
        setting: its hyperparameters.
        metrics: those that rank it.
        history: values by epoch, by metric.
        best_epoch: index of the epoch of `metrics`; -1 if no epoch was better than the start.
        seconds: wall time of its training.
    """

    study: str
    number: int
    state: TrialState
    setting: Setting
    metrics: Mapping[str, float]
    history: Mapping[str, Sequence[float]]
    best_epoch: int
    seconds: float


def write_record(path: Path, record: SweepRecord) -> None:
    """Writes what a report says of a sweep, as JSON."""
    write_json(path, asdict(record))


def read_record(path: Path) -> SweepRecord:
    """Reads a file from `write_record`.

    Raises:
        DataError: there is no such file, it is damaged, or of another version.
    """
    values = read_json(path)
    try:
        return TypeAdapter(SweepRecord).validate_python(values)
    except ValidationError as error:
        raise DataError(f"{path}: not what this version writes ({one_line(error, 300)})") from error


def write_trials(path: Path, trials: Sequence[TrialRecord]) -> None:
    """Writes the trials as a Parquet table: settings and metrics as JSON, the values of each epoch as lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "study": pa.array([trial.study for trial in trials], pa.string()),
        "number": pa.array([trial.number for trial in trials], pa.int64()),
        "state": pa.array([trial.state for trial in trials], pa.string()),
        "setting": pa.array([json.dumps(trial.setting) for trial in trials], pa.string()),
        "metrics": pa.array([json.dumps(trial.metrics) for trial in trials], pa.string()),
        "best_epoch": pa.array([trial.best_epoch for trial in trials], pa.int64()),
        "seconds": pa.array([trial.seconds for trial in trials], pa.float64()),
    }
    for name in sorted({name for trial in trials for name in trial.history}):
        columns[name] = pa.array([trial.history.get(name) for trial in trials], pa.list_(pa.float32()))
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    publish(path)


_OWN = ("study", "number", "state", "best_epoch", "seconds")


def read_trials(path: Path) -> list[TrialRecord]:
    """Reads a table from `write_trials`.

    Raises:
        OSError, pyarrow.ArrowException: there is no such file, or it is damaged.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    curves = [name for name in table.column_names if name not in (*_OWN, "setting", "metrics")]
    return [
        TrialRecord(
            **{name: line[name] for name in _OWN},
            setting=json.loads(line["setting"]),
            metrics=json.loads(line["metrics"]),
            history={name: line[name] for name in curves if line[name] is not None},
        )
        for line in table.to_pylist()
    ]
