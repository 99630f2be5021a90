import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import mlflow
import pytest
from mlflow.exceptions import RestException

from raysweep.errors import RaysweepError
from raysweep.results import recorder as module
from raysweep.results.recorder import start_recorder
from raysweep.results.tracking import LoggedTrial, Tracker

pytestmark = pytest.mark.process

WAIT_S = 120

# A driver that opens a run, says which process writes for it, and waits to be stopped.
DRIVER = """
import multiprocessing, signal, sys, time
from raysweep.results.recorder import start_recorder
from raysweep.results.tracking import Tracker

signal.signal(signal.SIGTERM, signal.default_int_handler)

recorder = start_recorder(sys.argv[1], sys.argv[2])
run_id, _ = recorder.call(Tracker.start_run, "key", "name", "sweep")
try:
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(120)
except KeyboardInterrupt:
    recorder.call(Tracker.log_metrics, run_id, {"after": 1.0})
    print("still writing", flush=True)
recorder.close()
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for the module, since making its tables takes seconds; every test has its own experiment in it."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def recorder(uri, request):
    recorder = start_recorder(uri, request.node.name)
    yield recorder
    recorder.close()


def find(uri, experiment):
    """The runs of an experiment by name."""
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run for run in runs}


def test_calls_are_made_in_order_and_answered(recorder, uri, request):
    run_id, created = recorder.call(Tracker.start_run, "key", "name", "sweep")
    assert created
    sent = recorder.send(Tracker.start_run, "key", "renamed", "sweep")
    for epoch in range(20):
        recorder.send(Tracker.log_history, run_id, [{"val/loss": float(epoch)}], epoch)
    recorder.send(Tracker.start_run, "key", "last name", "sweep")
    recorder.wait()
    assert sent.result() == (run_id, False)
    (run,) = find(uri, request.node.name).values()
    assert run.info.run_name == "last name"
    curve = mlflow.MlflowClient(uri).get_metric_history(run_id, "val/loss")
    assert [(point.step, point.value) for point in curve] == [(epoch + 1, epoch) for epoch in range(20)]


def test_close_ends_open_runs_as_failed_and_the_process(uri, request):
    recorder = start_recorder(uri, request.node.name)
    recorder.call(Tracker.start_run, "open", "open", "sweep")
    done, _ = recorder.call(Tracker.start_run, "done", "done", "sweep")
    recorder.send(Tracker.finish, done)
    recorder.wait()
    recorder.close()
    found = find(uri, request.node.name)
    assert {name: run.info.status for name, run in found.items()} == {"open": "FAILED", "done": "FINISHED"}
    with pytest.raises(RuntimeError, match="after shutdown"):
        recorder.send(Tracker.finish, done)


def test_what_goes_wrong_shows_at_the_next_call(recorder):
    run_id, _ = recorder.call(Tracker.start_run, "key", "name", "sweep")
    recorder.call(Tracker.log_once, run_id, {"epochs": 5})
    lost = recorder.send(Tracker.log_once, run_id, {"epochs": 6})
    assert isinstance(lost.exception(WAIT_S), RaysweepError)
    for again in (lambda: recorder.send(Tracker.finish, run_id), recorder.wait):
        with pytest.raises(RaysweepError, match=r"(?s)^tracking.uri: the MLflow store 'sqlite.*refused.*epochs"):
            again()


def test_a_call_raises_what_goes_wrong_with_it(recorder):
    with pytest.raises(RaysweepError, match=r"refused.*the same command goes on from here"):
        recorder.call(Tracker.log_once, "no_such_run", {"epochs": 5})


def test_a_store_that_cannot_be_used_is_named():
    recorder = start_recorder("mongodb://127.0.0.1/x", "x")
    with pytest.raises(RaysweepError, match=r"^tracking\.uri: 'mongodb://127\.0\.0\.1/x' cannot be used"):
        recorder.wait()
    with pytest.raises(RaysweepError, match="cannot be used"):
        recorder.send(Tracker.start_run, "key", "name", "sweep")
    recorder.close()


def test_a_long_wait_is_said_once(uri, request, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BEFORE_NOTICE", 0.01)
    said = []
    recorder = start_recorder(uri, request.node.name, said.append)
    sent = recorder.send(Tracker.start_run, "key", "name", "sweep")
    recorder.wait()
    assert said == [f"waiting for MLflow at {uri}: 2 calls to go"]
    assert sent.done()
    recorder.close()


def test_a_server_that_never_answers_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_CLOSE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        recorder = start_recorder(f"http://127.0.0.1:{silent.getsockname()[1]}", "x")
        silent.accept()  # the writer has begun to ask
        (writer,) = recorder._process._processes.values()
        started = time.monotonic()
        recorder.close()
        assert time.monotonic() - started < 30, "MLflow waits for two minutes"
        writer.kill()
        writer.join(WAIT_S)


# A store that is out of reach


class FlakyTracker:
    """A tracker whose store is away for a number of calls."""

    def __init__(self, errors):
        self.errors, self.num_calls, self.num_forgotten = list(errors), 0, 0

    def forget(self):
        self.num_forgotten += 1

    def start_run(self, key):
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return key, True


@pytest.fixture
def call(monkeypatch):
    """Calls a method of a tracker as the process that writes does."""

    def use(tracker, seconds=30.0, closing=False):
        outage = module.Outage(threading.Event(), threading.Event(), seconds)
        if closing:
            outage.is_closing.set()
        monkeypatch.setattr(module, "_trackers", [tracker])
        monkeypatch.setattr(module, "_outage", [outage])
        return outage, lambda: module._call("http://h", FlakyTracker.start_run, ("key",), {})

    monkeypatch.setattr(module, "MAX_PAUSE", 0.01)
    return use


AWAY = mlflow.MlflowException("API request to http://h failed with exception ...")


def test_a_call_is_repeated_until_the_store_is_back(call):
    tracker = FlakyTracker([AWAY, ConnectionResetError(), AWAY])
    outage, made = call(tracker)
    assert made() == ("key", True)
    assert (tracker.num_calls, tracker.num_forgotten, outage.is_lost.is_set()) == (4, 3, False)


def test_a_store_that_stays_away_gets_no_further_calls(call):
    tracker = FlakyTracker([AWAY] * 100)
    outage, made = call(tracker, seconds=0.3)
    assert made() == ("", False)
    assert outage.is_lost.is_set()
    num_calls = tracker.num_calls
    assert made() == ("", False)
    assert tracker.num_calls == num_calls


def test_what_a_store_refuses_is_not_repeated(call):
    tracker = FlakyTracker([RestException({"error_code": "PERMISSION_DENIED", "message": "no"})])
    _, made = call(tracker)
    with pytest.raises(RaysweepError, match=r"the MLflow store 'http://h' refused: PERMISSION_DENIED: no"):
        made()
    tracker.errors.append(OSError(28, "No space left on device"))
    with pytest.raises(RaysweepError, match="nothing can be written to 'http://h'"):
        made()
    assert tracker.num_calls == 2


def test_the_end_of_a_sweep_does_not_wait_for_a_store(call):
    tracker = FlakyTracker([AWAY] * 100)
    outage, made = call(tracker, closing=True)
    assert made() == ("", False)
    assert (tracker.num_calls, outage.is_lost.is_set()) == (1, False)


class Server:
    """An MLflow server on a store, that can be stopped and started again at the same address."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--port", str(self.port)]
        command = [sys.executable, "-m", "mlflow", "server", *store]
        self.process = subprocess.Popen(command, cwd=self.folder, start_new_session=True)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while_gets_everything_once_later_and_one_that_stays_away_is_told(tmp_path):
    server, said = Server(tmp_path), []
    server.start()
    try:
        recorder = start_recorder(server.uri, "x", said.append, seconds_away=120)
        sweep, _ = recorder.call(Tracker.start_run, "sweep", "sweep", "sweep")
        server.stop()
        trial = LoggedTrial({"lr": 1}, [{"val/loss": 1.0}, {"val/loss": 0.5}], {"val/loss": 0.5}, "FINISHED")
        for number in range(20):
            recorder.send(Tracker.log_trial, sweep, f"t/{number}", f"t-{number}", trial)
        time.sleep(5)
        server.start()
        recorder.wait()
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("x").experiment_id
        runs = client.search_runs([experiment], "tags.`raysweep.level` = 'trial'")
        assert [run.info.status for run in runs] == ["FINISHED"] * 20
        for run in runs[:3]:
            points = client.get_metric_history(run.info.run_id, "val/loss")
            assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5)]
        assert not recorder.is_lost
        recorder.close()
        recorder = start_recorder(server.uri, "x", said.append, seconds_away=3)
        sweep, _ = recorder.call(Tracker.start_run, "sweep", "sweep", "sweep")
        server.stop()
        recorder.send(Tracker.log_trial, sweep, "t/20", "t-20", trial)
        assert recorder.call(Tracker.start_run, "study", "study", "study", sweep) == ("", False)
        assert recorder.is_lost
        assert recorder.call(Tracker.log_metrics, sweep, {"a": 1.0}) is None
        assert said[-1].startswith(f"warning: MLflow at {server.uri} has not answered for 3 s; the sweep goes on")
        started = time.monotonic()
        recorder.close()
        assert time.monotonic() - started < 20
    finally:
        server.stop()


