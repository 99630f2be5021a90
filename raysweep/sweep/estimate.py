"""Estimates how long a plan takes on a cluster: one node decodes, encodes and trains on a few images.

The measured times are multiplied by the number of images, epochs and trials, and divided by what runs in parallel. The
number of epochs is the middle of its search space. Early stopping makes the real time shorter; the start of a sweep,
files and MLflow make it longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from raysweep.cluster.resources import Resources, num_concurrent_trials, uses_gpu
from raysweep.experiment.config import Experiment
from raysweep.experiment.modes import Mode
from raysweep.experiment.search_blocks import population_size
from raysweep.experiment.space import Choices, Dimension
from raysweep.experiment.studies import StudyConfig
from raysweep.results.leaderboard import describe_seconds

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from raysweep.encoders.base import Encoder, EncoderSpec
    from raysweep.images.index import ImageIndex
    from raysweep.images.pass_tasks import IndexReference

Result = TypeVar("Result")

SAMPLE = 16  # images that are decoded; a CPU encodes or trains on as many
GPU_SAMPLE = 128
MAX_ROWS = 4096  # of features, in the timed epoch of a Population
SECONDS_TO_WAIT = 30
START_SECONDS = {"pass": 8.0, "trial": 1.0}  # of an encoder pass, of a trial that trains alone; on two cores


@dataclass(frozen=True, slots=True)
class SampleJob:
    """The work that one node times.

    Attributes:
        mode: mode of the study.
        encoder: encoder of the study.
        weights: object reference of the encoder's state dict as numpy arrays.
        index: the images.
        num_classes: number of classes.
        num_train: number of training images.
        num_heads: heads of a Population.
        batch_size: rows per training step.
        num_threads: CPUs of the node.
        on_gpu: whether the sample runs on a GPU.
    """

    mode: Mode
    encoder: EncoderSpec
    weights: Any
    index: IndexReference
    num_classes: int
    num_train: int
    num_heads: int
    batch_size: int
    num_threads: int
    on_gpu: bool


@dataclass(frozen=True, slots=True)
class Speeds:
    """Times measured on a sample.

    Attributes:
        decode: seconds per image, on one core.
        encode: seconds per image, on one device with all cores of its node.
        train: seconds per image of a training step.
        head_epoch: seconds per epoch and head of a Population.
    """

    decode: float
    encode: float = 0.0
    train: float = 0.0
    head_epoch: float = 0.0


def estimate_lines(experiment: Experiment, index: ImageIndex, present: Resources) -> list[str]:
    """Times a sample of the work on one node; returns lines with the estimated time of each study and of all.

    Ray must be running. Loads every encoder. If no node is free, a line says that there is no estimate.

    Raises:
        RaysweepError: an encoder cannot be loaded, or no image of the sample can be decoded.
    """
    on_gpu = uses_gpu(experiment.resources, present)
    if not _has_free_device(on_gpu):
        return [f"time there: no estimate, since no {'GPU' if on_gpu else 'CPU'} of the cluster is free"]
    counts = {split: sum(by_class.values()) for split, by_class in index.counts().items()}
    num_images = sum(counts.values())
    lines, total, passes = ["time there, from a sample that one node worked on:"], 0.0, set()
    for study in experiment.studies():
        speeds = _speeds(study, experiment, index, present)
        seconds, work = 0.0, ""
        if study.reads_features and study.encoder_name not in passes:
            passes.add(study.encoder_name)
            pass_seconds = num_images * _pass_seconds_per_image(speeds, present, on_gpu)
            seconds += START_SECONDS["pass"] + pass_seconds
            work = f"pass at {num_images / pass_seconds:,.0f} images/s, then "
        block = experiment.search.block(study.mode)
        epochs = _midpoint(block.space["epochs"])
        if study.mode.trains_together:
            seconds += block.num_trials * epochs * speeds.head_epoch
        else:
            side_by_side = num_concurrent_trials(experiment.resources, present)
            rounds = -(-block.num_trials // side_by_side)
            images = epochs * (counts["train"] + counts["validation"] / 3)  # evaluation has no backward pass
            each = images * speeds.train / experiment.resources.num_workers
            seconds += rounds * (START_SECONDS["trial"] + each)
            seconds += num_images * speeds.decode / present.num_cpus
        if block.time_budget_s:
            seconds = min(seconds, block.time_budget_s)
        lines.append(f"  {study.name}: {work}{block.num_trials} trials of {epochs:.0f} epochs: {_rounded(seconds)}")
        total += seconds
    lines.append(f"  all: {_rounded(total)}; less where trials stop early, or where caches are there already")
    return lines


def _pass_seconds_per_image(speeds: Speeds, present: Resources, on_gpu: bool) -> float:
    devices = present.num_gpus if on_gpu else len(present.cpus_by_node)
    encoding = speeds.encode / devices
    return max(speeds.decode / present.num_cpus, encoding) if on_gpu else encoding


def _has_free_device(on_gpu: bool) -> bool:
    """Waits at most `SECONDS_TO_WAIT` for a free CPU or GPU; returns whether there is one."""
    import ray

    task = ray.remote(_do_nothing).options(**_task_resources(on_gpu)).remote()
    ready, _ = ray.wait([task], timeout=SECONDS_TO_WAIT)
    if not ready:
        ray.cancel(task)
    return bool(ready)


def _do_nothing() -> None:
    pass


def _task_resources(on_gpu: bool) -> dict[str, int]:
    """Returns the Ray resources of the task that times the sample."""
    return {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _rounded(seconds: float) -> str:
    return f"about {describe_seconds(float(f'{seconds:.1g}') if seconds < 10 else float(f'{seconds:.2g}'))}"


def _midpoint(dimension: Dimension) -> float:
    """Returns the middle of a search dimension: the mean of its choices, or of its ends."""
    if isinstance(dimension, Choices):
        return float(np.mean([float(choice) for choice in dimension.choices]))
    return float((dimension.low + dimension.high) / 2)


def _speeds(study: StudyConfig, experiment: Experiment, index: ImageIndex, present: Resources) -> Speeds:
    """Times the work of a study on one node."""
    import ray

    from raysweep.encoders.build import build_encoder
    from raysweep.images.passes import put_index

    encoder = build_encoder(study.encoder.model_dump(), experiment.seed)
    on_gpu = uses_gpu(experiment.resources, present)
    job = SampleJob(
        mode=study.mode,
        encoder=encoder.spec,
        weights=ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()}),
        index=put_index(index),
        num_classes=len(index.classes),
        num_train=sum(index.counts()["train"].values()),
        num_heads=population_size(experiment.search.block(study.mode)),
        batch_size=experiment.train.batch_size,
        num_threads=min(present.cpus_by_node),
        on_gpu=on_gpu,
    )
    speeds: Speeds = ray.get(ray.remote(time_study).options(**_task_resources(on_gpu)).remote(job))
    return speeds


def time_study(job: SampleJob) -> Speeds:
    """Times the work of a study in this process. Each part runs once before it is timed.

    Raises:
        DataError: no image of the sample can be decoded.
    """
    import ray
    import torch

    from raysweep.encoders.build import encoder_from_spec
    from raysweep.errors import DataError
    from raysweep.images.features import encode, load_arrays
    from raysweep.images.pixels import Geometry, decode_rows

    device = torch.device("cuda" if job.on_gpu and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(job.num_threads)
    encoder = encoder_from_spec(job.encoder)
    load_arrays(encoder, ray.get(job.weights))
    encoder = encoder.to(device)
    reads_features = job.mode.reads == "features"
    geometry = Geometry.of(encoder.preprocessing, for_training=not reads_features)
    rows, column = _sample(ray.get(job.index.rows)), job.index.image_column
    seconds, (errors, pixels) = _timed(lambda: decode_rows(rows, column, [geometry], num_threads=1))
    if all(errors):
        raise DataError(f"none of {len(rows)} images can be decoded, such as {rows['path'][0]}: {errors[0]}")
    speeds = Speeds(decode=seconds / len(rows))
    count = GPU_SAMPLE if device.type == "cuda" else SAMPLE
    images = np.resize(pixels[geometry], (count, *geometry.shape))
    if not reads_features:
        return replace(speeds, train=_time_training(encoder, images, job, device) / count)
    precision = "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in a pass: each of num_threads processes decodes and encodes with one thread
    encoding = _timed(lambda: encode(encoder, images, device, precision))[0] / count
    if device.type == "cpu":
        encoding = (encoding + speeds.decode) / job.num_threads
        torch.set_num_threads(job.num_threads)
    return replace(speeds, encode=encoding, head_epoch=_time_heads(encoder, job, device) / job.num_heads)


def _sample(rows: pa.Table) -> pa.Table:
    """Returns a few rows, evenly spaced over the index."""
    return rows.take(np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)))


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    function()
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _time_training(encoder: Encoder, images: np.ndarray, job: SampleJob, device: torch.device) -> float:
    """Returns the seconds of a forward and a backward pass over images, uint8 `(count, height, width, 3)`."""
    import torch

    from raysweep.encoders.head import Classifier, Head
    from raysweep.training.loop import CPU_MICRO_BATCH

    source = encoder.spec.default_source
    model = Classifier(encoder, Head(encoder.num_features(source), job.num_classes), source)
    model = model.to(device, memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
    on_gpu = device.type == "cuda"
    size = min(job.batch_size, len(images)) if on_gpu else CPU_MICRO_BATCH

    def step() -> None:
        for part in torch.from_numpy(images).to(device).split(size):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                logits = model(encoder.preprocessing.normalize(part))
            torch.nn.functional.cross_entropy(logits.float(), logits.argmax(1)).backward()
        if on_gpu:
            torch.cuda.synchronize()

    return _timed(step)[0]


def _time_heads(encoder: Encoder, job: SampleJob, device: torch.device) -> float:
    """Returns the seconds of an epoch of a Population on random features."""
    import torch

    from raysweep.training.population import FeatureSet, train_population

    def features(num_rows: int) -> FeatureSet:
        parts = {name: torch.randn(num_rows, width, device=device).half() for name, width in encoder.spec.parts.items()}
        return FeatureSet(parts, torch.randint(job.num_classes, (num_rows,), device=device))

    source = encoder.spec.default_source
    setting = {"learning_rate": 1e-3, "weight_decay": 1e-4, "epochs": 1, "features": source, "normalize": "none"}
    num_rows = min(MAX_ROWS, job.num_train)
    train, validation = features(num_rows), features(max(1, num_rows // 8))

    def run() -> Sequence[Any]:
        return train_population(
            train,
            validation,
            [setting] * job.num_heads,
            sources=encoder.spec.sources,
            num_classes=job.num_classes,
            batch_size=job.batch_size,
            seed=0,
        )

    return _timed(run)[0] * max(1.0, job.num_train / MAX_ROWS)
