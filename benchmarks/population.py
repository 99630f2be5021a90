"""100 probe heads as one stacked parameter, compared with a Python loop over heads on each batch, and one by one.

The loop over heads is as in DINOv2's eval/linear.py: one linear layer and one AdamW per head. Also a Population of 64
as a sweep trains it, on a quiet machine and beside busy loops. Torch only.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.busy import busy_cores
from benchmarks.figures import Figure, Options, make_figure
from raysweep.cluster.resources import local_resources
from raysweep.training.population import FeatureSet, train_population

BATCH_SIZE, SEED, NUM_VALIDATION = 64, 0, 1_000
# Rows, features, classes and epochs of a Population of 64; whether a sweep shares its heads among processes.
POPULATIONS = {"small": ((1_034, 1_280, 3, 15), False), "large": ((2_000, 768, 100, 2), True)}
NUM_HEADS, NUM_REPEATS = 64, 3
SOURCES: dict[str, tuple[str, ...]] = {"cls": ("cls",)}


def make_features(num_rows: int, num_features: int, num_classes: int, device: torch.device) -> FeatureSet:
    """Returns random features that differ by class, float16 `(num_rows, num_features)` as in a cache."""
    generator = torch.Generator().manual_seed(num_rows)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    centres = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(0))
    features = centres[labels] + torch.randn(num_rows, num_features, generator=generator)
    return FeatureSet({"cls": features.half().to(device)}, labels.to(device))


def make_settings(num_heads: int, num_epochs: int) -> list[dict[str, Any]]:
    """Returns settings that differ in learning rate and weight decay."""
    rates = torch.logspace(-4, -1, num_heads).tolist()
    decays = torch.logspace(-6, -2, num_heads).tolist()
    fixed = {"epochs": num_epochs, "features": "cls", "normalize": "none"}
    return [{"learning_rate": r, "weight_decay": d, **fixed} for r, d in zip(rates, decays, strict=True)]


def train_by_loop(
    train: FeatureSet, validation: FeatureSet, settings: Sequence[dict[str, Any]], num_classes: int
) -> list[float]:
    """Trains one layer per setting in a Python loop on each batch; returns their validation accuracies."""
    features, device = train.parts["cls"].shape[1], train.labels.device
    layers = [nn.Linear(features, num_classes, device=device) for _ in settings]
    optimizers = [
        torch.optim.AdamW(layer.parameters(), lr=one["learning_rate"], weight_decay=one["weight_decay"])
        for layer, one in zip(layers, settings, strict=True)
    ]
    num_epochs = int(settings[0]["epochs"])
    num_steps = num_epochs * math.ceil(len(train.labels) / BATCH_SIZE)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, num_steps) for one in optimizers]
    accuracies: list[float] = []
    for epoch in range(num_epochs):
        generator = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(len(train.labels), generator=generator).to(device).split(BATCH_SIZE):
            inputs, labels = train.source(("cls",), rows), train.labels[rows]
            for layer, optimizer, schedule in zip(layers, optimizers, schedules, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(layer(inputs), labels).backward()
                optimizer.step()
                schedule.step()
        held_out = validation.source(("cls",), torch.arange(len(validation.labels), device=device))
        with torch.inference_mode():
            accuracies = [(layer(held_out).argmax(1) == validation.labels).float().mean().item() for layer in layers]
    return accuracies


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Returns the wall seconds of a call, including its queued work on a GPU."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compare(options: Options, device: torch.device, benchmark: str) -> Iterator[Figure]:
    """Yields stacked heads compared with the loop over heads, and with one head at a time, on a device."""
    num_rows, num_features, num_classes = (200, 32, 3) if options.quick else (4_000, 768, 10)
    num_heads, num_alone, num_epochs, repeats = (20, 2, 2, 1) if options.quick else (100, 10, 10, 3)
    train, validation = (make_features(n, num_features, num_classes, device) for n in (num_rows, NUM_VALIDATION))
    settings = make_settings(num_heads, num_epochs)
    alone = settings[:: num_heads // num_alone]

    def stack(chosen: Sequence[dict[str, Any]]) -> None:
        training_options: dict[str, Any] = {
            "sources": SOURCES,
            "num_classes": num_classes,
            "batch_size": BATCH_SIZE,
            "seed": SEED,
        }
        train_population(train, validation, chosen, **training_options)

    by_loop = partial(train_by_loop, train, validation, num_classes=num_classes)
    stack(settings[:2])  # warm-up of torch
    stacked, loop, single = [], [], []
    for _ in range(repeats):
        stacked.append(seconds_of(partial(stack, settings), device))
        loop.append(seconds_of(partial(by_loop, settings), device))
        each = [seconds_of(partial(by_loop, [one]), device) for one in alone]
        single.append(statistics.mean(each) * num_heads)
    details = {"stacked_s": stacked, "loop_s": loop, "one_by_one_s": single, "num_heads": num_heads}
    together = statistics.median(stacked)
    yield make_figure(
        benchmark, "loop over heads / stacked", statistics.median(loop) / together, "x", ">= 5", **details
    )
    yield make_figure(benchmark, "one by one / stacked", statistics.median(single) / together, "x", ">= 15", **details)


@cache
def feature_sets(num_rows: int, num_features: int, num_classes: int) -> tuple[FeatureSet, FeatureSet]:
    """Returns train and validation features, made once in each process."""
    train, validation = (make_features(n, num_features, num_classes, torch.device("cpu")) for n in (num_rows, 300))
    return train, validation


def train_part(sizes: tuple[int, int, int, int], part: int, num_parts: int) -> None:
    """Trains one part of a Population's heads; runs in a process of one thread, as in a sweep."""
    torch.set_num_threads(1)
    num_rows, num_features, num_classes, num_epochs = sizes
    train, validation = feature_sets(num_rows, num_features, num_classes)
    settings = make_settings(NUM_HEADS, num_epochs)[part::num_parts]
    train_population(
        train, validation, settings, sources=SOURCES, num_classes=num_classes, batch_size=BATCH_SIZE, seed=SEED
    )


def under_load(options: Options) -> Iterator[Figure]:
    """Yields how much longer a Population takes beside one and beside two busy loops."""
    for name, (sizes, is_shared) in POPULATIONS.items():
        chosen = (100, 32, 3, 2) if options.quick else sizes
        num_processes = local_resources().num_cpus if is_shared else 1
        with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
            parts = [(chosen, part, num_processes) for part in range(num_processes)]

            def train(parts: Sequence[tuple[Any, ...]] = parts, pool: ProcessPoolExecutor = pool) -> None:
                list(pool.map(train_part, *zip(*parts, strict=True)))

            train()  # starts the processes
            seconds: dict[int, float] = {}
            for num_loops in (0, 1, 2):
                with busy_cores(num_loops):
                    times = [seconds_of(train, torch.device("cpu")) for _ in range(NUM_REPEATS)]
                seconds[num_loops] = statistics.median(times)
        label = f"{name}, {num_processes} process{'es' if num_processes > 1 else ''}"
        for num_loops, target in ((1, None), (2, "<= 2.2")):
            ratio = seconds[num_loops] / seconds[0]
            yield make_figure(
                "population", f"{label}: load {num_loops} / load 0", ratio, "x", target, seconds=list(seconds.values())
            )


def run(options: Options) -> Iterator[Figure]:
    """Yields the comparison on the CPU."""
    yield from compare(options, torch.device("cpu"), "population")
    yield from under_load(options)
