"""Progress of a sweep on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from raysweep.errors import printable

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Stages with a count, a note such as the best result, and the remaining time; several may run at once.

    It is a context manager, so that the terminal is restored at the end.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _stderr_console()
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        if self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        with suppress(OSError):  # a full disk under a log must not end the sweep
            self.console.print(f"[{self.elapsed:6.1f} s] {printable(text)}", markup=False, emoji=False)

    def warn(self, text: str) -> None:
        """Prints a warning in yellow."""
        with suppress(OSError):
            self.console.print(f"warning: {printable(text)}", style="yellow", markup=False, emoji=False)

    @property
    def elapsed(self) -> float:
        """Seconds since this object was created."""
        return time.monotonic() - self._started

    def stage(self, label: str, total: int) -> Stage:
        """Begins a stage of `total` steps."""
        return Stage(self, self._bar, label, total)


class Stage:
    """One stage: a bar on a terminal; elsewhere a line, at most every ten seconds."""

    def __init__(self, progress: Progress, bar: RichProgress | None, label: str, total: int) -> None:
        self._progress, self._bar, self._label, self._total = progress, bar, printable(label), total
        self._last_line = time.monotonic()
        self._task = bar.add_task(self._label, total=total, note="") if bar else None

    def update(self, done: int, note: str = "") -> None:
        """Shows the number of steps done; ignored after `finish`."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, note=printable(note))
        elif not self._bar and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES and done < self._total:
            self._last_line = time.monotonic()
            self._progress.say(f"{self._label}: {done}/{self._total}{', ' + note if note else ''}")

    def finish(self) -> None:
        """Removes the bar."""
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def _stderr_console() -> Console:
    """Returns a console on a copy of stderr, because Ray's start redirects stderr (`cluster.session`)."""
    try:
        is_stderr = sys.stderr.fileno() == 2
    except (OSError, ValueError):
        is_stderr = False
    file = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") if is_stderr else sys.stderr
    return Console(file=file, stderr=True, highlight=False, soft_wrap=True)
