"""Parquet files of images: their rows as listed, and the images in them."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from raysweep.errors import DataError
from raysweep.images.limits import MAX_ENCODED_BYTES
from raysweep.images.listed_rows import Listing, Row
from raysweep.images.missing_images import settle_paths
from raysweep.images.one_hot import LABEL, add_label
from raysweep.images.plain_columns import MAX_TEXT_BYTES, find_field, is_text, is_value, names_images, read_values
from raysweep.images.row_paths import RowPaths, cell_name
from raysweep.images.tables import (
    check_regular,
    check_size,
    columns_of_no_class,
    find_columns,
    lacks_label,
    reading,
    row_of,
    with_problem,
)
from raysweep.images.texts import Texts
from raysweep.storage.filesystems import open_filesystem

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

BUFFER_BYTES = 8 << 20
# Images hardly shrink when they are packed. What grows so much, and beyond this size, is made to fill the memory.
MAX_GROWTH, GROWTH_BYTES = 100, 2**26
MAX_DICTIONARY_BYTES = 2**24  # programs that write Parquet put about 1 MB of values into the dictionary of a column


def read_parquet_files(files: Sequence[tuple[str, str | None]], data: "DataConfig") -> Listing:
    """Lists the rows of Parquet files, given as pairs of a file and its split, or None. Does not read the images.

    Raises:
        DataError: a file or column cannot be read, or the image column contains neither paths nor bytes.
    """
    listing = Listing()
    for source, split in files:
        with reading(source):
            column = _read_parquet_file(source, split, data, listing)
        if listing.image_column not in (None, column):
            raise DataError(f"{source}: images in column '{column}', in other files in '{listing.image_column}'")
        listing.image_column = column
    return listing


def _read_parquet_file(source: str, split: str | None, data: "DataConfig", listing: Listing) -> str | None:
    """Appends the rows of a file; returns its image column, or None if that contains only paths."""
    with _opened(source) as (opened, file):
        schema = file.schema_arrow
        one_hot, derived = _one_hot_labels(opened, file, data)
        columns = find_columns([*schema.names, LABEL] if one_hot else schema.names, data, source)
        holds_paths = names_images(find_field(schema, columns.image))
        read = [name for name in (None if one_hot else columns.label, columns.split, columns.group) if name]
        read += [columns.image] if holds_paths else []
        values = read_values(opened, file, read)
        labels = one_hot or values[columns.label]
        splits = values[columns.split] if columns.split else repeat(split, len(labels))
        groups = values[columns.group] if columns.group else repeat(None, len(labels))
        cells = values[columns.image] if holds_paths else _outer_paths(file, columns.image)
        metadata, row_groups = schema.metadata, _row_groups(file.metadata)
    named = Texts(name for name in map(cell_name, cells) if name)
    # Without names there is nothing to look for, not even a folder: all images lie in the file.
    paths, warnings = settle_paths(source, data, named) if named or holds_paths else (None, [])
    listing.warnings += [*derived, *warnings]
    names = _class_names(metadata, columns.label)
    if names is not None:
        numbered = dict(enumerate(names))
        # Datasets of the hub have -1 for labels that are not published.
        labels = [numbered.get(label) if isinstance(label, int) else label for label in labels]
    for position, (cell, label, row_split, group) in enumerate(zip(cells, labels, splits, groups, strict=True)):
        row = _row(source, position, cell, paths, holds_paths)._replace(label=label, split=row_split, group=group)
        listing.rows.append(with_problem(row, columns.split is not None))
    if holds_paths:
        return None
    listing.row_groups[source] = row_groups
    return columns.image


def _row_groups(metadata: pq.FileMetaData) -> frozenset[int]:
    """Returns the first row of each row group."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return frozenset(accumulate(sizes, initial=0))


def _one_hot_labels(opened: pa.NativeFile, file: pq.ParquetFile, data: "DataConfig") -> tuple[list[Any], list[str]]:
    """Returns the labels of a file with one column a class, and a warning that says so; nothing for other files."""
    schema = file.schema_arrow
    if not lacks_label(schema.names, data):
        return [], []
    names = [field.name for field in schema if is_value(field.type) and not is_text(field.type)]
    columns = read_values(opened, file, names)
    records = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    found, derived = add_label(names, list(enumerate(records)), columns_of_no_class(data))
    return [record[LABEL] for record in records] if LABEL in found else [], derived


def _row(source: str, position: int, cell: Any, paths: RowPaths | None, holds_paths: bool) -> Row:
    if paths is None or not (holds_paths or cell):
        return Row(source, None, None, position)
    return row_of(f"{source} row {position}", cell, paths)


@contextmanager
def _opened(source: str, **options: Any) -> Iterator[tuple[pa.NativeFile, pq.ParquetFile]]:
    """Opens a Parquet file, local or remote."""
    if "://" not in source:
        check_regular(source)
    filesystem, inner = open_filesystem(source)
    with filesystem.open_input_file(inner) as opened, pq.ParquetFile(opened, **options) as file:
        yield opened, file


