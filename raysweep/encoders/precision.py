"""Whether an encoder runs faster in bfloat16 here: that the hardware has it does not say so."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raysweep.encoders import Encoder

# bf16 turns a feature vector a little (cosine .9999 to fp32 with dinov2-small); less gain than this is not worth it.
MIN_SPEEDUP = 1.1
MAX_ROUNDS, MAX_SECONDS = 3, 0.5


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, rather than by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        # Not oneDNN's own check, which any AVX-512 passes; CPUs with AMX have this too.
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def faster_precision(encoder: Encoder, device: torch.device, num_images: int) -> str:
    """Returns `bf16` where the device has it and the encoder gains by it, else `fp32`.

    A CPU with bf16 instructions but no AMX may be slower in bf16: two such cores ran dinov2-small at 17.6 images/s in
    fp32 and at 10.0 in bf16. So a few batches of each are timed, in turn: one to warm up, then the fastest of up to
    three. Two images take dinov2-small about a second in all.

    Args:
        encoder: in evaluation mode, on the device.
        device: where it will run.
        num_images: images a forward pass: on a GPU as many as it will be run with, on a CPU one or two.
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
    """Lets torch use one CPU thread, whose own CPU time other work on the machine hardly changes.

    Threads that wait for one another would make the choice, and with it the cache that a sweep finds, a matter of luck.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# no_grad, not inference_mode: what a model caches must still be usable in training.
@torch.no_grad()
def _seconds(encoder: Encoder, pixel_values: torch.Tensor, precision: str) -> float:
    """CPU time of one forward pass on a CPU, wall time on a GPU."""
    device = pixel_values.device.type
    clock = time.thread_time if device == "cpu" else time.perf_counter
    started = clock()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(pixel_values)
    for features in outputs.values():
        features.cpu()  # waits for a GPU to be done
    return clock() - started
