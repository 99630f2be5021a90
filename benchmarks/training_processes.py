"""Processes that fine-tune side by side, each a model of its own, or all of them one model (gloo)."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from benchmarks import fine_tune
from raysweep.cluster.own_ray import PROCESS_SETTINGS


@dataclass(frozen=True, order=True)
class Layout:
    """Number of processes, CPU threads of each, and whether all of them train one model."""

    num_processes: int
    num_threads: int
    together: bool = False

    @property
    def name(self) -> str:
        """Name of a folder."""
        return str(self).replace(" ", "-")

    def __str__(self) -> str:
        """Says it as in `2 x 1 together`."""
        return f"{self.num_processes} x {self.num_threads}{' together' if self.together else ''}"


@dataclass(frozen=True)
class Task:
    """An epoch of `num_rows` images.

    Attributes:
        loop: `hand`; `raysweep`; or `files`, raysweep's with pixels from files.
        precision: `fp32` or `bf16`.
        num_at_once: images per forward pass of the hand-written loop.
        num_rows: images.
    """

    loop: str
    precision: str
    num_at_once: int
    num_rows: int


def serve(
    connection: Connection, layout: Layout, rank: int, block: dict[str, Any], num_rows: int, folder: Path
) -> None:
    """Runs in a process of its own: builds a model and its pixels, then answers every task with its images/s."""
    torch.set_num_threads(layout.num_threads)
    device, parallel = torch.device("cpu"), None
    model = fine_tune.make_model(block, device)
    pixels, labels = fine_tune.make_pixels(num_rows, model.encoder.preprocessing.training_size, device)
    if layout.together:
        place = f"file://{folder}/ranks"
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=layout.num_processes)
        parallel = nn.parallel.DistributedDataParallel(model)
    files = fine_tune.on_disk(pixels, folder / f"pixels-{rank}")
    (folder / f"{rank}").mkdir()
    connection.send(None)
    while (task := connection.recv()) is not None:
        chosen, chosen_labels = pixels[: task.num_rows], labels[: task.num_rows]
        if task.loop == "hand":
            speed = fine_tune.hand_written_epoch(
                model, chosen, chosen_labels, task.precision, task.num_at_once, parallel
            )
        else:
            rows = files if task.loop == "files" else fine_tune.ResidentPixels(chosen)
            speed = fine_tune.raysweep_epoch(model, rows, chosen_labels, task.precision, folder / f"{rank}")
        connection.send(speed)


class TrainingProcesses:
    """Processes that do the same epoch side by side, with the environment of a sweep's processes."""

    def __init__(self, layout: Layout, block: dict[str, Any], num_rows: int, folder: Path) -> None:
        for name, value in PROCESS_SETTINGS.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")
        folder.mkdir()
        self.layout, self.pipes, self.members = layout, [], []
        for rank in range(layout.num_processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, layout, rank, block, num_rows, folder)
            member = context.Process(target=serve, args=arguments, daemon=True)
            member.start()
            self.pipes.append(ours)
            self.members.append(member)
        for pipe in self.pipes:
            pipe.recv()

    def speed(self, task: Task) -> float:
        """Returns the images per second of all processes, as the slowest one had it."""
        for pipe in self.pipes:
            pipe.send(task)
        slowest = min([pipe.recv() for pipe in self.pipes])
        return slowest * (1 if self.layout.together else len(self.pipes))

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for member in self.members:
            member.join()
