"""One Ray Data pass over the images makes all missing caches: it decodes each image once, then encodes it.

Without GPUs, each process decodes and encodes with one thread, on each CPU: tasks on a Ray of our own, actors on a
cluster (see `pass_processes`). With GPUs, tasks decode on all CPUs, and one actor on each GPU encodes. The code of
tasks and actors is in `pass_tasks`.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raysweep.errors import DataError, RaysweepError
from raysweep.images.blocks import dataset_of_blocks, list_blocks, map_blocks
from raysweep.images.cache import (
    Cache,
    has_cache,
    only_writer,
    open_cache,
    remove_leftovers,
    remove_older_passes,
    write_manifest,
)
from raysweep.images.cache_files import damaged_files, fetch_files, is_whole, read_row_ids, remove_others
from raysweep.images.features import FeatureRequest
from raysweep.images.image_hashes import add_hashes, hashes_file, write_hashes
from raysweep.images.index import BadRow, ImageIndex
from raysweep.images.pass_errors import raising_own_errors
from raysweep.images.pass_processes import PassProcesses
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
from raysweep.storage.copies import local_path, location, on_every_node, remove

if TYPE_CHECKING:
    import ray.data

ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 64, 512
MIN_BLOCKS, MAX_BLOCKS = 8, 2_000  # the minimum lets the progress be seen with few images too
GPU_BLOCK = 256  # rows that a GPU actor gets at once: several batches, so that uploads and forward passes overlap
# Decoded images that wait for each GPU: some seconds of its work. More would only fill the object store.
MAX_WAITING_IMAGES = 16_384

Request = FeatureRequest | PixelRequest
Progress = Callable[[int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Processors:
    """What a pass runs on; see `build_caches`."""

    num_gpus: int
    processes: PassProcesses


def build_caches(
    requests: Sequence[Request],
    index: ImageIndex,
    *,
    num_gpus: int,
    processes: PassProcesses,
    on_progress: Progress = lambda _done, _total: None,
    say: Say = lambda _line: None,
) -> list[Cache]:
    """Returns the requested caches, in order. One pass makes those that do not exist yet.

    Of a cache that exists, only files that are missing or damaged are made again, in a pass over their images alone.

    Args:
        requests: Feature caches and pixel caches of this index. Requests with the same folder are one cache.
        index: The images.
        num_gpus: GPUs to spread the encoders over; 0 encodes on CPUs.
        processes: The processes that encode on CPUs.
        on_progress: Called with (images done, all images).
        say: Called with each line that the user is to read.

    Raises:
        DataError: the pass did not see every image.
        ResourceError: a disk is full, or a process of the pass was ended too often.
    """
    processors = _Processors(num_gpus, processes)
    missing = {request.folder: request for request in requests if not _is_whole(request)}
    with ExitStack() as locks:
        for folder in sorted(missing):  # every sweep uses the same order, so that no two wait for each other
            locks.enter_context(only_writer(folder))
        missing = {folder: request for folder, request in missing.items() if not _is_whole(request)}
        damaged = [request for request in missing.values() if _exists(request)]
        absent = [request for request in missing.values() if not _exists(request)]
        if absent:
            _make_pass(absent, index, processors, on_progress, say)
        for request in damaged:
            _mend(request, index, processors, on_progress, say)
    caches = []
    for request in requests:
        cache = open_cache(request.folder)
        assert cache is not None
        caches.append(replace(cache, made_now=request.folder in {made.folder for made in absent}))
    return caches


def _exists(request: Request) -> bool:
    return has_cache(request.folder, streamed=_is_streamed(request))


def _is_whole(request: Request) -> bool:
    return is_whole(request.folder, streamed=_is_streamed(request))


def _is_streamed(request: Request) -> bool:
    return isinstance(request, PixelRequest) and request.streamed


def warm_up(num_processes: int) -> None:
    """Starts in advance what a pass would wait for: Ray Data's own actors, and processes that have imported torch.

    It saves time when it runs in a thread, between the start of Ray and `build_caches`.
    """
    map_blocks(dataset_of_blocks(list_blocks(num_processes, 1)), _import_encoders).materialize()


def _import_encoders(block: pa.Table) -> pa.Table:
    import transformers.modeling_utils  # noqa: F401

    return block


def put_index(index: ImageIndex) -> IndexReference:
    """Puts into Ray's object store what workers need to decode the rows of an index."""
    import ray

    rows = index.table.select(["row_id", "path", "position", "image", "content_hash"])
    paths = pa.array([on_every_node(path) for path in rows["path"].to_pylist()], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("path"), "path", paths)
    return IndexReference(ray.put(rows), index.image_column, index.decode_options)


