"""A fine-tuning epoch of raysweep compared with a hand-written PyTorch loop on the same pixels. Torch only.

The hand-written loop crops at random offsets and flips; raysweep resizes random crops. The hand-written loop uses the
faster of whole batches and micro-batches. On a GPU also: share of the matrix rate, memory, and time to read pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.gpu import flops_per_image, matmul_rate
from benchmarks.sweeps import DINOV2_SMALL, TINY_DINOV2
from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.images.pixels import open_pixels, write_pixels
from raysweep.training.augment import Augmentation
from raysweep.training.loop import CPU_MICRO_BATCH, LoopOptions, train_classifier
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.pixel_rows import PixelRows, PixelSet, ResidentPixels
from raysweep.training.ranking import Ranking

BATCH_SIZE, NUM_CLASSES, NUM_PAIRS = 64, 10, 3
SETTING = {"learning_rate": 1e-5, "epochs": 1, "weight_decay": 0.05, "layer_decay": 0.75}
AUGMENTATION = Augmentation(min_crop_scale=0.7, horizontal_flip=True)


def make_model(block: dict[str, Any], device: torch.device) -> Classifier:
    """Returns a classifier, prepared as in a worker."""
    encoder = build_encoder(block, 0)
    model = Classifier(encoder, Head(encoder.num_features("cls"), NUM_CLASSES), "cls")
    model.to(device, memory_format=torch.channels_last)
    freeze_unused_parameters(model)
    return model


def make_pixels(num_rows: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns random pixels, uint8 `(num_rows, height, width, 3)`, on the device, and int64 labels on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_rows, *size, 3), generator=generator, dtype=torch.uint8)
    return pixels.to(device), torch.randint(NUM_CLASSES, (num_rows,), generator=generator)


def hand_written_epoch(model: Classifier, pixels: Tensor, labels: Tensor, precision: str, num_at_once: int) -> float:
    """Trains for an epoch; returns images per second."""
    device, size = pixels.device, model.encoder.preprocessing.output_size[0]
    mean = torch.tensor(model.encoder.preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(model.encoder.preprocessing.std, device=device).view(1, 3, 1, 1) * 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-len(labels) // BATCH_SIZE))
    model.train()
    _wait_for(device)
    started = time.perf_counter()
    labels = labels.to(device)
    for batch in torch.randperm(len(labels)).to(device).split(BATCH_SIZE):
        optimizer.zero_grad(set_to_none=True)
        for rows in batch.split(num_at_once):
            top, left = (int(torch.randint(side - size + 1, ())) for side in pixels.shape[1:3])
            images = pixels[rows, top : top + size, left : left + size].permute(0, 3, 1, 2)
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits = model((images.float() - mean) / std)
            (F.cross_entropy(logits.float(), labels[rows], reduction="sum") / len(batch)).backward()
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, block, num_rows, precision = "dinov2-small, fp32", DINOV2_SMALL, 128, "fp32"
    if device.type == "cuda":
        name, num_rows, precision = "dinov2-base, bf16", 4_096, "bf16"
        block = {"type": "dinov2", "use_pretrained": False}
    if options.quick:
        block, num_rows = TINY_DINOV2, 32
    model = make_model(block, device)
    tensor, labels = make_pixels(num_rows, model.encoder.preprocessing.training_size, device)
    resident, files = ResidentPixels(tensor), on_disk(tensor, options.scratch / "pixels")
    sizes = (BATCH_SIZE, CPU_MICRO_BATCH) if device.type == "cpu" else (BATCH_SIZE,)
    num_warm_up = num_rows if device.type == "cuda" else 32
    by_size = {n: hand_written_epoch(model, tensor[:num_warm_up], labels[:num_warm_up], precision, n) for n in sizes}
    by_size = {n: hand_written_epoch(model, tensor[:num_warm_up], labels[:num_warm_up], precision, n) for n in sizes}
    num_at_once = max(by_size, key=lambda size: by_size[size])
    raysweep_epoch(model, resident, labels[:num_warm_up], precision, options.scratch)
    hand, ours, from_files = [], [], []
    for _ in range(NUM_PAIRS):
        hand.append(hand_written_epoch(model, tensor, labels, precision, num_at_once))
        ours.append(raysweep_epoch(model, resident, labels, precision, options.scratch))
        from_files.append(raysweep_epoch(model, files, labels, precision, options.scratch))
    ratio = statistics.median(own / other for own, other in zip(ours, hand, strict=True))
    stall = 100 * (1 - statistics.median(f / r for f, r in zip(from_files, ours, strict=True)))
    details = {"hand_written": hand, "raysweep": ours, "from_files": from_files, "rows_at_once_by_hand": num_at_once}
    yield make_figure("fine_tune", f"{name}: hand-written loop", statistics.median(hand), "images/s")
    yield make_figure("fine_tune", f"{name}: raysweep", statistics.median(ours), "images/s", **details)
    yield make_figure("fine_tune", f"{name}: raysweep / hand-written", ratio, "x", ">= 0.95")
    yield make_figure("fine_tune", f"{name}: lost to reading pixels from files", stall, "%", "<= 3")
    if device.type == "cuda":
        rate, flops = matmul_rate(device), 3 * flops_per_image(model.encoder.eval())
        share = 100 * statistics.median(ours) * flops / rate
        yield make_figure("fine_tune", f"{name}: share of the matrix rate", share, "%", ">= 35", rate=rate)
        torch.cuda.reset_peak_memory_stats(device)
        raysweep_epoch(model, files, labels, precision, options.scratch)
        peak = torch.cuda.max_memory_allocated(device) - tensor.nbytes
        yield make_figure("fine_tune", f"{name}: peak memory", peak / 1e9, "GB", batch_size=BATCH_SIZE)
