"""Decodes one image in a process of its own, which the system ends when it takes too much time or memory.

No decoder in C can be interrupted from Python. A process costs 0.2 s, so only images that are much work get one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from PIL import Image

from raysweep.errors import DataError
from raysweep.images.limits import MAX_SECONDS

if TYPE_CHECKING:
    from raysweep.images.decode import DecodeOptions

MEMORY_BYTES, MEMORY_OF_A_PIXEL = 2**30, 24  # address space: of the interpreter, and of pixels in several copies
WALL_SECONDS = 10 * MAX_SECONDS  # other processes may use the CPU
COMMAND = "from raysweep.images.decode_process import main; main()"

_one_at_a_time = threading.Lock()


def decode_apart(
    data: bytes, min_sides: Collection[int | None], options: DecodeOptions
) -> dict[int | None, Image.Image]:
    """Does what `decode.decode_images` does, in another process. A process waits here until no other thread is inside.

    Raises:
        DataError: the image cannot be decoded, or not with the time and memory that an image gets.
    """
    order = list(min_sides)
    num_bytes = MEMORY_BYTES + len(data) + int(options.max_megapixels * 1e6) * MEMORY_OF_A_PIXEL
    limits = {"seconds": MAX_SECONDS, "num_bytes": num_bytes}
    request = json.dumps({"min_sides": order, "options": asdict(options), "limits": limits}).encode() + b"\n"
    # Threads of BLAS would reserve address space.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", COMMAND]
    try:
        with _one_at_a_time:
            done = subprocess.run(
                command, input=request + data, capture_output=True, timeout=WALL_SECONDS, env=environment, check=False
            )
    except subprocess.TimeoutExpired:
        raise DataError(f"not decoded within {WALL_SECONDS} s") from None
    if done.returncode:
        raise DataError(_reason(done.returncode))
    start = done.stdout.index(b"\n") + 1
    answer = json.loads(done.stdout[:start])
    if "error" in answer:
        raise DataError(answer["error"])
    images, pixels = {}, memoryview(done.stdout)
    for min_side, (width, height) in zip(order, answer["sizes"], strict=True):
        stop = start + 3 * width * height
        images[min_side] = Image.frombytes("RGB", (width, height), pixels[start:stop])
        start = stop
    return images


def _reason(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"takes more than {MAX_SECONDS} s to decode"
    if code < 0:
        return f"its decoder was ended by the system ({signal.Signals(-code).name})"
    return f"its decoder failed (exit status {code})"


def main() -> None:
    """Reads a request and an image from the standard input, and writes sizes and pixels to the standard output."""
    from raysweep.images.decode import DecodeOptions, decode_here

    request = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    options = DecodeOptions.from_dict(request["options"])
    _limit(**request["limits"])
    try:
        images = decode_here(data, request["min_sides"], options)
        pixels = [images[min_side] for min_side in request["min_sides"]]
        answer = json.dumps({"sizes": [image.size for image in pixels]})
    except DataError as error:
        pixels, answer = [], json.dumps({"error": str(error)})
    sys.stdout.buffer.write(answer.encode() + b"\n")
    for image in pixels:
        sys.stdout.buffer.write(image.tobytes())


def _limit(seconds: int, num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    with suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
