"""CPUs and GPUs of a machine or cluster, and how many training runs fit on them. Nothing here needs Ray."""

from __future__ import annotations

import glob
import math
import os
from dataclasses import dataclass

from raysweep.errors import ResourceError
from raysweep.experiment.config import ResourcesConfig


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a machine or a cluster. `nodes` holds (CPUs, GPUs) of each node of a cluster."""

    num_cpus: int
    num_gpus: int
    nodes: tuple[tuple[int, int], ...] = ()

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return max(1, len(self.nodes))

    @property
    def by_node(self) -> tuple[tuple[int, int], ...]:
        """(CPUs, GPUs) of each machine, also if there is only one."""
        return self.nodes or ((self.num_cpus, self.num_gpus),)

    @property
    def cpus_by_node(self) -> tuple[int, ...]:
        """CPUs of each node that has any. A head often declares none, so that Ray schedules no work on it."""
        return tuple(num_cpus for num_cpus, _ in self.by_node if num_cpus)


def local_resources() -> Resources:
    """Returns the CPUs and GPUs of this machine, without starting Ray or importing torch."""
    num_gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        num_gpus = min(num_gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    # macOS has no sched_getaffinity.
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(num_cpus, num_gpus)


def uses_gpu(config: ResourcesConfig, present: Resources) -> bool:
    """Returns whether training runs use GPUs: as configured, or for `auto` if there is a GPU."""
    return present.num_gpus > 0 if config.use_gpu == "auto" else config.use_gpu


def check_resources(config: ResourcesConfig, present: Resources, reserved_cpus: int = 0) -> None:
    """Checks that a training run can be scheduled. Otherwise Ray would wait for ever, without a message.

    Args:
        config: The resources of one training run.
        present: The resources of the machine or cluster.
        reserved_cpus: CPUs that decode images during training.

    Raises:
        ResourceError: One training run needs more than there is.
    """
    needed_cpus = config.num_workers * config.cpus_per_worker
    problems = []
    if needed_cpus + reserved_cpus > present.num_cpus:
        workers = f"{config.num_workers} workers x {config.cpus_per_worker} CPUs"
        decoding = f" and {reserved_cpus} for decoding" if reserved_cpus else ""
        problems.append(f"{needed_cpus + reserved_cpus} CPUs ({workers}{decoding}), there are {present.num_cpus}")
    needed_gpus = config.num_workers * config.gpus_per_worker
    if uses_gpu(config, present) and needed_gpus > present.num_gpus:
        workers = f"{config.num_workers} workers x {config.gpus_per_worker:g} GPUs"
        problems.append(f"{needed_gpus:g} GPUs ({workers}), there are {present.num_gpus}")
    if uses_gpu(config, present) and config.num_workers > 1 and config.gpus_per_worker < 1:
        problems.append("a whole GPU for each of its workers (gpus_per_worker: 1), since NCCL knows no shares of one")
    if not problems and (fitting := num_fitting_workers(config, present, reserved_cpus)) < config.num_workers:
        problems.append(
            f"{config.num_workers} workers, each whole on one node; {fitting} fit into {_describe(present)}"
        )
    if problems:
        keys = "resources.num_workers, cpus_per_worker, gpus_per_worker, use_gpu"
        nodes = "add nodes, or raise pixel_disk_gb" if reserved_cpus else "or add nodes"
        raise ResourceError(f"resources: one training run needs {' and '.join(problems)}; lower {keys}, {nodes}")


def _describe(present: Resources) -> str:
    return ", ".join(f"{num_cpus} CPUs with {num_gpus} GPUs" for num_cpus, num_gpus in present.by_node)


def num_fitting_workers(config: ResourcesConfig, present: Resources, reserved_cpus: int = 0) -> int:
    """Returns how many workers fit. A worker needs one node, and a fraction of a GPU needs one GPU."""
    total = 0
    for num_cpus, num_gpus in present.by_node:
        fitting = num_cpus // config.cpus_per_worker
        if uses_gpu(config, present):
            # The margin is needed because 1 / gpus_per_worker may be rounded to just below a whole number.
            fitting = min(fitting, num_gpus * int(1 / config.gpus_per_worker + 1e-6))
        total += fitting
    lacking = reserved_cpus - (present.num_cpus - total * config.cpus_per_worker)
    return max(0, total - math.ceil(max(0, lacking) / config.cpus_per_worker))


def num_concurrent_trials(config: ResourcesConfig, present: Resources, reserved_cpus: int = 0) -> int:
    """Returns how many training runs fit at a time, beside the CPUs that decode images for them."""
    fitting = num_fitting_workers(config, present, reserved_cpus) // config.num_workers
    limit = config.max_concurrent_trials
    return max(1, fitting if limit == "auto" else min(fitting, limit))
