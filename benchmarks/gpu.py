"""A GPU's speed: the encoder pass as a share of its matrix rate, heads, and the CPU cores that it needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare_loop import decode
from benchmarks.figures import Figure, Options, Skipped, make_figure
from benchmarks.images import source_images
from benchmarks.population import compare, seconds_of
from raysweep.encoders.base import Encoder
from raysweep.encoders.build import build_encoder
from raysweep.images.features import encode

ENCODERS = {
    "dinov2-base": {"type": "dinov2", "use_pretrained": False},
    "clip-vit-base-patch32": {"type": "clip", "use_pretrained": False},
    "siglip-base-patch16-224": {"type": "siglip", "use_pretrained": False},
}
MATRIX_SIDE = 8_192


def matmul_rate(device: torch.device, side: int = MATRIX_SIDE, repeats: int = 20) -> float:
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


def run(options: Options) -> Iterator[Figure]:
    """Yields the figures of each encoder, then those of heads.

    Raises:
        Skipped: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise Skipped("torch sees no CUDA device")
    device, num_images = torch.device("cuda"), 256 if options.quick else 4_096
    rate = matmul_rate(device)
    yield make_figure("gpu", "bf16 matrix products", rate / 1e12, "Tflop/s", device=torch.cuda.get_device_name(device))
    for name, block in ENCODERS.items():
        encoder = build_encoder(block, 0).requires_grad_(False).to(device)
        shape = (num_images, *encoder.preprocessing.output_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        encode(encoder, pixels[:256], device, "bf16")
        speed = num_images / seconds_of(partial(encode, encoder, pixels, device, "bf16"), device)
        flops = flops_per_image(encoder)
        decoded = decoded_per_second(encoder, options)
        yield make_figure("gpu", f"{name}: encoder pass", speed, "images/s", flops_per_image=flops)
        yield make_figure("gpu", f"{name}: share of the matrix rate", 100 * speed * flops / rate, "%", ">= 50")
        yield make_figure("gpu", f"{name}: decoding by one core", decoded, "images/s")
        yield make_figure("gpu", f"{name}: cores that feed the GPU", speed / decoded, "cores")
    yield from compare(options, device, "gpu")
