"""What a pass runs inside Ray's tasks and actors: decode blocks of images, encode them, write the files of caches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.build import encoder_from_spec
from raysweep.encoders.compiled import PassEncoder, compile_for_pass
from raysweep.images.blocks import rows_of, tensor_column, tensors
from raysweep.images.cache_files import Checksums, write_rows
from raysweep.images.decode import DEFAULT_OPTIONS, DecodeOptions
from raysweep.images.features import ENCODER_BATCH, encode, feature_table, load_arrays
from raysweep.images.image_hashes import HASH_BYTES
from raysweep.images.pixels import Geometry, decode_rows, is_blank, write_pixels
from raysweep.images.task_reports import build_reports, files_of, seconds_of
from raysweep.storage.copies import local_path


@dataclass(frozen=True, slots=True)
class IndexReference:
    """An `ImageIndex` in Ray's object store: what workers need to decode its rows. `passes.put_index` makes it.

    Attributes:
        rows: Object reference of a table with the columns `row_id`, `path`, `position`, `image` and `content_hash`.
        image_column: Column of the images in Parquet files; None where there are none.
        decode_options: How the images are decoded.
    """

    rows: Any
    image_column: str | None
    decode_options: DecodeOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True)
class PassTarget:
    """One cache that a pass makes.

    Attributes:
        folder: Location of the subfolder that this pass writes the cache's rows to.
        geometry: Shape and preparation of the pixels.
        streamed: Whether no pixels are written; images are decoded only to find bad rows.
        encoder: The encoder of a feature cache; None for a pixel cache.
        weights: Object reference of the encoder's state dict as numpy arrays; None for a pixel cache.
        precision: Precision of the forward pass, `fp32` or `bf16`.
    """

    folder: str
    geometry: Geometry
    streamed: bool = False
    encoder: EncoderSpec | None = None
    weights: Any = None
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class PassJob:
    """What every task and actor of one pass is told.

    Attributes:
        key: A unique name of the pass.
        index: The images.
        targets: The caches that the pass makes.
        num_threads: CPU threads that decode and encode in a process that does both.
        num_images: Images that each process will encode, about.
    """

    key: str
    index: IndexReference
    targets: tuple[PassTarget, ...]
    num_threads: int
    num_images: int

    @property
    def encoded_geometries(self) -> list[Geometry]:
        """The geometries of the pixels that encoders read, each once."""
        return list(dict.fromkeys(target.geometry for target in self.targets if target.encoder is not None))


def decode_block(block: pa.Table, job: PassJob, num_threads: int = 1) -> pa.Table:
    """Decodes a block of the index and writes its rows of the pixel caches.

    Returns:
        The reports of the rows, and the columns `pixels_0`, `pixels_1` ... for `job.encoded_geometries`.
    """
    import ray

    rows, targets = ray.get(job.index.rows)[rows_of(block)], job.targets
    seconds = np.zeros(1 + len(targets))
    started = time.perf_counter()
    geometries = list(dict.fromkeys(target.geometry for target in targets))
    hashes = np.zeros((len(rows), HASH_BYTES), np.uint8)
    options = job.index.decode_options
    errors, pixels = decode_rows(rows, job.index.image_column, geometries, num_threads, options, hashes)
    seconds[0] = time.perf_counter() - started
    row_ids, good = rows["row_id"].to_numpy(), np.array([error is None for error in errors])
    files: list[Checksums] = [{} for _ in targets]
    for number, target in enumerate(targets):
        if target.encoder is None and not target.streamed:
            started, images = time.perf_counter(), pixels[target.geometry]
            images = images if good.all() else images[good]
            files[number] = write_pixels(str(local_path(target.folder)), row_ids[good], images)
            seconds[1 + number] = time.perf_counter() - started
    blank = good & is_blank(pixels[geometries[0]])
    decoded = build_reports(row_ids, pa.array(errors, pa.string()), seconds, files=files, blank=blank, hashes=hashes)
    for number, geometry in enumerate(job.encoded_geometries):
        decoded = decoded.append_column(f"pixels_{number}", tensor_column(pixels[geometry]))
    return decoded


class WaitingTime:
    """Tells the time in which no call was running from the time in which one or more were. It starts with a call."""

    def __init__(self) -> None:
        self._lock, self._num_calls, self._last = Lock(), 0, 0.0
        self._seconds = np.zeros(2)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Runs the block as a call; several threads may do so at a time."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def take(self) -> np.ndarray:
        """Returns, within a call, the seconds since it was last taken: float64 `(2,)`, without and with a call."""
        self._count(0)
        with self._lock:
            seconds, self._seconds = self._seconds, np.zeros(2)
        return seconds

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._last:
                self._seconds[int(self._num_calls > 0)] += now - self._last
            self._last = now
            self._num_calls += change


class EncoderActor:
    """All encoders of a pass on one device. A call turns decoded blocks into files of features."""

    def __init__(self, job: PassJob) -> None:
        import ray

        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(job.num_threads)
        self.waiting = WaitingTime()
        self.warnings: list[str] = []  # for the next reports
        self.encoders: dict[int, PassEncoder] = {}  # by the number of the target
        for number, target in enumerate(job.targets):
            if target.encoder is not None:
                encoder = encoder_from_spec(target.encoder)
                encoder.requires_grad_(False)
                load_arrays(encoder, ray.get(target.weights), shared=True)
                self.encoders[number] = compile_for_pass(
                    encoder.to(self.device),
                    self.device,
                    target.precision,
                    batch_size=ENCODER_BATCH[self.device.type, target.precision],
                    num_images=job.num_images,
                    warn=self.warnings.append,
                )

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Takes what `decode_block` returned, writes one file for each feature cache, and returns the reports."""
        with self.waiting.call():
            return self._encode(decoded, self.waiting)

    def _encode(self, decoded: pa.Table, waiting: WaitingTime | None) -> pa.Table:
        good = decoded["error"].is_null().to_numpy()
        row_ids, geometries = decoded["row_id"].to_numpy(), self.job.encoded_geometries
        seconds, files = seconds_of(decoded), files_of(decoded, len(self.job.targets))
        for number, encoder in self.encoders.items():
            started, target = time.perf_counter(), self.job.targets[number]
            pixels = tensors(decoded, f"pixels_{geometries.index(target.geometry)}")
            features = encode(encoder, pixels if good.all() else pixels[good], self.device, target.precision)
            files[number] |= write_rows(str(local_path(target.folder)), feature_table(row_ids[good], features))
            seconds[1 + number] = time.perf_counter() - started
        gpu_memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        memory = pc.max(decoded["memory"]).as_py()
        blank = decoded["blank"].to_numpy()
        warnings, self.warnings = self.warnings, []
        encoder_seconds = waiting.take() if waiting else None
        return build_reports(
            row_ids,
            decoded["error"],
            seconds,
            memory,
            gpu_memory,
            files,
            blank,
            encoder_seconds,
            warnings,
            tensors(decoded, "hash"),
        )


class DecoderEncoderActor(EncoderActor):
    """Decodes and encodes in one process. A call turns blocks of the index into features."""

    def __call__(self, block: pa.Table) -> pa.Table:
        """Takes a block of the index, writes one file for each cache, and returns the reports."""
        return self._encode(decode_block(block, self.job, self.job.num_threads), None)


# The encoders of the pass that this process works for, by the key of the pass: tasks leave them to the next task.
_encoders: dict[str, DecoderEncoderActor] = {}


def decode_and_encode_block(block: pa.Table, job: PassJob) -> pa.Table:
    """Does what a `DecoderEncoderActor` does, as a task; tasks that follow in the same process reuse the encoders."""
    if job.key not in _encoders:
        _encoders.clear()
        _encoders[job.key] = DecoderEncoderActor(job)
    return _encoders[job.key](block)
