"""The leaderboard: rows, files, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.paths import write_atomically, write_json
from raysweep.results.selection import differs

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "study",
    "encoder",
    "mode",
    "shots",
    "num_trials",
    "best_params",
    "val_accuracy",
    "test_accuracy",
    "test_accuracy_low",
    "test_accuracy_high",
    "test_macro_f1",
    "num_test",
    "encoder_passes",
    "train_seconds",
    "study_seconds",
    "peak_memory_bytes",
    "peak_gpu_memory_bytes",
    "images_per_second",
    "mlflow_run_id",
    "model_path",
    "tied_with_best",
)


def rank_rows(rows: Sequence[dict[str, Any]], correct: Sequence[Sequence[bool]], seed: int) -> list[dict[str, Any]]:
    """Sorts rows by test accuracy, then cost, and marks those that the test split cannot tell from the first.

    Args:
        rows: a row per study, without `tied_with_best`.
        correct: per row, which test rows its model got right; the same test rows for all.
        seed: of the paired bootstrap.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["test_accuracy"], rows[i]["train_seconds"]))
    hits = [np.array(correct[index], bool) for index in order]
    return [
        rows[index] | {"tied_with_best": len(own) == len(hits[0]) and not differs(hits[0], own, seed)}
        for index, own in zip(order, hits, strict=True)
    ]


def write_leaderboard(rows: Sequence[dict[str, Any]], json_path: Path, csv_path: Path) -> None:
    """Writes the rows as a JSON list and as a CSV table with `best_params` as JSON."""
    write_json(json_path, [{column: row[column] for column in COLUMNS} for row in rows])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "best_params": json.dumps(row["best_params"])} for row in rows)
    write_atomically(csv_path, text.getvalue())


def render_leaderboard(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table for the terminal: encoder, mode, accuracy with interval, what it cost."""
    from rich import box
    from rich.table import Table

    table = Table(title="Leaderboard (test split)", title_justify="left", box=box.SIMPLE_HEAD)
    several_shots = len({row["shots"] for row in rows}) > 1
    on_gpu = any(row["peak_gpu_memory_bytes"] for row in rows)
    for name in ("", "encoder", "mode", *(["shots"] if several_shots else [])):
        table.add_column(name)
    for name in (r"accuracy \[95 % interval]", "trials", "train time", "peak GPU memory" if on_gpu else "peak memory"):
        table.add_column(name, justify="right", no_wrap=name.startswith("accuracy"))
    for place, row in enumerate(rows, start=1):
        mark = "=" if row["tied_with_best"] and place > 1 else str(place)
        interval = f"{row['test_accuracy']:.3f} [{row['test_accuracy_low']:.3f}, {row['test_accuracy_high']:.3f}]"
        memory = row["peak_gpu_memory_bytes"] if on_gpu else row["peak_memory_bytes"]
        table.add_row(
            mark,
            row["encoder"],
            row["mode"],
            *([str(row["shots"])] if several_shots else []),
            interval.replace("[", r"\["),
            str(row["num_trials"]),
            describe_seconds(row["train_seconds"]),
            f"{memory / 1e9:.1f} GB",
        )
    if any(row["tied_with_best"] for row in rows[1:]):
        table.caption = "= the test split cannot tell it from the first (paired bootstrap, 95 %)"
        table.caption_justify = "left"
    return table


def describe_setting(setting: dict[str, Any]) -> str:
    """Returns a setting in a few words: `lr 0.003, 15 epochs, cls`."""
    parts = [f"lr {setting['learning_rate']:.2g}", f"{setting['epochs']} epochs"]
    return ", ".join(parts + [str(setting[name]) for name in ("features", "normalize") if name in setting])


def describe_seconds(seconds: float) -> str:
    """Returns `8.4 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
