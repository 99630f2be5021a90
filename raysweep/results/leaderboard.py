"""The leaderboard: its rows, files, and table on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.errors import printable
from raysweep.experiment.metrics import TEST_METRICS
from raysweep.experiment.space import Setting
from raysweep.storage.paths import write_csv, write_json
from raysweep.training.best_set import may_be_best
from raysweep.training.intervals import FoldEstimate

if TYPE_CHECKING:
    from rich.table import Table

SIMILAR_COST = 2.0  # rows whose training times differ by less than this factor cost about the same
UNEVEN = 2.0  # the largest class has this many times the images of the smallest


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """Metrics of one class on test.

    Attributes:
        precision: share of the images that are predicted to be of the class which are; None if none is predicted.
        recall: share of the images of the class that are predicted to be; None if there are none.
    """

    precision: float | None
    recall: float | None


def class_metrics(confusion_matrix: Sequence[Sequence[int]]) -> list[ClassMetrics]:
    """Returns precision and recall of each class, from counts: row true class, column predicted class."""
    predicted = [sum(column) for column in zip(*confusion_matrix, strict=True)]
    return [
        ClassMetrics(
            precision=row[number] / predicted[number] if predicted[number] else None,
            recall=row[number] / sum(row) if any(row) else None,
        )
        for number, row in enumerate(confusion_matrix)
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the leaderboard; the fields are its columns, and so is each of `test_metrics`.

    Attributes:
        study: name of the study or baseline.
        encoder: name of the encoder.
        mode: mode of the study, or the baseline's name.
        shots: training images per class, or `all`.
        num_seeds: number of few-shot draws; the metrics are means over them.
        num_trials: number of tried settings.
        best_params: the best setting on validation.
        val_accuracy: accuracy of the best setting on validation.
        val_accuracy_corrected: the same without the optimism of having chosen the best of many trials
            (`training.bias_correction`), which ranks the rows; None for baselines, and where another metric ranks.
        test_accuracy: its accuracy on test.
        test_accuracy_low: lower end of the 95 % interval of the test accuracy.
        test_accuracy_high: upper end of that interval.
        test_macro_f1: macro F1 on test.
        num_test: number of test images.
        encoder_passes: passes of the encoder over the images; for features those of this invocation, 1 or 0.
        train_seconds: wall time from images to weights: the pass that made its cache, plus its training.
        study_seconds: wall time of all work for the study; times of parallel trials are added.
        peak_memory_bytes: largest resident set of a process that worked for it.
        peak_gpu_memory_bytes: largest GPU memory of tensors in such a process.
        images_per_second: speed of the encoder pass, or of the training loop.
        mlflow_run_id: id of its MLflow run.
        model_path: location of the exported model; None if there is none.
        tied_with_best: whether it may be the best of the rows with as many shots: on the test split, none of them is
            significantly more accurate, with all pairs compared at once.
        test_largest_class: share of the test images that are of the largest class, which is the accuracy of always
            naming it.
        test_smallest_class: share of the test images that are of the smallest class.
        is_recommended: whether it is the best on validation of the rows that may be the best and take at most
            `SIMILAR_COST` times the least training time of these.
        folds: accuracy by nested cross-validation over the images of all splits; None where `data.folds` does not ask
            for it, and for studies with trials.
        test_metrics: metrics on test (`experiment.metrics.TEST_METRICS`), columns `test_<name>`; empty if an earlier
            version tested it.
        test_per_class: metrics by class, not in the CSV table; empty as well.
    """

    study: str
    encoder: str
    mode: str
    shots: int | str
    num_seeds: int
    num_trials: int
    best_params: Setting
    val_accuracy: float
    test_accuracy: float
    test_accuracy_low: float
    test_accuracy_high: float
    test_macro_f1: float
    num_test: int
    encoder_passes: int
    train_seconds: float
    study_seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    images_per_second: float
    mlflow_run_id: str | None
    model_path: str | None
    tied_with_best: bool = False
    test_largest_class: float = 0.0
    test_smallest_class: float = 0.0
    is_recommended: bool = False
    val_accuracy_corrected: float | None = None
    folds: FoldEstimate | None = None
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    test_per_class: Mapping[str, ClassMetrics] = field(default_factory=dict)

    @property
    def shown_val_accuracy(self) -> float:
        """The accuracy on validation that compares with that of other rows."""
        return self.val_accuracy if self.val_accuracy_corrected is None else self.val_accuracy_corrected

    @property
    def is_uneven(self) -> bool:
        """Whether accuracy says little about the smaller classes of the test split."""
        return self.test_largest_class >= UNEVEN * self.test_smallest_class and self.test_largest_class > 0


