"""A fine-tuning epoch of raysweep compared with a hand-written PyTorch loop on the same pixels. Torch only.

The hand-written loop crops at random offsets and flips; raysweep resizes random crops. On CPUs the hand-written loop
works in its best shape: processes x threads x precision x images per forward pass, each tried on a few images, while
raysweep trains as a sweep of several trials does: one trial of one thread for each CPU. Both are measured on a quiet
machine and with a busy loop on each core. On a GPU also: share of the matrix rate, memory, and time to read pixels.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.busy import LOADS, load
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.gpu import flops_per_image, matmul_rate
from benchmarks.images import shared_folder
from benchmarks.sweeps import DINOV2_SMALL, TINY_DINOV2
from raysweep.cluster.resources import local_resources
from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.encoders.precision import faster_precision, supports_bf16
from raysweep.images.pixels import open_pixels, write_pixels
from raysweep.training.augment import Augmentation
from raysweep.training.distributed import own_rows, world_size
from raysweep.training.loop import LoopOptions, train_classifier
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.pixel_rows import PixelRows, PixelSet, ResidentPixels
from raysweep.training.ranking import Ranking

BATCH_SIZE, NUM_CLASSES, NUM_PAIRS = 64, 10, 3
NUM_ROWS, NUM_TRIED = 32, 16  # on CPUs, of each process
ROWS_AT_ONCE = (4, 16)
SETTING = {"learning_rate": 1e-5, "epochs": 1, "weight_decay": 0.05, "layer_decay": 0.75}
AUGMENTATION = Augmentation(min_crop_scale=0.7, horizontal_flip=True)


def make_model(block: dict[str, Any], device: torch.device) -> Classifier:
    """Returns a classifier, prepared as in a worker."""
    encoder = build_encoder(block, 0)
    source = encoder.spec.default_source
    model = Classifier(encoder, Head(encoder.num_features(source), NUM_CLASSES), source)
    model.to(device, memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    return model


def make_pixels(num_rows: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns random pixels, uint8 `(num_rows, height, width, 3)`, on the device, and int64 labels on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_rows, *size, 3), generator=generator, dtype=torch.uint8)
    return pixels.to(device), torch.randint(NUM_CLASSES, (num_rows,), generator=generator)


def hand_written_epoch(
    model: Classifier,
    pixels: Tensor,
    labels: Tensor,
    precision: str,
    num_at_once: int,
    parallel: nn.parallel.DistributedDataParallel | None = None,
) -> float:
    """Trains for an epoch; returns images per second, of all processes if they train one model in `parallel`."""
    device, size = pixels.device, model.encoder.preprocessing.output_size[0]
    mean = torch.tensor(model.encoder.preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(model.encoder.preprocessing.std, device=device).view(1, 3, 1, 1) * 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-len(labels) // BATCH_SIZE))
    model.train()
    _wait_for(device)
    started = time.perf_counter()
    labels = labels.to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    for batch in order.split(BATCH_SIZE):
        optimizer.zero_grad(set_to_none=True)
        parts = own_rows(batch).split(num_at_once)
        for index, rows in enumerate(parts):
            top, left = (int(torch.randint(side - size + 1, ())) for side in pixels.shape[1:3])
            images = pixels[rows, top : top + size, left : left + size].permute(0, 3, 1, 2)
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            with parallel.no_sync() if parallel and index < len(parts) - 1 else nullcontext():
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                    logits = (parallel or model)((images.float() - mean) / std)
                loss = F.cross_entropy(logits.float(), labels[rows], reduction="sum")
                (loss * (world_size() / len(batch))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    _wait_for(device)
    return len(labels) / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def raysweep_epoch(model: Classifier, pixels: PixelRows, labels: Tensor, precision: str, folder: Path) -> float:
    """Trains for an epoch; returns images per second, without evaluation and checkpoint."""
    ranking = Ranking("val/loss", "minimize")
    options = LoopOptions(BATCH_SIZE, 0, ranking, patience=9, precision=precision, augmentation=AUGMENTATION)
    (folder / "last.safetensors").unlink(missing_ok=True)
    train, validation = PixelSet(pixels, labels), PixelSet(pixels, labels[:2])
    speeds: list[float] = []
    train_classifier(
        model, model, train, validation, SETTING, options, folder, lambda e: speeds.append(e["train/images_per_second"])
    )
    return speeds[0]


def on_disk(pixels: Tensor, folder: Path) -> PixelRows:
    """Writes pixels to files as in a sweep's cache."""
    row_ids = np.arange(len(pixels))
    folder.mkdir()
    write_pixels(str(folder), row_ids, pixels.cpu().numpy())
    height, width = pixels.shape[1:3]
    return open_pixels(str(folder), row_ids, (height, width, 3))


