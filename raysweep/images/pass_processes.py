"""How many processes encode on the CPUs of a node, with how many threads each (docs/decisions/0025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.encoders.base import Encoder
from raysweep.images.features import ENCODER_BATCH

# A process that has imported torch, transformers and Ray Data, and holds a block of decoded images.
PROCESS_BYTES = 700_000_000
# Outputs of the largest layer that a forward pass holds at a time: its input, its output, and what is added later.
LAYERS_HELD = 4


@dataclass(frozen=True, slots=True)
class PassProcesses:
    """The processes of a pass that encode on CPUs at the same time, on all nodes.

    Attributes:
        num_processes: number of processes on all nodes.
        num_threads: CPU threads of each.
        on_cluster: whether they are actors, one of which starts on nodes that join too; tasks on a Ray of our own.
    """

    num_processes: int = 1
    num_threads: int = 1
    on_cluster: bool = False

    def __str__(self) -> str:
        """Says the numbers, as in `2 processes x 1 thread`."""
        counts = (self.num_processes, "process", "processes"), (self.num_threads, "thread", "threads")
        return " x ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)


def choose_processes(
    cpus_by_node: Sequence[int], memory_by_node: Sequence[float], process_bytes: float, on_cluster: bool
) -> PassProcesses:
    """Returns a process of one thread for each CPU; fewer with more threads each where these do not fit into memory.

    Threads of one process wait for the slowest of them after every layer, and other programs make one of them slow.

    Args:
        cpus_by_node: CPUs of each node that has any.
        memory_by_node: free bytes of the same nodes.
        process_bytes: memory of one process, without the weights that all processes of a node share.
        on_cluster: see `PassProcesses`.
    """
    num_threads = 1
    for num_cpus, memory in zip(cpus_by_node, memory_by_node, strict=True):
        fitting = max(1, min(num_cpus, int(memory // process_bytes)))
        num_threads = max(num_threads, -(-num_cpus // fitting))
    # All processes have the same number of threads. A node with fewer CPUs than that has no process.
    return PassProcesses(max(1, sum(num_cpus // num_threads for num_cpus in cpus_by_node)), num_threads, on_cluster)


def bytes_of_process(encoders: Sequence[Encoder]) -> int:
    """Returns the memory of one process that encodes on a CPU, without the weights."""
    num_images = max(size for (device, _), size in ENCODER_BATCH.items() if device == "cpu")
    return PROCESS_BYTES + max((num_images * activation_bytes(encoder) for encoder in encoders), default=0)


def activation_bytes(encoder: Encoder) -> int:
    """Returns the bytes that a forward pass of one image needs beside the weights, from the outputs of all layers."""
    return LAYERS_HELD * max(output_bytes(encoder, list(encoder.modules())), default=0)


# no_grad, not inference_mode: training must be able to use what a model caches in its first call.
@torch.no_grad()
def output_bytes(encoder: Encoder, modules: Sequence[nn.Module]) -> list[int]:
    """Returns the bytes of each tensor that some modules of an encoder give in a forward pass of one image."""
    found: list[int] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        images = torch.zeros(1, *encoder.preprocessing.output_size, 3, dtype=torch.uint8)
        encoder(encoder.preprocessing.normalize(images))
    finally:
        for hook in hooks:
            hook.remove()
    return found