def rank_rows(
    rows: Sequence[Row], scores: Sequence[tuple[float, ...]], hits: Sequence[np.ndarray], seed: int
) -> list[Row]:
    """Sorts rows by shots, then validation score, then cost, and marks those that may be the best of as many shots.

    The test split has no part in the order: of ten equal rows, the one that is best on test would look two to three
    points better than it is. Of the rows that may be the best and cost about as little as the cheapest of them, the
    best on validation is recommended.

    Args:
        rows: one row per study and baseline.
        scores: keys on validation, such as `Ranking.key`; the largest is the best.
        hits: for each row, bools `(num_draws, num_test)`: whether the model of a few-shot draw is right. Of no length
            if that is not known; such a row is never left out.
        seed: seed of the paired bootstrap (`training.best_set.may_be_best`).
    """
    ranked: list[Row] = []
    for shots in sorted({row.shots for row in rows}, key=_section):
        members = [one for one, row in enumerate(rows) if row.shots == shots]
        members.sort(key=lambda one: ([-value for value in scores[one]], rows[one].train_seconds))
        known = [one for one in members if len(hits[one])]
        may_be = dict(zip(known, may_be_best([hits[one] for one in known], seed).tolist(), strict=True))
        best = [one for one in members if may_be.get(one, True)]
        limit = SIMILAR_COST * min((rows[one].train_seconds for one in best), default=0.0)
        recommended = next((one for one in best if rows[one].train_seconds <= limit), None)
        ranked += [replace(rows[one], tied_with_best=one in best, is_recommended=one == recommended) for one in members]
    return ranked


def write_leaderboard(rows: Sequence[Row], json_path: Path, csv_path: Path) -> None:
    """Writes the rows as a JSON list, and as a CSV table: `best_params`, `folds` as JSON, without `test_per_class`."""
    records = [_record(row) for row in rows]
    write_json(json_path, records)
    columns = [name for name in _COLUMNS if name != "test_per_class"]
    cells = [
        {
            **record,
            "best_params": json.dumps(record["best_params"]),
            "folds": record["folds"] and json.dumps(record["folds"]),
        }
        for record in records
    ]
    write_csv(csv_path, columns, [[record[name] for name in columns] for record in cells])


_FIELDS = [column.name for column in fields(Row) if column.name != "test_metrics"]
_COLUMNS = [*_FIELDS, *(name for name in map("test_{}".format, TEST_METRICS) if name not in _FIELDS)]


def _record(row: Row) -> dict[str, Any]:
    """Returns the row's columns by name; a metric that is not known or not defined is None."""
    values = asdict(row)
    metrics = {f"test_{name}": value for name, value in values.pop("test_metrics").items()}
    return {name: values.get(name, metrics.get(name)) for name in _COLUMNS}


