"""Starts Ray or joins a cluster, and tells which resources its nodes have."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext

from raysweep.cluster.address import joined_cluster, joins_cluster
from raysweep.cluster.own_ray import own_ray, watched
from raysweep.cluster.resources import Resources, local_resources
from raysweep.cluster.signals import is_stopping, keep_signal_handlers

SECONDS_BETWEEN_LOOKS = 2  # between two queries for the nodes of a cluster
# Our code relies on these, whatever other programs of the user need.
NEEDED_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # On Ctrl-C, Tune would only end the current search, and the sweep would continue with the next study.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# Values that the user has set are kept.
DEFAULT_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default, a task that does not fit into memory is tried again without end.
    "RAY_task_oom_retries": "3",
}
DEFAULTS_OF_OWN_RAY = {
    # Ray's idle worker processes import these modules, which takes seconds, while the driver reads the images.
    "RAY_preload_python_modules": "torch,ray.tune,ray.train.torch,raysweep.worker.train,raysweep.worker.evaluate",
    # Ray's default is niceness 15: workers would hardly run while other programs use the CPUs.
    "RAY_worker_niceness": "0",
}


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
            ResourceError: Ray cannot start, or no cluster answers at RAY_ADDRESS.
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
        """Shuts Ray down, and waits until this is done; or until the process ends, if a signal ends it now."""
        has_joined = joins_cluster() and self._resources is not None and self._resources.done()
        if is_stopping() and not has_joined:
            return  # Ray may be starting, or busy; it ends with this process (`leave_at_once`)
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
        ResourceError: Ray cannot start, or no cluster answers at RAY_ADDRESS.
    """
    _set_environment(verbose)
    import ray

    level = logging.INFO if verbose else logging.ERROR
    options = {"log_to_driver": verbose, "logging_level": level}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore" if not verbose else "default")
        if not ray.is_initialized():
            with nullcontext() if verbose else _silent_stderr(), keep_signal_handlers():
                stack.enter_context(joined_cluster(options) if joins_cluster() else own_ray(options))
            stack.callback(_shut_down)
            if not joins_cluster():
                stack.enter_context(watched())
        if not verbose:
            _silence_ray()
        import ray.data

        # Without this, our own errors reach the driver as text in a traceback of Ray Data.
        ray.data.DataContext.get_current().raise_original_map_exception = True
        yield present_resources()


def _set_environment(verbose: bool) -> None:
    """Sets what Ray reads at its import, or at the start of its processes."""
    os.environ.update(NEEDED_SETTINGS)
    defaults = dict(DEFAULT_SETTINGS)
    if not joins_cluster():
        defaults |= DEFAULTS_OF_OWN_RAY
        # A process that starts keeps a CPU busy for seconds, and the driver and MLflow's process start at that time.
        defaults["RAY_worker_maximum_startup_concurrency"] = str(max(1, local_resources().num_cpus // 2))
    if not verbose:
        # Ray's C++ code writes to the terminal without Python's loggers. Errors still arrive as exceptions.
        defaults["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _shut_down() -> None:
    """Disconnects from Ray, and ends it if this process has started it."""
    import ray

    node = ray._private.worker._global_node
    with _no_garbage_collection(), keep_signal_handlers():
        if node is not None and node.dead_processes():  # ray.shutdown would wait for them, or end this process
            node.kill_all_processes(check_alive=False)
        else:
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


def present_resources() -> Resources:
    """Returns the resources of all nodes that are alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive)
    return Resources(sum(num_cpus for num_cpus, _ in nodes), sum(num_gpus for _, num_gpus in nodes), nodes)


def cpus_and_memory_by_node() -> list[tuple[int, float]]:
    """Returns the CPUs of each node that is alive, and the free bytes of memory when the node started."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), float(node.get("memory", 0))) for node in alive]


def give_tune_no_variables() -> None:
    """Lets Tune's actors use the worker processes that Ray has already started, without variables of the driver.

    Tune gives its actors a runtime environment with copies of the driver's variables: also AWS's secret keys, which Ray
    writes to its logs and shows in its state API. And Ray starts a new process for each actor that has one
    (docs/decisions/0011). The processes of a node have the environment of their node.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


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
