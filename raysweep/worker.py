"""One worker of one Train run: its share of the rows, the training loop, and what it reports."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysweep.encoders import encoder_from_spec
from raysweep.encoders.head import Classifier, Head
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import TrialError
from raysweep.images.cache import forget_peak_memory, peak_memory_bytes
from raysweep.images.features import load_arrays, load_features
from raysweep.images.pixels import Geometry, open_pixels
from raysweep.images.streaming import StreamedPixels
from raysweep.results.selection import evaluate_test
from raysweep.training.baselines import run_knn, run_ridge
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.distributed import rank
from raysweep.training.loop import (
    LoopOptions,
    predict_rows,
    ranking_key,
    train_classifier,
)
from raysweep.training.optimizer import freeze_unused_parameters
from raysweep.training.pixel_rows import PixelRows, PixelSet, ResidentPixels
from raysweep.training.population import FeatureSet, Subsets, train_population

Report = Callable[[dict[str, Any]], None]

WEIGHTS_PER_THREAD = 2**19  # of heads that train together
FEATURES_PER_THREAD = 2**22  # of the train rows that a baseline reads
CONTEXT_BYTES = 600_000_000  # of GPU memory that a process takes before its first tensor
TEST_ROWS = 4096  # that a probe's heads see at once
RESIDENT_SHARE = 0.3  # of a worker's GPU memory, for the pixels of all splits
RESIDENT_ROWS = 256  # that are copied to it at once

# What the last job loaded: actors are reused from one Population to the next, and the data is the same.
_loaded: dict[str, Any] = {}


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
    _forget_peaks(device)
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
    return max(gpus_per_worker - CONTEXT_BYTES / _total_memory(device), gpus_per_worker / 2)


def _total_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1]


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
    subsets = _subsets(study, device)
    # Threads that wait for one another at every step of a small product gain nothing, and beside anything else on the
    # machine they crawl: 64 trials on 1,034 x 1,280 features took 4 s with one thread, and 100 s with two at load 3.
    num_weights = len(trials) * (subsets.train.shape[0] if subsets else 1) * job["num_classes"] * _width(job)
    torch.set_num_threads(max(1, min(job["num_threads"], num_weights // WEIGHTS_PER_THREAD)))
    started = time.perf_counter()
    heads = train_population(
        train,
        validation,
        [trial["setting"] for trial in trials],
        sources=_sources(job),
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
        path = Path(study["folder"]) / "trials" / str(trial["number"]) / "best.safetensors"
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
                "checkpoint": str(path) if index == best else None,
                "train_seconds": seconds,
                "images_per_second": num_rows * len(head.history) / sum(e["time/epoch_s"] for e in head.history),
            }
        )
    return results


def _width(job: dict[str, Any]) -> int:
    """Features of the widest source."""
    widths: dict[str, int] = job["encoder"]["parts"]
    return max(sum(widths[part] for part in parts) for parts in _sources(job).values())


def _sources(job: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {source: tuple(parts) for source, parts in job["encoder"]["sources"].items()}


def _subsets(study: dict[str, Any], device: torch.device) -> Subsets | None:
    places = study["subsets"]
    return (
        Subsets(*(torch.from_numpy(places[split]).to(device) for split in ("train", "validation"))) if places else None
    )


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
    folder = Path(job["studies"][trial["study"]]["folder"]) / "trials" / str(number)
    started = time.perf_counter()
    done: list[int] = []

    def on_epoch(metrics: dict[str, float]) -> None:
        if not local and Path(trial["stop_file"]).exists():
            raise TrialError("stopped early")  # on any rank: Train ends the others and frees what they hold
        # As text, because Tune flattens nested results.
        report({"epoch": json.dumps({"number": trial["number"], "epoch": len(done), "metrics": metrics})})
        done.append(1)

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
    speeds = [epoch["train/images_per_second"] for epoch in result.history]
    return {
        "study": trial["study"],
        "number": trial["number"],
        "history": result.history,
        "final": result.best or result.history[-1],
        "best_epoch": result.best_epoch,
        "checkpoint": str(result.checkpoint),
        # A continued trial has epochs from before.
        "train_seconds": max(time.perf_counter() - started, sum(epoch["time/epoch_s"] for epoch in result.history)),
        "images_per_second": float(np.median(speeds)),
    }


def build_classifier(job: dict[str, Any]) -> Classifier:
    """Builds the model that every trial of a fine_tune or from_scratch study starts from."""
    import ray

    encoder = encoder_from_spec(job["encoder"])
    load_arrays(encoder, ray.get(job["weights"]))
    if job["head"] is not None:
        (head, *_), source = load_heads(Path(job["head"]))
    else:
        source = job["source"]
        head = Head(encoder.num_features(source), job["num_classes"])
    return Classifier(encoder, head, source)


def save_heads(path: Path, heads: Sequence[Head], source: str, metadata: dict[str, Any]) -> None:
    """Writes a probe's checkpoint: its heads, one per few-shot draw, and the feature source that they read."""
    tensors = {f"head.{i}.{name}": t for i, head in enumerate(heads) for name, t in head.state_dict().items()}
    save_checkpoint(path, tensors, metadata | {"head": heads[0].spec(), "num_heads": len(heads), "source": source})


def load_heads(path: Path) -> tuple[list[Head], str]:
    """Reads a probe's checkpoint: its heads, one per few-shot draw, and the feature source that they read.

    Raises:
        TrialError: the file is not a probe's checkpoint.
    """
    tensors, metadata = load_checkpoint(path)
    if "head" not in metadata:
        raise TrialError(f"{path}: not the checkpoint of a linear probe")
    heads = []
    for index in range(metadata["num_heads"]):
        heads.append(Head(**metadata["head"]))
        prefix = f"head.{index}."
        heads[-1].load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return heads, metadata["source"]


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
        _forget_peaks(device)
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


