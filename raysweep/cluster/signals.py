"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP when a terminal closes. All three end it in order.

The first one raises KeyboardInterrupt in the main thread. A second Ctrl-C ends the process at once. `fail_command` ends
a command in the same way, for a cause that another thread sees.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILURE = signal.SIGUSR2  # of `fail`: sent by this process to itself
# Ray's C++ code replaces the handler of this one, each time that Ray starts and ends in this process.
REPLACED_BY_RAY = signal.SIGTERM
SECONDS_TO_RAISE = 5
SIZE_OF_SIGACTION = 1024  # larger than C's struct on any platform


class StopSignals:
    """Handles the signals of one command; made by `stop_signals`.

    Attributes:
        word: what the terminal shows as soon as a signal comes.
        number: the first signal that came; None before.
        failure: the error that ends the command instead of a signal, from `fail`, which has said it; None if there
            is none.
    """

    def __init__(self, word: str) -> None:
        self.word = word
        self.number: int | None = None
        self._terminal = _copy_of_stderr()
        self._has_raised = threading.Event()
        self.failure: Exception | None = None

    @property
    def exit_status(self) -> int:
        """128 and the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.number or signal.SIGINT)

    def fail(self, error: Exception) -> None:
        """Says an error at once and ends the command, from any thread. Does nothing once a signal has come."""
        if self.number is not None or self.failure is not None:
            return
        self.failure = error
        self._say(f"error: {error}")  # Ray's C++ code may end this process before the main thread can say it
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, FAILURE)
        if not self._has_raised.wait(SECONDS_TO_RAISE):  # it waits in C++ code for what will never come
            leave_at_once(1)

    def raise_failure(self, _number: int, _frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt for `fail`: Ray's C++ code lets no other exception through."""
        self._has_raised.set()
        if self.number is None and self.failure is not None:
            self.number = FAILURE
            raise KeyboardInterrupt

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Ends the command. Only a second Ctrl-C counts: supervisors and shells send other signals twice."""
        if self.number is None:
            self.number = number
            self._say(f"{self.word}…" + (" (Ctrl-C once more leaves at once)" if number == signal.SIGINT else ""))
            raise KeyboardInterrupt
        if self.number == FAILURE and number != signal.SIGINT:  # it came to Ray's processes, too, and was the cause
            self.number, self.failure = number, None
        if number == signal.SIGINT:
            leave_at_once(128 + number)

    def _say(self, text: str) -> None:
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        try:
            os.write(self._terminal, f"\n{text}\n".encode(encoding, errors="replace"))
        except OSError:  # the terminal has closed
            _replace_by_null(self._terminal)

    def close(self) -> None:
        """Closes its copy of stderr."""
        os.close(self._terminal)


_current: StopSignals | None = None
_before_leaving: list[Callable[[], None]] = []


@contextmanager
def stop_signals(word: str = "stopping") -> Iterator[StopSignals]:
    """Handles signals while a command runs. Signals that the process was started to ignore stay ignored.

    `nohup` ignores SIGHUP, and a shell ignores Ctrl-C for what a script runs in the background.

    Args:
        word: what the terminal shows as soon as a signal comes.
    """
    global _current  # noqa: PLW0603  # signal handlers belong to the process, too
    signals, outer = StopSignals(word), _current
    before = {}
    if threading.current_thread() is threading.main_thread() and outer is None:
        before = {number: signal.getsignal(number) for number in (*ENDING, FAILURE)}
        for number in (number for number in ENDING if before[number] != signal.SIG_IGN):
            signal.signal(number, signals.handle)
        signal.signal(FAILURE, signals.raise_failure)
        _current = signals
    try:
        yield outer or signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _current = outer
        signals.close()


def is_stopping() -> bool:
    """Returns whether a signal has come, and the command ends."""
    return _current is not None and _current.number is not None


@contextmanager
def before_leaving(function: Callable[[], None]) -> Iterator[None]:
    """Lets `leave_at_once` call a function first, if it is called before the block has ended."""
    _before_leaving.append(function)
    try:
        yield
    finally:
        _before_leaving.remove(function)


def fail_command(error: Exception) -> None:
    """Ends the command that runs now with an error, from any thread: see `StopSignals.failure`."""
    if _current is not None:
        _current.fail(error)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Sets the handler of SIGTERM again after a block in which Ray's C++ code replaces it. Works in any thread.

    Ray's handler ends the process with SIGABRT and a C++ trace. Python sets handlers in the main thread only, which
    does not know when Ray, in its own thread, has replaced one.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(REPLACED_BY_RAY)
    c_library, action = ctypes.CDLL(None), ctypes.create_string_buffer(SIZE_OF_SIGACTION)
    c_library.sigaction(int(REPLACED_BY_RAY), None, action)
    try:
        yield
    finally:
        if in_main_thread:  # ray.init sets a handler of Python's, too
            signal.signal(REPLACED_BY_RAY, handler)
        c_library.sigaction(int(REPLACED_BY_RAY), action, None)


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Lets processes that start in this block survive signals that end the sweep: it needs them to end in order.

    A terminal that closes sends SIGHUP to all of its processes, and `timeout`, systemd and Slurm send SIGTERM to all of
    a command's. New processes inherit which signals this thread blocks. They end with SIGKILL, or by themselves.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_at_once(status: int) -> NoReturn:
    """Ends the process, and what it has started, without Python's cleanup.

    The cleanup takes a second once torch, Ray and transformers are imported.
    """
    # Streams may be closed, or a signal may have interrupted them or any other code.
    for function in (sys.stdout.flush, sys.stderr.flush, *_before_leaving, _remove_semaphores):
        with suppress(Exception):
            function()
    os._exit(status)


def _remove_semaphores() -> None:
    """Removes the semaphores of process pools. Otherwise Python warns on the terminal that they leaked."""
    finalizers: Any = getattr(multiprocessing, "util", None)
    if finalizers is not None:
        finalizers._run_finalizers(0)


def _copy_of_stderr() -> int:
    """Returns a copy of file descriptor 2, since Ray's start captures what is written to 2 itself."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _replace_by_null(descriptor: int) -> None:
    """Lets all writes to a terminal that has closed go nowhere. They would raise errors while the command ends."""
    closed, null = os.fstat(descriptor), os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            if os.path.samestat(os.fstat(int(name)), closed):
                os.dup2(null, int(name), inheritable=int(name) < 3)
    os.close(null)
