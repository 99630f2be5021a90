"""How much memory this process has used at most."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path


def forget_peak_memory() -> None:
    """Resets the peak that `peak_memory_bytes` returns, on systems that can do so (Linux: proc_pid_clear_refs(5)).

    First, free memory is returned to the system. Every trial runs in its own thread, and glibc may keep a separate
    arena for each thread: after five trials of MobileNetV2, of 1.6 GB each, a worker held 4.7 GB.
    """
    with suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # the system is not Linux, or refuses
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Returns the largest resident set size of this process since `forget_peak_memory`."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # Linux counts in KiB
