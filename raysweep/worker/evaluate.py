"""The test of what studies chose, on a worker's device: where the rows already are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysweep.images.cache import peak_memory_bytes
from raysweep.worker.inputs import (
    build_classifier,
    feature_set,
    forget_peaks,
    load_heads,
    pixel_set,
    save_heads,
    sources_of,
    subsets_of,
    widest,
)
from raysweep.training.evaluation import evaluate_test
from raysweep.storage import local_path, location
from raysweep.training.baselines import run_knn, run_ridge
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.loop import LoopOptions, predict_rows

FEATURES_PER_THREAD = 2**22  # of the train rows that a baseline reads
TEST_ROWS = 4096  # that a probe's heads see at once


def run_test(job: dict[str, Any], checkpoints: dict[str, str], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Evaluates the test rows once for each study, on this worker's device.

    Args:
        job: what the studies share.
        checkpoints: what each searched study chose, by its name.
        baselines: names of studies without trials, which are chosen on validation first.

    Returns:
        By study: the `error` that ended it; or `test`, from `selection.evaluate_test`, and `peak_gpu_memory_bytes`, of
        a baseline also its `checkpoint` (or None), `setting`, `num_settings`, `validation`, `seconds` and
        `peak_memory_bytes`.
    """
    torch.set_num_threads(job["num_threads"])
    device = torch.device("cuda" if job["use_gpu"] else "cpu")
    tested: dict[str, dict[str, Any]] = {}
    for name in [*checkpoints, *baselines]:
        forget_peaks(device)
        try:
            if name in checkpoints:
                logits = _probe_logits if job["mode"] == "linear_probe" else _classifier_logits
                result = {"test": _evaluate(job, logits(job, checkpoints[name], device))}
            else:
                result = _run_baseline(job, job["studies"][name], device)
        except Exception as error:  # what is wrong with one study need not be wrong with the others
            tested[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            continue
        gpu_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        tested[name] = result | {"peak_gpu_memory_bytes": gpu_memory}
    return tested


def _evaluate(job: dict[str, Any], logits: Sequence[Tensor]) -> dict[str, Any]:
    scores = [one.numpy() for one in logits]
    labels: np.ndarray = job["rows"]["test"][1]
    return evaluate_test(scores if len(scores) > 1 else scores[0], labels, job["loop"]["seed"])


def _run_baseline(job: dict[str, Any], study: dict[str, Any], device: torch.device) -> dict[str, Any]:
    train, validation, test = (feature_set(job, split, device) for split in ("train", "validation", "test"))
    num_features = len(train.labels) * widest(job)
    torch.set_num_threads(max(1, min(job["num_threads"], num_features // FEATURES_PER_THREAD)))
    run = {"knn": run_knn, "ridge": run_ridge}[study["mode"]]
    result = run(
        train,
        validation,
        test,
        sources=sources_of(job),
        num_classes=job["num_classes"],
        subsets=subsets_of(study, device),
        metric=job["loop"]["metric"],
        direction=job["loop"]["direction"],
    )
    path = local_path(study["folder"]) / "best.safetensors" if result.heads else None
    if path is not None:
        save_heads(path, result.heads, result.setting["features"], {"setting": result.setting})
    return {
        "test": _evaluate(job, result.test_logits),
        "checkpoint": location(path) if path else None,
        "setting": result.setting,
        "num_settings": result.num_settings,
        "validation": result.validation,
        "seconds": result.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _classifier_logits(job: dict[str, Any], checkpoint: str, device: torch.device) -> list[Tensor]:
    model = build_classifier(job)
    model.load_state_dict(load_checkpoint(local_path(checkpoint))[0])
    images = pixel_set(job, "test", device)
    rows = torch.arange(len(images.labels))
    return [torch.cat([p.cpu() for _, p in predict_rows(model.to(device), images, rows, LoopOptions(**job["loop"]))])]


@torch.inference_mode()
def _probe_logits(job: dict[str, Any], checkpoint: str, device: torch.device) -> list[Tensor]:
    heads, source = load_heads(local_path(checkpoint))
    features, parts = feature_set(job, "test", device), sources_of(job)[source]
    logits: list[list[Tensor]] = [[] for _ in heads]
    for rows in torch.arange(len(features.labels), device=device).split(TEST_ROWS):
        inputs = features.source(parts, rows)
        for head, scores in zip(heads, logits, strict=True):
            scores.append(head.to(device)(inputs).cpu())
    return [torch.cat(scores) for scores in logits]
