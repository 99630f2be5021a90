"""The description of a sweep's run in MLflow, in Markdown: the answer, the leaderboard, and how to run it again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raysweep.results.conclusion import conclusion
from raysweep.results.leaderboard import Row, describe_seconds, describe_setting

# The tag that holds the description has at most 5,000 characters.
MAX_ROWS, MAX_TABLE = 20, 3500


def sweep_description(rows: Sequence[Row]) -> str:
    """Returns the description of a finished sweep.

    Args:
        rows: the ranked rows; at least one.
    """
    table = [
        "| | encoder | mode | shots | setting | test accuracy [95 %] | train time |",
        "|---|---|---|---|---|---|---|",
    ]
    lines = [_line(row) for row in rows[:MAX_ROWS]]
    while lines and sum(map(len, lines)) > MAX_TABLE:
        lines.pop()
    table += lines
    if len(rows) > len(lines):
        table.append(f"\n{len(rows) - len(lines)} more rows: `leaderboard.csv` among the artifacts.")
    return "\n".join(
        [
            f"**{_plain(conclusion(rows))}**",
            "",
            *table,
            "",
            "`=` and `*` may be the best: no other is better on test. `*` is recommended: of those, the best on "
            "validation that costs at most twice the least.",
            "",
            "To run it again, take `experiment.resolved.yaml` from the artifacts: "
            "`raysweep run experiment.resolved.yaml`. The tags name versions and commit.",
        ]
    )


def _line(row: Row) -> str:
    mark = "*" if row.is_recommended else "=" * row.tied_with_best
    cells = [f"`{mark}`" if mark else "", _plain(row.encoder), f"`{row.mode}`", str(row.shots)]
    cells += [_plain(describe_setting(row.best_params)), _accuracy(row), describe_seconds(row.train_seconds)]
    return f"| {' | '.join(cells)} |"


def _accuracy(row: Row) -> str:
    return f"{row.test_accuracy:.3f} [{row.test_accuracy_low:.3f}, {row.test_accuracy_high:.3f}]"


def _plain(text: str) -> str:
    """Escapes what Markdown would read as markup: names come from the experiment's file."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(text.split()))
