"""Collective operations of training; with one worker, each is the identity."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns this worker's index among the workers of its Train run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of workers in this Train run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sums a tensor over all workers, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Copies the first worker's values of each tensor to every worker, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def own_rows(rows: Tensor) -> Tensor:
    """Returns this worker's share of `rows`; each row belongs to exactly one worker."""
    return rows[rank() :: world_size()]


def seeded_generator(seed: int, epoch: int) -> torch.Generator:
    """Returns a CPU generator that depends only on seed and epoch, so that every worker draws the same numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
