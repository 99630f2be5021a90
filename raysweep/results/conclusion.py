"""What a sweep has found, in a sentence: on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence

from raysweep.results.leaderboard import Row, describe_seconds, describe_setting

CHEAPER = 0.9  # a share of the training time below this is worth a word


def describe_row(row: Row) -> str:
    """Returns encoder and mode, and the shots where they are few: `dinov2 linear_probe, 5 shots`."""
    return f"{row.encoder} {row.mode}" + (f", {row.shots} shots" if row.shots != "all" else "")


def first_section(rows: Sequence[Row]) -> list[Row]:
    """Returns the ranked rows with the most training images: only these compare with each other."""
    return [row for row in rows if row.shots == rows[0].shots]


def recommended(rows: Sequence[Row]) -> Row:
    """Returns the recommended row (`leaderboard.rank_rows`), else the best on validation."""
    section = first_section(rows)
    return next((row for row in section if row.is_recommended), section[0])


def conclusion(rows: Sequence[Row]) -> str:
    """Returns what was found as a sentence.

    Args:
        rows: ranked rows, at least one.
    """
    section = first_section(rows)
    best, chosen = section[0], recommended(rows)
    accuracy = f"{_accuracy(best)} [{best.test_accuracy_low:.3f}, {best.test_accuracy_high:.3f}]"
    found = f"{describe_row(best)} is first on validation; its test accuracy is {accuracy}"
    if len(section) == 1:
        return f"{describe_row(best)} has a test accuracy of {accuracy}, with {describe_setting(best.best_params)}."
    num_tied = sum(row.tied_with_best for row in section)
    if not best.tied_with_best:
        return f"{found}, and another is better on test; recommended: {describe_row(chosen)} ({_accuracy(chosen)})."
    if num_tied == 1:
        return f"{found}, and no other may be the best on these {best.num_test:,} test images."
    if chosen is best:
        others = f"{num_tied - 1} other{'s' * (num_tied > 2)}"
        told = f"cannot be told from it on {best.num_test:,} test images"
        return f"{found}; {others} {told}, and none takes less than half of its time to train."
    return (
        f"{found}; {describe_row(chosen)} ({_accuracy(chosen)}) cannot be told from it on {best.num_test:,} test "
        f"images{_cost(chosen, best)}."
    )


def _accuracy(row: Row) -> str:
    return f"{row.test_accuracy:.3f}"


def _cost(chosen: Row, best: Row) -> str:
    if chosen.train_seconds >= CHEAPER * best.train_seconds:
        return ", and took no longer to train"
    took, instead = describe_seconds(chosen.train_seconds), describe_seconds(best.train_seconds)
    return f", and took {took} to train instead of {instead}"


def describe_choice(rows: Sequence[Row]) -> str:
    """Returns the row to use and its setting: `dinov2 linear_probe with lr 0.003, 15 epochs, cls`."""
    chosen = recommended(rows)
    setting = describe_setting(chosen.best_params)
    return f"{describe_row(chosen)} with {setting}" if setting else describe_row(chosen)
