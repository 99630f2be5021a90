"""The index: rows a second, and bytes a row that one process keeps and that it needs at most.

Small files really on disk, and a million rows whose bytes are made up, so that neither listing nor disk counts. Each
runs in a separate process, to measure its memory alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from benchmarks.figures import Figure, Options, make_figure
from benchmarks.streaming import resident_bytes
from benchmarks.sweeps import peak_memory_bytes, run_command
from raysweep.experiment.sections import DataConfig
from raysweep.images import image_bytes, index
from raysweep.images.listed_rows import Listing, Row, Rows

NUM_CLASSES = 200
MADE_UP = "/data/images/class_{label:03}/{number:08}.png"


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


def made_up_listing(num_rows: int) -> Listing:
    """Returns the rows of files that do not exist."""
    labels = [str(number) for number in range(NUM_CLASSES)]
    places = ((number, number % NUM_CLASSES) for number in range(num_rows))
    return Listing(Rows(Row(MADE_UP.format(label=label, number=number), labels[label]) for number, label in places))


def measure(source: str, num_rows: int) -> dict[str, Any]:
    """Makes an index.

    Args:
        source: folder of images, or `made-up`.
        num_rows: number of rows that are made up.
    """
    png = small_png()
    before, started = resident_bytes(), time.perf_counter()
    if source == "made-up":
        with (
            patch.object(index, "list_source", lambda _: made_up_listing(num_rows)),
            patch.object(image_bytes, "read_file", lambda path: png + hashlib.sha256(path.encode()).digest()),
        ):
            made = index.load_index(DataConfig(source=source), seed=0)
    else:
        made = index.load_index(DataConfig(source=source), seed=0)
    seconds, count = time.perf_counter() - started, len(made.table)
    assert count == num_rows, (count, num_rows)
    return {
        "rows_per_second": count / seconds,
        "kept_bytes": made.table.nbytes / count,
        "peak_bytes": (peak_memory_bytes() - before) / count,
        "path_length": len(made.table["path"][0].as_py()),
    }


def run(options: Options) -> Iterator[Figure]:
    """Yields rows a second, and bytes a row: those of the table that is kept, and the peak while it is made."""
    num_files, num_made_up = (1_000, 1_000) if options.quick else (200_000, 1_000_000)
    folder = options.scratch / "images"
    write_files(folder, num_files)
    for name, source, num_rows in (("on disk", str(folder), num_files), ("made up", "made-up", num_made_up)):
        command = ["-m", "benchmarks.index", source, str(num_rows)]
        result = json.loads(run_command(command, options.scratch).stdout)
        details = {"num_rows": num_rows, "path_length": result["path_length"]}
        speed = result["rows_per_second"]
        yield make_figure("index", f"speed, {name}", speed, "rows/s", ">= 3000", **details)
        yield make_figure("index", f"kept, {name}", result["kept_bytes"], "bytes/row", "<= 100", **details)
        yield make_figure("index", f"peak, {name}", result["peak_bytes"], "bytes/row", "<= 100", **details)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
