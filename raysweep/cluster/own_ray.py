"""The Ray that a sweep starts for itself: nobody else on this machine can read its files or give it work.

Its folder is private, its token is random and stands only in the environment of its processes, and its servers listen
on the loopback address. docs/security.md says what remains.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raysweep.cluster.resources import local_resources
from raysweep.cluster.signals import before_leaving, deaf_to_signals, fail_command
from raysweep.errors import KEPT, ResourceError, one_line

LOOPBACK = "127.0.0.1"
# The pass over the images and the worker of a training run each need one.
MIN_LOGICAL_CPUS = 2
PREFIX = "rs-"
RAY = "ray"  # the folder in it that Ray opens for everybody, as it does with all its folders
# What Ray adds to that: /session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store
LONGEST_SOCKET = 64
MAX_SOCKET_PATH = 103  # bytes: macOS 103, Linux 107
MIN_FREE_BYTES = 100_000_000  # logs, and a start of Ray that can say what is wrong
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
SECONDS_UNTIL_LEFT_OVER = 60
SECONDS_BETWEEN_CHECKS = 0.02  # Ray's C++ code ends this process without a word at the first use of a dead object store
# Ray would use these instead of its own: another cluster's database, ports, token, or settings of a job.
NOT_OURS = ("RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR",
            "RAY_RUNTIME_ENV_HOOK", "RAY_OVERRIDE_RESOURCES", "RAY_NAMESPACE")  # fmt: skip
# For Ray's processes alone, not for this one and what it starts later. Values that the user has set are kept.
PROCESS_SETTINGS = {
    # Threads that spin while they wait take the CPUs from what they wait for (docs/decisions/0026).
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc would give large activations back to the system after every layer, and ask for them again.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def own_ray(options: Mapping[str, Any]) -> Iterator[None]:
    """Starts Ray on this machine; at the end, removes its files and ends the processes that still use them.

    Args:
        options: more options of `ray.init`.

    Raises:
        ResourceError: Ray cannot start here.
    """
    import ray

    with private_folder() as folder:
        try:
            with _own_settings(), _fewer_processes(options), deaf_to_signals():
                # Without "local", Ray would look for a running cluster on this machine and join it.
                ray.init(
                    address="local",
                    num_cpus=max(MIN_LOGICAL_CPUS, local_resources().num_cpus),
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder / RAY),
                    **options,
                )
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}", 500)
            raise ResourceError(f"Ray cannot start on this machine, with its files in {folder} ({reason})") from error
        _end_by_sigkill()
        yield


def _end_by_sigkill() -> None:
    """Lets Ray end its processes by SIGKILL: they are deaf to its SIGTERM, and it would wait a second for each."""
    import ray

    for started in ray._private.worker._global_node.all_processes.values():
        for each in started:
            each.process.terminate = each.process.kill


@contextmanager
def private_folder() -> Iterator[Path]:
    """Makes a folder for Ray's files that only this user can enter, and removes it at the end.

    Raises:
        ResourceError: no folder for temporary files can be used.
    """
    base = _base_folder()
    _remove_leftovers(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = FileLock(folder / "lock")
    lock.acquire()
    try:
        with before_leaving(partial(_remove, folder)):
            yield folder
    finally:
        _remove(folder)
        lock.release()


def _base_folder() -> Path:
    """Returns the folder for temporary files in which Ray's can lie."""
    named = [(name, os.environ[name]) for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    candidates = [*named, *(("", place) for place in ("/tmp", "/var/tmp", "/dev/shm"))]
    problems = []
    for name, place in candidates:
        problem = _problem(place)
        if problem is None:
            return Path(place).absolute()
        problems.append(f"{name + ' ' if name else ''}{place}: {problem}")
    raise ResourceError(
        f"TMPDIR: no folder can hold Ray's temporary files ({'; '.join(problems)}); accepted: a folder with a short "
        f"path that can be written to and has {MIN_FREE_BYTES // 1_000_000} MB free"
    )


def _problem(place: str) -> str | None:
    """Returns why Ray's files cannot lie in a folder; None if they can."""
    num_bytes = len(os.fsencode(os.path.abspath(place))) + len(f"/{PREFIX}12345678/{RAY}") + LONGEST_SOCKET
    if num_bytes > MAX_SOCKET_PATH:
        return f"its path is {num_bytes - MAX_SOCKET_PATH} bytes too long for Ray's sockets"
    try:
        with tempfile.TemporaryDirectory(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return str(error.strerror).lower()
    return None if free >= MIN_FREE_BYTES else f"{free / 1e6:.0f} MB are free"


def _remove_leftovers(base: Path) -> None:
    """Removes folders of sweeps that were killed, and ends the processes that still write there."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            about = folder.lstat()
            is_new = time.time() - about.st_mtime < SECONDS_UNTIL_LEFT_OVER and not (folder / "lock").exists()
            if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode) or is_new:
                continue
            with FileLock(folder / "lock", blocking=False):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Removes Ray's folder, and ends processes with files there: its agents live on after a killed driver."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or ended by now
            if process.name != str(os.getpid()) and _has_files_in(folder / RAY, process):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _has_files_in(folder: Path, process: Path) -> bool:
    """Returns whether a process, given by its folder in /proc, has files of a folder open."""
    for file in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            if os.readlink(file).startswith(f"{folder}/"):
                return True
    return False


@contextmanager
def _own_settings() -> Iterator[None]:
    """Sets a new token and the loopback address for the processes that Ray starts in this block."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own |= {name: os.environ.get(name, value) for name, value in PROCESS_SETTINGS.items()}
    before = {name: os.environ.pop(name, None) for name in (*NOT_OURS, *own, RECONNECT)}
    os.environ.update(own)
    # Ray has read its settings, if it was imported or started before.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray's agents would wait for a minute for a GCS that has died, for example after its driver was killed. So would
    # this process, and then end without a word: `watched` is sooner.
    os.environ.setdefault(RECONNECT, "20")
    # Ray replaces 127.0.0.1 by an address that other machines reach, unless it is told that there will be none.
    allows_others, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = allows_others
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _fewer_processes(options: Mapping[str, Any]) -> Iterator[None]:
    """Lets Ray start in this block without processes that a sweep on one machine does not use.

    These are the dashboard's server, for which Ray would wait; the autoscaler; and the monitor of the logs if nobody
    sees them. Together they take 1.4 s of CPU time (docs/decisions/0027).
    """
    from ray._private.node import Node

    unused = ["start_api_server", "start_monitor", *([] if options.get("log_to_driver") else ["start_log_monitor"])]
    before = {name: getattr(Node, name) for name in unused}
    for name in unused:
        setattr(Node, name, lambda _node, **_options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def watched() -> Iterator[None]:
    """Ends the command when a process of Ray dies. Ray itself would exit without a reason, at once or after a minute.

    The block has to end before Ray is shut down: that ends its processes, too.
    """
    import ray

    node, is_over = ray._private.worker._global_node, threading.Event()

    def watch() -> None:
        while not is_over.wait(SECONDS_BETWEEN_CHECKS):
            if dead := [f"{name} (status {process.returncode})" for name, process in node.dead_processes()]:
                fail_command(
                    ResourceError(
                        f"Ray's process {', '.join(dead)} has died: it was killed, or this machine ran out of memory; "
                        f"{KEPT}"
                    )
                )
                return

    thread = threading.Thread(target=watch, name="raysweep-ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
