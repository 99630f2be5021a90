"""Ray itself: starting it quietly, joining a cluster, and what its nodes have and see."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from raysweep.cluster.resources import Resources, local_resources
from raysweep.errors import ResourceError

# A pass over the images and the worker of a training run each hold one.
MIN_LOGICAL_CPUS = 2
SECONDS_BETWEEN_LOOKS = 2  # at the nodes of a cluster
PRELOADED = "torch,ray.tune,ray.train.torch,raysweep.worker.train,raysweep.worker.evaluate"


class RaySession:
    """Ray, started at most once and in a thread of its own, so that a sweep reads its images meanwhile.

    The thread lives as long as Ray does: the processes that Ray starts die with the thread that started them
    (PR_SET_PDEATHSIG), not with its process.

    Args:
        verbose: whether Ray's own messages are shown.
        on_start: told what the cluster has once Ray is up.
    """

    def __init__(self, verbose: bool, on_start: Callable[[Resources], None] = lambda _resources: None) -> None:
        self._verbose, self._on_start = verbose, on_start
        self._thread = ThreadPoolExecutor(1, "ray")
        self._stack = ExitStack()
        self._resources: Future[Resources] | None = None
        self._seen: tuple[float, Resources] | None = None
        self._preparation: Future[None] | None = None

    def start(self) -> None:
        """Begins to start Ray, or to join the cluster that RAY_ADDRESS names; returns at once."""
        if self._resources is None:
            self._resources = self._thread.submit(self._enter)

    def _enter(self) -> Resources:
        resources = self._stack.enter_context(ray_session(self._verbose))
        self._on_start(resources)
        return resources

    def prepare(self, function: Callable[[], None]) -> None:
        """Has something done in Ray's thread once Ray is up, without waiting for it; not if Ray is left before."""
        self._preparation = self._thread.submit(function)

    @property
    def resources(self) -> Resources:
        """What the cluster has; starts Ray, and waits until it is up.

        Raises:
            ResourceError: nothing answers at RAY_ADDRESS.
        """
        self.start()
        assert self._resources is not None
        return self._resources.result()

    @property
    def resources_now(self) -> Resources:
        """What the cluster has by now: nodes come and go. It is looked at every few seconds."""
        before = self.resources
        if not joins_cluster():
            return before
        if self._seen is None or time.monotonic() - self._seen[0] > SECONDS_BETWEEN_LOOKS:
            self._seen = time.monotonic(), present_resources()
        return self._seen[1]

    def leave(self) -> None:
        """Leaves Ray, where it was started: nothing needs it any more. Its processes may end a little later.

        Waits until this process has let go of it: until then no reference to one of Ray's objects may be dropped
        (see `_letting_go`), and whoever calls this holds some.
        """
        if self._preparation is not None:
            self._preparation.cancel()
        if self._resources is not None:
            left = self._thread.submit(self._stack.close)
            while not left.done() and _holds_ray():
                time.sleep(0.01)

    def close(self) -> None:
        """Waits until Ray has been left."""
        self.leave()
        self._thread.shutdown()


@contextmanager
def ray_session(verbose: bool) -> Iterator[Resources]:
    """Starts Ray, or joins the cluster that RAY_ADDRESS names, and leaves it again.

    Args:
        verbose: whether Ray's own messages are shown.

    Yields:
        What the cluster has.

    Raises:
        ResourceError: nothing answers at RAY_ADDRESS.
    """
    # Ray reads these when it is imported or its processes start; anything the user set stays.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # Tune would take an interrupt as "end this search", and the sweep would go on to the next study.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not joins_cluster():
        # The processes that Ray starts ahead import what takes them seconds while the driver reads the images.
        os.environ.setdefault("RAY_preload_python_modules", PRELOADED)
        # Ray runs workers at niceness 15: beside anything else on the machine they would hardly run at all.
        os.environ.setdefault("RAY_worker_niceness", "0")
    if not verbose:
        # Ray's C++ side writes to the terminal itself, past every logger; failures still arrive as exceptions.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS", "")
    joins, started = joins_cluster(), not ray.is_initialized()
    if started:
        _check_reachable(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not verbose else "default")
        if started:
            # "local", because Ray would else look for a cluster that runs on this machine, and join that one.
            own: dict[str, Any] = {"address": "local", "num_cpus": max(MIN_LOGICAL_CPUS, local_resources().num_cpus)}
            own = {} if joins else own
            with nullcontext() if verbose else _silent_stderr():
                ray.init(include_dashboard=None if joins else False, log_to_driver=verbose, logging_level=level, **own)
        if not verbose:
            _quieten()
        import ray.data

        # Or an error of ours would reach the driver as text, in a traceback of Ray Data's.
        ray.data.DataContext.get_current().raise_original_map_exception = True
        try:
            yield present_resources()
        finally:
            if started:
                with _letting_go():
                    ray.shutdown()


def _holds_ray() -> bool:
    """Whether this process is still a driver, for Ray's C++ side: `ray.is_initialized()` is true for longer."""
    worker = sys.modules.get("ray._private.worker")
    return worker is not None and hasattr(worker.global_worker, "core_worker")


@contextmanager
def _letting_go() -> Iterator[None]:
    """Keeps Python from collecting cycles.

    There may be references to Ray's objects among them, and Ray ends the process, with status 1 and without a word,
    when one is dropped while it shuts down (`CoreWorkerProcessImpl::GetCoreWorker`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def joins_cluster() -> bool:
    """Whether this sweep runs on a cluster that is there already, rather than on a Ray of its own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def present_resources() -> Resources:
    """What the nodes have that are alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive)
    return Resources(sum(num_cpus for num_cpus, _ in nodes), sum(num_gpus for _, num_gpus in nodes), nodes)


def let_tune_use_started_workers() -> None:
    """Lets Tune's actors run in processes that Ray has started ahead, on a Ray of our own.

    Tune gives its actors a runtime environment with copies of the driver's variables, and Ray starts another process
    for whatever has one. On one machine processes inherit those variables anyway (docs/decisions/0011).
    """
    from ray.tune.execution import class_cache

    if not joins_cluster():
        class_cache.DEFAULT_ENV_VARS.clear()
        class_cache.ENV_VARS_TO_PROPAGATE.clear()


def _check_reachable(address: str) -> None:
    """Knocks at `host:port` (or `ray://host:port`): Ray itself would try for two minutes, then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}' ({error})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keeps what is written to file descriptor 2 back, and shows it only when the block fails.

    Setting Ray's log level makes its C++ side say so, on a line of its own that no setting suppresses.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held_back:
        terminal = os.dup(2)
        try:
            os.dup2(held_back.fileno(), 2)
            yield
        except BaseException:
            held_back.seek(0)
            os.write(terminal, held_back.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _quieten() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What they raise is told anyway; and Tune would print the traceback of every trial that it does again elsewhere.
    for name in ("ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
