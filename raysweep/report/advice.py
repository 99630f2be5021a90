"""What to do next, from what a sweep has found."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysweep.experiment.metrics import VALIDATION_METRICS
from raysweep.report.class_figures import class_lines, confusion_counts
from raysweep.report.run_files import RunFiles
from raysweep.results.conclusion import describe_choice, describe_row, first_section, recommended
from raysweep.results.leaderboard import Row
from raysweep.results.sweep_record import TrialRecord
from raysweep.storage.copies import location
from raysweep.training.ranking import Ranking

WIDE = 0.04  # width of an interval of the test accuracy that leaves much open
NEAR_EDGE = 0.08  # share of the tried range of learning rates, on a scale of logarithms
MIN_TRIALS = 6  # fewer say nothing about an edge
WEAK = 0.15  # a recall this far below the accuracy


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do next, and perhaps the command for it."""

    text: str
    command: str = ""


def next_steps(run: RunFiles) -> list[Step]:
    """Returns what to do next, the most useful first."""
    chosen = recommended(run.rows)
    steps = [Step(f"Use {describe_choice(run.rows)}.", _command(run, chosen))]
    if chosen.model_path is None:
        others = [row for row in first_section(run.rows) if row.tied_with_best and row.model_path]
        text = (
            "It has no exported model, as its training images are its model. The first row that may be as good and has"
        )
        steps += [Step(f"{text} one: {describe_row(row)}.", _command(run, row)) for row in others[:1]]
    texts = [*_edge(run, chosen), *_more_images(run), *_weak_class(run, chosen), *_failures(run)]
    return [*steps, *map(Step, texts)]


def _command(run: RunFiles, row: Row) -> str:
    if row.model_path is None:
        return ""
    place = location(run.paths.root / row.model_path).removeprefix(f"{Path.cwd()}/")
    return f"raysweep predict {shlex.quote(place)} IMAGE"


def _edge(run: RunFiles, chosen: Row) -> list[str]:
    trials = [trial for trial in run.trials.get(chosen.study, ()) if trial.state == "done"]
    rates = [float(trial.setting["learning_rate"]) for trial in trials if "learning_rate" in trial.setting]
    best = chosen.best_params.get("learning_rate")
    if len(rates) < MIN_TRIALS or best is None or max(rates) <= min(rates):
        return []
    low, high = math.log(min(rates)), math.log(max(rates))
    place = (math.log(float(best)) - low) / (high - low)
    if NEAR_EDGE < place < 1 - NEAR_EDGE:
        return []
    end, way = ("lowest", "lower") if place <= NEAR_EDGE else ("highest", "higher")
    key = f"search.{chosen.mode}.space.learning_rate"
    return [f"The best learning rate, {float(best):.2g}, is among the {end} that were tried: try {way} ones ({key})."]


def _more_images(run: RunFiles) -> list[str]:
    section = first_section(run.rows)
    width = section[0].test_accuracy_high - section[0].test_accuracy_low
    num_tied = sum(row.tied_with_best for row in section)
    if num_tied < 2 or width < WIDE:
        return []
    return [
        f"{num_tied} rows may be the best. To tell them apart takes more test images: with {section[0].num_test:,} of "
        f"them, the interval is {100 * width:.0f} points wide, and with four times as many about half of that."
    ]


def _weak_class(run: RunFiles, chosen: Row) -> list[str]:
    found = run.predictions.get(chosen.study)
    if found is None:
        return []
    lines = [line for line in class_lines(found.classes, confusion_counts(found)) if line.recall is not None]
    weakest = min(lines, key=lambda line: line.recall or 0.0, default=None)
    if weakest is None or weakest.recall is None or weakest.recall > chosen.test_accuracy - WEAK:
        return []
    return [
        f"'{weakest.name}' is found least often: {weakest.recall:.0%} of its {weakest.support} test images. Look "
        "at its mistakes below, then add images of it."
    ]


def _failures(run: RunFiles) -> list[str]:
    failures = run.record.failures if run.record else ()
    return [f"Without a result: {failure}" for failure in failures]


def setting_ties(trials: Sequence[TrialRecord], metric: str, ranking: Ranking, num_images: int) -> str:
    """Returns how many trials share the best score, and which is chosen, in words; empty if only one has it.

    Args:
        trials: trials of a study.
        metric: what the leaderboard is ordered by.
        ranking: how the trials are ranked.
        num_images: number of validation images; 0 if that is not known.
    """
    scores = [trial.metrics[metric] for trial in trials if trial.state == "done" and metric in trial.metrics]
    if not scores:
        return ""
    best = max(scores) if VALIDATION_METRICS[metric] == "maximize" else min(scores)
    num_best = sum(score == best for score in scores)
    if num_best < 2:
        return ""
    on = f" on {num_images:,} validation images" if num_images else ""
    chosen = "the trial" if ranking.metric != metric else "of these, the one"
    return f"{num_best} of {len(scores)} trials reach {metric} {best:.3f}{on}; {chosen} with the lowest loss is chosen."
