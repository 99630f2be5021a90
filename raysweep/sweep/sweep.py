"""One sweep, from the experiment to the leaderboard: the order of the steps, and what starts early."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from raysweep.cluster.address import joins_cluster
from raysweep.cluster.resources import Resources, check_resources, local_resources
from raysweep.cluster.session import RaySession
from raysweep.cluster.signals import deaf_to_signals
from raysweep.errors import ConfigError
from raysweep.experiment.config import Experiment, resolved_yaml
from raysweep.images.index import ImageIndex, load_index
from raysweep.images.splits import SPLITS
from raysweep.results.leaderboard import uneven_warning
from raysweep.results.progress import Progress
from raysweep.results.recorder import start_recorder
from raysweep.storage.copies import in_a_job, is_bucket, remove_temporaries
from raysweep.storage.paths import SweepPaths, write_atomically

if TYPE_CHECKING:
    from raysweep.results.leaderboard import Row
    from raysweep.sweep.leaderboard_entry import LeaderboardEntry
    from raysweep.sweep.stages import SweepResult


class SweepStopped(KeyboardInterrupt):
    """A signal has ended the sweep; `rows` are those of what is finished, ranked."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self.rows = rows


def run_sweep(experiment: Experiment, progress: Progress, verbose: bool = False) -> SweepResult:
    """Runs the studies of an experiment, without the work that is already done, and writes the leaderboard.

    Raises:
        SweepStopped: a signal has ended it, after its first study was opened.
        RaysweepError: the experiment, data, weights, resources or store cannot be used; the message says which.
    """
    paths = SweepPaths(experiment.storage, experiment.name)
    check_results_outlast_job(experiment)
    if not joins_cluster():
        check_resources(experiment.resources, local_resources())
    with ExitStack() as stack:
        stack.enter_context(only_sweep_in(paths.root))
        remove_temporaries(paths.root)
        paths.fetch()
        # Both start while torch is imported and the images are read: MLflow always, Ray only if it is surely needed.
        ray = RaySession(verbose, lambda present: describe_resources(present, progress))
        stack.callback(ray.close)
        if not paths.optuna_journal.exists() and has_source(experiment):
            ray.start()
            if not paths.has_features and not joins_cluster():
                ray.prepare(warm_up_pass)
        name = experiment.tracking.experiment or experiment.name
        with deaf_to_signals():
            recorder = start_recorder(experiment.tracking.uri, name, progress.say)
        stack.callback(recorder.close)
        progress.say(f"reading {experiment.data.source}")
        index = load_index(experiment.data, experiment.seed, lambda: ray.resources)
        describe_index(index, progress)
        write_atomically(paths.resolved_experiment, resolved_yaml(experiment))
        # These import torch, which takes seconds.
        from raysweep.images.rows import write_quarantine
        from raysweep.sweep.stages import check_studies, conclude_finished, run_stages
        from raysweep.sweep.state import SweepState

        write_quarantine(paths.quarantine, index.bad_rows)
        state = SweepState(experiment, paths, index, recorder, progress, ray)
        check_studies(state)
        recorder.wait()  # an unusable store raises here, before hours of work
        entries: list[LeaderboardEntry] = []
        try:
            return run_stages(state, entries)
        except KeyboardInterrupt as stop:
            raise SweepStopped(conclude_finished(state, entries)) from stop


def check_results_outlast_job(experiment: Experiment) -> None:
    """In a submitted job, checks that results lie outside its working directory, which Ray removes at the end.

    Raises:
        ConfigError: the storage or the MLflow store is relative.
    """
    if not in_a_job():
        return
    ways = "results would be lost with this job's working directory, which Ray removes"
    if not is_bucket(experiment.storage) and not Path(experiment.storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage: '{experiment.storage}' is relative, and {ways}; accepted in a job: an absolute path that all "
            "nodes see, s3://bucket/prefix or gs://bucket/prefix, in the file, with --set storage=..., or as "
            "RAYSWEEP_STORAGE in the nodes' environment"
        )
    uri = experiment.tracking.uri
    if "://" not in uri or re.match(r"sqlite:///[^/]", uri):
        raise ConfigError(
            f"tracking.uri: '{uri}' is relative, and {ways}; accepted in a job: an MLflow server's http://..., in the "
            "file, with --set tracking.uri=..., or as MLFLOW_TRACKING_URI in the nodes' environment; or sqlite:////..."
        )


def has_source(experiment: Experiment) -> bool:
    """Whether the images may exist: a misspelt folder must raise before anything is started."""
    source = experiment.data.source
    return "://" in source or Path(source).expanduser().exists()


def warm_up_pass() -> None:
    """Imports in Ray's workers what an encoder pass needs."""
    from raysweep.images.passes import warm_up

    warm_up(local_resources().num_cpus)


@contextmanager
def only_sweep_in(root: Path) -> Iterator[None]:
    """Holds a lock on the sweep's folder: of two sweeps, each would treat the other's trials as interrupted.

    Raises:
        ConfigError: another sweep holds the lock.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{root}: another sweep is running here; wait for it, or give this one a name") from None
    try:
        yield
    finally:
        lock.release()


def describe_resources(present: Resources, progress: Progress) -> None:
    """Prints the resources to run on."""
    nodes = f" on {present.num_nodes} nodes" if present.num_nodes > 1 else ""
    progress.say(f"Ray is up: {present.num_cpus} CPUs, {present.num_gpus} GPUs{nodes}")


def describe_index(index: ImageIndex, progress: Progress) -> None:
    """Prints the images by split, the classes, warnings, and the number of bad rows."""
    counts = {split: sum(by_class.values()) for split, by_class in index.counts().items()}
    derived = f" ({' and '.join(index.derived_splits)} taken from train)" if index.derived_splits else ""
    splits = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    progress.say(f"{len(index.table):,} images in {len(index.classes)} classes: {splits}{derived}")
    for warning in [*index.warnings, *filter(None, [uneven_warning(index.counts())])]:
        progress.warn(warning)
    if index.bad_rows:
        progress.warn(f"{len(index.bad_rows)} images cannot be used; see quarantine.csv")
