"""What a sweep writes for its report at its end, and the process that makes the report from it."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from raysweep.cluster.resources import local_resources
from raysweep.errors import DataError, RaysweepError, hide_secrets, one_line
from raysweep.images.decode import decode_image
from raysweep.images.image_bytes import read_image_bytes
from raysweep.images.listed_rows import image_name
from raysweep.results.environment import environment_tags
from raysweep.results.model import WEIGHTS
from raysweep.results.sweep_record import (
    EncoderRecord,
    ModelRecord,
    SweepRecord,
    TrialRecord,
    write_record,
    write_trials,
)
from raysweep.storage.copies import fetch, location, publish, replacing
from raysweep.storage.paths import TEST_ROWS
from raysweep.storage.test_rows import TestRows, read_test_rows
from raysweep.sweep.leaderboard_entry import LeaderboardEntry
from raysweep.sweep.state import SweepState
from raysweep.sweep.study import Study
from raysweep.worker.job import TrialResult

MAX_THUMBNAILS, MISTAKES_PER_STUDY = 500, 24
THUMBNAIL_SIDE, JPEG_QUALITY = 112, 80
SECONDS_FOR_REPORT = 600


def make_report(state: SweepState, entries: Sequence[LeaderboardEntry]) -> None:
    """Writes the files that a report is made from, and makes it. A sweep without a report is a sweep all the same.

    The report is made in a process of its own, so that nothing of matplotlib stays in the driver.

    Args:
        state: state that all studies share.
        entries: studies and baselines that have a result.
    """
    paths = state.paths
    try:
        write_record(paths.sweep_record, sweep_record(state, entries))
        studies = [entry for entry in entries if isinstance(entry, Study)]
        write_trials(
            paths.trials, [_trial_record(result) for study in studies for result in study.optuna_study.results]
        )
        write_tables(state, entries)
        command = [sys.executable, "-m", "raysweep.report", location(paths.root), "--quiet"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_REPORT, check=False)
        if made.returncode:
            raise RaysweepError(one_line(made.stderr.strip().rpartition("\n")[2], 500))
    except Exception as error:  # whatever it is, the results are there, and the leaderboard has to be shown
        state.progress.warn(
            f"no report could be made: {one_line(error, 500)}; 'raysweep report {location(paths.root)}' tries again"
        )


def write_tables(state: SweepState, entries: Sequence[LeaderboardEntry]) -> None:
    """Writes what each study predicts for the test images, and small copies of images that it takes for others."""
    tested = _test_rows(state, entries)
    _write_predictions(state, tested)
    _write_thumbnails(state, tested)


def sweep_record(state: SweepState, entries: Sequence[LeaderboardEntry]) -> SweepRecord:
    """Returns what a report says of the whole sweep."""
    experiment, index, resources = state.experiment, state.index, local_resources()
    encoders = {}
    for entry in entries:
        spec = entry.encoder.spec
        size = spec.preprocessing.output_size[0]
        encoders[entry.config.encoder_name] = EncoderRecord(
            spec.type, spec.origin.name, spec.origin.revision, size, spec.widest
        )
    tags = environment_tags(location(state.paths.root))
    versions = {name.removeprefix("version."): text for name, text in tags.items() if name.startswith("version.")}
    if commit := tags.get("mlflow.source.git.commit"):
        versions["git commit"] = commit
    return SweepRecord(
        name=experiment.name,
        source=hide_secrets(experiment.data.source),
        metric=experiment.metric,
        direction=experiment.direction,
        seed=experiment.seed,
        counts=index.counts(),
        derived_splits=index.derived_splits,
        num_bad_rows=len(index.bad_rows) + len(state.bad_rows),
        warnings=index.warnings,
        encoders=encoders,
        importances={entry.name: entry.optuna_study.importances() for entry in entries if isinstance(entry, Study)},
        models={entry.name: model for entry in entries if (model := _model_record(state.paths.model(entry.name)))},
        versions=versions,
        machine={
            "system": platform.platform(),
            "CPUs": str(resources.num_cpus),
            "GPUs": str(resources.num_gpus),
        },
        command=tuple(map(hide_secrets, ["python", "-m", "raysweep.run", *_arguments(sys.argv[1:])])),
        failures=tuple(state.failures),
    )


def _arguments(words: Sequence[str]) -> Sequence[str]:
    """Returns the arguments of `python -m raysweep.run`; those of `raysweep run` begin with the command's name."""
    return words[1:] if words[:1] == ["run"] else words


