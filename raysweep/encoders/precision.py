"""Chooses between float32 and bfloat16 for an encoder, by timing both: hardware with bfloat16 may be slower in it."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raysweep.encoders.base import Encoder

# bf16 changes features a little (their cosine to those in fp32 is .9999 with dinov2-small). A smaller speedup than this
# is not worth it.
MIN_SPEEDUP = 1.1
MAX_ROUNDS, MAX_SECONDS = 3, 0.5


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, rather than by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        # Not oneDNN's own check, which is true for any AVX-512. CPUs with AMX have AVX512_BF16 too.
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def faster_precision(encoder: Encoder, device: torch.device, num_images: int) -> str:
    """Returns `bf16` where the device has it and the encoder is faster with it, else `fp32`.

    A CPU with bf16 instructions but without AMX may be slower in bf16: two such cores ran dinov2-small at 17.6 images/s
    in fp32 and at 10.0 in bf16. So both are timed, in turn. The first batch of each warms up. Of up to three more, the
    fastest counts. With dinov2-small and two images, this takes about a second in all.

    Args:
        encoder: The encoder, in evaluation mode and on the device.
        device: The device that the encoder will run on.
        num_images: Images in a forward pass. On a GPU use the number that it will be run with, on a CPU one or two.
    """
    if not supports_bf16(device):
        return "fp32"
    images = torch.zeros(num_images, *encoder.preprocessing.output_size, 3, dtype=torch.uint8, device=device)
    pixel_values = encoder.preprocessing.normalize(images)
    best = dict.fromkeys(("fp32", "bf16"), float("inf"))
    with _one_thread():
        for precision in best:
            _seconds(encoder, pixel_values, precision)
        spent = 0.0
        for _ in range(MAX_ROUNDS):
            seconds = {precision: _seconds(encoder, pixel_values, precision) for precision in best}
            best = {precision: min(best[precision], seconds[precision]) for precision in best}
            spent += sum(seconds.values())
            if spent > MAX_SECONDS:
                break
    return "bf16" if best["fp32"] >= MIN_SPEEDUP * best["bf16"] else "fp32"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one CPU thread. Other work on the machine hardly changes the CPU time of one thread.

    With several threads, which wait for each other, the choice would differ from run to run. A sweep could then not
    find its cache again, because the cache depends on the precision.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# no_grad, not inference_mode: training must be able to use what a model caches in its first call.
@torch.no_grad()
def _seconds(encoder: Encoder, pixel_values: torch.Tensor, precision: str) -> float:
    """Returns the CPU time of one forward pass on a CPU, the wall time on a GPU."""
    device = pixel_values.device.type
    clock = time.thread_time if device == "cpu" else time.perf_counter
    started = clock()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(pixel_values)
    for features in outputs.values():
        features.cpu()  # waits until a GPU has finished
    return clock() - started