def _forget_peaks(device: torch.device) -> None:
    """Begins to measure memory anew: this process may have worked for other studies, or run out of memory."""
    forget_peak_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _evaluate(job: dict[str, Any], logits: Sequence[Tensor]) -> dict[str, Any]:
    scores = [one.numpy() for one in logits]
    labels: np.ndarray = job["rows"]["test"][1]
    return evaluate_test(scores if len(scores) > 1 else scores[0], labels, job["loop"]["seed"])


def _run_baseline(job: dict[str, Any], study: dict[str, Any], device: torch.device) -> dict[str, Any]:
    train, validation, test = (feature_set(job, split, device) for split in ("train", "validation", "test"))
    num_features = len(train.labels) * _width(job)
    torch.set_num_threads(max(1, min(job["num_threads"], num_features // FEATURES_PER_THREAD)))
    run = {"knn": run_knn, "ridge": run_ridge}[study["mode"]]
    result = run(
        train,
        validation,
        test,
        sources=_sources(job),
        num_classes=job["num_classes"],
        subsets=_subsets(study, device),
        metric=job["loop"]["metric"],
        direction=job["loop"]["direction"],
    )
    path = Path(study["folder"]) / "best.safetensors" if result.heads else None
    if path is not None:
        save_heads(path, result.heads, result.setting["features"], {"setting": result.setting})
    return {
        "test": _evaluate(job, result.test_logits),
        "checkpoint": str(path) if path else None,
        "setting": result.setting,
        "num_settings": result.num_settings,
        "validation": result.validation,
        "seconds": result.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _classifier_logits(job: dict[str, Any], checkpoint: str, device: torch.device) -> list[Tensor]:
    model = build_classifier(job)
    model.load_state_dict(load_checkpoint(Path(checkpoint))[0])
    images = pixel_set(job, "test", device)
    rows = torch.arange(len(images.labels))
    return [torch.cat([p.cpu() for _, p in predict_rows(model.to(device), images, rows, LoopOptions(**job["loop"]))])]


@torch.inference_mode()
def _probe_logits(job: dict[str, Any], checkpoint: str, device: torch.device) -> list[Tensor]:
    heads, source = load_heads(Path(checkpoint))
    features, parts = feature_set(job, "test", device), _sources(job)[source]
    logits: list[list[Tensor]] = [[] for _ in heads]
    for rows in torch.arange(len(features.labels), device=device).split(TEST_ROWS):
        inputs = features.source(parts, rows)
        for head, scores in zip(heads, logits, strict=True):
            scores.append(head.to(device)(inputs).cpu())
    return [torch.cat(scores) for scores in logits]


def feature_set(job: dict[str, Any], split: str, device: torch.device) -> FeatureSet:
    """Cached features and labels of a split, on a device."""
    row_ids, labels = job["rows"][split]
    num_rows = sum(len(ids) for ids, _ in job["rows"].values())
    budget = job["memory_bytes"] * len(row_ids) // num_rows  # of what all splits together may take
    load = partial(load_features, job["cache"], row_ids, list(job["encoder"]["parts"]), budget)
    parts = _load_once(f"{job['data_key']}/{split}", load)
    return FeatureSet({name: part.to(device) for name, part in parts.items()}, torch.from_numpy(labels).to(device))


def pixel_set(job: dict[str, Any], split: str, device: torch.device) -> PixelSet:
    """Pixels and labels of a split: on a GPU with room for all splits of the job there, else where they are read."""
    row_ids, labels = job["rows"][split]
    load = partial(_load_pixels, job, row_ids, device)
    return PixelSet(_load_once(f"{job['data_key']}/{split}", load), torch.from_numpy(labels))


def _load_pixels(job: dict[str, Any], row_ids: np.ndarray, device: torch.device) -> PixelRows:
    shape = (*job["shape"], 3)
    if job["stream"] is None:
        pixels: PixelRows = open_pixels(job["cache"], row_ids, shape)
    else:
        preprocessing = Preprocessing.from_dict(job["encoder"]["preprocessing"])
        pixels = StreamedPixels(job["stream"], row_ids, Geometry.of(preprocessing, for_training=True))
    num_bytes = math.prod(shape) * sum(len(ids) for ids, _ in job["rows"].values())
    if device.type != "cuda" or not fits_on_device(num_bytes, _total_memory(device), job["gpus_per_worker"]):
        return pixels
    resident = torch.empty((len(row_ids), *shape), dtype=torch.uint8, device=device)
    batches = torch.arange(len(row_ids)).split(RESIDENT_ROWS)
    for part, read in zip(resident.split(RESIDENT_ROWS), pixels.read(batches), strict=True):
        part.copy_(read)
    return ResidentPixels(resident)


def fits_on_device(num_bytes: int, total_memory: int, gpus_per_worker: float) -> bool:
    """Whether pixels leave enough of a worker's share of a GPU's memory to what trains on them."""
    return num_bytes <= RESIDENT_SHARE * total_memory * min(1.0, gpus_per_worker)


def _load_once(key: str, load: Callable[[], Any]) -> Any:
    study = key.rpartition("/")[0]
    for other in [known for known in _loaded if known.rpartition("/")[0] != study]:
        del _loaded[other]
    if key not in _loaded:
        _loaded[key] = load()
    return _loaded[key]