# What the driver's end does to the writer


@pytest.fixture
def driver(uri, request):
    """The driver and the process that writes for it, in a process group of their own."""
    command = [sys.executable, "-c", DRIVER, uri, request.node.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process, int(process.stdout.readline())
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid):
    deadline = time.monotonic() + WAIT_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_to_the_process_group_is_left_to_the_driver(driver, uri, request, number):
    process, writer = driver
    os.killpg(process.pid, number)
    assert process.communicate(timeout=WAIT_S)[0] == "still writing\n"
    assert process.returncode == 0
    run = find(uri, request.node.name)["name"]
    assert (run.data.metrics["after"], run.info.status) == (1.0, "FAILED")
    wait_until_gone(writer)


def test_the_writer_ends_with_a_driver_that_is_killed(driver):
    process, writer = driver
    assert is_alive(writer)
    process.kill()
    process.wait(WAIT_S)
    wait_until_gone(writer)


def test_a_writer_that_was_killed_is_reported_as_ours_and_does_not_hinder_the_end(uri, request):
    recorder = start_recorder(uri, request.node.name)
    recorder.wait()
    (writer,) = recorder._process._processes.values()
    writer.kill()
    writer.join(WAIT_S)
    with pytest.raises(RaysweepError, match=r"tracking\.uri"):
        recorder.call(Tracker.start_run, "key", "name", "sweep")
    recorder.close()
