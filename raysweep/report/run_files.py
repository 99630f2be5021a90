"""What a report reads: the files in the folder of a sweep, or under a bucket's prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import DataError, RaysweepError, hide_secrets, one_line
from raysweep.results.leaderboard import ClassMetrics, Row
from raysweep.results.sweep_record import SweepRecord, TrialRecord, read_record, read_trials
from raysweep.storage.copies import fetch_folder
from raysweep.storage.paths import SweepPaths, read_json
from raysweep.training.intervals import FoldEstimate
from raysweep.training.ranking import Ranking

PREFIX = "probability_"
_FILES = (
    "leaderboard.json", "sweep.json", "trials.parquet", "predictions.parquet", "thumbnails.parquet",
    "near_copies.json", "experiment.resolved.yaml",
)  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """What the model of one study says of the test images.

    Attributes:
        classes: class names, in the order of the probabilities.
        row_ids: int64 `(num_rows,)`.
        images: path of each image.
        labels: int64 `(num_rows,)`, indices into the classes.
        predicted: int64 `(num_rows,)`.
        probabilities: float32 `(num_rows, num_classes)`.
    """

    classes: tuple[str, ...]
    row_ids: np.ndarray
    images: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each predicted class, float32 `(num_rows,)`."""
        return np.asarray(self.probabilities[np.arange(len(self.predicted)), self.predicted])


@dataclass(frozen=True, slots=True)
class NearCopies:
    """Images that look the same, from `near_copies.json`.

    Attributes:
        leaks: by split, pairs of an image and its copy in train.
        conflicts: pairs of images and their different classes: image, class, other image, its class.
    """

    leaks: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    conflicts: Sequence[tuple[str, str, str, str]] = ()


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a sweep's folder.

    Attributes:
        paths: paths of its files.
        rows: the ranked rows of the leaderboard.
        record: what is said of the whole sweep; None if an earlier version wrote it.
        trials: trials by study.
        predictions: predictions by study.
        thumbnails: JPEG files by row id.
        near_copies: images that look the same.
        experiment: the experiment as YAML, with every default, without credentials.
        missing: files that are not there, or cannot be read, with the reason.
    """

    paths: SweepPaths
    rows: tuple[Row, ...]
    record: SweepRecord | None
    trials: Mapping[str, list[TrialRecord]]
    predictions: Mapping[str, Predictions]
    thumbnails: Mapping[int, bytes]
    near_copies: NearCopies
    experiment: str
    missing: tuple[str, ...]

    @property
    def ranking(self) -> Ranking:
        """How studies are ranked; `within_study` says how their trials are."""
        return Ranking(self.record.metric, self.record.direction) if self.record else Ranking()


def read_run(place: str) -> RunFiles:
    """Reads the folder of a sweep, given as a path or the URI of a bucket.

    Raises:
        RaysweepError: the folder has no leaderboard, it cannot be read or has no rows, or the bucket cannot be read.
    """
    storage, _, name = place.rstrip("/").rpartition("/")
    paths = SweepPaths(storage or ("/" if place.startswith("/") else "."), name)
    fetch_folder(paths.root, lambda file: file in _FILES)
    if not paths.leaderboard_json.exists():
        raise DataError(f"{place}: no leaderboard.json; expected the folder of a sweep, such as runs/quickstart")
    try:
        rows = tuple(_row(values) for values in read_json(paths.leaderboard_json))
    except (TypeError, KeyError, AttributeError) as error:
        reason = one_line(error, 200)
        raise DataError(f"{paths.leaderboard_json}: not a leaderboard that this version can read ({reason})") from error
    if not rows:
        raise DataError(f"{paths.leaderboard_json}: it has no rows; run the sweep again")
    missing: list[str] = []

    def read(path: Path, reader: Any, default: Any) -> Any:
        import pyarrow as pa

        try:
            return reader(path)
        except (RaysweepError, OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            missing.append(f"{path.name} ({one_line(error, 200) if path.exists() else 'not there'})")
            return default

    trials: dict[str, list[TrialRecord]] = {}
    for trial in read(paths.trials, read_trials, []):
        trials.setdefault(trial.study, []).append(trial)
    near_copies = NearCopies()
    if paths.near_copies.exists():
        near_copies = read(paths.near_copies, _read_near_copies, near_copies)
    return RunFiles(
        paths=paths,
        rows=rows,
        record=read(paths.sweep_record, read_record, None),
        trials=trials,
        predictions=read(paths.predictions, _read_predictions, {}),
        thumbnails=read(paths.thumbnails, _read_thumbnails, {}),
        near_copies=near_copies,
        experiment=hide_secrets(read(paths.resolved_experiment, Path.read_text, "")),
        missing=tuple(missing),
    )


def _row(values: Mapping[str, Any]) -> Row:
    known = {column.name for column in fields(Row)}
    row = {name: value for name, value in values.items() if name in known}
    row["test_metrics"] = {
        name.removeprefix("test_"): value
        for name, value in values.items()
        if name.startswith("test_") and isinstance(value, float)
    }
    row["test_per_class"] = {name: ClassMetrics(**one) for name, one in row.get("test_per_class", {}).items()}
    row["folds"] = FoldEstimate(**row["folds"]) if row.get("folds") else None
    return Row(**row)


def _read_predictions(path: Path) -> dict[str, Predictions]:
    import pyarrow.parquet as pq

    found: dict[str, Predictions] = {}
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name.startswith(PREFIX)]
        classes = tuple(name.removeprefix(PREFIX) for name in columns)
        numbers = {name: number for number, name in enumerate(classes)}
        for group in range(file.num_row_groups):  # one study each
            table = file.read_row_group(group)
            found[table["study"][0].as_py()] = Predictions(
                classes=classes,
                row_ids=table["row_id"].to_numpy(),
                images=tuple(table["image"].to_pylist()),
                labels=np.array([numbers[name] for name in table["label"].to_pylist()]),
                predicted=np.array([numbers[name] for name in table["prediction"].to_pylist()]),
                probabilities=np.stack([table[name].to_numpy() for name in columns], 1),
            )
    return found


def _read_thumbnails(path: Path) -> dict[int, bytes]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return dict(zip(table["row_id"].to_pylist(), table["jpeg"].to_pylist(), strict=True))


def _read_near_copies(path: Path) -> NearCopies:
    found = read_json(path)
    return NearCopies(
        {split: [(pair["image"], pair["train_image"]) for pair in pairs] for split, pairs in found["leaks"].items()},
        [(one["image"], one["class"], other["image"], other["class"]) for one, other in found["conflicts"]],
    )
