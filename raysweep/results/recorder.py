"""Writes to MLflow in a separate process, because to log a trial takes longer than to train a probe's head.

MLflow's import and its SQLite schema take seconds, and each logged trial takes about 25 ms of Python. In a thread of
the driver, this time would slow the search down. Calls run in order; an error is raised at the next call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any, Concatenate, ParamSpec, TypeVar

from raysweep.errors import RaysweepError
from raysweep.results.tracking import Tracker, convert_mlflow_errors, open_tracker

SECONDS_BEFORE_NOTICE = 15
SECONDS_TO_CLOSE = 60

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

_trackers: list[Tracker] = []  # the tracker; used only in the process that writes


def start_recorder(uri: str, experiment: str, say: Callable[[str], None] = lambda _text: None) -> Recorder:
    """Starts a process that writes to MLflow, and returns at once; a later call raises if the store is unusable.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment.
        say: prints a line when MLflow takes long.
    """
    # Spawn, because a fork of a process with threads may hang. One worker keeps the order of calls.
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare_process)
    return Recorder(uri, process, process.submit(_open, uri, experiment), say)


class Recorder:
    """Calls methods of a `Tracker` in another process, one after another; made by `start_recorder`.

    Methods are given as functions, such as `Tracker.log_metrics`, so that mypy checks their arguments.
    """

    def __init__(
        self, uri: str, process: ProcessPoolExecutor, opening: Future[None], say: Callable[[str], None]
    ) -> None:
        self.uri, self._process, self._say = uri, process, say
        self._sent: deque[Future[Any]] = deque([opening])

    def send(
        self,
        method: Callable[Concatenate[Tracker, Arguments], Answer],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Future[Answer]:
        """Calls a method without waiting; returns a future of its result.

        Raises:
            RaysweepError: an earlier call failed.
        """
        with self._convert_errors():
            self._remove_finished()
            future = self._process.submit(_call, self.uri, method, arguments, options)
            self._sent.append(future)
        return future

    def call(
        self,
        method: Callable[Concatenate[Tracker, Arguments], Answer],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Answer:
        """Calls a method after all earlier calls, waits, and returns its result.

        Raises:
            RaysweepError: this or an earlier call failed.
        """
        answer = self.send(method, *arguments, **options)
        self.wait()
        return answer.result()

    def wait(self) -> None:
        """Waits until all calls are done.

        Raises:
            RaysweepError: a call failed.
        """
        with self._convert_errors():
            self._remove_finished(waiting=True)

    def _remove_finished(self, waiting: bool = False) -> None:
        """Removes finished calls, or waits for all calls. A failed call stays, and raises each time."""
        limit: float | None = SECONDS_BEFORE_NOTICE
        while self._sent and (waiting or self._sent[0].done()):
            if waiting and wait_for([self._sent[0]], limit).not_done:
                self._say(f"waiting for MLflow at {self.uri}: {len(self._sent)} calls to go")
                limit = None
            self._sent[0].result()
            self._sent.popleft()

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            lost = "what is finished is kept, and the same command goes on from here"
            raise RaysweepError(f"tracking.uri: the process that writes to '{self.uri}' has died; {lost}") from error

    def close(self) -> None:
        """Ends open runs as FAILED, and then the process; called at the end of every sweep, failed or not."""
        for future in self._sent:
            future.cancel()
        # MLflow retries a lost server for minutes. The process ends with the driver in any case.
        is_over = True
        with suppress(BrokenProcessPool):
            closing = self._process.submit(_call, self.uri, Tracker.close, (), {})
            is_over = not wait_for([closing], SECONDS_TO_CLOSE).not_done
        self._process.shutdown(wait=is_over)


def _prepare_process() -> None:
    """Ignores signals, which the driver handles; ends with the driver; hides MLflow's warnings."""
    warnings.simplefilter("ignore")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _open(uri: str, experiment: str) -> None:
    _trackers.append(open_tracker(uri, experiment))


def _call(uri: str, method: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    if not _trackers:  # the store could not be opened, and the call that opens it has raised
        return None
    try:
        with convert_mlflow_errors(uri):
            return method(_trackers[0], *arguments, **options)
    except OSError as error:
        raise RaysweepError(f"tracking.uri: nothing can be written to '{uri}' ({error})") from error
