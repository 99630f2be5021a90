"""Translates what Ray raises when a pass fails into errors that say what happened and what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raysweep.errors import RaysweepError, ResourceError, one_line
from raysweep.images.blocks import MAX_RETRIES

RAY_DATA_SUFFIX = "\nFailed to apply UDF transform"  # Ray Data appends this, and advice, to the message of any error
LESS_MEMORY = "free memory, or use a smaller encoder or a smaller image_size"


@contextmanager
def raising_own_errors() -> Iterator[None]:
    """Raises a RaysweepError of a task as it was raised there, and a ResourceError for what a machine lacked.

    Ray wraps an error of a task in its own error, and adds the tracebacks of all processes in between to the message.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        # The class of such an error is derived from both RayTaskError and the class of its cause.
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        reason = " ".join(str(cause).partition(RAY_DATA_SUFFIX)[0].split())
        if isinstance(cause, RaysweepError):
            raise type(cause)(str(cause).partition(RAY_DATA_SUFFIX)[0]) from None
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            raise ResourceError(f"the pass over the images ran out of memory ({reason}); {LESS_MEMORY}") from error
        if isinstance(cause, OSError):
            # Ray Data puts its own advice in the place of the file's name.
            raise ResourceError(f"the pass over the images: {cause.strerror or reason}") from error
        raise
    except ray.exceptions.OutOfDiskError as error:
        raise ResourceError(
            "the pass over the images: Ray's folder for temporary files is full (in /tmp, or in TMPDIR)"
        ) from error
    except ray.exceptions.OutOfMemoryError as error:
        raise ResourceError(
            f"the pass over the images: Ray ended a process in each of {1 + MAX_RETRIES} tries, because the memory of "
            f"its node was full; {LESS_MEMORY}"
        ) from error
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
    ) as error:
        reason = one_line(error, 500)
        raise ResourceError(
            "the pass over the images: a process was ended from outside, or crashed, in each of "
            f"{1 + MAX_RETRIES} tries ({reason}); if memory was short: {LESS_MEMORY}"
        ) from error
