"""One Ray Data pass over the images makes all missing caches: it decodes each image once, then encodes it.

Without GPUs, one process of each node decodes and encodes with all CPUs of the node: a task on a Ray of our own, an
actor on a cluster. Decoding in other processes would take CPUs from the encoder's threads, which wait for the slowest
of them (half the speed, measured on two cores with MobileNetV2). With GPUs, tasks decode on all CPUs, and one actor on
each GPU encodes. The code of tasks and actors is in `pass_tasks`.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raysweep.errors import DataError, RaysweepError
from raysweep.images.blocks import WHOLE_BLOCKS, dataset_of_blocks
from raysweep.images.cache import (
    Cache,
    has_cache,
    only_writer,
    open_cache,
    remove_leftovers,
    remove_older_passes,
    write_manifest,
)
from raysweep.images.features import FeatureRequest
from raysweep.images.index import BadRow, ImageIndex
from raysweep.images.pass_tasks import (
    DecoderEncoderActor,
    EncoderActor,
    IndexReference,
    PassJob,
    PassTarget,
    decode_and_encode_block,
    decode_block,
)
from raysweep.images.pixels import Geometry, PixelRequest
from raysweep.images.task_reports import Tally
from raysweep.storage.copies import location, on_every_node, remove

if TYPE_CHECKING:
    import ray.data

ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 64, 512
MIN_BLOCKS, MAX_BLOCKS = 8, 2_000  # the minimum lets the progress be seen with few images too
RAY_DATA_SUFFIX = "\nFailed to apply UDF transform"  # Ray Data appends this, and advice, to the message of any error
GPU_BLOCK = 256  # rows that a GPU actor gets at once: several batches, so that uploads and forward passes overlap

Request = FeatureRequest | PixelRequest
Progress = Callable[[int, int], None]


def build_caches(
    requests: Sequence[Request],
    index: ImageIndex,
    *,
    num_gpus: int,
    num_threads: int,
    num_nodes: int = 0,
    on_progress: Progress = lambda _done, _total: None,
) -> list[Cache]:
    """Returns the requested caches, in order. One pass makes those that do not exist yet.

    Args:
        requests: Feature caches and pixel caches of this index. Requests with the same folder are one cache.
        index: The images.
        num_gpus: GPUs to spread the encoders over; 0 encodes on CPUs.
        num_threads: CPUs of the smallest node that has any; on a Ray of our own, CPUs of this machine.
        num_nodes: Nodes of a cluster that have CPUs; 0 on a Ray of our own. Nodes of a cluster work at the same time,
            and nodes that join during the pass work too.
        on_progress: Called with (images done, all images).

    Raises:
        DataError: the pass did not see every image.
    """
    missing = {request.folder: request for request in requests if not _exists(request)}
    with ExitStack() as locks:
        for folder in sorted(missing):  # every sweep uses the same order, so that no two wait for each other
            locks.enter_context(only_writer(folder))
        missing = {folder: request for folder, request in missing.items() if not _exists(request)}
        if missing:
            _make_pass(list(missing.values()), index, num_gpus, num_threads, num_nodes, on_progress)
    caches = []
    for request in requests:
        cache = open_cache(request.folder)
        assert cache is not None
        caches.append(replace(cache, made_now=request.folder in missing))
    return caches


def _exists(request: Request) -> bool:
    return has_cache(request.folder, streamed=_is_streamed(request))


def _is_streamed(request: Request) -> bool:
    return isinstance(request, PixelRequest) and request.streamed


def warm_up() -> None:
    """Starts in advance what a pass would wait for: Ray Data's own actors, and a process that has imported torch.

    It saves time when it runs in a thread, between the start of Ray and `build_caches`.
    """
    import ray.data

    ray.data.from_items([{"start": 0}]).map_batches(_import_encoders, **WHOLE_BLOCKS).materialize()


def _import_encoders(block: pa.Table) -> pa.Table:
    import transformers.modeling_utils  # noqa: F401

    return block


def put_index(index: ImageIndex) -> IndexReference:
    """Puts into Ray's object store what workers need to decode the rows of an index."""
    import ray

    rows = index.table.select(["row_id", "path", "position", "image"])
    paths = pa.array([on_every_node(path) for path in rows["path"].to_pylist()], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("path"), "path", paths)
    return IndexReference(ray.put(rows), index.image_column)


def _make_pass(
    requests: Sequence[Request],
    index: ImageIndex,
    num_gpus: int,
    num_threads: int,
    num_nodes: int,
    on_progress: Progress,
) -> None:
    started = time.perf_counter()
    for request in requests:
        remove_leftovers(request.folder)
    tally, num_rows, key = Tally(len(requests)), len(index.table), uuid.uuid4().hex
    dataset = _dataset(requests, key, index, num_gpus, num_threads, num_nodes)
    with _raising_own_errors():
        for reports in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            tally.add(reports)
            on_progress(tally.num_rows, num_rows)
    if tally.num_rows != num_rows:
        folders = ", ".join(str(request.folder) for request in requests)
        raise DataError(f"{folders}: the pass saw {tally.num_rows} of {num_rows} images; start the sweep again")
    _finish_caches(requests, key, index, tally, time.perf_counter() - started)