def _model_record(folder: Path) -> ModelRecord | None:
    weights = folder / WEIGHTS
    if not weights.exists():
        return None
    with safe_open(weights, framework="numpy") as file:
        num_parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return ModelRecord(num_parameters, weights.stat().st_size)


def _trial_record(result: TrialResult) -> TrialRecord:
    names = dict.fromkeys(name for epoch in result.history for name in epoch if not name.startswith("time/"))
    return TrialRecord(
        study=result.study,
        number=result.number,
        state="failed" if result.error is not None else "stopped" if result.pruned else "done",
        setting=result.setting,
        metrics=result.final,
        history={name: [epoch.get(name, float("nan")) for epoch in result.history] for name in names},
        best_epoch=result.best_epoch,
        seconds=result.train_seconds,
    )


def _test_rows(state: SweepState, entries: Sequence[LeaderboardEntry]) -> dict[str, TestRows]:
    """Reads what each study's model says of the test images; earlier versions have not written it."""
    found = {}
    for entry in entries:
        try:
            found[entry.name] = read_test_rows(fetch(entry.folder / TEST_ROWS))
        except (OSError, pa.ArrowException) as error:
            state.progress.warn(f"{entry.name}: its predictions are not there ({one_line(error, 200)})")
    return found


def _write_predictions(state: SweepState, tested: Mapping[str, TestRows]) -> None:
    """Writes one line per study and test image: true and predicted class, and the probability of each class."""
    classes = np.array(state.index.classes, object)
    columns = ["study", "row_id", "image", "label", "prediction", "confidence"]
    schema = pa.schema(
        [
            *zip(columns, [pa.string(), pa.int64(), *[pa.string()] * 3, pa.float32()], strict=True),
            *((f"probability_{name}", pa.float32()) for name in classes),
        ]
    )
    with (
        replacing(state.paths.predictions) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for study, rows in tested.items():
            values = [
                [study] * len(rows.ids),
                rows.ids,
                _names_of(state, rows.ids),
                classes[rows.labels].tolist(),
                classes[rows.predicted].tolist(),
                rows.probabilities[np.arange(len(rows.ids)), rows.predicted],
                *rows.probabilities.T,
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=max(1, len(rows.ids)))
    publish(state.paths.predictions)


def _lines_of(state: SweepState, row_ids: np.ndarray) -> pa.Table:
    table = state.index.table
    return table.take(pa.array(np.searchsorted(table["row_id"].to_numpy(), row_ids)))


def _names_of(state: SweepState, row_ids: np.ndarray) -> list[str]:
    """Returns for each image its path, and its row where the path is that of a table."""
    lines = _lines_of(state, row_ids).select(["path", "position"]).to_pydict()
    pairs = zip(lines["path"], lines["position"], strict=True)
    return [image_name(path, position) for path, position in pairs]


def _write_thumbnails(state: SweepState, tested: Mapping[str, TestRows]) -> None:
    """Writes small copies of the images that a study's model is most sure of, and wrong."""
    per_study = min(MISTAKES_PER_STUDY, MAX_THUMBNAILS // max(1, len(tested)))
    wanted = sorted({row for rows in tested.values() for row in most_confident_mistakes(rows, per_study).tolist()})
    lines = _lines_of(state, np.array(wanted, np.int64)).select(["path", "position", "image"]).to_pydict()
    images = read_image_bytes(lines["path"], lines["position"], lines["image"], state.index.image_column)
    made = []
    for row_id, image in zip(wanted, images, strict=True):
        try:
            if not isinstance(image, DataError):
                made.append((row_id, _thumbnail(state, image)))
        except DataError:  # it was there when the sweep began; its place in the report stays empty
            continue
    table = pa.table({"row_id": [row_id for row_id, _ in made], "jpeg": [jpeg for _, jpeg in made]})
    with replacing(state.paths.thumbnails) as temporary:
        pq.write_table(table, temporary)
    publish(state.paths.thumbnails)


def most_confident_mistakes(rows: TestRows, most: int) -> np.ndarray:
    """Returns the row ids of the wrong predictions with the highest probabilities, the highest first."""
    wrong = np.flatnonzero(rows.predicted != rows.labels)
    confidence = rows.probabilities[wrong, rows.predicted[wrong]]
    return np.asarray(rows.ids[wrong[np.argsort(-confidence, kind="stable")][:most]])


def _thumbnail(state: SweepState, image: bytes) -> bytes:
    small = decode_image(image, THUMBNAIL_SIDE, state.index.decode_options)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()
