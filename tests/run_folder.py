"""The folder of a sweep, as its end leaves it: two studies and a baseline, for tests of the report."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from PIL import Image
from states import FakeRecorder, make_state

from raysweep.images.index import ImageIndex
from raysweep.results.leaderboard import Row, rank_rows, write_leaderboard
from raysweep.results.sweep_record import TrialRecord, write_record, write_trials
from raysweep.storage.paths import TEST_ROWS, SweepPaths, write_atomically
from raysweep.storage.test_rows import TestRows, write_test_rows
from raysweep.sweep import report_files

CLASSES = ("ant", "bee", "cat")


def make_image_index(folder, classes=CLASSES, num_test=30, first_name="0.png"):
    """Test images of one colour each; label by number."""
    folder.mkdir(parents=True)
    names = [first_name, *(f"{number}.png" for number in range(1, num_test))]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (number, 0, 200)).save(folder / name)
    table = pa.table(
        {
            "row_id": np.arange(num_test),
            "path": [str(folder / name) for name in names],
            "position": pa.array([-1] * num_test, pa.int32()),
            "image": pa.nulls(num_test, pa.large_binary()),
            "label": np.arange(num_test, dtype=np.int32) % len(classes),
            "split": ["test"] * num_test,
        }
    )
    return ImageIndex(table, classes, (), ("a warning",), num_test, "fingerprint")


def make_row(study="cnn-fine_tune", **changes):
    """A row of the leaderboard."""
    encoder, mode = study.split("-")
    values = {
        "encoder": encoder, "mode": mode, "shots": "all", "num_seeds": 1, "num_trials": 8,
        "best_params": {"learning_rate": 0.01, "epochs": 4}, "val_accuracy": 0.9, "test_accuracy": 0.8,
        "test_accuracy_low": 0.61, "test_accuracy_high": 0.92, "test_macro_f1": 0.8, "num_test": 30,
        "encoder_passes": 1, "train_seconds": 60.0, "study_seconds": 99.0, "peak_memory_bytes": 10**9,
        "peak_gpu_memory_bytes": 0, "images_per_second": 50.0, "mlflow_run_id": None, "model_path": f"models/{study}",
    }  # fmt: skip
    return Row(study=study, **{**values, **changes})


def make_trials(study="cnn-fine_tune", number=8, epochs=4):
    """Trials of which number 3 is the best; the last one failed."""
    trials = []
    for trial in range(number):
        accuracy = 0.9 if trial == 3 else 0.5 + trial / 100
        failed = trial == number - 1
        setting = {"learning_rate": 0.01 * 2.0 ** (trial - 3), "epochs": epochs + (trial - 3) % 5}
        curve = [accuracy * (epoch + 1) / epochs for epoch in range(epochs)]
        history = {"val/accuracy": curve, "val/loss": [1 - value for value in curve]}
        metrics = {} if failed else {"val/accuracy": accuracy, "val/loss": 1 - accuracy}
        state = "failed" if failed else "done"
        trials.append(TrialRecord(study, trial, state, setting, metrics, {} if failed else history, epochs - 1, 1.0))
    return trials


def make_test_rows(num_classes=3, num_rows=30, num_right=24):
    """The last rows are taken for the next class, each with a little more confidence."""
    labels = np.arange(num_rows) % num_classes
    predicted = np.where(np.arange(num_rows) < num_right, labels, (labels + 1) % num_classes)
    confidence = np.linspace(0.6, 0.9, num_rows)
    probabilities = np.repeat(((1 - confidence) / (num_classes - 1))[:, None], num_classes, 1)
    probabilities[np.arange(num_rows), predicted] = confidence
    return TestRows(np.arange(num_rows), labels, predicted, probabilities.astype(np.float32))


def make_run(
    tmp_path, *, storage=None, classes=CLASSES, rows=None, trials=None, tested=None, first_name="0.png", num_test=30
):
    """Writes the folder; returns its paths."""
    rows = rows or [make_row(), make_row("dino-linear_probe", val_accuracy=0.88, train_seconds=10.0)]
    state = make_state(storage or tmp_path / "runs", FakeRecorder())
    state.index = make_image_index(tmp_path / "images", classes, num_test, first_name)
    tested = tested or make_test_rows(len(classes), num_test, num_test * 4 // 5)
    entries = []
    for row in rows:
        folder = state.paths.study(row.study, "key")
        write_test_rows(folder / TEST_ROWS, tested)
        config = SimpleNamespace(encoder_name=row.encoder)
        entries.append(SimpleNamespace(name=row.study, folder=folder, encoder=state.encoders["dinov2"], config=config))
    hits = [(tested.predicted == tested.labels)[None]] * len(rows)
    ranked = rank_rows(rows, [(row.val_accuracy,) for row in rows], hits, seed=0)
    write_leaderboard(ranked, state.paths.leaderboard_json, state.paths.leaderboard_csv)
    write_atomically(state.paths.resolved_experiment, "name: x\n")
    write_record(state.paths.sweep_record, report_files.sweep_record(state, entries))
    write_trials(state.paths.trials, make_trials(rows[0].study) if trials is None else trials)
    report_files.write_tables(state, entries)
    return SweepPaths(str(storage or tmp_path / "runs"), "x")
