"""One worker of a Train run: its share of the rows, the training loop, and its reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from raysweep.encoders.head import Classifier
from raysweep.errors import TrialError
from raysweep.images.memory import peak_memory_bytes
from raysweep.storage.copies import exists, forget, local_path, location
from raysweep.training.baseline_task import all_rows, apply_head
from raysweep.training.bias_correction import kept_positions, pack_row_losses
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.distributed import rank
from raysweep.training.loop import LoopResult, predict_rows, train_classifier
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.population import FeatureSet, HeadResult, Subsets, train_population
from raysweep.worker.inputs import (
    build_classifier,
    feature_set,
    pixel_set,
    reset_memory_peaks,
    save_heads,
    subsets_of,
    total_memory_of,
)
from raysweep.worker.job import EpochReport, Job, StudySpec, TrainLoopConfig, TrialResult, TrialSpec, to_tune

Report = Callable[[dict[str, str]], None]

CONTEXT_BYTES = 600_000_000  # GPU memory that a process takes before its first tensor


def train_worker(config: TrainLoopConfig) -> tuple[TrialResult, ...]:
    """Trains one Population; Ray Train calls it on each worker.

    Returns:
        The results of the trials, in the order of `work.trials`.

    Raises:
        TrialError: a scheduler stopped a trial of several workers.
    """
    job, work, report = config["job"], config["work"], config["report"]
    is_local = report is not None
    if report is None:
        import ray.train

        report = ray.train.report
    torch.set_num_threads(job.num_threads)
    device = _device(job, is_local)
    reset_memory_peaks(device)
    if job.mode.trains_together:
        results = _train_heads(job, work.trials, device)
    else:
        assert len(work.trials) == 1, f"{job.mode.name} trains one trial per Train run"
        if work.micro_batch_size is not None:
            job = replace(job, loop=replace(job.loop, micro_batch_size=work.micro_batch_size))
        results = [_train_classifier(job, work.trials[0], device, is_local, report)]
    gpu_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    memory = peak_memory_bytes()
    return tuple(replace(one, peak_memory_bytes=memory, peak_gpu_memory_bytes=gpu_memory) for one in results)


def _device(job: Job, is_local: bool) -> torch.device:
    if not job.use_gpu:
        return torch.device("cpu")
    if is_local:
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        import ray.train.torch

        device = ray.train.torch.get_device()
    if job.resources.gpus_per_worker < 1:
        # When a trial runs out of memory, it must see the error, not the other trials on its GPU.
        torch.cuda.set_per_process_memory_fraction(_memory_share(job.resources.gpus_per_worker, device), device)
    return device


def _memory_share(gpus_per_worker: float, device: torch.device) -> float:
    """Returns the share of a GPU's memory for a worker's tensors, without its CUDA context."""
    return max(gpus_per_worker - CONTEXT_BYTES / total_memory_of(device), gpus_per_worker / 2)


def _train_heads(job: Job, trials: Sequence[TrialSpec], device: torch.device) -> list[TrialResult]:
    """Trains the heads of a Population, one study after another: the heads of a study read the same rows."""
    results = []
    for name in dict.fromkeys(trial.study for trial in trials):
        members = [trial for trial in trials if trial.study == name]
        results += _train_heads_of(job, job.studies[name], members, device)
    return results


def _train_heads_of(job: Job, study: StudySpec, trials: Sequence[TrialSpec], device: torch.device) -> list[TrialResult]:
    train, validation = (feature_set(job, split, device) for split in ("train", "validation"))
    subsets = subsets_of(study, device)
    # Threads would wait for each other at every step; large Populations are shared among processes instead.
    torch.set_num_threads(1)
    started = time.perf_counter()
    heads = train_population(
        train,
        validation,
        [trial.setting for trial in trials],
        sources=job.encoder.sources,
        num_classes=job.num_classes,
        batch_size=job.loop.batch_size,
        seed=job.loop.seed,
        subsets=subsets,
    )
    seconds = time.perf_counter() - started
    best = max(range(len(heads)), key=lambda index: job.loop.ranking.key(heads[index].history[-1]))
    row_losses = _row_losses_of_heads(job, heads, validation, subsets)
    num_rows = subsets.train.numel() if subsets else len(train.labels)
    results = []
    for index, (trial, head) in enumerate(zip(trials, heads, strict=True)):
        path = local_path(study.folder) / "trials" / str(trial.number) / "best.safetensors"
        if index == best and rank() == 0:
            about = {"trial": trial.number, "setting": trial.setting}
            save_heads(path, head.heads, str(trial.setting["features"]), about)
        results.append(
            TrialResult(
                study=study.name,
                number=trial.number,
                setting=trial.setting,
                history=tuple(head.history),
                final=head.history[-1],
                best_epoch=len(head.history) - 1,
                # Only the best head of a Population can be the best of the study, so only its weights are kept.
                checkpoint=location(path) if index == best else None,
                train_seconds=seconds,
                images_per_second=num_rows * len(head.history) / sum(epoch["time/epoch_s"] for epoch in head.history),
                row_losses=row_losses[index],
            )
        )
    return results


@torch.no_grad()
def _row_losses_of_heads(
    job: Job, heads: Sequence[HeadResult], validation: FeatureSet, subsets: Subsets | None
) -> list[str]:
    """Returns the losses of each setting by validation row, those of all draws one after another."""
    device = validation.labels.device
    draws = all_rows(validation)[None] if subsets is None else subsets.validation
    rows = kept_positions(draws).to(device).chunk(len(draws))
    labels = validation.labels[torch.cat(rows)]
    packed = []
    for result in heads:
        parts = job.encoder.parts_of(str(result.setting["features"]))
        pairs = zip(result.heads, rows, strict=True)
        logits = [apply_head(head.to(device), validation, parts, own) for head, own in pairs]
        packed.append(pack_row_losses(torch.cat(logits), labels))
    return packed


def _train_classifier(job: Job, trial: TrialSpec, device: torch.device, is_local: bool, report: Report) -> TrialResult:
    # Convolutions run up to twice as fast with channels last, on CPUs and in bf16 on GPUs; others are unaffected.
    model = build_classifier(job).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parallel = _wrap_model(job, model, is_local)
    folder = local_path(job.studies[trial.study].folder) / "trials" / trial.folder_name
    started, num_epochs = time.perf_counter(), 0

    def on_epoch(metrics: dict[str, float]) -> None:
        nonlocal num_epochs
        if not is_local and exists(local_path(trial.stop_file)):
            raise TrialError("stopped early")  # on any rank: Train ends the other workers and frees their resources
        report(to_tune(EpochReport(trial.number, num_epochs, metrics)))
        num_epochs += 1

    try:
        result = train_classifier(
            model,
            parallel,
            pixel_set(job, "train", device),
            pixel_set(job, "validation", device),
            trial.setting,
            job.loop,
            folder,
            on_epoch,
        )
    finally:
        if rank() == 0:
            forget(folder)  # else every node would keep the weights and optimiser states of all its trials
    return TrialResult(
        study=trial.study,
        number=trial.number,
        setting=trial.setting,
        history=tuple(result.history),
        final=result.best or result.history[-1],
        best_epoch=result.best_epoch,
        checkpoint=location(result.checkpoint),
        # The history of a continued trial has earlier epochs, too.
        train_seconds=max(time.perf_counter() - started, sum(epoch["time/epoch_s"] for epoch in result.history)),
        images_per_second=float(np.median([epoch["train/images_per_second"] for epoch in result.history])),
        row_losses=_row_losses_of(job, model, result, device) if rank() == 0 else "",
    )


def _row_losses_of(job: Job, model: Classifier, result: LoopResult, device: torch.device) -> str:
    """Returns the losses of the best epoch by validation row; it is evaluated again, on a bounded number of rows."""
    if result.best is None:
        return ""
    model.load_state_dict(load_checkpoint(result.checkpoint)[0])
    validation = pixel_set(job, "validation", device)
    rows = kept_positions(torch.arange(len(validation.labels))[None])
    logits = torch.cat([found.cpu() for _, found in predict_rows(model, validation, rows, job.loop)])
    return pack_row_losses(logits, validation.labels[rows].cpu())


def _wrap_model(job: Job, model: Classifier, is_local: bool) -> nn.Module:
    """Returns the module to call for a forward pass; freezes parameters that a forward pass does not use."""
    freeze_unused_parameters(model)
    if job.gradient_checkpointing:
        model.encoder.enable_gradient_checkpointing()
    parallel: nn.Module = model
    if not is_local:
        from ray.train.torch import prepare_model

        parallel = prepare_model(model, move_to_device=False)
    return torch.compile(parallel) if job.compile else parallel  # type: ignore[return-value]
