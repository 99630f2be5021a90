"""The report as Markdown: its text and its tables, for a wiki, a pull request or a run's description."""

from __future__ import annotations

import re

from raysweep.errors import printable
from raysweep.report.advice import next_steps
from raysweep.report.class_figures import class_lines, confusion_counts
from raysweep.report.run_files import RunFiles
from raysweep.results.conclusion import conclusion, recommended
from raysweep.results.leaderboard import describe_seconds, describe_setting

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!])")


def escaped(text: str) -> str:
    """Returns a text that Markdown shows as it is, also in a cell of a table, and that is no HTML."""
    return _SPECIAL.sub(r"\\\1", printable(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def render_markdown(run: RunFiles) -> str:
    """Returns the report as Markdown."""
    name = run.record.name if run.record else run.paths.name
    lines = [f"# {escaped(name)}", "", escaped(conclusion(run.rows)), "", "## What next", ""]
    for step in next_steps(run):
        lines += [f"- {escaped(step.text)}", *(["", f"      {printable(step.command)}", ""] if step.command else [])]
    lines += ["", "## Leaderboard", "", *_leaderboard(run), "", *_classes(run), *_reproduce(run)]
    return "\n".join(lines) + "\n"


def _leaderboard(run: RunFiles) -> list[str]:
    lines = [
        "| | encoder | mode | shots | val | test accuracy [95 % interval] | macro F1 | setting | train time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run.rows:
        mark = "*" if row.is_recommended else "=" if row.tied_with_best else ""
        interval = f"{row.test_accuracy:.3f} \\[{row.test_accuracy_low:.3f}, {row.test_accuracy_high:.3f}\\]"
        cells = [
            escaped(mark),
            escaped(row.encoder),
            escaped(row.mode),
            str(row.shots),
            f"{row.shown_val_accuracy:.3f}",
            interval,
        ]
        cells += [
            f"{row.test_macro_f1:.3f}",
            escaped(describe_setting(row.best_params)),
            describe_seconds(row.train_seconds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "= may be the best: no other is better on test (all pairs compared at once, 95 %); "
        "\\* recommended: of those, the best on validation that costs at most twice the least",
    ]


def _classes(run: RunFiles) -> list[str]:
    chosen = recommended(run.rows)
    found = run.predictions.get(chosen.study)
    if found is None:
        return []
    lines = [
        f"## Classes of {escaped(chosen.study)}",
        "",
        "| class | precision | recall | F1 | images |",
        "|---|---|---|---|---|",
    ]
    for line in class_lines(found.classes, confusion_counts(found)):
        figures = ["" if value is None else f"{value:.3f}" for value in (line.precision, line.recall, line.f1)]
        lines.append(f"| {' | '.join([escaped(line.name), *figures, str(line.support)])} |")
    return [*lines, ""]


def _reproduce(run: RunFiles) -> list[str]:
    if run.record is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in run.record.versions.items())
    return [
        "## How to repeat it",
        "",
        f"    {printable(run.record.command_line)}",
        "",
        escaped(f"seed {run.record.seed}; {versions}"),
    ]
