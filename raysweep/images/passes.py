"""One Ray Data pass over the images makes every cache that is missing: each image is decoded once, then encoded.

On CPUs a task, or on a cluster an actor of each node, does both with all cores of its node, because decoding in other
processes would take cores from the encoder's threads, which wait for the slowest of them (measured on two cores with
MobileNetV2: half the speed). With GPUs, tasks decode on all cores and an actor on every GPU encodes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raysweep.encoders import Encoder, encoder_from_spec
from raysweep.errors import DataError, RaysweepError
from raysweep.images.cache import (
    MANIFEST,
    Cache,
    has_cache,
    only_writer,
    open_cache,
    peak_memory_bytes,
    remove_leftovers,
    remove_older_passes,
    write_rows,
)
from raysweep.images.features import FeatureRequest, encode, feature_table, load_arrays
from raysweep.images.pixels import Geometry, PixelRequest, decode_rows, write_pixels
from raysweep.images.sources import BadRow, ImageIndex
from raysweep.paths import write_json
from raysweep.storage import local_path, location, on_every_node, remove

if TYPE_CHECKING:
    import ray.data

ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 64, 512
MIN_BLOCKS, MAX_BLOCKS = 8, 2_000  # at the least, so that progress shows with few images too
RAYS_ADVICE = "\nFailed to apply UDF transform"  # that it adds to the message of whatever a task raises
GPU_BLOCK = 256  # rows that a GPU gets at once: several batches, of which one is uploaded while another is worked on
WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}

Request = FeatureRequest | PixelRequest
Progress = Callable[[int, int], None]


def build_caches(
    requests: Sequence[Request],
    index: ImageIndex,
    *,
    num_gpus: int,
    cpus_by_node: Sequence[int] = (),
    on_progress: Progress = lambda _done, _total: None,
) -> list[Cache]:
    """Returns the caches asked for, in that order; those that are not there yet are made in one pass.

    Args:
        requests: feature and pixel caches of this index; requests of one folder are one cache.
        index: the images.
        num_gpus: GPUs to spread the encoders over; 0 encodes on CPUs.
        cpus_by_node: of a cluster, whose nodes work side by side, those that come later too; empty on a Ray of our own.
        on_progress: called with (images done, images in all).

    Raises:
        DataError: the pass has not seen every image.
    """
    missing = {request.folder: request for request in requests if not _is_there(request)}
    with ExitStack() as locks:
        for folder in sorted(missing):  # in one order, so that no two sweeps wait for each other
            locks.enter_context(only_writer(folder))
        missing = {folder: request for folder, request in missing.items() if not _is_there(request)}
        if missing:
            _make_pass(list(missing.values()), index, num_gpus, cpus_by_node, on_progress)
    caches = []
    for request in requests:
        cache = open_cache(request.folder)
        assert cache is not None
        caches.append(replace(cache, made_now=request.folder in missing))
    return caches


def _is_there(request: Request) -> bool:
    return has_cache(request.folder, streamed=isinstance(request, PixelRequest) and request.streamed)


def warm_up() -> None:
    """Starts ahead what a pass would wait for: Ray Data's own actors, and a process that has imported torch.

    Worth its while in a thread, between Ray's start and `build_caches`.
    """
    import ray.data

    ray.data.from_items([{"start": 0}]).map_batches(_import_encoders, **WHOLE_BLOCKS).materialize()


def _import_encoders(block: pa.Table) -> pa.Table:
    import transformers.modeling_utils  # noqa: F401

    return block


def _make_pass(
    requests: Sequence[Request], index: ImageIndex, num_gpus: int, cpus_by_node: Sequence[int], on_progress: Progress
) -> None:
    started = time.perf_counter()
    for request in requests:
        remove_leftovers(request.folder)
    tally, num_rows, key = _Tally(len(requests)), len(index.table), uuid.uuid4().hex
    dataset = _dataset(requests, key, index, num_gpus, cpus_by_node)
    with _reasons():
        for receipts in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            tally.add(receipts)
            on_progress(tally.num_rows, num_rows)
    if tally.num_rows != num_rows:
        folders = ", ".join(str(request.folder) for request in requests)
        raise DataError(f"{folders}: the pass saw {tally.num_rows} of {num_rows} images; start the sweep again")
    paths = dict(zip(index.table["row_id"].to_pylist(), index.table["path"].to_pylist(), strict=True))
    bad_rows = [vars(BadRow(row_id, paths[row_id], error)) for row_id, error in sorted(tally.errors.items())]
    for request, seconds in zip(requests, tally.shares(time.perf_counter() - started), strict=True):
        manifest = {
            "num_rows": num_rows - len(bad_rows),
            "bad_rows": bad_rows,
            "seconds": seconds,
            "peak_memory_bytes": tally.memory,
            "peak_gpu_memory_bytes": tally.gpu_memory,
            "streamed": isinstance(request, PixelRequest) and request.streamed,
            "rows": key,
        }
        if _is_there(request):  # of a bucket, where another head was quicker
            remove(request.folder / key)
        else:
            write_json(request.folder / MANIFEST, manifest)
            remove_older_passes(request.folder / key)


@contextmanager
def _reasons() -> Iterator[None]:
    """Raises what a task raised, where that is an error of ours: Ray wraps it, with the tracebacks of all between."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # which poses as an error of the cause's class
            cause = cause.cause
        if isinstance(cause, RaysweepError):
            raise type(cause)(str(cause).partition(RAYS_ADVICE)[0]) from None
        raise


