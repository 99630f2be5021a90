"""The test of chosen classifiers, on the device of a worker that has already loaded the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raysweep.errors import TrialError
from raysweep.images.memory import peak_memory_bytes
from raysweep.storage.copies import local_path, location
from raysweep.training.baseline_task import BaselineTask
from raysweep.training.baselines import RUN_BASELINE
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.evaluation import TestMetrics, evaluate_test
from raysweep.training.loop import predict_rows
from raysweep.worker.inputs import (
    build_classifier,
    feature_set,
    load_heads,
    pixel_set,
    reset_memory_peaks,
    save_heads,
    subsets_of,
)
from raysweep.worker.job import BaselineFit, Job, StudySpec, TestResult, TestWork

FEATURES_PER_THREAD = 2**22  # elements of the train features that a baseline reads
TEST_ROWS = 4096  # per forward pass of a probe's heads


def run_test(job: Job, work: TestWork) -> dict[str, TestResult]:
    """Evaluates each study and baseline once on the test rows, on this worker's device; returns the results by name.

    An error ends only the test of its own study.
    """
    torch.set_num_threads(job.num_threads)
    device = torch.device("cuda" if job.use_gpu else "cpu")
    tested: dict[str, TestResult] = {}
    for name in work.studies:
        reset_memory_peaks(device)
        try:
            if name in work.checkpoints:
                logits = _probe_logits if job.mode.reads == "features" else _classifier_logits
                result = TestResult(_evaluate(job, logits(job, work.checkpoints[name], device)))
            else:
                result = _run_baseline(job, job.studies[name], device)
        except Exception as error:  # the other studies may still have results
            tested[name] = TestResult(error=f"{type(error).__name__}: {error}"[:500])
            continue
        gpu_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        tested[name] = replace(result, peak_gpu_memory_bytes=gpu_memory)
    return tested


def _evaluate(job: Job, logits: Sequence[Tensor]) -> TestMetrics:
    found = evaluate_test([one.numpy() for one in logits], job.rows["test"].labels)
    if broken := [name for name, value in found.values.items() if not math.isfinite(value)]:
        num_bad = sum(int((~one.isfinite()).any(1).sum()) for one in logits)
        raise TrialError(
            f"{', '.join(broken)} on the test split are not finite numbers: the classifier's outputs overflow for "
            f"{num_bad} of its {found.num_rows} images"
        )
    return found


def _run_baseline(job: Job, study: StudySpec, device: torch.device) -> TestResult:
    assert study.baseline is not None, study.name
    train, validation, test = (feature_set(job, split, device) for split in ("train", "validation", "test"))
    num_features = len(train.labels) * job.encoder.widest
    torch.set_num_threads(max(1, min(job.num_threads, num_features // FEATURES_PER_THREAD)))
    task = BaselineTask(
        train,
        validation,
        test,
        sources=job.encoder.sources,
        num_classes=job.num_classes,
        subsets=subsets_of(study, device),
        ranking=job.loop.ranking,
        seed=job.loop.seed,
        refit=study.refit,
    )
    result = RUN_BASELINE[study.baseline](task)
    path = local_path(study.folder) / "best.safetensors" if result.heads else None
    if path is not None:
        save_heads(path, result.heads, result.setting["features"], {"setting": result.setting})
    fit = BaselineFit(
        setting=result.setting,
        num_settings=result.num_settings,
        validation=result.validation,
        checkpoint=location(path) if path else None,
        seconds=result.seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return TestResult(_evaluate(job, result.test_logits), fit=fit)


def _classifier_logits(job: Job, checkpoint: str, device: torch.device) -> list[Tensor]:
    model = build_classifier(job)
    model.load_state_dict(load_checkpoint(local_path(checkpoint))[0])
    images = pixel_set(job, "test", device)
    rows = torch.arange(len(images.labels))
    return [torch.cat([logits.cpu() for _, logits in predict_rows(model.to(device), images, rows, job.loop)])]


@torch.inference_mode()
def _probe_logits(job: Job, checkpoint: str, device: torch.device) -> list[Tensor]:
    heads, source = load_heads(local_path(checkpoint))
    features, parts = feature_set(job, "test", device), job.encoder.parts_of(source)
    logits: list[list[Tensor]] = [[] for _ in heads]
    for rows in torch.arange(len(features.labels), device=device).split(TEST_ROWS):
        inputs = features.source(parts, rows)
        for head, scores in zip(heads, logits, strict=True):
            scores.append(head.to(device)(inputs).cpu())
    return [torch.cat(scores) for scores in logits]
