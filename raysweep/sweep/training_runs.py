"""How many training runs work side by side on CPUs, with how many threads each (docs/decisions/0026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysweep.cluster.resources import Resources, num_concurrent_trials
from raysweep.encoders.base import Encoder
from raysweep.experiment.sections import ResourcesConfig
from raysweep.images.pass_processes import PROCESS_BYTES, output_bytes

# Weights, gradients, both moments of AdamW, and the moving average, each float32.
BYTES_PER_WEIGHT = 4 * 5


@dataclass(frozen=True, slots=True)
class TrainingRuns:
    """The training runs of one study group that work on CPUs at the same time.

    Attributes:
        num_fitting: number of runs that the CPUs and the memory of all nodes hold.
        is_memory_short: whether the CPUs would hold more than the memory does.
        num_expected: number of them that there will be work for, with the other groups.
        num_threads: CPU threads of each worker.
    """

    num_fitting: int
    is_memory_short: bool
    num_expected: int
    num_threads: int

    def __str__(self) -> str:
        """Says the numbers, as in `2 at a time x 1 thread`."""
        return f"{self.num_expected} at a time x {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


def choose_runs(
    resources: ResourcesConfig,
    present: Resources,
    nodes: Sequence[tuple[int, float]],
    worker_bytes: float,
    num_wanted: int,
    reserved_cpus: int = 0,
) -> TrainingRuns:
    """Returns as many runs as there is work for; CPUs that are left over become threads.

    Threads of one process wait for the slowest of them after every layer, and other programs make one of them slow.
    So runs side by side are faster together than one after another with all threads.

    Args:
        resources: resources of one run, as configured.
        present: resources of all nodes.
        nodes: CPUs and free bytes of each node; empty for no limit of memory, as on GPUs.
        worker_bytes: memory of one worker.
        num_wanted: number of runs that there is work for.
        reserved_cpus: CPUs that runs must leave free.
    """
    num_fitting = by_cpus = num_concurrent_trials(resources, present, reserved_cpus)
    if nodes:
        # A node with much memory and few CPUs does not make up for one with many CPUs and little memory.
        num_workers = sum(
            min(num_cpus // resources.cpus_per_worker, int(memory // worker_bytes)) for num_cpus, memory in nodes
        )
        num_fitting = max(1, min(by_cpus, num_workers // resources.num_workers))
    num_expected = min(num_fitting, num_wanted)
    num_cpus = present.num_cpus - reserved_cpus
    num_threads = num_cpus // max(len(present.cpus_by_node), num_expected * resources.num_workers)
    num_threads = min(num_threads, *(num_cpus for num_cpus in present.cpus_by_node if num_cpus), num_cpus)
    return TrainingRuns(num_fitting, num_fitting < by_cpus, num_expected, max(1, num_threads))


def bytes_of_trial(encoder: Encoder, num_images: int) -> int:
    """Returns the memory of a worker that trains all weights of an encoder on a CPU.

    Args:
        encoder: the encoder; the head is small beside it.
        num_images: images in a forward pass.
    """
    num_weights = sum(weight.numel() for weight in encoder.parameters())
    return PROCESS_BYTES + BYTES_PER_WEIGHT * num_weights + num_images * trained_activation_bytes(encoder)


def trained_activation_bytes(encoder: Encoder) -> int:
    """Returns the bytes that a forward pass of one image keeps for the backward pass: the outputs of all layers."""
    return sum(output_bytes(encoder, [module for module in encoder.modules() if not list(module.children())]))
