"""Signals that end a command, in processes of their own."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from raysweep.cluster.signals import StopSignals, fail_command, is_stopping, keep_signal_handlers, stop_signals
from raysweep.errors import ResourceError

pytestmark = pytest.mark.process

COMMAND = """
    import multiprocessing, os, signal, sys, threading, time
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.connection import wait
    from raysweep.cluster.signals import before_leaving, is_stopping, leave_at_once, stop_signals

    def end_with_parent():  # as the process that writes to MLflow
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = multiprocessing.parent_process().sentinel
        threading.Thread(target=lambda: (wait([parent]), os._exit(0)), daemon=True).start()

    def main():
        with stop_signals() as signals:
            try:
                with before_leaving(lambda: print("left", flush=True)):
                    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
                    pool.submit(int).result()
                    print("ready", flush=True)
                    time.sleep(60)
            except KeyboardInterrupt:
                print("closing", is_stopping(), file=sys.stderr, flush=True)
                time.sleep(float(sys.argv[1]))
                pool.shutdown()
                print("interrupted", file=sys.stderr, flush=True)
                return signals.exit_status

    if __name__ == "__main__":
        leave_at_once(main())
"""


@pytest.fixture
def start(tmp_path):
    """Starts the command, and waits until it works."""
    (tmp_path / "command.py").write_text(textwrap.dedent(COMMAND))
    started = []

    def start_command(*arguments, wrapper=(), **options):
        command = [*wrapper, sys.executable, str(tmp_path / "command.py"), *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        process = subprocess.Popen(command, start_new_session=True, **options)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_command
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_in_order(start, number):
    process = start("0")
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    words = [line for line in said.splitlines() if line]
    assert words[0].startswith("stopping…")
    assert words[1:] == ["closing True", "interrupted"]
    assert process.returncode == 128 + number


def test_a_second_ctrl_c_leaves_at_once(start):
    process = start("60")
    process.send_signal(signal.SIGINT)
    assert any("closing" in line for line in iter(process.stderr.readline, ""))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, warned = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert warned == "", "neither a traceback nor a warning about semaphores"
    assert said == "", "the block with something to do before leaving had ended"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_come_twice_are_one(start, number):
    """`timeout` sends SIGTERM to its child and to the group; a kernel and a shell both send SIGHUP."""
    process = start("1")
    process.send_signal(number)
    assert any("closing" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == "interrupted\n"
    assert process.returncode == 128 + number


def test_a_terminal_that_closes_ends_a_command_in_order(start):
    ours, its = pty.openpty()
    process = start("0", stderr=its)
    os.close(its)
    os.close(ours)  # whatever it says now has nowhere to go
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 129


def test_nohup_stays_deaf(start):
    process = start("0", wrapper=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


def test_an_error_reaches_the_main_thread_from_another_one():
    error, began = ResourceError("Ray has died"), time.monotonic()
    with stop_signals() as signals:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            threading.Thread(target=fail_command, args=(error,)).start()
            threading.Event().wait(20)
        assert (signals.failure, is_stopping()) == (error, True)
    assert time.monotonic() - began < 5
    assert not is_stopping()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_all_processes_is_the_cause_if_ray_ends_first(number, status):
    with stop_signals() as signals:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            threading.Thread(target=fail_command, args=(ResourceError("Ray has died"),)).start()
            threading.Event().wait(20)
        signals.handle(number, None)
        assert (signals.failure, signals.exit_status) == (None, status)


def test_handlers_are_as_before_when_the_command_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with stop_signals() as outer, stop_signals() as inner:
        assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer.handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("status", [130, 143])
def test_the_exit_status_names_the_signal(status):
    signals = StopSignals("stopping")
    signals.number = status - 128
    assert signals.exit_status == status
    signals.close()


REPLACED = """
    import ctypes, os, signal, sys, threading
    from raysweep.cluster.signals import keep_signal_handlers, stop_signals

    def replace_in_c():  # as Ray's C++ code does, in its own thread
        with keep_signal_handlers():
            ctypes.CDLL(None).signal(signal.SIGTERM, None)

    with stop_signals() as signals:
        try:
            thread = threading.Thread(target=replace_in_c)
            thread.start()
            thread.join()
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(20)
        except KeyboardInterrupt:
            sys.exit(signals.exit_status)
"""


def test_a_handler_that_c_code_replaces_in_another_thread_is_set_again():
    command = [sys.executable, "-c", textwrap.dedent(REPLACED)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    with keep_signal_handlers():
        pass
