"""One worker of one Train run: its share of the rows, the training loop, and what it reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from raysweep.errors import TrialError
from raysweep.images.cache import peak_memory_bytes
from raysweep.worker.inputs import (
    build_classifier,
    feature_set,
    forget_peaks,
    pixel_set,
    save_heads,
    sources_of,
    subsets_of,
    total_memory_of,
    widest,
)
from raysweep.storage import exists, forget, local_path, location
from raysweep.training.distributed import rank
from raysweep.training.loop import LoopOptions, ranking_key, train_classifier
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.population import train_population

Report = Callable[[dict[str, Any]], None]

WEIGHTS_PER_THREAD = 2**19  # of heads that train together
CONTEXT_BYTES = 600_000_000  # of GPU memory that a process takes before its first tensor


def train_worker(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains one Population.

    Args:
        config: `job`, what all trials of the group share (`Group.build_job`); `trials`, a dict each with `study`,
            `number`, `setting`, `continues` (the number of an interrupted trial of the same setting, or None) and
            `stop_file` (which is there once the trial is to be stopped, of several workers);
            `micro_batch_size` of a lone trial, None where memory has not run out; `report`, called with each epoch's
            metrics when this runs inside the Tune trial itself, None in a worker process.

    Returns:
        One dict per trial: `study`, `number`, `history` by epoch, `final` metrics (a probe's last epoch, otherwise the
        best), `best_epoch`, `checkpoint` path or None, `train_seconds`, `images_per_second`, and the memory peaks.
    """
    job, trials = config["job"], config["trials"]
    local = config["report"] is not None
    if not local:
        import ray.train

        report: Report = ray.train.report
    else:
        report = config["report"]
    torch.set_num_threads(job["num_threads"])
    device = _device(job, local)
    forget_peaks(device)
    if job["mode"] == "linear_probe":
        results = _train_heads(job, trials, device)
    else:
        assert len(trials) == 1, "fine_tune and from_scratch train one trial per Train run"
        if config["micro_batch_size"] is not None:
            job = job | {"loop": job["loop"] | {"micro_batch_size": config["micro_batch_size"]}}
        results = [_train_classifier(job, trials[0], device, local, report)]
    gpu_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    memory = {"peak_memory_bytes": peak_memory_bytes(), "peak_gpu_memory_bytes": gpu_memory}
    return [result | memory for result in results]


def _device(job: dict[str, Any], local: bool) -> torch.device:
    if not job["use_gpu"]:
        return torch.device("cpu")
    if local:
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        import ray.train.torch

        device = ray.train.torch.get_device()
    if job["gpus_per_worker"] < 1:
        # A trial that runs out of memory shall feel it itself, not the others on its GPU.
        torch.cuda.set_per_process_memory_fraction(_memory_share(job["gpus_per_worker"], device), device)
    return device


def _memory_share(gpus_per_worker: float, device: torch.device) -> float:
    """Share of a GPU's memory for the tensors of a worker, beside its CUDA context."""
    return max(gpus_per_worker - CONTEXT_BYTES / total_memory_of(device), gpus_per_worker / 2)


def _train_heads(job: dict[str, Any], trials: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Trains the heads of a Population, study by study: those of one number of shots read the same rows."""
    results = []
    for name in dict.fromkeys(trial["study"] for trial in trials):
        members = [trial for trial in trials if trial["study"] == name]
        results += _train_heads_of(job, job["studies"][name], members, device)
    return results


def _train_heads_of(
    job: dict[str, Any], study: dict[str, Any], trials: list[dict[str, Any]], device: torch.device
) -> list[dict[str, Any]]:
    train, validation = (feature_set(job, split, device) for split in ("train", "validation"))
    subsets = subsets_of(study, device)
    # Threads that wait for one another at every step of a small product gain nothing, and beside anything else on the
    # machine they crawl: 64 trials on 1,034 x 1,280 features took 4 s with one thread, and 100 s with two at load 3.
    num_weights = len(trials) * (subsets.train.shape[0] if subsets else 1) * job["num_classes"] * widest(job)
    torch.set_num_threads(max(1, min(job["num_threads"], num_weights // WEIGHTS_PER_THREAD)))
    started = time.perf_counter()
    heads = train_population(
        train,
        validation,
        [trial["setting"] for trial in trials],
        sources=sources_of(job),
        num_classes=job["num_classes"],
        batch_size=job["loop"]["batch_size"],
        seed=job["loop"]["seed"],
        subsets=subsets,
    )
    seconds = time.perf_counter() - started
    options = LoopOptions(**job["loop"])
    best = max(range(len(heads)), key=lambda index: ranking_key(heads[index].history[-1], options))
    num_rows = subsets.train.numel() if subsets else len(train.labels)
    results = []
    for index, (trial, head) in enumerate(zip(trials, heads, strict=True)):
        path = local_path(study["folder"]) / "trials" / str(trial["number"]) / "best.safetensors"
        if index == best and rank() == 0:
            save_heads(path, head.heads, trial["setting"]["features"], {"trial": trial["number"]})
        results.append(
            {
                "study": study["name"],
                "number": trial["number"],
                "history": head.history,
                "final": head.history[-1],
                "best_epoch": len(head.history) - 1,
                # Only the best head of a Population can be the study's best, so only that one is kept.
                "checkpoint": location(path) if index == best else None,
                "train_seconds": seconds,
                "images_per_second": num_rows * len(head.history) / sum(e["time/epoch_s"] for e in head.history),
            }
        )
    return results


def _train_classifier(
    job: dict[str, Any], trial: dict[str, Any], device: torch.device, local: bool, report: Report
) -> dict[str, Any]:
    # Convolutions run up to twice as fast with channels last, on CPUs and in bf16 on GPUs; the rest is indifferent.
    model = build_classifier(job).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    freeze_unused_parameters(model)
    if job["gradient_checkpointing"]:
        model.encoder.enable_gradient_checkpointing()
    parallel: nn.Module = model
    if not local:
        from ray.train.torch import prepare_model

        parallel = prepare_model(model, move_to_device=False)
    if job["compile"]:
        parallel = torch.compile(parallel)  # type: ignore[assignment]
    number = trial["number"] if trial["continues"] is None else trial["continues"]
    folder = local_path(job["studies"][trial["study"]]["folder"]) / "trials" / str(number)
    started = time.perf_counter()
    done: list[int] = []

    def on_epoch(metrics: dict[str, float]) -> None:
        if not local and exists(local_path(trial["stop_file"])):
            raise TrialError("stopped early")  # on any rank: Train ends the others and frees what they hold
        # As text, because Tune flattens nested results.
        report({"epoch": json.dumps({"number": trial["number"], "epoch": len(done), "metrics": metrics})})
        done.append(1)

    try:
        result = train_classifier(
            model,
            parallel,
            pixel_set(job, "train", device),
            pixel_set(job, "validation", device),
            trial["setting"],
            LoopOptions(**job["loop"]),
            folder,
            on_epoch,
        )
    finally:
        if rank() == 0:
            forget(folder)  # or every node would keep the weights and optimiser states of all its trials
    speeds = [epoch["train/images_per_second"] for epoch in result.history]
    return {
        "study": trial["study"],
        "number": trial["number"],
        "history": result.history,
        "final": result.best or result.history[-1],
        "best_epoch": result.best_epoch,
        "checkpoint": location(result.checkpoint),
        # A continued trial has epochs from before.
        "train_seconds": max(time.perf_counter() - started, sum(epoch["time/epoch_s"] for epoch in result.history)),
        "images_per_second": float(np.median(speeds)),
    }