def _outer_paths(file: pq.ParquetFile, name: str) -> list[str | None]:
    """Returns for each row the path of its image, or None where the image is in the file itself.

    Raises:
        DataError: a path is too long.
    """
    field, num_rows = file.schema_arrow.field(name), file.metadata.num_rows
    if (
        not types.is_struct(field.type)
        or field.type.get_field_index("path") < 0
        or types.is_null(field.type.field("path").type)
        or not _may_lack(file, f"{name}.bytes")
    ):
        return [None] * num_rows
    paths: list[str | None] = []
    for batch in file.iter_batches(64, columns=[f"{name}.bytes", f"{name}.path"]):
        lacks, texts = (batch.column(name).field(part) for part in ("bytes", "path"))
        check_size(pc.max(pc.binary_length(texts)).as_py() or 0, MAX_TEXT_BYTES)
        paths += [
            path if lacking else None
            for lacking, path in zip(lacks.is_null().to_pylist(), texts.to_pylist(), strict=True)
        ]
    return paths


def _may_lack(file: pq.ParquetFile, leaf: str) -> bool:
    """Returns whether the values of a column may be missing in some rows, by the statistics of the file."""
    for group in range(file.num_row_groups):
        columns = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
        statistics = [column.statistics for column in columns if column.path_in_schema == leaf]
        if len(statistics) != 1 or statistics[0] is None or statistics[0].null_count != 0:
            return True
    return False


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Returns the class names that Hugging Face's datasets library stores in the schema of a Parquet file."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def parquet_images(source: str, column: str, positions: Sequence[int]) -> Iterator[tuple[int, bytes | DataError]]:
    """Reads images from a Parquet file, a few dozen rows at a time. Each row group that contains some is read once.

    Yields:
        For each distinct position, in ascending order: the position, and the encoded image or the reason why there is
        none.

    Raises:
        DataError: the column does not contain images.
    """
    wanted = sorted(set(positions))
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
    with _opened(source, **options) as (opened, file):
        # Checked here too: this process knows other extension types than the one that listed the rows.
        field = find_field(file.schema_arrow, column)
        if names_images(field):
            raise DataError(f"column '{column}' contains paths, not images")
        leaf = f"{column}.bytes" if types.is_struct(field.type) else column
        # An image that stands in many rows is then kept once: 2 KB of Parquet grew to 5 GB otherwise.
        once = [leaf] if _dictionary_bytes(file.metadata, leaf) > MAX_DICTIONARY_BYTES else []
        reader = pq.ParquetFile(opened, metadata=file.metadata, read_dictionary=once, **options) if once else file
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            due = wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]
            if due:
                _check_growth(file.metadata.row_group(group), leaf)
            # A row group may have gigabytes (pandas writes only one per file), so it is read in small batches.
            batches = reader.iter_batches(64, row_groups=[group], columns=[leaf]) if due else ()
            for batch in batches:
                cells = batch.column(column)
                cells = cells.field("bytes") if types.is_struct(cells.type) else cells
                places = [
                    place - start for place in due[bisect_left(due, start) : bisect_left(due, start + len(cells))]
                ]
                for place, value in zip(places, _values(cells, places), strict=True):
                    yield start + place, _cell_bytes(value)
                start += len(cells)
                if start > due[-1]:
                    break
            start = stop


def _values(cells: pa.Array, places: Sequence[int]) -> Iterator[Any]:
    if not types.is_dictionary(cells.type):
        return (cells[place].as_py() for place in places)
    values = cells.dictionary.to_pylist() if places else []
    numbers = cells.indices.to_pylist()
    return (None if numbers[place] is None else values[numbers[place]] for place in places)


def _dictionary_bytes(metadata: pq.FileMetaData, leaf: str) -> int:
    """Returns how large the dictionary of a column is at most: all that is not known to be something else."""
    largest = 0
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        for column in columns:
            if column.path_in_schema == leaf and column.has_dictionary_page:
                others = column.total_compressed_size - (column.data_page_offset - column.dictionary_page_offset)
                largest = max(largest, column.total_uncompressed_size - others)
    return largest


def _check_growth(group: pq.RowGroupMetaData, leaf: str) -> None:
    for number in range(group.num_columns):
        column = group.column(number)
        unpacked = column.total_uncompressed_size
        if column.path_in_schema == leaf and unpacked > max(GROWTH_BYTES, MAX_GROWTH * column.total_compressed_size):
            raise DataError(
                f"column '{leaf}' grows from {column.total_compressed_size / 2**20:,.1f} MiB to "
                f"{unpacked / 2**20:,.0f} MiB when it is unpacked; accepted: at most {MAX_GROWTH} times"
            )


def _cell_bytes(value: Any) -> bytes | DataError:
    if not isinstance(value, bytes):
        return DataError("no image in this row")
    try:
        check_size(len(value), MAX_ENCODED_BYTES)
    except DataError as error:
        return error
    return value
