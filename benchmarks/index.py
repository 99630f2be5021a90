"""The index: rows a second, and bytes a row that one process keeps and that it needs at most.

Small files really on disk and small images in real Parquet files are read in this process and by Ray's tasks. The bytes
of a million further rows are made up, so that neither listing nor disk counts. Each runs in a separate process, to
measure its memory alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.streaming import resident_bytes
from benchmarks.sweeps import peak_memory_bytes, run_command
from raysweep.cluster.session import ray_session
from raysweep.experiment.sections import DataConfig
from raysweep.images import image_bytes, index, index_tasks
from raysweep.images.listed_rows import Listing, Row, Rows

NUM_CLASSES = 200
MADE_UP = "/data/images/class_{label:03}/{number:08}.png"
ROWS_PER_SHARD, ROWS_PER_GROUP = 50_000, 1_000


def small_png() -> bytes:
    """Returns an image of 16 x 16 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, num_files: int) -> None:
    """Writes class folders of images whose bytes all differ: decoders ignore what follows the end of a PNG."""
    png = small_png()
    for label in range(NUM_CLASSES):
        (folder / f"class_{label:03}").mkdir(parents=True)
    for number in range(num_files):
        (folder / f"class_{number % NUM_CLASSES:03}" / f"{number:08}.png").write_bytes(png + str(number).encode())


def write_shards(folder: Path, num_rows: int) -> None:
    """Writes such images into Parquet files as the Hugging Face hub has them."""
    png = small_png()
    folder.mkdir(parents=True)
    for start in range(0, num_rows, ROWS_PER_SHARD):
        numbers = range(start, min(start + ROWS_PER_SHARD, num_rows))
        cells = [{"bytes": png + str(number).encode(), "path": None} for number in numbers]
        table = pa.table({"image": cells, "label": [number % NUM_CLASSES for number in numbers]})
        pq.write_table(table, folder / f"train-{start // ROWS_PER_SHARD:05}.parquet", row_group_size=ROWS_PER_GROUP)


def made_up_listing(num_rows: int) -> Listing:
    """Returns the rows of files that do not exist."""
    labels = [str(number) for number in range(NUM_CLASSES)]
    places = ((number, number % NUM_CLASSES) for number in range(num_rows))
    return Listing(Rows(Row(MADE_UP.format(label=label, number=number), labels[label]) for number, label in places))


def measure(source: str, num_rows: int, by_tasks: bool) -> dict[str, Any]:
    """Makes an index.

    Args:
        source: folder of images, or `made-up`.
        num_rows: number of rows, which are made up or in the folder.
        by_tasks: whether Ray's tasks read the images, however few. Ray is started before.
    """
    png = small_png()
    with ExitStack() as stack:
        if by_tasks:
            stack.enter_context(ray_session(verbose=False))
            stack.enter_context(patch.object(index_tasks, "MIN_ROWS_FOR_TASKS", 1))
        index.load_index(DataConfig(source="sklearn://digits"), seed=0)  # modules that are imported when needed
        if source == "made-up":
            stack.enter_context(patch.object(index, "list_source", lambda _: made_up_listing(num_rows)))
            made_up = patch.object(image_bytes, "read_file", lambda path: png + hashlib.sha256(path.encode()).digest())
            stack.enter_context(made_up)
        before, started = resident_bytes(), time.perf_counter()
        made = index.load_index(DataConfig(source=source), seed=0, start_ray=(lambda: None) if by_tasks else None)
        seconds, count = time.perf_counter() - started, len(made.table)
    assert count == num_rows, (count, num_rows)
    return {
        "rows_per_second": count / seconds,
        "kept_bytes": made.table.nbytes / count,
        "peak_bytes": (peak_memory_bytes() - before) / count,
        "path_length": 0 if made.image_column else len(made.table["path"][0].as_py()),
    }


def run(options: Options) -> Iterator[Figure]:
    """Yields rows a second, and bytes a row beside its path: of the table that is kept, and of the peak before."""
    num_files, num_others = (1_000, 1_000) if options.quick else (200_000, 1_000_000)
    files, shards = options.scratch / "images", options.scratch / "shards"
    write_files(files, num_files)
    write_shards(shards, num_others)
    for name, source, num_rows, by_tasks in (
        ("on disk", str(files), num_files, False),
        ("on disk by tasks", str(files), num_files, True),
        ("Parquet", str(shards), num_others, False),
        ("Parquet by tasks", str(shards), num_others, True),
        ("made up", "made-up", num_others, False),
    ):
        command = ["-m", "benchmarks.index", source, str(num_rows), *(["tasks"] if by_tasks else [])]
        result = json.loads(run_command(command, options.scratch).stdout)
        length = result["path_length"]
        details = {"num_rows": num_rows, "path_length": length}
        speed = result["rows_per_second"]
        yield make_figure("index", f"speed, {name}", speed, "rows/s", ">= 3000", **details)
        for kind in ("kept", "peak"):
            num_bytes = result[f"{kind}_bytes"] - length
            yield make_figure("index", f"{kind}, {name}", num_bytes, "bytes/row", "<= 100", **details)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), by_tasks="tasks" in sys.argv[3:])))
