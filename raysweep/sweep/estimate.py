"""How long a plan will take on a cluster: a few images are decoded, encoded and trained on by one of its nodes.

From what that took follows the rest by counting: images, epochs, trials, and what works side by side. Epochs count in
the middle of what is searched. Trials that stop early make it less; a sweep's start, files and MLflow make it more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.experiment.config import Experiment, StudyConfig
from raysweep.experiment.space import Choices
from raysweep.cluster.resources import Resources, num_concurrent_trials, uses_gpu
from raysweep.results.leaderboard import describe_seconds

if TYPE_CHECKING:
    from raysweep.encoders import Encoder
    from raysweep.images.sources import ImageIndex

SAMPLE = 16  # images that are decoded; as many are encoded on a CPU, and trained on
GPU_SAMPLE = 128
MAX_ROWS = 4096  # of features on which a Population is timed for one epoch
SECONDS_FOR_ROOM = 30
START_SECONDS = {"pass": 8.0, "trial": 1.0}  # of a pass, and of a trial that trains alone, measured on two cores


def estimate_lines(experiment: Experiment, index: ImageIndex, present: Resources) -> list[str]:
    """Times a sample of the work on one node; returns what each part of the plan will take, and all of it.

    Must be called with Ray up. Loads each encoder. Where no node is free, a line says that there is no estimate.

    Raises:
        RaysweepError: an encoder cannot be loaded, or no image of the sample can be decoded.
    """
    on_gpu = uses_gpu(experiment.resources, present)
    if not _is_room(on_gpu):
        return [f"time there: no estimate, since no {'GPU' if on_gpu else 'CPU'} of the cluster is free"]
    counts = {split: sum(by_class.values()) for split, by_class in index.counts().items()}
    lines, total, passes = ["time there, from a sample that one node worked on:"], 0.0, {}
    for study in experiment.studies():
        speeds = _speeds(study, experiment, index, on_gpu)
        seconds, work = 0.0, ""
        if study.mode == "linear_probe" and study.encoder_name not in passes:
            devices = present.num_gpus if on_gpu else sum(num_cpus > 0 for num_cpus, _ in present.by_node)
            decoding = speeds["decode"] / present.num_cpus
            encoding = speeds["encode"] / devices
            passes[study.encoder_name] = sum(counts.values()) * (max(decoding, encoding) if on_gpu else encoding)
            seconds += START_SECONDS["pass"] + passes[study.encoder_name]
            work = f"pass at {sum(counts.values()) / passes[study.encoder_name]:,.0f} images/s, then "
        block = experiment.search.block(study.mode)
        epochs = _middle(block.space["epochs"])
        if study.mode == "linear_probe":
            seconds += block.num_trials * epochs * speeds["head_epoch"]
        else:
            side_by_side = num_concurrent_trials(experiment.resources, present)
            rounds = -(-block.num_trials // side_by_side)
            images = epochs * (counts["train"] + counts["validation"] / 3)  # evaluation has no backward pass
            each = images * speeds["train"] / experiment.resources.num_workers
            seconds += rounds * (START_SECONDS["trial"] + each)
            seconds += sum(counts.values()) * speeds["decode"] / present.num_cpus
        if block.time_budget_s:
            seconds = min(seconds, block.time_budget_s)
        lines.append(f"  {study.name}: {work}{block.num_trials} trials of {epochs:.0f} epochs: {_about(seconds)}")
        total += seconds
    lines.append(f"  all: {_about(total)}; less where trials stop early, or where caches are there already")
    return lines


def _is_room(on_gpu: bool) -> bool:
    """Waits for a while until some node could work on the sample at once."""
    import ray

    look = ray.remote(_nothing).options(**_place(on_gpu)).remote()
    ready, _ = ray.wait([look], timeout=SECONDS_FOR_ROOM)
    if not ready:
        ray.cancel(look)
    return bool(ready)


def _nothing() -> None:
    pass


def _place(on_gpu: bool) -> dict[str, int]:
    """What a sample is worked on with."""
    return {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _about(seconds: float) -> str:
    return f"about {describe_seconds(float(f'{seconds:.1g}') if seconds < 10 else float(f'{seconds:.2g}'))}"


def _middle(dimension: Any) -> float:
    """The middle of what is searched."""
    if isinstance(dimension, Choices):
        return float(np.mean([float(choice) for choice in dimension.choices]))
    return float((dimension.low + dimension.high) / 2)


def _speeds(study: StudyConfig, experiment: Experiment, index: ImageIndex, on_gpu: bool) -> dict[str, float]:
    """Has one node time the work of a study; returns seconds an image, or for `head_epoch` an epoch of a trial."""
    import ray

    from raysweep.encoders import build_encoder
    from raysweep.images.passes import put_index
    from raysweep.sweep.optuna_study import population_size

    encoder = build_encoder(study.encoder.model_dump(), experiment.seed)
    block = experiment.search.block(study.mode)
    job = {
        "mode": study.mode,
        "encoder": encoder.spec(),
        "num_classes": len(index.classes),
        "num_rows": min(MAX_ROWS, int((np.array(index.table["split"].to_pylist()) == "train").sum())),
        "scale": max(1.0, sum(index.counts()["train"].values()) / MAX_ROWS),
        "heads": population_size(block),
        "batch_size": experiment.train.batch_size,
        "on_gpu": on_gpu,
        **put_index(index),
    }
    weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
    speeds: dict[str, float] = ray.get(ray.remote(time_study).options(**_place(on_gpu)).remote(job, weights))
    return speeds


def time_study(job: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Times the work of a study in this process, each part after a first run that does not count.

    Args:
        job: see `_speeds`.
        weights: of the encoder.

    Returns:
        Seconds an image for `decode` (one core), `encode` (this device, with all its cores) and `train`; seconds for
        an epoch of one of many heads, `head_epoch`.
    """
    import ray
    import torch

    from raysweep.encoders import encoder_from_spec
    from raysweep.errors import DataError
    from raysweep.images.features import encode, load_arrays
    from raysweep.images.passes import num_cores
    from raysweep.images.pixels import Geometry, decode_rows

    device = torch.device("cuda" if job["on_gpu"] and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(num_cores())
    encoder = encoder_from_spec(job["encoder"])
    load_arrays(encoder, weights)
    encoder = encoder.to(device)
    is_probe = job["mode"] == "linear_probe"
    geometry = Geometry.of(encoder.preprocessing, for_training=not is_probe)
    rows = _sample(ray.get(job["rows"]))
    seconds, (errors, pixels) = _timed(lambda: decode_rows(rows, job["image_column"], [geometry], num_threads=1))
    if all(errors):
        raise DataError(f"none of {len(rows)} images can be decoded, such as {rows['path'][0]}: {errors[0]}")
    speeds = {"decode": seconds / len(rows)}
    count = GPU_SAMPLE if device.type == "cuda" else SAMPLE
    images = np.resize(pixels[geometry], (count, *geometry.shape))
    if not is_probe:
        return speeds | {"train": _time_training(encoder, images, job, device) / count}
    precision = "bf16" if device.type == "cuda" else "fp32"
    speeds["encode"] = _timed(lambda: encode(encoder, images, device, precision))[0] / count
    if device.type == "cpu":  # in one task with decoding, on all cores
        speeds["encode"] += speeds["decode"] / num_cores()
    return speeds | {"head_epoch": _time_heads(encoder, job, device) * job["scale"] / job["heads"]}


def _sample(rows: Any) -> Any:
    """A few rows from all over the index."""
    return rows.take(np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)))


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    function()
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _time_training(encoder: Encoder, images: np.ndarray, job: dict[str, Any], device: Any) -> float:
    """Seconds of a forward and a backward pass over some images."""
    import torch

    from raysweep.encoders.head import Classifier, Head
    from raysweep.training.loop import CPU_MICRO_BATCH

    source = next(iter(encoder.sources))
    model = Classifier(encoder, Head(encoder.num_features(source), job["num_classes"]), source)
    model = model.to(device, memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
    on_gpu = device.type == "cuda"
    size = min(job["batch_size"], len(images)) if on_gpu else CPU_MICRO_BATCH

    def step() -> None:
        for part in torch.from_numpy(images).to(device).split(size):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                logits = model(encoder.preprocessing.normalize(part))
            torch.nn.functional.cross_entropy(logits.float(), logits.argmax(1)).backward()
        if on_gpu:
            torch.cuda.synchronize()

    return _timed(step)[0]


def _time_heads(encoder: Encoder, job: dict[str, Any], device: Any) -> float:
    """Seconds of an epoch of a Population on features of random numbers."""
    import torch

    from raysweep.training.population import FeatureSet, train_population

    def features(num_rows: int) -> FeatureSet:
        parts: dict[str, Any] = {}
        for name, width in encoder.parts.items():
            parts[name] = torch.randn(num_rows, width, device=device).half()
        return FeatureSet(parts, torch.randint(job["num_classes"], (num_rows,), device=device))

    source = next(iter(encoder.sources))
    setting = {"learning_rate": 1e-3, "weight_decay": 1e-4, "epochs": 1, "features": source, "normalize": "none"}
    train, validation = features(job["num_rows"]), features(max(1, job["num_rows"] // 8))
    sources: dict[str, tuple[str, ...]] = {name: tuple(parts) for name, parts in encoder.sources.items()}

    def run() -> Sequence[Any]:
        return train_population(
            train,
            validation,
            [setting] * job["heads"],
            sources=sources,
            num_classes=job["num_classes"],
            batch_size=job["batch_size"],
            seed=0,
        )

    return _timed(run)[0]
