"""What the tasks of a pass report for every row, and what the reports add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysweep.images.blocks import tensor_column, tensors
from raysweep.images.image_hashes import HASH_BYTES
from raysweep.images.memory import peak_memory_bytes

FILES = pa.list_(pa.struct({"cache": pa.int32(), "name": pa.string(), "checksum": pa.int64()}))


def build_reports(
    row_ids: np.ndarray,
    errors: pa.Array,
    seconds: np.ndarray,
    memory: int = 0,
    gpu_memory: int = 0,
    files: Sequence[Mapping[str, int]] = (),
    blank: np.ndarray | None = None,
    encoder_seconds: np.ndarray | None = None,
    warnings: Sequence[str] = (),
    hashes: np.ndarray | None = None,
) -> pa.Table:
    """Returns the reports of the rows of one block.

    Args:
        row_ids: int64 `(n,)`, with at least one row.
        errors: For each row the reason why it is bad, or null.
        seconds: float64 `(1 + num_caches,)`, time spent on the block: for decoding, then for each cache. Each row gets
            an equal part.
        memory: Largest resident set size of the processes that worked on the block before this one, in bytes.
        gpu_memory: Most GPU memory that this process had allocated, in bytes.
        files: For each cache, the names and checksums of the files that were written. The first row carries them all.
        blank: bool `(n,)`, which images have one colour only; None if none has.
        encoder_seconds: float64 `(2,)`, since the last reports of this encoder: the time in which it waited for images,
            and the time in which it did not. Each row gets an equal part; None is no time.
        warnings: What the user is told. The first row carries them all.
        hashes: uint8 `(n, 32)`, what the images look like (see `image_hashes`); None if no image has a hash.
    """
    num_rows = len(row_ids)
    written = [
        {"cache": number, "name": name, "checksum": checksum}
        for number, checksums in enumerate(files)
        for name, checksum in checksums.items()
    ]
    return pa.table(
        {
            "row_id": row_ids,
            "error": errors,
            "seconds": tensor_column(np.tile(seconds / num_rows, (num_rows, 1))),
            "memory": np.full(num_rows, max(memory, peak_memory_bytes())),
            "gpu_memory": np.full(num_rows, gpu_memory),
            "blank": np.zeros(num_rows, bool) if blank is None else blank,
            "files": pa.array([written, *[None] * (num_rows - 1)], FILES),
            "encoder_seconds": tensor_column(
                np.tile((np.zeros(2) if encoder_seconds is None else encoder_seconds) / num_rows, (num_rows, 1))
            ),
            "hash": tensor_column(np.zeros((num_rows, HASH_BYTES), np.uint8) if hashes is None else hashes),
            "warnings": pa.array([list(warnings), *[None] * (num_rows - 1)], pa.list_(pa.string())),
        }
    )


def seconds_of(reports: pa.Table) -> np.ndarray:
    """Returns the sum of the seconds: float64 `(1 + num_caches,)`, for decoding, then for each cache."""
    total: np.ndarray = tensors(reports, "seconds").sum(axis=0)
    return total


def files_of(reports: pa.Table, num_caches: int) -> list[dict[str, int]]:
    """Returns for each cache the names and checksums of the files that were written."""
    files: list[dict[str, int]] = [{} for _ in range(num_caches)]
    for written in reports["files"].drop_null().to_pylist():
        for file in written:
            files[file["cache"]][file["name"]] = file["checksum"]
    return files


@dataclass
class Tally:
    """The sum of the reports of a pass.

    Attributes:
        num_caches: Number of caches that the pass makes.
        num_rows: Number of reports so far.
        memory: Largest resident set size of any process, in bytes.
        gpu_memory: Most GPU memory that any process had allocated, in bytes.
        errors: The reason for each bad row, by row id.
        blank_rows: Ids of rows whose image has one colour only.
        seconds: float64 `(1 + num_caches,)`, for decoding, then for each cache.
        files: For each cache, the names and checksums of its files.
        encoder_seconds: float64 `(2,)`, the time in which encoders waited for images that other processes decode, and
            in which they did not.
        warnings: What the user is told, each once.
        hashes: Row ids and hashes of each block.
    """

    num_caches: int
    num_rows: int = 0
    memory: int = 0
    gpu_memory: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    blank_rows: list[int] = field(default_factory=list)
    seconds: np.ndarray = field(init=False)
    files: list[dict[str, int]] = field(init=False)
    encoder_seconds: np.ndarray = field(init=False)
    warnings: list[str] = field(default_factory=list)
    hashes: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seconds = np.zeros(1 + self.num_caches)
        self.files = [{} for _ in range(self.num_caches)]
        self.encoder_seconds = np.zeros(2)

    def add(self, reports: pa.Table) -> None:
        """Adds the reports of one block."""
        self.num_rows += len(reports)
        self.memory = max(self.memory, pc.max(reports["memory"]).as_py())
        self.gpu_memory = max(self.gpu_memory, pc.max(reports["gpu_memory"]).as_py())
        self.seconds += seconds_of(reports)
        for number, written in enumerate(files_of(reports, self.num_caches)):
            self.files[number] |= written
        self.encoder_seconds += tensors(reports, "encoder_seconds").sum(axis=0)
        new = [text for texts in reports["warnings"].drop_null().to_pylist() for text in texts]
        self.warnings += [text for text in dict.fromkeys(new) if text not in self.warnings]
        self.hashes.append((reports["row_id"].to_numpy(), tensors(reports, "hash").copy()))
        self.blank_rows += reports.filter(reports["blank"])["row_id"].to_pylist()
        bad = reports.filter(reports["error"].is_valid())
        self.errors |= dict(zip(bad["row_id"].to_pylist(), bad["error"].to_pylist(), strict=True))

    def all_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row ids of all reports, int64 `(num_rows,)`, and their hashes, uint8 `(num_rows, 32)`."""
        row_ids, hashes = zip(*self.hashes, strict=True)
        return np.concatenate(row_ids), np.concatenate(hashes)

    def shares(self, wall_seconds: float) -> list[float]:
        """Splits the wall time of the pass among its caches; each cache takes an equal part of the decoding."""
        cost = self.seconds[1:] + self.seconds[0] / self.num_caches
        return [float(share) for share in wall_seconds * cost / cost.sum()]

    def lines(self) -> list[str]:
        """Returns what the user is told: the warnings, and whether more CPUs would make a pass on GPUs faster."""
        waiting, total = float(self.encoder_seconds[0]), float(self.encoder_seconds.sum())
        share = [f"the GPUs waited {waiting / total:.0%} of the time for decoded images"] if total else []
        return [*self.warnings, *share]
