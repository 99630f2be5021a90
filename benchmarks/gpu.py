"""A GPU's speed: encoders, plain and compiled, as a share of its matrix rate, and how long a pass lets it wait.

Where there is no GPU, the same code runs on a CPU with a small encoder. This stand-in shows that the code runs. The
names of its figures say so, and they say nothing of a GPU.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare_loop import decode
from benchmarks.figures import Figure, Options, make_figure
from benchmarks.images import repeat_images, source_images
from benchmarks.population import compare, seconds_of
from benchmarks.sweeps import DINOV2_SMALL, SEED, TINY_DINOV2
from raysweep.cluster.session import ray_session
from raysweep.encoders.base import Encoder
from raysweep.encoders.build import build_encoder
from raysweep.encoders.compiled import MIN_IMAGES, PassEncoder, compile_encoder
from raysweep.encoders.precision import supports_bf16
from raysweep.experiment.sections import DataConfig
from raysweep.images.features import ENCODER_BATCH, FeatureRequest, encode
from raysweep.images.index import load_index
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches

ENCODERS = {
    "dinov2-base": {"type": "dinov2", "use_pretrained": False},
    "clip-vit-base-patch32": {"type": "clip", "use_pretrained": False},
    "siglip-base-patch16-224": {"type": "siglip", "use_pretrained": False},
}
STAND_IN = "stand-in on a CPU, no GPU"
MATRIX_SIDE = {"cuda": 8_192, "cpu": 1_024}
WAITING = re.compile(r"the GPUs waited (\d+)% of the time")


def matmul_rate(device: torch.device, side: int, repeats: int = 20) -> float:
    """Returns the flops per second of large bf16 matrix products."""
    first, second = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(lambda: first @ second, device)
    return 2 * side**3 * repeats / seconds_of(lambda: [first @ second for _ in range(repeats)], device)


def flops_per_image(encoder: Encoder) -> int:
    """Returns the flops of one forward pass; a multiplication and an addition count as two."""
    image = torch.zeros(1, 3, *encoder.preprocessing.output_size, device=next(encoder.parameters()).device)
    # The counter does not know every fused attention kernel; with the math backend it counts all products.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        encoder(image)
    return int(counter.get_total_flops())


def decoded_per_second(encoder: Encoder, options: Options) -> float:
    """Returns how many images per second one CPU core reads, decodes and resizes."""
    paths = [path for paths in source_images(options).values() for path in paths]
    started = time.perf_counter()
    for path in paths:
        decode(encoder, path)
    return len(paths) / (time.perf_counter() - started)


def encoder_figures(
    name: str, encoder: Encoder, device: torch.device, options: Options, rate: float, make: Callable[..., Figure]
) -> Iterator[Figure]:
    """Yields the speed of one encoder, plain and compiled, without Ray and without decoding."""
    precision = precision_on(device)
    batch_size = ENCODER_BATCH[device.type, precision]
    num_images = 2 * batch_size if options.quick else 256 if device.type == "cpu" else 4_096
    shape = (num_images, *encoder.preprocessing.output_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def speed(one: PassEncoder) -> float:
        encode(one, pixels[: 2 * batch_size], device, precision)
        return num_images / seconds_of(partial(encode, one, pixels, device, precision), device)

    flops, decoded, plain = flops_per_image(encoder), decoded_per_second(encoder, options), speed(encoder)
    started = time.perf_counter()
    compiled = compile_encoder(encoder, device, precision, batch_size)
    seconds = time.perf_counter() - started
    fast = speed(compiled)
    gain = 1 / plain - 1 / fast
    yield make(f"{name}: plain", plain, "images/s", flops_per_image=flops, precision=precision)
    yield make(f"{name}: plain, share of the matrix rate", 100 * plain * flops / rate, "%")
    yield make(f"{name}: compiled", fast, "images/s")
    yield make(f"{name}: compiled, share of the matrix rate", 100 * fast * flops / rate, "%", ">= 50")
    yield make(f"{name}: compilation with its check", seconds, "s")
    repaid = seconds / gain if gain > 0 else math.inf
    yield make(f"{name}: images that repay it", repaid, "images", assumed=MIN_IMAGES)
    yield make(f"{name}: decoding by one core", decoded, "images/s")
    yield make(f"{name}: cores that feed it, compiled", fast / decoded, "cores")


def pass_figures(
    name: str, block: dict[str, Any], device: torch.device, options: Options, make: Callable[..., Figure]
) -> Iterator[Figure]:
    """Yields the speed of a whole pass over images with one GPU actor, and the share of time in which it waits.

    The pass is too short to be compiled.
    """
    num_images = 64 if options.quick else 1_000 if device.type == "cpu" else 20_000
    repeat_images(source_images(options), options.scratch / "images", num_images)
    index = load_index(DataConfig(source=str(options.scratch / "images")), SEED)
    encoder, lines, stamps = build_encoder(block, SEED), [], []
    with ExitStack() as stack:
        import ray

        if device.type == "cpu":  # a GPU in Ray's books only: the pass takes the way through GPU actors
            stack.enter_context(patch.object(ray, "init", partial(ray.init, num_gpus=1)))
        num_cpus = stack.enter_context(ray_session(verbose=False)).num_cpus
        weights = ray.put({key: tensor.numpy() for key, tensor in encoder.state_dict().items()})
        request = FeatureRequest(options.scratch / "cache", encoder.spec, weights, precision_on(device))
        (cache,) = build_caches(
            [request],
            index,
            num_gpus=1,
            processes=PassProcesses(),
            on_progress=lambda done, _total: stamps.append((done, time.perf_counter())),
            say=lines.append,
        )
    (first, started), (last, ended) = stamps[0], stamps[-1]
    speed = (last - first) / (ended - started) if last > first else num_images / cache.seconds
    yield make(f"{name}: pass, from the first to the last batch", speed, "images/s", cpus=num_cpus, images=num_images)
    yield make(f"{name}: pass, with its start", num_images / cache.seconds, "images/s")
    waiting = next(int(found[1]) for line in lines if (found := WAITING.match(line)))
    yield make(f"{name}: pass, stall (the encoder waits for batches)", waiting, "%", cpus=num_cpus)


def precision_on(device: torch.device) -> str:
    """Returns the precision that a sweep would choose on a GPU, and the same on a CPU that has it."""
    return "bf16" if supports_bf16(device) else "fp32"


def run(options: Options) -> Iterator[Figure]:
    """Yields the matrix rate, the figures of a pass, those of each encoder, then those of heads on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks: dict[str, dict[str, Any]] = ENCODERS
    if device.type == "cpu":
        blocks = {"tiny dinov2": TINY_DINOV2} if options.quick else {"dinov2-small": DINOV2_SMALL}

    def make(name: str, value: float, unit: str, target: str | None = None, **details: Any) -> Figure:
        if device.type == "cpu":
            return make_figure("gpu", f"{STAND_IN}: {name}", value, unit, **details)
        return make_figure("gpu", name, value, unit, target, **details)

    rate = matmul_rate(device, MATRIX_SIDE[device.type])
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else STAND_IN
    yield make("bf16 matrix products", rate / 1e12, "Tflop/s", device=card)
    first = next(iter(blocks))
    yield from pass_figures(first, blocks[first], device, options, make)
    for name, block in blocks.items():
        encoder = build_encoder(block, SEED).requires_grad_(False).to(device)
        yield from encoder_figures(name, encoder, device, options, rate, make)
    if device.type == "cuda":  # on CPUs, `population` does the same
        yield from compare(options, device, "gpu")