@dataclass
class _Tally:
    """What the receipts of a pass add up to; `seconds` are those of decoding, then those of each cache."""

    num_caches: int
    num_rows: int = 0
    memory: int = 0
    gpu_memory: int = 0
    errors: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seconds = np.zeros(1 + self.num_caches)

    def add(self, receipts: pa.Table) -> None:
        self.num_rows += len(receipts)
        self.memory = max(self.memory, pc.max(receipts["memory"]).as_py())
        self.gpu_memory = max(self.gpu_memory, pc.max(receipts["gpu_memory"]).as_py())
        self.seconds += lists(receipts, "seconds", self.seconds.shape).sum(axis=0)
        bad = receipts.filter(receipts["error"].is_valid())
        self.errors |= dict(zip(bad["row_id"].to_pylist(), bad["error"].to_pylist(), strict=True))

    def shares(self, wall: float) -> list[float]:
        """Seconds of the pass's wall time that each cache cost."""
        cost = self.seconds[1:] + self.seconds[0] / self.num_caches
        return [float(share) for share in wall * cost / cost.sum()]


def _dataset(
    requests: Sequence[Request], key: str, index: ImageIndex, num_gpus: int, cpus_by_node: Sequence[int]
) -> ray.data.Dataset:
    """A Ray Dataset that yields a receipt for every row; nothing runs yet."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    job = {
        "key": key,
        "targets": [_target(request, key) for request in requests],
        "num_threads": min(cpus_by_node, default=None),
        **put_index(index),
    }
    blocks = _blocks(len(index.table))
    # A block is a place in the index, which all processes of a node share: with tables, Ray would start a task for
    # each to learn its schema.
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    if not any(isinstance(request, FeatureRequest) for request in requests):
        return dataset.map_batches(partial(_decode, job=job), **WHOLE_BLOCKS)
    # On a cluster, nodes that join while the pass goes on get actors too.
    size: dict[str, int] = {"size": num_gpus}
    if cpus_by_node:
        size = {"min_size": num_gpus or len(cpus_by_node), "max_size": max(num_gpus, len(blocks))}
    if not num_gpus and cpus_by_node:
        # An actor on each node, which has its next block waiting: for a task on another node, Ray would learn a tenth
        # of a second late that there is room, after every block.
        compute = ActorPoolStrategy(**size)
        keys: dict[str, Any] = {"compute": compute, "num_cpus": min(cpus_by_node), **WHOLE_BLOCKS}
        return dataset.map_batches(_DecodersAndEncoders, fn_constructor_args=(job,), **keys)
    if not num_gpus:
        # Tasks rather than actors, because Ray starts a process for every actor, but has idle ones for tasks. Each
        # asks for one CPU only, or it might never start beside training runs. All blocks go to one process, which
        # gives the encoders' memory back by ending after the last.
        one = {"compute": TaskPoolStrategy(size=1), "max_calls": len(blocks)}
        return dataset.map_batches(partial(_decode_and_encode, job=job), **one, **WHOLE_BLOCKS)
    return dataset.map_batches(partial(_decode, job=job), **WHOLE_BLOCKS).map_batches(
        _Encoders,
        fn_constructor_args=(job,),
        # Of two calls at once, one copies pixels or writes its file while the GPU works for the other.
        compute=ActorPoolStrategy(**size, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        num_cpus=0,  # so that decoding gets every core, on a machine of one core too
        num_gpus=1,
        **(WHOLE_BLOCKS | {"batch_size": GPU_BLOCK}),
    )


def put_index(index: ImageIndex) -> dict[str, Any]:
    """Puts into Ray's object store what workers need to decode rows of an index: `rows` and `image_column`."""
    import ray

    rows = index.table.select(["row_id", "path", "position", "image"])
    paths = pa.array([on_every_node(path) for path in rows["path"].to_pylist()], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("path"), "path", paths)
    return {"rows": ray.put(rows), "image_column": index.image_column}


