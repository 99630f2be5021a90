"""Writes to MLflow in a separate process, because to log a trial takes longer than to train a probe's head.

MLflow's import and its SQLite schema take seconds, and each logged trial takes about 25 ms of Python. In a thread of
the driver, this time would slow the search down. Calls run in order; an error is raised at the next call.

A store that cannot be reached for a while gets the calls later. If it stays away, the sweep goes on without it: every
result is in the sweep's folder, and the next invocation logs what a store lacks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any, Concatenate, ParamSpec, TypeVar

from raysweep.errors import KEPT, RaysweepError, hide_secrets
from raysweep.results.mlflow_store import convert_mlflow_errors, is_away, without_retries
from raysweep.results.tracking import Tracker, open_tracker

SECONDS_BEFORE_NOTICE = 15
SECONDS_TO_CLOSE = 60
SECONDS_AWAY = 180  # the time for which a store may be out of reach
MAX_PAUSE = 8.0
# What a call returns when the store is out of reach for good; None for the others.
ANSWERS_WITHOUT_STORE: Mapping[str, Any] = {"start_run": ("", False), "register": "", "save_view": ""}

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

_trackers: list[Tracker] = []  # the tracker; used only in the process that writes
_outage: list[Outage] = []  # the same


@dataclass(frozen=True)
class Outage:
    """What the driver and the process that writes tell each other about a store that is out of reach.

    Attributes:
        is_lost: the store stayed away, and nothing more is written in this invocation.
        is_closing: the sweep ends, so do not wait for the store.
        seconds: the time for which the store may be out of reach.
    """

    is_lost: Event
    is_closing: Event
    seconds: float


def start_recorder(
    uri: str, experiment: str, say: Callable[[str], None] = lambda _text: None, seconds_away: float = SECONDS_AWAY
) -> Recorder:
    """Starts a process that writes to MLflow, and returns at once; a later call raises if the store is unusable.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment.
        say: prints a line when MLflow takes long.
        seconds_away: the time for which a store that worked may be out of reach.
    """
    # Spawn, because a fork of a process with threads may hang. One worker keeps the order of calls.
    spawn = multiprocessing.get_context("spawn")
    outage = Outage(spawn.Event(), spawn.Event(), seconds_away)
    process = ProcessPoolExecutor(1, spawn, _prepare_process, (outage,))
    return Recorder(uri, process, process.submit(_open, uri, experiment), say, outage)


class Recorder:
    """Calls methods of a `Tracker` in another process, one after another; made by `start_recorder`.

    Methods are given as functions, such as `Tracker.log_metrics`, so that mypy checks their arguments.
    """

    def __init__(
        self,
        uri: str,
        process: ProcessPoolExecutor,
        opening: Future[None],
        say: Callable[[str], None],
        outage: Outage,
    ) -> None:
        self.uri, self._process, self._say, self._outage = uri, process, say, outage
        self._sent: deque[Future[Any]] = deque([opening])
        self._opening = opening
        self._has_said_lost = False

    @property
    def is_lost(self) -> bool:
        """Whether the store is out of reach for good, so that nothing more is logged."""
        return self._outage.is_lost.is_set()

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
                self._say(f"waiting for MLflow at {hide_secrets(self.uri)}: {len(self._sent)} calls to go")
                limit = None
            self._sent[0].result()
            self._sent.popleft()
        if self.is_lost and not self._has_said_lost:
            self._has_said_lost = True
            self._say(
                f"warning: MLflow at {hide_secrets(self.uri)} has not answered for {self._outage.seconds:.0f} s; the "
                "sweep goes on without it, and the same command logs later what is missing"
            )

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise RaysweepError(f"tracking.uri: the process that writes to '{self.uri}' has died; {KEPT}") from error

    def close(self) -> None:
        """Ends open runs as FAILED, and then the process; called at the end of every sweep, failed or not."""
        self._outage.is_closing.set()
        if not self._opening.done():  # no run is open yet, and a new store is made beside its place
            self._process.shutdown(wait=False, cancel_futures=True)
            return
        for future in self._sent:
            future.cancel()
        # MLflow retries a lost server for minutes. The process ends with the driver in any case.
        is_over = True
        with suppress(BrokenProcessPool):
            closing = self._process.submit(_call, self.uri, Tracker.close, (), {})
            is_over = not wait_for([closing], SECONDS_TO_CLOSE).not_done
        self._process.shutdown(wait=is_over)


def _prepare_process(outage: Outage) -> None:
    """Ignores signals, which the driver handles; ends with the driver; hides MLflow's warnings."""
    _outage.append(outage)
    warnings.simplefilter("ignore")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
    outage, pause, deadline = _outage[0], 0.5, None
    while not outage.is_lost.is_set():
        try:
            # Without MLflow's own retries: a request whose answer got lost would be made twice.
            with convert_mlflow_errors(uri), without_retries():
                return method(_trackers[0], *arguments, **options)
        except RaysweepError as error:
            if error.__cause__ is None or not is_away(error.__cause__):
                raise
        _trackers[0].forget()
        deadline = deadline or time.monotonic() + outage.seconds
        if outage.is_closing.wait(pause):
            break
        if time.monotonic() > deadline:
            outage.is_lost.set()
        pause = min(2 * pause, MAX_PAUSE)
    return ANSWERS_WITHOUT_STORE.get(method.__name__)
