"""Parquet files of images: their rows as listed, and the images in them."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from pyarrow import types

from raysweep.errors import DataError
from raysweep.images.tables import (
    Listing,
    Row,
    find_columns,
    join_source,
    parent_source,
    read_file,
    reading,
    with_problem,
)
from raysweep.storage.filesystems import open_filesystem

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

BUFFER_BYTES = 8 << 20


def read_parquet_files(files: Sequence[tuple[str, str | None]], data: "DataConfig") -> Listing:
    """Lists the rows of Parquet files, given as pairs of a file and its split, or None. Does not read the images.

    Raises:
        DataError: a file or column cannot be read, or the image column contains neither paths nor bytes.
    """
    listing = Listing([])
    for source, split in files:
        with reading(source):
            column = _read_parquet_file(source, split, data, listing.rows)
        if listing.image_column not in (None, column):
            raise DataError(f"{source}: images in column '{column}', in other files in '{listing.image_column}'")
        listing.image_column = column
    return listing


def _read_parquet_file(source: str, split: str | None, data: "DataConfig", rows: list[Row]) -> str | None:
    """Appends the rows of a file; returns its image column, or None if that contains only paths."""
    filesystem, inner = open_filesystem(source)
    with filesystem.open_input_file(inner) as opened, pq.ParquetFile(opened) as file:
        schema = file.schema_arrow
        image, label, split_column = find_columns(schema.names, data, source)
        holds_paths = _holds_paths(schema.field(image).type, image, source)
        columns = [name for name in (label, split_column, image if holds_paths else None) if name]
        table = file.read(columns=columns)
    labels = table.column(label).to_pylist()
    splits = table.column(split_column).to_pylist() if split_column else [split] * len(labels)
    paths = table.column(image).to_pylist() if holds_paths else []
    names = _class_names(schema.metadata, label)
    for position, (value, row_split) in enumerate(zip(labels, splits, strict=True)):
        row = Row(source, value, row_split, position)
        if holds_paths:
            row = row._replace(path=f"{source} row {position}", position=-1)
            if not paths[position]:
                rows.append(row._replace(problem="no image path"))
                continue
            row = row._replace(path=join_source(parent_source(source), paths[position].strip()))
        if names is not None and isinstance(value, int):
            # Datasets of the hub have -1 for labels that are not published.
            row = row._replace(label=names[value] if 0 <= value < len(names) else None)
        rows.append(with_problem(row, split_column is not None))
    return None if holds_paths else image


def _holds_paths(kind: Any, image: str, source: str) -> bool:
    value = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(value) or types.is_large_string(value):
        return True
    is_bytes = types.is_binary(value) or types.is_large_binary(value)
    if is_bytes or (types.is_struct(value) and value.get_field_index("bytes") >= 0):
        return False
    raise DataError(f"{source}: column '{image}' is {kind}; accepted: paths, bytes, or structs of {{bytes, path}}")


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Returns the class names that Hugging Face's datasets library stores in the schema of a Parquet file."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def parquet_images(source: str, column: str, positions: Sequence[int]) -> Iterator[tuple[int, bytes | DataError]]:
    """Reads images from a Parquet file, a few dozen rows at a time. Each row group that contains some is read once.

    Yields:
        For each distinct position, in ascending order: the position, and the encoded image or the reason why there is
        none.
    """
    wanted = sorted(set(positions))
    filesystem, inner = open_filesystem(source)
    options = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
    with filesystem.open_input_file(inner) as opened, pq.ParquetFile(opened, **options) as file:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            due = wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]
            # A row group may have gigabytes (pandas writes only one per file), so it is read in small batches.
            batches = file.iter_batches(64, row_groups=[group], columns=[column]) if due else ()
            for batch in batches:
                cells = batch.column(0)
                for position in due[bisect_left(due, start) : bisect_left(due, start + len(cells))]:
                    yield position, _cell_bytes(cells[position - start].as_py(), source)
                start += len(cells)
                if start > due[-1]:
                    break
            start = stop


def _cell_bytes(value: Any, source: str) -> bytes | DataError:
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path:
            try:
                return read_file(join_source(parent_source(source), path))
            except DataError as error:
                return error
    return value if isinstance(value, bytes) else DataError("no image in this row")