def _finish_caches(requests: Sequence[Request], key: str, index: ImageIndex, tally: Tally, wall_seconds: float) -> None:
    """Writes the manifests of a pass that has ended."""
    paths = dict(zip(index.table["row_id"].to_pylist(), index.table["path"].to_pylist(), strict=True))
    bad_rows = tuple(BadRow(row_id, paths[row_id], error) for row_id, error in sorted(tally.errors.items()))
    for request, seconds in zip(requests, tally.shares(wall_seconds), strict=True):
        if _exists(request):  # in a bucket, where another head node finished first
            remove(request.folder / key)
            continue
        cache = Cache(
            folder=location(request.folder),
            rows=location(request.folder / key),
            num_rows=tally.num_rows - len(bad_rows),
            bad_rows=bad_rows,
            seconds=seconds,
            peak_memory_bytes=tally.memory,
            peak_gpu_memory_bytes=tally.gpu_memory,
            made_now=True,
            streamed=_is_streamed(request),
        )
        write_manifest(request.folder, cache)
        remove_older_passes(request.folder / key)


@contextmanager
def _raising_own_errors() -> Iterator[None]:
    """Raises a RaysweepError of a task as it was raised there.

    Ray wraps it in its own error, and adds the tracebacks of all processes in between to the message.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        # The class of such an error is derived from both RayTaskError and the class of its cause.
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, RaysweepError):
            raise type(cause)(str(cause).partition(RAY_DATA_SUFFIX)[0]) from None
        raise


def _dataset(
    requests: Sequence[Request], key: str, index: ImageIndex, num_gpus: int, num_threads: int, num_nodes: int
) -> ray.data.Dataset:
    """Returns a Ray Dataset that yields a report for every row; nothing runs yet."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    job = PassJob(key, put_index(index), tuple(_target(request, key) for request in requests), num_threads)
    num_rows = len(index.table)
    block_size = _block_size(num_rows)
    blocks, num_blocks = dataset_of_blocks(num_rows, block_size), math.ceil(num_rows / block_size)
    if not any(isinstance(request, FeatureRequest) for request in requests):
        return blocks.map_batches(partial(decode_block, job=job), **WHOLE_BLOCKS)
    if not num_gpus and not num_nodes:
        # A task, not an actor: Ray starts a new process for each actor, but keeps idle processes for tasks. Each task
        # asks for one CPU only, because it might never start beside training runs otherwise. One process works on all
        # blocks, and ends after the last one, which frees the memory of the encoders.
        one_process: dict[str, Any] = {"compute": TaskPoolStrategy(size=1), "max_calls": num_blocks}
        return blocks.map_batches(partial(decode_and_encode_block, job=job), **one_process, **WHOLE_BLOCKS)
    size = {"size": num_gpus}
    if num_nodes:  # nodes that join a cluster during the pass get actors too
        size = {"min_size": num_gpus or num_nodes, "max_size": max(num_gpus, num_blocks)}
    if not num_gpus:
        # One actor on each node, with its next block already waiting. If these were tasks, Ray would notice a tenth of
        # a second late, after every block, that another node is free.
        one_per_node: dict[str, Any] = {"compute": ActorPoolStrategy(**size), "num_cpus": num_threads}
        return blocks.map_batches(DecoderEncoderActor, fn_constructor_args=(job,), **one_per_node, **WHOLE_BLOCKS)
    return blocks.map_batches(partial(decode_block, job=job), **WHOLE_BLOCKS).map_batches(
        EncoderActor,
        fn_constructor_args=(job,),
        # Two calls run at once: one copies pixels or writes its file while the GPU works for the other.
        compute=ActorPoolStrategy(**size, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        num_cpus=0,  # all CPUs are left for decoding, also on a machine with only one
        num_gpus=1,
        **(WHOLE_BLOCKS | {"batch_size": GPU_BLOCK}),
    )


def _block_size(num_rows: int) -> int:
    """Returns how many rows of the index one file of each cache holds."""
    size = max(ROWS_PER_BLOCK, -(-num_rows // MAX_BLOCKS))
    return min(size, MAX_ROWS_PER_BLOCK, max(1, num_rows // MIN_BLOCKS))


def _target(request: Request, key: str) -> PassTarget:
    """Returns what the tasks are told of a request, with the subfolder that this pass writes to."""
    folder = location(request.folder / key)
    if isinstance(request, PixelRequest):
        geometry = Geometry.of(request.preprocessing, for_training=True)
        return PassTarget(folder, geometry, streamed=request.streamed)
    geometry = Geometry.of(request.encoder.preprocessing, for_training=False)
    return PassTarget(folder, geometry, encoder=request.encoder, weights=request.weights, precision=request.precision)
