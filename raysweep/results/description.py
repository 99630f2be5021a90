"""The description of a sweep's run in MLflow, in Markdown: the answer, the leaderboard, and how to run it again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raysweep.results.leaderboard import Row, describe_seconds, describe_setting

MAX_ROWS = 20  # the tag that holds the description has at most 5,000 characters


def sweep_description(rows: Sequence[Row]) -> str:
    """Returns the description of a finished sweep.

    Args:
        rows: the ranked rows; at least one.
    """
    table = [
        "| | encoder | mode | shots | setting | test accuracy [95 %] | train time |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows[:MAX_ROWS]),
    ]
    if len(rows) > MAX_ROWS:
        table.append(f"\n{len(rows) - MAX_ROWS} more rows: `leaderboard.csv` among the artifacts.")
    return "\n".join(
        [
            answer(rows),
            "",
            *table,
            "",
            "`*` is the cheapest of the rows that may be the best, and recommended; `=` may be the best, too.",
            "",
            "To run it again, take `experiment.resolved.yaml` from the artifacts: "
            "`raysweep run experiment.resolved.yaml`. The tags name versions and commit.",
        ]
    )


def answer(rows: Sequence[Row]) -> str:
    """Returns the answer in a sentence, for the rows with the most training images."""
    first = [row for row in rows if row.shots == rows[0].shots]
    best = first[0]
    said = f"**{_name(best)}** is the best by validation, with test accuracy {_accuracy(best)}"
    others = [row for row in first[1:] if row.tied_with_best]
    if not best.tied_with_best or not others:
        return f"{said}."
    recommended = next((row for row in first if row.is_recommended), best)
    advice = "it is also the cheapest of them" if recommended is best else f"the cheapest is **{_name(recommended)}**"
    return f"{said}; not distinguishable on test from {', '.join(map(_name, others))}; {advice}."


def _line(row: Row) -> str:
    mark = "*" if row.is_recommended else "=" * row.tied_with_best
    cells = [f"`{mark}`" if mark else "", _plain(row.encoder), f"`{row.mode}`", str(row.shots)]
    cells += [_plain(describe_setting(row.best_params)), _accuracy(row), describe_seconds(row.train_seconds)]
    return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
    return f"{_plain(row.encoder)} {_plain(row.mode)}"


def _accuracy(row: Row) -> str:
    return f"{row.test_accuracy:.3f} [{row.test_accuracy_low:.3f}, {row.test_accuracy_high:.3f}]"


def _plain(text: str) -> str:
    """Escapes what Markdown would read as markup: names come from the experiment's file."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(text.split()))