def run(options: Options) -> Iterator[Figure]:
    """Yields the speeds of both loops and their ratio; on a GPU also the share of the matrix rate, and memory."""
    if torch.cuda.is_available():
        yield from _run_on_gpu(options)
        return
    blocks = {"dinov2-small": TINY_DINOV2 if options.quick else DINOV2_SMALL}
    if not options.quick and (weights := shared_folder("weights/mobilenet_v2")):
        blocks["mobilenet_v2"] = {"type": "auto", "pretrained_model_name_or_path": str(weights)}
    for name, block in blocks.items():
        yield from _run_on_cpus(name, block, options.scratch / name)


def _run_on_cpus(name: str, block: dict[str, Any], folder: Path) -> Iterator[Figure]:
    from benchmarks.training_processes import Layout, Task, TrainingProcesses  # imports this module

    folder.mkdir()
    device, num_cpus = torch.device("cpu"), local_resources().num_cpus
    precisions = ("fp32", "bf16") if supports_bf16(device) else ("fp32",)
    own_precision = faster_precision(build_encoder(block, 0), device, 2)
    layouts = sorted({Layout(1, num_cpus), Layout(num_cpus, 1), Layout(num_cpus, 1, together=True)})
    groups = {layout: TrainingProcesses(layout, block, NUM_ROWS, folder / layout.name) for layout in layouts}
    tasks = [Task("hand", *shape, NUM_TRIED) for shape in itertools.product(precisions, ROWS_AT_ONCE)]
    for load_name in LOADS:
        tried: dict[tuple[Layout, Task], float] = {}
        hand, ours, from_files = [], [], []
        with load(load_name):
            for layout, task in itertools.product(layouts, tasks):
                groups[layout].speed(replace(task, num_rows=task.num_at_once))  # warms up
                tried[layout, task] = groups[layout].speed(task)
            best_layout, best = max(tried, key=lambda key: tried[key])
            own_layout, own = Layout(num_cpus, 1), Task("raysweep", own_precision, 0, NUM_ROWS)
            groups[own_layout].speed(replace(own, num_rows=NUM_TRIED))
            for _ in range(NUM_PAIRS):
                hand.append(groups[best_layout].speed(replace(best, num_rows=NUM_ROWS)))
                ours.append(groups[own_layout].speed(own))
                from_files.append(groups[own_layout].speed(replace(own, loop="files")))
        speeds = {f"{layout}, {task.precision}, {task.num_at_once}": speed for (layout, task), speed in tried.items()}
        details = {"precision": own_precision, "best": f"{best_layout}, {best.precision}, {best.num_at_once}"}
        yield from _compare(f"{name}, {load_name}", hand, ours, from_files, details | {"tried": speeds})
    for group in groups.values():
        group.close()


def _compare(
    name: str, hand: list[float], ours: list[float], from_files: list[float], details: dict[str, Any]
) -> Iterator[Figure]:
    ratio = statistics.median(own / other for own, other in zip(ours, hand, strict=True))
    stall = 100 * (1 - statistics.median(f / r for f, r in zip(from_files, ours, strict=True)))
    details |= {"hand_written": hand, "raysweep": ours, "from_files": from_files}
    yield make_figure("fine_tune", f"{name}: hand-written loop", statistics.median(hand), "images/s")
    yield make_figure("fine_tune", f"{name}: raysweep", statistics.median(ours), "images/s", **details)
    yield make_figure("fine_tune", f"{name}: raysweep / hand-written", ratio, "x", ">= 0.95")
    yield make_figure("fine_tune", f"{name}: lost to reading pixels from files", stall, "%", "<= 3")


def _run_on_gpu(options: Options) -> Iterator[Figure]:
    device, name, num_rows, precision = torch.device("cuda"), "dinov2-base, bf16", 4_096, "bf16"
    block: dict[str, Any] = {"type": "dinov2", "use_pretrained": False}
    if options.quick:
        block, num_rows = TINY_DINOV2, 32
    model = make_model(block, device)
    tensor, labels = make_pixels(num_rows, model.encoder.preprocessing.training_size, device)
    resident, files = ResidentPixels(tensor), on_disk(tensor, options.scratch / "pixels")
    hand_written_epoch(model, tensor, labels, precision, BATCH_SIZE)
    raysweep_epoch(model, resident, labels, precision, options.scratch)
    hand, ours, from_files = [], [], []
    for _ in range(NUM_PAIRS):
        hand.append(hand_written_epoch(model, tensor, labels, precision, BATCH_SIZE))
        ours.append(raysweep_epoch(model, resident, labels, precision, options.scratch))
        from_files.append(raysweep_epoch(model, files, labels, precision, options.scratch))
    yield from _compare(name, hand, ours, from_files, {})
    rate, flops = matmul_rate(device), 3 * flops_per_image(model.encoder.eval())
    share = 100 * statistics.median(ours) * flops / rate
    yield make_figure("fine_tune", f"{name}: share of the matrix rate", share, "%", ">= 35", rate=rate)
    torch.cuda.reset_peak_memory_stats(device)
    raysweep_epoch(model, files, labels, precision, options.scratch)
    peak = torch.cuda.max_memory_allocated(device) - tensor.nbytes
    yield make_figure("fine_tune", f"{name}: peak memory", peak / 1e9, "GB", batch_size=BATCH_SIZE)