def _blocks(num_rows: int) -> list[dict[str, int]]:
    """Places of an index that make one file of each cache."""
    size = max(ROWS_PER_BLOCK, -(-num_rows // MAX_BLOCKS))
    size = min(size, MAX_ROWS_PER_BLOCK, max(1, num_rows // MIN_BLOCKS))
    return [{"start": start, "size": size} for start in range(0, num_rows, size)]


def _target(request: Request, key: str) -> dict[str, Any]:
    """A request as it travels to the workers, with the folder that its rows go to in this pass."""
    folder = location(request.folder / key)
    if isinstance(request, PixelRequest):
        geometry = Geometry.of(request.preprocessing, for_training=True)
        return {"folder": folder, "geometry": geometry, "encoder": None, "streamed": request.streamed}
    return {
        "folder": folder,
        "geometry": Geometry.of(request.encoder.preprocessing, for_training=False),
        "encoder": request.encoder.spec(),
        "weights": request.weights,
        "precision": request.precision,
    }


def _decode(block: pa.Table, job: dict[str, Any], num_threads: int = 1) -> pa.Table:
    """Decodes a block of the index and writes its rows of the pixel caches.

    Returns:
        A receipt for every row: `row_id`, `error` (null where it is good), `seconds` (the row's share, see `_Tally`),
        `memory` and `gpu_memory`; and `pixels_0`, `pixels_1` ... for each geometry that an encoder waits for.
    """
    import ray

    rows = ray.get(job["rows"]).slice(block["start"][0].as_py(), block["size"][0].as_py())
    targets, seconds = job["targets"], np.zeros(1 + len(job["targets"]))
    started = time.perf_counter()
    geometries = list(dict.fromkeys(target["geometry"] for target in targets))
    errors, pixels = decode_rows(rows, job["image_column"], geometries, num_threads)
    seconds[0] = time.perf_counter() - started
    row_ids, good = rows["row_id"].to_numpy(), np.array([error is None for error in errors])
    for number, target in enumerate(targets):
        if target["encoder"] is None and not target["streamed"]:
            started, images = time.perf_counter(), pixels[target["geometry"]]
            write_pixels(str(local_path(target["folder"])), row_ids[good], images if good.all() else images[good])
            seconds[1 + number] = time.perf_counter() - started
    columns = {f"pixels_{number}": fixed_lists(pixels[geometry]) for number, geometry in enumerate(_encoded(job))}
    return pa.table(_receipts(row_ids, pa.array(errors, pa.string()), seconds) | columns)


def _encoded(job: dict[str, Any]) -> list[Geometry]:
    """The geometries that encoders wait for, without repetition."""
    return list(dict.fromkeys(target["geometry"] for target in job["targets"] if target["encoder"] is not None))


def _receipts(row_ids: Any, errors: Any, seconds: np.ndarray, memory: int = 0, gpu_memory: int = 0) -> dict[str, Any]:
    num_rows = len(row_ids)
    return {
        "row_id": row_ids,
        "error": errors,
        "seconds": fixed_lists(np.tile(seconds / num_rows, (num_rows, 1))),
        "memory": np.full(num_rows, max(memory, peak_memory_bytes())),
        "gpu_memory": np.full(num_rows, gpu_memory),
    }


def fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """Wraps `(n, ...)` as n lists, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values[0].size)


def lists(table: pa.Table, column: str, shape: tuple[int, ...]) -> np.ndarray:
    """Gives back what `fixed_lists` was given, of `shape` each."""
    flat: np.ndarray = table[column].combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, *shape)


class _Encoders:
    """Every encoder of a pass on one device: turns blocks of pixels into files of features."""

    def __init__(self, job: dict[str, Any]) -> None:
        import ray

        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(job["num_threads"] or num_cores())
        self.encoders: dict[int, Encoder] = {}
        for number, target in enumerate(job["targets"]):
            if target["encoder"] is not None:
                encoder = encoder_from_spec(target["encoder"])
                load_arrays(encoder, ray.get(target["weights"]))
                self.encoders[number] = encoder.to(self.device).requires_grad_(False)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        good = decoded["error"].is_null().to_numpy()
        row_ids, geometries = decoded["row_id"].to_numpy(), _encoded(self.job)
        seconds = lists(decoded, "seconds", (1 + len(self.job["targets"]),)).sum(axis=0)
        for number, encoder in self.encoders.items():
            started, target = time.perf_counter(), self.job["targets"][number]
            geometry = target["geometry"]
            pixels = lists(decoded, f"pixels_{geometries.index(geometry)}", geometry.shape)
            features = encode(encoder, pixels if good.all() else pixels[good], self.device, target["precision"])
            write_rows(str(local_path(target["folder"])), feature_table(row_ids[good], features))
            seconds[1 + number] = time.perf_counter() - started
        gpu_memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        memory = pc.max(decoded["memory"]).as_py()
        return pa.table(_receipts(row_ids, decoded["error"], seconds, memory, gpu_memory))


class _DecodersAndEncoders(_Encoders):
    """A node's share of a pass without GPUs: turns places of the index into files of features."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return super().__call__(_decode(block, self.job, self.job["num_threads"]))


# What the tasks of a pass leave for the next ones in the same process, by the key of the pass.
_in_this_process: dict[str, _Encoders] = {}


def _decode_and_encode(block: pa.Table, job: dict[str, Any]) -> pa.Table:
    if job["key"] not in _in_this_process:
        _in_this_process.clear()
        _in_this_process[job["key"]] = _Encoders(job)
    return _in_this_process[job["key"]](_decode(block, job, num_cores()))


def num_cores() -> int:
    """CPUs that this process may use."""
    # macOS has no such call.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
