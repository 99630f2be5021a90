"""The leaderboard: rows, files, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.paths import write_atomically, write_json

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "study",
    "encoder",
    "mode",
    "shots",
    "num_seeds",
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


def rank_rows(rows: Sequence[dict[str, Any]], correct: Sequence[Sequence[float]], seed: int) -> list[dict[str, Any]]:
    """Sorts rows by test accuracy, then cost, and marks those that the test split cannot tell from the best.

    The best is that of the same number of shots: more images win without saying anything of the encoder.

    Args:
        rows: a row per study and baseline, without `tied_with_best`.
        correct: per row, how right its model was on each test row: a bool, or the share of few-shot seeds.
        seed: of the paired bootstrap.
    """
    from raysweep.training.evaluation import differs  # imports torch, which a dry run has no time for

    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["test_accuracy"], rows[i]["train_seconds"]))
    best: dict[int | str, np.ndarray] = {}
    ranked = []
    for index in order:
        own = np.array(correct[index], float)
        first = best.setdefault(rows[index]["shots"], own)
        ranked.append(rows[index] | {"tied_with_best": len(own) == len(first) and not differs(first, own, seed)})
    return ranked


def write_leaderboard(rows: Sequence[dict[str, Any]], json_path: Path, csv_path: Path) -> None:
    """Writes the rows as a JSON list and as a CSV table with `best_params` as JSON."""
    write_json(json_path, [{column: row[column] for column in COLUMNS} for row in rows])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "best_params": json.dumps(row["best_params"])} for row in rows)
    write_atomically(csv_path, text.getvalue())


def render_leaderboard(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table for the terminal: encoder, mode, accuracy with interval, what it cost; a section per shots."""
    from rich import box
    from rich.table import Table

    on_gpu, sections = any(row["peak_gpu_memory_bytes"] for row in rows), _by_shots(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.title, table.title_justify = "Leaderboard (test split)\n", "left"
    for name in ("", "encoder", "mode"):
        # On a narrow terminal it is the encoder's name that is folded.
        table.add_column(name, no_wrap=name != "encoder", overflow="fold")
    memory = "GPU\nmemory" if on_gpu else "memory"
    for name in ("accuracy\n\\[95 % interval]", "tried", "train\ntime", memory):
        table.add_column(name, justify="right", no_wrap=True)
    for section in sections:
        table.add_section()
        if len(sections) > 1:
            table.add_row("", _describe_shots(section[0]["shots"]), style="bold")
        for place, row in enumerate(section, start=1):
            mark = "=" if row["tied_with_best"] and place > 1 else str(place)
            table.add_row(mark, row["encoder"], row["mode"], *_figures(row, on_gpu))
    table.caption, table.caption_justify = "\n".join(["", *_legend(rows)]), "left"
    return table


def _by_shots(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups ranked rows by their number of shots, all images first, then from many to few."""
    found = sorted({row["shots"] for row in rows}, key=lambda shots: -math.inf if shots == "all" else -shots)
    return [[row for row in rows if row["shots"] == shots] for shots in found]


def _describe_shots(shots: int | str) -> str:
    return "all images" if shots == "all" else f"{shots} shot{'s' * (shots != 1)}"


def _figures(row: dict[str, Any], on_gpu: bool) -> list[str]:
    interval = f"{row['test_accuracy']:.3f} [{row['test_accuracy_low']:.3f}, {row['test_accuracy_high']:.3f}]"
    memory = row["peak_gpu_memory_bytes"] if on_gpu else row["peak_memory_bytes"]
    settings, seconds = str(row["num_trials"]), describe_seconds(row["train_seconds"])
    return [interval.replace("[", r"\["), settings, seconds, f"{memory / 1e9:.1f} GB"]


def _legend(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    if any(row["tied_with_best"] for section in _by_shots(rows) for row in section[1:]):
        lines.append("= the test split cannot tell it from the first (paired bootstrap, 95 %)")
    num_seeds = max((row["num_seeds"] for row in rows), default=1)
    if num_seeds > 1:
        lines.append(f"few shots: mean of {num_seeds} draws of the training images, interval over the draws")
    return lines


def describe_setting(setting: dict[str, Any]) -> str:
    """Returns a setting in a few words: `lr 0.003, 15 epochs, cls`, `k 10, cls`, `strength 0.3, cls, standardize`."""
    words = {
        "learning_rate": "lr {:.2g}",
        "epochs": "{} epochs",
        "k": "k {}",
        "strength": "strength {:.2g}",
        "features": "{}",
        "normalize": "{}",
    }
    return ", ".join(text.format(setting[name]) for name, text in words.items() if name in setting)


def describe_seconds(seconds: float) -> str:
    """Returns `8.4 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
