"""The Ray of a sweep: who can reach it and read its files, and what is left when it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from raysweep.cluster import own_ray
from raysweep.cluster.own_ray import private_folder
from raysweep.errors import ResourceError


@pytest.fixture
def temporary(monkeypatch):
    """A folder for temporary files with a short path, as TMPDIR."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_only_this_user_enters_the_folder_and_it_is_removed(temporary):
    with private_folder() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "ray").mkdir()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("problem", ["long", "missing", "a file", "full"])
def test_a_folder_that_ray_cannot_use_is_not_used(problem, temporary, monkeypatch):
    place = temporary / ("x" * 60)
    if problem == "long":
        place.mkdir()
    elif problem == "a file":
        place = temporary / "file"
        place.write_text("")
    elif problem == "full":
        place = temporary
        usage = shutil.disk_usage
        full = usage(temporary)._replace(free=5_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full if Path(path) == temporary else usage(path))
    monkeypatch.setenv("TMPDIR", str(place))
    with private_folder() as folder:
        assert not folder.is_relative_to(place)
        longest = f"{folder}/{own_ray.RAY}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
        assert len(longest) <= own_ray.MAX_SOCKET_PATH


def test_without_any_folder_the_error_names_them_all(temporary, monkeypatch):
    monkeypatch.setattr(own_ray, "MIN_FREE_BYTES", 10**18)
    with pytest.raises(ResourceError, match=r"TMPDIR: no folder .* MB are free; /tmp: .*; accepted: a folder with a"):
        private_folder().__enter__()


def test_folders_of_killed_sweeps_are_removed_and_those_of_others_stay(temporary):
    with private_folder() as running:
        left = temporary / "rs-aaaaaaaa"
        left.mkdir()
        (left / "lock").write_text("")
        (temporary / "rs-bbbbbbbb").mkdir()  # a sweep that starts now: it has no lock yet
        (temporary / "other").mkdir()
        with private_folder():
            assert not left.exists()
            assert {"rs-bbbbbbbb", "other", running.name} < {path.name for path in temporary.iterdir()}


# A real Ray: what listens, who reads, and what stays


SESSION = """
    import json, os, sys, time
    from pathlib import Path
    import ray
    from raysweep.cluster.signals import leave_at_once, stop_signals
    from raysweep.cluster.session import ray_session

    @ray.remote
    def environment(seconds):
        time.sleep(seconds)
        return dict(os.environ)

    with stop_signals() as signals:
        try:
            with ray_session(verbose=False):
                node = ray._private.worker._global_node
                told = {"folder": node.get_session_dir_path(), "gcs": node.gcs_address,
                        "worker": ray.get(environment.remote(0)), "driver": dict(os.environ),
                        "processes": {name: process.pid for name, process in node.live_processes()}}
                print(json.dumps(told), flush=True)
                waited_for = environment.remote(1000)
                while True:  # as Tune and Ray Data do
                    ray.wait([waited_for], timeout=0.5)
        except KeyboardInterrupt:
            if signals.failure:
                print("error:", signals.failure, flush=True)
                leave_at_once(1)
            leave_at_once(signals.exit_status)
"""


@pytest.fixture
def session(temporary):
    """A process with a Ray of its own, and what it tells about it."""
    started = []

    def start(**variables):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SESSION)],
            env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("{"), line + process.stdout.read()
        return process, json.loads(line)

    yield start
    for process in started:
        process.kill()
        process.wait()
    with private_folder():  # ends what a killed driver leaves
        pass


