"""The report as one HTML page: its content from the files of a run, and the template that shows it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raysweep.errors import printable
from raysweep.report import figures
from raysweep.report.advice import next_steps, setting_ties
from raysweep.report.class_figures import (
    CalibrationBins,
    ClassLine,
    Confusion,
    calibration_bins,
    class_lines,
    confusion_counts,
    most_confused,
)
from raysweep.report.run_files import Predictions, RunFiles
from raysweep.results.conclusion import conclusion, describe_row, first_section, recommended
from raysweep.results.leaderboard import Row, describe_seconds, describe_setting
from raysweep.results.sweep_record import TrialRecord
from raysweep.training.ranking import Ranking

MAX_TABLE_CLASSES = 20  # more are drawn as a picture
MISTAKES_PER_STUDY, MAX_MISTAKES, MAX_MISTAKE_BYTES = 24, 500, 3_500_000
MAX_CONFUSIONS = 8


@dataclass(frozen=True, slots=True)
class FigureView:
    """A figure: SVG, what it is called, and what it shows, for people who do not see it."""

    svg: Markup
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong prediction with a picture of the image, as a data URI."""

    picture: str
    image: str
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True, eq=False, slots=True)
class StudyView:
    """What the page shows of one study or baseline.

    Attributes:
        row: its row of the leaderboard.
        place: its place among the rows with as many shots.
        anchor: id of its section on the page.
        is_chosen: whether it is the row to use.
        figures: what was tried, learning curves, calibration.
        ties: how many settings share the best score, in words; empty if one is the best.
        importances: how much each hyperparameter decides whether a trial is among the best.
        num_stopped: trials that a scheduler stopped.
        num_failed: trials that an error ended.
        counts: confusion matrix, `(num_classes, num_classes)`, where a table can show it.
        classes: class names.
        class_lines: figures of each class.
        confusions: the pairs of classes that are confused most often.
        mistakes: the most confident of them.
        num_wrong: number of wrong predictions.
    """

    row: Row
    place: int
    anchor: str
    is_chosen: bool
    figures: tuple[FigureView, ...] = ()
    ties: str = ""
    importances: tuple[tuple[str, float], ...] = ()
    num_stopped: int = 0
    num_failed: int = 0
    counts: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    class_lines: tuple[ClassLine, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    num_wrong: int = 0


def render_page(run: RunFiles) -> str:
    """Returns the report as HTML."""
    environment = Environment(
        loader=PackageLoader("raysweep.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters |= {
        "seconds": describe_seconds, "setting": describe_setting, "row": describe_row, "bytes": _describe_bytes,
        "f3": lambda value: "" if value is None else f"{value:.3f}", "count": lambda value: f"{value:,}",
    }  # fmt: skip
    section = first_section(run.rows)
    return environment.get_template("page.html.jinja").render(
        run=run,
        record=run.record,
        name=run.record.name if run.record else run.paths.name,
        answer=conclusion(run.rows),
        steps=next_steps(run),
        sections=_sections(run.rows),
        uneven=any(row.is_uneven for row in section),
        fronts=front_figures(run),
        few_shots=few_shot_figures(run.rows),
        studies=study_views(run),
    )


def _shown(value: object) -> object:
    """Makes characters visible that would turn the direction of what follows, or that are not seen."""
    return printable(value, keep="\n") if type(value) is str else value


def _describe_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _sections(rows: Sequence[Row]) -> list[tuple[str, list[tuple[int, Row]]]]:
    names = dict.fromkeys(row.shots for row in rows)
    return [
        (
            "all images" if shots == "all" else f"{shots} image{'s' * (shots != 1)} a class",
            list(enumerate([row for row in rows if row.shots == shots], start=1)),
        )
        for shots in names
    ]


def front_figures(run: RunFiles) -> list[FigureView]:
    """Returns accuracy against training time, and against the size of the model; none for a single row."""
    rows = dict(enumerate(first_section(run.rows), start=1))
    models = run.record.models if run.record else {}
    sized = {place: row for place, row in rows.items() if row.study in models}
    figures_of = [
        ("Accuracy against training time", "seconds from images to weights", "front-time", rows,
         [row.train_seconds for row in rows.values()]),
        ("Accuracy against size", "million parameters, encoder and head", "front-size", sized,
         [models[row.study].num_parameters / 1e6 for row in sized.values()]),
    ]  # fmt: skip
    drawn = []
    for title, label, key, shown, costs in figures_of:
        if len(shown) > 1:
            text = "; ".join(
                f"{place}: {describe_row(row)}, accuracy {row.test_accuracy:.3f}, {cost:.3g} {label}"
                for (place, row), cost in zip(shown.items(), costs, strict=True)
            )
            drawn.append(FigureView(Markup(figures.draw_front(shown, costs, label, key)), title, text))
    return drawn


def few_shot_figures(rows: Sequence[Row]) -> list[FigureView]:
    """Returns accuracy by images a class, of encoders and modes with two numbers of shots or more."""
    curves: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.shots != "all"), key=lambda row: int(row.shots)):
        curves.setdefault(printable(f"{row.encoder} {row.mode}"), []).append(row)
    curves = {name: own for name, own in curves.items() if len(own) > 1}
    if not curves:
        return []
    lines = [
        f"{name}: "
        + ", ".join(
            f"{row.test_accuracy:.3f} [{row.test_accuracy_low:.3f}, {row.test_accuracy_high:.3f}] with {row.shots}"
            for row in own
        )
        for name, own in curves.items()
    ]
    svg = Markup(figures.draw_few_shots(curves, "few-shots"))
    return [FigureView(svg, "Accuracy by images a class", "; ".join(lines))]


