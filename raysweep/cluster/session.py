"""Starts Ray or joins a cluster, and tells which resources its nodes have."""

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

# The pass over the images and the worker of a training run each need one.
MIN_LOGICAL_CPUS = 2
SECONDS_BETWEEN_LOOKS = 2  # between two queries for the nodes of a cluster
PRELOADED = "torch,ray.tune,ray.train.torch,raysweep.worker.train,raysweep.worker.evaluate"


class RaySession:
    """Starts Ray at most once, in its own thread, so that the sweep can read its images at the same time.

    The thread must live until Ray is shut down: the kernel ends Ray's processes when the thread that started them ends
    (PR_SET_PDEATHSIG), not when its process ends.

    Args:
        verbose: Whether Ray's own messages are shown.
        on_start: Called with the resources of the cluster when Ray has started.
    """

    def __init__(self, verbose: bool, on_start: Callable[[Resources], None] = lambda _resources: None) -> None:
        self._verbose, self._on_start = verbose, on_start
        self._thread = ThreadPoolExecutor(1, "ray")
        self._stack = ExitStack()
        self._resources: Future[Resources] | None = None
        self._seen: tuple[float, Resources] | None = None
        self._preparation: Future[None] | None = None

    def start(self) -> None:
        """Starts Ray in the background, or joins the cluster of RAY_ADDRESS. Does not wait."""
        if self._resources is None:
            self._resources = self._thread.submit(self._enter)

    def _enter(self) -> Resources:
        resources = self._stack.enter_context(ray_session(self._verbose))
        self._on_start(resources)
        return resources

    def prepare(self, function: Callable[[], None]) -> None:
        """Schedules a function in Ray's thread after Ray's start. It does not run if `leave` is called before."""
        self._preparation = self._thread.submit(function)

    @property
    def resources(self) -> Resources:
        """The resources of the cluster. Starts Ray if needed, and waits for it.

        Raises:
            ResourceError: No cluster answers at RAY_ADDRESS.
        """
        self.start()
        assert self._resources is not None
        return self._resources.result()

    @property
    def resources_now(self) -> Resources:
        """The current resources of the cluster, whose nodes can change. Queried at most every few seconds."""
        before = self.resources
        if not joins_cluster():
            return before
        if self._seen is None or time.monotonic() - self._seen[0] > SECONDS_BETWEEN_LOOKS:
            self._seen = time.monotonic(), present_resources()
        return self._seen[1]

    def leave(self) -> None:
        """Shuts Ray down if it was started. Ray's processes may end a little later.

        Waits until this process has disconnected from Ray. Before that, no reference to a Ray object may be deleted
        (see `_no_garbage_collection`), and the caller holds such references.
        """
        if self._preparation is not None:
            self._preparation.cancel()
        if self._resources is not None:
            shutdown = self._thread.submit(self._stack.close)
            while not shutdown.done() and _holds_ray():
                time.sleep(0.01)

    def close(self) -> None:
        """Shuts Ray down, and waits until this is done."""
        self.leave()
        self._thread.shutdown()


@contextmanager
def ray_session(verbose: bool) -> Iterator[Resources]:
    """Starts Ray, or joins the cluster of RAY_ADDRESS. Shuts Ray down at the end.

    Args:
        verbose: Whether Ray's own messages are shown.

    Yields:
        The resources of the cluster.

    Raises:
        ResourceError: No cluster answers at RAY_ADDRESS.
    """
    # Ray reads these at its import or at the start of its processes. Values that the user has set are kept.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # On Ctrl-C, Tune would only end the current search, and the sweep would continue with the next study.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not joins_cluster():
        # Ray's idle worker processes import these modules, which takes seconds, while the driver reads the images.
        os.environ.setdefault("RAY_preload_python_modules", PRELOADED)
        # Ray's default is niceness 15: workers would hardly run while other programs use the CPUs.
        os.environ.setdefault("RAY_worker_niceness", "0")
    if not verbose:
        # Ray's C++ code writes to the terminal without Python's loggers. Errors still arrive as exceptions.
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
            # Without "local", Ray would look for a running cluster on this machine and join it.
            options: dict[str, Any] = {
                "address": "local",
                "num_cpus": max(MIN_LOGICAL_CPUS, local_resources().num_cpus),
            }
            options = {} if joins else options
            with nullcontext() if verbose else _silent_stderr():
                ray.init(
                    include_dashboard=None if joins else False, log_to_driver=verbose, logging_level=level, **options
                )
        if not verbose:
            _silence_ray()
        import ray.data

        # Without this, our own errors reach the driver as text in a traceback of Ray Data.
        ray.data.DataContext.get_current().raise_original_map_exception = True
        try:
            yield present_resources()
        finally:
            if started:
                with _no_garbage_collection():
                    ray.shutdown()


def _holds_ray() -> bool:
    """Returns whether Ray's C++ code is still connected. `ray.is_initialized()` stays true for longer."""
    worker = sys.modules.get("ray._private.worker")
    return worker is not None and hasattr(worker.global_worker, "core_worker")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disables Python's garbage collection of reference cycles.

    Cycles may contain references to Ray objects. If one is deleted during Ray's shutdown, Ray ends the process with
    status 1 and without a message (`CoreWorkerProcessImpl::GetCoreWorker`).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def joins_cluster() -> bool:
    """Returns whether the sweep joins an existing cluster, instead of starting Ray itself."""
    return bool(os.environ.get("RAY_ADDRESS"))


def present_resources() -> Resources:
    """Returns the resources of all nodes that are alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive)
    return Resources(sum(num_cpus for num_cpus, _ in nodes), sum(num_gpus for _, num_gpus in nodes), nodes)


def let_tune_use_started_workers() -> None:
    """Lets Tune's actors use the worker processes that Ray has already started. Does nothing on a cluster.

    Tune gives its actors a runtime environment with copies of the driver's variables, and Ray starts a new process for
    each actor that has one. On one machine, processes inherit these variables anyway (docs/decisions/0011).
    """
    from ray.tune.execution import class_cache

    if not joins_cluster():
        class_cache.DEFAULT_ENV_VARS.clear()
        class_cache.ENV_VARS_TO_PROPAGATE.clear()


def _check_reachable(address: str) -> None:
    """Checks that `[ray://]host:port` accepts connections. Ray would try for two minutes, then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}' ({error})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Captures the output to file descriptor 2, and shows it only if the block raises an error.

    When its log level is set, Ray's C++ code prints a line about it, which no setting suppresses.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        terminal = os.dup(2)
        try:
            os.dup2(captured.fileno(), 2)
            yield
        except BaseException:
            captured.seek(0)
            os.write(terminal, captured.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _silence_ray() -> None:
    """Turns off Ray Data's progress bars and the messages of Ray's loggers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Their errors are raised anyway. Tune would also print a traceback for every trial that it runs again elsewhere.
    for name in ("ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