def _make_pass(
    requests: Sequence[Request], index: ImageIndex, processors: _Processors, on_progress: Progress, say: Say
) -> None:
    """Makes caches of all images. The caller holds their locks."""
    started = time.perf_counter()
    for request in requests:
        remove_leftovers(request.folder)
    key = uuid.uuid4().hex
    dataset = _dataset(requests, key, index, processors)
    try:
        tally = _run_pass(dataset, len(requests), len(index.table), on_progress, say)
        _finish_caches(requests, key, index, tally, time.perf_counter() - started)
    except BaseException:
        for request in requests:
            with suppress(RaysweepError):  # an error of the storage must not hide the first one
                if not _exists(request):
                    remove(request.folder / key)  # a disk that is full gets its room back
        raise


def _mend(request: Request, index: ImageIndex, processors: _Processors, on_progress: Progress, say: Say) -> None:
    """Makes again the rows of a cache that its whole files do not hold. The caller holds its lock.

    The manifest is written last: until then it names the damaged files, and an interrupted repair begins anew.
    """
    cache = open_cache(request.folder)
    assert cache is not None
    folder, files = local_path(cache.rows), dict(cache.files or {})
    for name in damaged_files(cache):
        del files[name]
    remove_others(folder, files)
    known = [read_row_ids(path) for path in sorted(fetch_files(folder, files))]
    bad_rows = [row for row in cache.bad_rows if not row.is_unread]
    cache = replace(cache, num_rows=cache.num_rows + len(cache.bad_rows) - len(bad_rows), bad_rows=tuple(bad_rows))
    row_ids = index.table["row_id"].to_numpy()
    is_missing = ~np.isin(row_ids, np.concatenate([*known, [row.row_id for row in cache.bad_rows]]))
    missing = replace(index, table=index.table.filter(pa.array(is_missing)))
    num_missing = len(missing.table)
    if num_missing:
        dataset = _dataset([request], folder.name, missing, processors)
        num_done = len(row_ids) - num_missing

        def on_done(done: int, _total: int) -> None:
            on_progress(num_done + done, len(row_ids))

        tally = _run_pass(dataset, 1, num_missing, on_done, say)
        add_hashes(hashes_file(request.folder.parent, index), row_ids, *tally.all_hashes())
        new_bad_rows = _bad_rows(missing, tally)
        cache = replace(
            cache,
            num_rows=cache.num_rows - len(new_bad_rows),
            bad_rows=tuple(sorted((*bad_rows, *new_bad_rows), key=lambda row: row.row_id)),
            peak_memory_bytes=max(cache.peak_memory_bytes, tally.memory),
            peak_gpu_memory_bytes=max(cache.peak_gpu_memory_bytes, tally.gpu_memory),
        )
        files |= tally.files[0]
        cache = replace(cache, blank_rows=tuple(sorted({*cache.blank_rows, *tally.blank_rows})))
    write_manifest(request.folder, replace(cache, files=files))


def _run_pass(dataset: ray.data.Dataset, num_caches: int, num_rows: int, on_progress: Progress, say: Say) -> Tally:
    """Runs a pass to its end, and returns what its tasks reported.

    Raises:
        DataError: the pass did not see every image.
        ResourceError: a disk is full, or a process was ended too often.
    """
    tally = Tally(num_caches)
    with raising_own_errors():
        for reports in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            tally.add(reports)
            on_progress(tally.num_rows, num_rows)
    if tally.num_rows != num_rows:
        raise DataError(f"the pass saw {tally.num_rows} of {num_rows} images; run the same command again")
    for line in tally.lines():
        say(line)
    return tally


def _bad_rows(index: ImageIndex, tally: Tally) -> tuple[BadRow, ...]:
    paths = dict(zip(index.table["row_id"].to_pylist(), index.table["path"].to_pylist(), strict=True))
    return tuple(BadRow(row_id, paths[row_id], error) for row_id, error in sorted(tally.errors.items()))


