"""What a person sees while a sweep runs: one bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Stages with a count, a note such as the best so far, and the time left.

    Used as a context manager, so that the terminal is left as it was found.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._last_line = 0.0
        self._label = ""
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
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
        """Prints a line, stamped with the seconds since the start."""
        (self._bar.console if self._bar else self.console).print(
            f"[{self.elapsed:6.1f} s] {text}", markup=False, emoji=False
        )

    def warn(self, text: str) -> None:
        """Prints a line that a person should not miss."""
        console = self._bar.console if self._bar else self.console
        console.print(f"warning: {text}", style="yellow", markup=False, emoji=False)

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._started

    def start(self, label: str, total: int) -> None:
        """Begins a stage of `total` steps."""
        self._label, self._last_line = label, time.monotonic()
        if self._bar:
            self.finish()
            self._task = self._bar.add_task(label, total=total, note="")

    def update(self, done: int, total: int, note: str = "") -> None:
        """Shows how far the stage is; as a line, at most every ten seconds, where there is no terminal."""
        if self._bar and self._task in self._bar.task_ids:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif not self._bar and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES and done < total:
            self._last_line = time.monotonic()
            self.say(f"{self._label}: {done}/{total}{', ' + note if note else ''}")

    def finish(self) -> None:
        """Takes the bar of the current stage away."""
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
