"""The one writer to MLflow, in a process of its own: logging a trial takes longer than training a probe's head.

MLflow's import and its SQLite schema take seconds, and every logged trial some 25 ms of Python, which in a thread of
the driver would be taken from the search. Calls are made in order; what goes wrong shows at the next call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

from raysweep.errors import RaysweepError
from raysweep.results.tracking import Tracker, reported_as_ours

SECONDS_UNTIL_SAID = 15
SECONDS_TO_CLOSE = 60

_trackers: list[Tracker] = []  # in the writing process, its tracker


class Recorder:
    """Passes calls on to a `Tracker` in another process, one after another.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the MLflow experiment.
        say: told when it takes long to wait for MLflow.
    """

    def __init__(self, uri: str, experiment: str, say: Callable[[str], None] = lambda _text: None) -> None:
        self.uri, self._say = uri, say
        # Spawned, because a fork of a process with threads may hang; one worker keeps the order.
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _outlive_nothing)
        self._sent: deque[Future[Any]] = deque([self._process.submit(_open, uri, experiment)])

    def send(self, method: str, *arguments: Any) -> Future[Any]:
        """Has a `Tracker` method called, without waiting for it; returns what it will return.

        Raises:
            RaysweepError: an earlier call has failed.
        """
        with self._explained():
            self._drop_done()
            self._sent.append(self._process.submit(_call, self.uri, method, arguments))
        return self._sent[-1]

    def call(self, method: str, *arguments: Any) -> Any:
        """Has a `Tracker` method called, after all that was sent before, and returns what it returned.

        Raises:
            RaysweepError: this or an earlier call has failed.
        """
        answer = self.send(method, *arguments)
        self.wait()
        return answer.result()

    def wait(self) -> None:
        """Waits until everything that was sent is done.

        Raises:
            RaysweepError: a call has failed.
        """
        with self._explained():
            self._drop_done(waiting=True)

    def _drop_done(self, waiting: bool = False) -> None:
        """Forgets calls that are done, or waits for all; one that has failed stays, and is raised each time."""
        patience: float | None = SECONDS_UNTIL_SAID
        while self._sent and (waiting or self._sent[0].done()):
            if waiting and wait_for([self._sent[0]], patience).not_done:
                self._say(f"waiting for MLflow at {self.uri}: {len(self._sent)} calls to go")
                patience = None
            self._sent[0].result()
            self._sent.popleft()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            lost = "what is finished is kept, and the same command goes on from here"
            raise RaysweepError(f"tracking.uri: the process that writes to '{self.uri}' has died; {lost}") from error

    def close(self) -> None:
        """Ends every run that is still open as FAILED, and the process; on the way out of a sweep, however it went."""
        for future in self._sent:
            future.cancel()
        # Of a server that is lost, MLflow takes minutes to believe it; the process ends with the driver in any case.
        is_over = True
        with suppress(BrokenProcessPool):
            is_over = not wait_for([self._process.submit(_call, self.uri, "close", ())], SECONDS_TO_CLOSE).not_done
        self._process.shutdown(wait=is_over)


def _outlive_nothing() -> None:
    """Leaves signals to the driver, ends with it should it be killed, and keeps MLflow's advice to itself."""
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
    _trackers.append(Tracker(uri, experiment))


def _call(uri: str, method: str, arguments: tuple[Any, ...]) -> Any:
    if not _trackers:  # the store could not be opened, as its own call has said
        return None
    try:
        with reported_as_ours(uri):
            return getattr(_trackers[0], method)(*arguments)
    except OSError as error:
        raise RaysweepError(f"tracking.uri: nothing can be written to '{uri}' ({error})") from error