def _finish_caches(requests: Sequence[Request], key: str, index: ImageIndex, tally: Tally, wall_seconds: float) -> None:
    """Writes the hashes and the manifests of a pass that has ended."""
    write_hashes(hashes_file(requests[0].folder.parent, index), *tally.all_hashes())
    bad_rows = _bad_rows(index, tally)
    for request, seconds, files in zip(requests, tally.shares(wall_seconds), tally.files, strict=True):
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
            files=files,
            blank_rows=tuple(sorted(tally.blank_rows)),
        )
        write_manifest(request.folder, cache)
        remove_older_passes(request.folder / key)


def _dataset(requests: Sequence[Request], key: str, index: ImageIndex, processors: _Processors) -> ray.data.Dataset:
    """Returns a Ray Dataset that yields a report for every row; nothing runs yet."""
    from ray.data import ActorPoolStrategy, ExecutionResources, TaskPoolStrategy

    num_gpus, processes = processors.num_gpus, processors.processes
    targets = tuple(_target(request, key) for request in requests)
    num_rows, num_takers = len(index.table), num_gpus or processes.num_processes
    job = PassJob(uuid.uuid4().hex, put_index(index), targets, processes.num_threads, num_rows // num_takers)
    ranges = list_blocks(num_rows, _block_size(num_rows), num_takers)
    blocks, num_blocks = dataset_of_blocks(ranges), len(ranges)
    if not any(isinstance(request, FeatureRequest) for request in requests):
        return map_blocks(blocks, partial(decode_block, job=job))
    if not num_gpus and not processes.on_cluster:
        # Tasks, not actors: Ray starts a new process for each actor, but keeps idle processes for tasks. Each task asks
        # for one CPU only, because it might never start beside training runs otherwise.
        pool: dict[str, Any] = {"compute": TaskPoolStrategy(size=num_takers)}
        return map_blocks(blocks, partial(decode_and_encode_block, job=job), **pool)
    size = {"size": num_takers}
    if processes.on_cluster:  # nodes that join a cluster during the pass get actors too
        size = {"min_size": num_takers, "max_size": max(num_takers, num_blocks)}
    if not num_gpus:
        # Actors, with their next blocks already waiting. If these were tasks, Ray would notice a tenth of a second
        # late, after every block, that another node is free.
        actors: dict[str, Any] = {"compute": ActorPoolStrategy(**size), "num_cpus": processes.num_threads}
        return map_blocks(blocks, DecoderEncoderActor, fn_constructor_args=(job,), **actors)
    dataset = map_blocks(
        map_blocks(blocks, partial(decode_block, job=job)),
        EncoderActor,
        fn_constructor_args=(job,),
        # Two calls run at once: one copies pixels or writes its file while the GPU works for the other.
        compute=ActorPoolStrategy(**size, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        num_cpus=0,  # all CPUs are left for decoding, also on a machine with only one
        num_gpus=1,
        batch_size=GPU_BLOCK,
    )
    image_bytes = sum(math.prod(geometry.shape) for geometry in job.encoded_geometries)
    num_bytes = image_bytes * (num_gpus * MAX_WAITING_IMAGES + _cluster_cpus() * 2 * ranges[0]["size"])
    # Decoding on all CPUs goes on as long as there is room, and then at the speed of the GPUs.
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=num_bytes)
    return dataset


def _cluster_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def _block_size(num_rows: int) -> int:
    """Returns how many rows of the index one block has, except the last ones."""
    size = ROWS_PER_BLOCK
    while size < MAX_ROWS_PER_BLOCK and size * MAX_BLOCKS < num_rows:
        size *= 2  # so that blocks add up to full batches of a GPU
    return min(size, MAX_ROWS_PER_BLOCK, max(1, num_rows // MIN_BLOCKS))


def _target(request: Request, key: str) -> PassTarget:
    """Returns what the tasks are told of a request, with the subfolder that this pass writes to."""
    folder = location(request.folder / key)
    if isinstance(request, PixelRequest):
        geometry = Geometry.of(request.preprocessing, for_training=True)
        return PassTarget(folder, geometry, streamed=request.streamed)
    geometry = Geometry.of(request.encoder.preprocessing, for_training=False)
    return PassTarget(folder, geometry, encoder=request.encoder, weights=request.weights, precision=request.precision)