def study_views(run: RunFiles) -> list[StudyView]:
    """Returns what the page shows of each row of the leaderboard, in its order."""
    views, seen = [], dict.fromkeys((row.shots for row in run.rows), 0)
    per_study = min(MISTAKES_PER_STUDY, MAX_MISTAKES // max(1, len(run.rows)))
    room = MAX_MISTAKE_BYTES
    for number, row in enumerate(run.rows):
        seen[row.shots] += 1
        view = StudyView(row, seen[row.shots], f"study-{number}", row is recommended(run.rows))
        if trials := run.trials.get(row.study):
            view = _with_trials(view, trials, run)
        if found := run.predictions.get(row.study):
            view = _with_predictions(view, found)
            mistakes = _mistakes(found, run, per_study)
            while mistakes and sum(len(one.picture) for one in mistakes) > room:
                mistakes = mistakes[:-1]
            room -= sum(len(one.picture) for one in mistakes)
            view = replace(view, mistakes=tuple(mistakes))
        views.append(view)
    return views


def _with_trials(view: StudyView, trials: Sequence[TrialRecord], run: RunFiles) -> StudyView:
    metric, ranking = run.ranking.metric, run.ranking.within_study
    best = _chosen(trials, view.row, ranking)
    drawn = []
    if any("learning_rate" in trial.setting and metric in trial.metrics for trial in trials):
        response = figures.draw_response(trials, best, metric, f"{view.anchor}-response")
        text = (
            f"{len(trials)} trials; the chosen one, trial {best.number} with {describe_setting(best.setting)}, has "
            f"{metric} {best.metrics.get(metric, float('nan')):.3f} and is ringed"
        )
        drawn.append(FigureView(Markup(response), "Every trial", text))
    for number, name in enumerate(dict.fromkeys([metric, ranking.metric])):
        if any(trial.history.get(name) for trial in trials):
            curves = figures.draw_curves(trials, best, name, f"{view.anchor}-curves-{number}")
            text = (
                f"{name} after each epoch of {len(trials)} trials; trial {best.number} in colour, its chosen epoch "
                "marked"
            )
            drawn.append(FigureView(Markup(curves), f"Learning curves, {name}", text))
    found = run.record.importances.get(view.row.study, {}) if run.record else {}
    return replace(
        view,
        figures=tuple(drawn),
        ties=setting_ties(trials, metric, ranking, sum(run.record.counts["validation"].values()) if run.record else 0),
        importances=tuple(sorted(found.items(), key=lambda pair: -pair[1])),
        num_stopped=sum(trial.state == "stopped" for trial in trials),
        num_failed=sum(trial.state == "failed" for trial in trials),
    )


def _chosen(trials: Sequence[TrialRecord], row: Row, ranking: Ranking) -> TrialRecord:
    """Returns the trial with the setting of the row; of several, the best."""
    usable = [trial for trial in trials if trial.state == "done" and ranking.is_usable(trial.metrics)]
    same = [trial for trial in usable if dict(trial.setting) == dict(row.best_params)]
    return max(same or usable, key=lambda trial: ranking.key(trial.metrics), default=trials[0])


def _with_predictions(view: StudyView, found: Predictions) -> StudyView:
    counts, bins = confusion_counts(found), calibration_bins(found)
    drawn = [*view.figures]
    if len(found.classes) > MAX_TABLE_CLASSES:
        picture = figures.draw_confusion(counts, f"{view.anchor}-confusion")
        text = "share of each true class by predicted class; the pairs confused most often are listed as text"
        drawn.append(FigureView(Markup(picture), "Confusion matrix", text))
    calibration = figures.draw_calibration(bins, f"{view.anchor}-calibration")
    drawn.append(FigureView(Markup(calibration), "Calibration", _describe_bins(bins)))
    return replace(
        view,
        figures=tuple(drawn),
        counts=counts if len(found.classes) <= MAX_TABLE_CLASSES else None,
        classes=found.classes,
        class_lines=tuple(class_lines(found.classes, counts)),
        confusions=tuple(most_confused(found.classes, counts, MAX_CONFUSIONS)),
        num_wrong=int((found.labels != found.predicted).sum()),
    )


def _describe_bins(bins: CalibrationBins) -> str:
    last = (
        f"of predictions with a confidence of {bins.confidence[-1]:.2f} on average, {bins.accuracy[-1]:.2f} are right"
    )
    return f"expected calibration error {bins.error:.3f}; {last}"


def _mistakes(found: Predictions, run: RunFiles, most: int) -> list[Mistake]:
    confidence = found.confidence
    wrong = np.flatnonzero(found.predicted != found.labels)
    shown = []
    for place in wrong[np.argsort(-confidence[wrong], kind="stable")][:most].tolist():
        jpeg = run.thumbnails.get(int(found.row_ids[place]))
        if jpeg is not None:
            shown.append(
                Mistake(
                    f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
                    _short(found.images[place]),
                    found.classes[found.labels[place]],
                    found.classes[found.predicted[place]],
                    float(confidence[place]),
                )
            )
    return shown


def _short(path: str) -> str:
    """Returns the last two parts of a path."""
    return "/".join(re.split(r"/+", path)[-2:])
