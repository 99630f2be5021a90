"""Measures on a node of many CPUs how many processes, with how many threads each, encode the fastest.

Processes of one thread are the fastest where their weights fit into the CPU's cache together. Those of a large encoder
may not: then fewer processes with more threads each read them less often (docs/decisions/0025).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from raysweep.encoders.base import Encoder, EncoderSpec
from raysweep.encoders.build import encoder_from_spec
from raysweep.images.features import ENCODER_BATCH, FeatureRequest, encode, load_arrays
from raysweep.images.pass_processes import PassProcesses

MIN_CPUS = 8
MIN_IMAGES_PER_CPU = 100  # with fewer, a pass is short whatever the encoder
THREADS = (1, 2, 4, 8)
SECONDS = 2.0  # of one measurement
MIN_PASS_SECONDS = 60.0  # a shorter pass does not repay the measurements
MIN_GAIN = 1.1  # less may be chance

_encoders: dict[str, Encoder] = {}  # that this process has loaded for a measurement: the last one


def fastest_processes(
    requests: Sequence[FeatureRequest],
    first: PassProcesses,
    num_cpus: int,
    num_images: int,
    say: Callable[[str], None],
) -> PassProcesses:
    """Returns the fastest of `first` and of fewer processes with more threads each; `first` where the pass is short.

    Args:
        requests: the features to compute.
        first: as many processes as fit into memory.
        num_cpus: CPUs of the node.
        num_images: images of the pass.
        say: is told what was measured.
    """
    if num_cpus < MIN_CPUS or num_images < MIN_IMAGES_PER_CPU * num_cpus or not requests:
        return first
    seconds = {first: seconds_per_image(requests, first)}
    if seconds[first] * num_images < MIN_PASS_SECONDS:
        return first
    best = first
    for num_threads in THREADS:
        if num_threads > first.num_threads:
            shape = replace(first, num_processes=num_cpus // num_threads, num_threads=num_threads)
            seconds[shape] = seconds_per_image(requests, shape)
            if seconds[best] < MIN_GAIN * seconds[shape]:
                break  # even more threads would wait for each other even longer
            best = shape
    say("encoding, images/s: " + ", ".join(f"{shape} {1 / found:,.0f}" for shape, found in seconds.items()))
    return best


def seconds_per_image(requests: Sequence[FeatureRequest], shape: PassProcesses) -> float:
    """Returns the seconds of a node for one image with all encoders, while all processes work at the same time."""
    import ray

    measure = ray.remote(_images_per_second).options(num_cpus=1)
    total = 0.0
    for request in requests:
        about = request.encoder, request.weights, request.precision, shape.num_threads
        for seconds in (0.0, SECONDS):  # the first round loads the encoder in every process
            rates = ray.get([measure.remote(str(request.folder), *about, seconds) for _ in range(shape.num_processes)])
        total += 1 / sum(rates)
    return total


def _images_per_second(
    key: str,
    spec: EncoderSpec,
    weights: dict[str, np.ndarray],
    precision: str,
    num_threads: int,
    seconds: float,
) -> float:
    """Encodes for some seconds, at least one batch, in a task of Ray's."""
    torch.set_num_threads(num_threads)
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = encoder_from_spec(spec)
        _encoders[key].requires_grad_(False)
        load_arrays(_encoders[key], weights, shared=True)
    encoder, batch = _encoders[key], ENCODER_BATCH["cpu", precision]
    images = np.zeros((batch, *spec.preprocessing.output_size, 3), np.uint8)
    started, num_batches, elapsed = time.perf_counter(), 0, 0.0
    while not num_batches or elapsed < seconds:
        encode(encoder, images, torch.device("cpu"), precision)
        num_batches, elapsed = num_batches + 1, time.perf_counter() - started
    return num_batches * batch / elapsed