def processes_in(folder):
    """Ids of the processes with open files in a folder."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if own_ray._has_files_in(folder, process):
                found.add(int(process.name))
    return found


def assert_empty_soon(folder, others):
    """Killed processes need a moment to end."""
    deadline = time.monotonic() + 5
    while left := processes_in(folder) - others:
        assert time.monotonic() < deadline, [Path(f"/proc/{number}/cmdline").read_text() for number in left]
        time.sleep(0.1)


def listening_addresses(processes):
    from ray._private.process_watcher import psutil  # Ray ships its own

    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # idle workers end when they like
            found |= {one.laddr.ip for one in psutil.Process(process).net_connections("inet") if one.status == "LISTEN"}
    return found


def as_nobody(*command):
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


JOB = """
    import os, grpc, sys
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest, GetAllJobInfoRequest
    from ray.core.generated import gcs_service_pb2_grpc as services
    with grpc.insecure_channel(sys.argv[1]) as channel:
        try:
            services.JobInfoGcsServiceStub(channel).GetAllJobInfo(GetAllJobInfoRequest(), timeout=5)
            print("answered")
        except grpc.RpcError as error:
            print(error.code().name)
"""


@pytest.mark.ray
def test_others_on_the_machine_get_no_work_and_no_files(session, temporary):
    process, told = session(
        RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="known-to-others", RAY_GCS_SERVER_PORT="1", OMP_WAIT_POLICY="ACTIVE"
    )
    assert told["worker"]["OMP_WAIT_POLICY"] == told["driver"]["OMP_WAIT_POLICY"] == "ACTIVE", "a user's value is kept"
    assert told["worker"]["MALLOC_ARENA_MAX"] == "1"
    assert "MALLOC_ARENA_MAX" not in told["driver"], "the settings of Ray's processes are not those of this one"
    assert told["gcs"].startswith("127.0.0.1:")
    running = processes_in(temporary)
    assert set(told["processes"]) == {"gcs_server", "raylet"}  # no dashboard, autoscaler or monitor of logs
    assert len(running) >= 5  # with two agents, and a worker
    assert listening_addresses(running | {process.pid}) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    status = Path(f"/proc/{told['processes']['raylet']}/status").read_text()
    blocked = int(re.search(r"^SigBlk:\s+(\w+)", status, re.M)[1], 16)
    for number in (signal.SIGHUP, signal.SIGTERM):
        assert blocked & 1 << number - 1, f"{number.name} to all processes does not end it"
    token = told["worker"]["RAY_AUTH_TOKEN"]
    assert (len(token), told["driver"]["RAY_AUTH_TOKEN"]) == (64, "known-to-others")
    # The token stands in no file and on no command line.
    written = [path for path in temporary.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    lines = [Path(f"/proc/{number}/cmdline").read_bytes() for number in told["processes"].values()]
    assert (written, [line for line in lines if token.encode() in line]) == ([], [])
    asked = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(JOB), told["gcs"]], capture_output=True, text=True, check=False
    )
    assert asked.stdout.split() == ["UNAUTHENTICATED"], asked.stderr
    if os.getuid() == 0 and shutil.which("setpriv"):
        for command in (["ls", told["folder"]], ["cat", f"/proc/{told['processes']['raylet']}/environ"]):
            done = as_nobody(*command)
            assert (done.returncode != 0, done.stdout) == (True, ""), command


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_ray_that_dies_is_named_soon(session, temporary, name):
    process, told = session()
    os.kill(told["processes"][name], signal.SIGKILL)
    started = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert f"error: Ray's process {name} (status -9) has died" in said
    assert process.returncode == 1
    assert time.monotonic() - started < 15
    assert "Traceback" not in said
    assert_empty_soon(temporary, others=set())
    assert list(temporary.iterdir()) == []


@pytest.mark.ray
def test_sigterm_to_all_processes_ends_only_the_driver(session, temporary):
    """So send it `timeout`, systemd and Slurm. Ray's C++ code would end the driver if its raylet ended first."""
    process, _ = session()
    running = processes_in(temporary)
    for number in running - {process.pid}:
        os.kill(number, signal.SIGTERM)
    time.sleep(1)
    assert processes_in(temporary) >= running
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert_empty_soon(temporary, others=set())


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_of_a_killed_sweep_stays_for_long(session, temporary):
    process, _ = session()
    process.kill()
    process.wait()
    with private_folder() as folder:  # of the next run
        assert_empty_soon(temporary, others={os.getpid()})
        assert list(temporary.iterdir()) == [folder]