def render_leaderboard(rows: Sequence[Row], metric: str = "val/accuracy") -> Table:
    """Returns the table for the terminal: encoder, mode, accuracies, cost; one section per shots.

    Args:
        rows: ranked rows.
        metric: the metric that ranked them.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    on_gpu, sections = any(row.peak_gpu_memory_bytes for row in rows), _by_shots(rows)
    is_uneven, num_folds = any(row.is_uneven for row in rows), _num_folds(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    name = metric.removeprefix("val/").replace("_", " ")
    table.title, table.title_justify = f"Leaderboard, ordered by validation {name}\n", "left"
    for name in ("", "encoder", "mode"):
        # On a narrow terminal only the encoder's name is folded.
        table.add_column(name, no_wrap=name != "encoder", overflow="fold")
    memory = "GPU\nmemory" if on_gpu else "memory"
    macro_f1 = ["macro\nF1"] if is_uneven else []
    folds = [f"{num_folds} folds\n\\[95 % interval]"] if num_folds else []
    for name in ("val", "test accuracy\n\\[95 % interval]", *macro_f1, *folds, "tried", "train\ntime", memory):
        table.add_column(name, justify="right", no_wrap=True)
    for section in sections:
        table.add_section()
        if len(sections) > 1:
            table.add_row("", "", _describe_shots(section[0].shots), style="bold")
        for place, row in enumerate(section, start=1):
            mark = f"{place}{'*' * row.is_recommended or '=' * row.tied_with_best}" if len(section) > 1 else str(place)
            # A name of an encoder may look like rich's markup or steer the terminal.
            names = [Text(printable(name)) for name in (row.encoder, row.mode)]
            table.add_row(mark, *names, *_figures(row, on_gpu, is_uneven, num_folds > 0))
    table.caption, table.caption_justify = "\n".join(["", *_legend(rows)]), "left"
    return table


def uneven_warning(counts: Mapping[str, Mapping[str, int]]) -> str | None:
    """Returns a warning if the classes of the test split are uneven; None otherwise.

    Args:
        counts: number of images by class, by split.
    """
    test = counts.get("test", {})
    num_images, largest = sum(test.values()), max(test, key=lambda name: test[name], default="")
    if len(test) < 2 or test[largest] < UNEVEN * min(test.values()):
        return None
    smallest = min(test, key=lambda name: test[name])
    return (
        f"uneven classes: of {num_images:,} test images, {test[largest]:,} are '{largest}' "
        f"({test[largest] / num_images:.1%}) and {test[smallest]:,} '{smallest}'; accuracy says little about the "
        "smaller classes; the leaderboard shows macro F1 too, and 'metric: val/macro_f1' searches for it"
    )


def _by_shots(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups ranked rows by shots: all images first, then from many to few."""
    found = sorted({row.shots for row in rows}, key=_section)
    return [[row for row in rows if row.shots == shots] for shots in found]


def _section(shots: int | str) -> float:
    return -math.inf if shots == "all" else -int(shots)


def _describe_shots(shots: int | str) -> str:
    return "all images" if shots == "all" else f"{shots} shot{'s' * (shots != 1)}"


def _figures(row: Row, on_gpu: bool, is_uneven: bool, shows_folds: bool) -> list[str]:
    interval = f"{row.test_accuracy:.3f} [{row.test_accuracy_low:.3f}, {row.test_accuracy_high:.3f}]"
    memory = row.peak_gpu_memory_bytes if on_gpu else row.peak_memory_bytes
    settings, seconds = str(row.num_trials), describe_seconds(row.train_seconds)
    accuracies = [f"{row.shown_val_accuracy:.3f}", interval.replace("[", r"\[")]
    macro_f1 = [f"{row.test_macro_f1:.3f}"] if is_uneven else []
    folds = [row.folds.describe().replace("[", r"\[") if row.folds else ""] if shows_folds else []
    return [*accuracies, *macro_f1, *folds, settings, seconds, f"{memory / 1e9:.1f} GB"]


def _num_folds(rows: Sequence[Row]) -> int:
    return max((len(row.folds.accuracies) for row in rows if row.folds is not None), default=0)


def _legend(rows: Sequence[Row]) -> list[str]:
    lines = []
    if share := max((row.test_largest_class for row in rows if row.is_uneven), default=0.0):
        lines += [f"always naming the largest class has accuracy {share:.3f}", "macro F1 counts every class alike"]
    if any(len(section) > 1 for section in _by_shots(rows)):
        lines.append("= may be the best: no other is better on test (all pairs compared at once, 95 %)")
        lines.append("* recommended: of those, the best on validation that costs at most twice the least")
    if any(row.val_accuracy_corrected is not None for row in rows):
        lines.append("val: accuracy, without the luck of having been the best of many trials")
    if num_folds := _num_folds(rows):
        lines.append(f"{num_folds} folds: mean accuracy of nested cross-validation over the images of all splits")
    num_seeds = max((row.num_seeds for row in rows), default=1)
    if num_seeds > 1:
        lines.append(f"few shots: mean of {num_seeds} draws of the images, interval over draws and test images")
    return lines


def describe_setting(setting: Setting) -> str:
    """Returns a short text for a setting: `lr 0.003, 15 epochs, cls`, `k 10, cls`, `strength 0.3, cls, standardize`."""
    formats = {
        "learning_rate": "lr {:.2g}",
        "epochs": "{} epochs",
        "k": "k {}",
        "strength": "strength {:.2g}",
        "features": "{}",
        "normalize": "{}",
        "fitted_to": "fitted to {}",
    }
    return ", ".join(text.format(setting[name]) for name, text in formats.items() if name in setting)


def describe_seconds(seconds: float) -> str:
    """Returns `8.4 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
