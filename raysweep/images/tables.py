"""Rows and columns of tables of images, and tables in CSV, TSV and JSON Lines. Opens no image."""

import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from raysweep.errors import DataError, did_you_mean, one_line
from raysweep.images.limits import MAX_ENCODED_BYTES
from raysweep.images.listed_rows import Listing, Row, Rows
from raysweep.images.missing_images import settle_paths
from raysweep.images.one_hot import add_label
from raysweep.images.row_paths import RowPaths, cell_name
from raysweep.images.text_tables import DELIMITERS, Record, parse_text_table
from raysweep.images.texts import Texts
from raysweep.storage.filesystems import open_filesystem, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

# In order of preference, for tables with several of them: the first contain images, the last often only names.
# fmt: off
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file_path", "filepath", "image_file_path", "file_name",
                 "filename", "file", "image_name", "image_id")
# fmt: on
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "class_id", "classid")
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")
MAX_TABLE_BYTES = 2**31


class Columns(NamedTuple):
    """Names of the columns of a table; `split` and `group` are None where it has no such column."""

    image: str
    label: str
    split: str | None
    group: str | None = None


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns errors of file systems, of Arrow and of the network into a DataError that names the source."""
    try:
        yield
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error}") from error
    except Exception as error:
        text = one_line(error, 300)
        raise DataError(f"{source}: cannot be read ({type(error).__name__}: {text})") from error


def read_file(path: str, max_bytes: int = MAX_ENCODED_BYTES) -> bytes:
    """Reads one file, local or remote.

    Raises:
        DataError: the file cannot be read, is no regular file, or is too large; the message is a short reason without
            the path.
    """
    try:
        if "://" not in path:
            check_regular(path)
            with open(path, "rb") as local:
                check_size(os.fstat(local.fileno()).st_size, max_bytes)
                return local.read()
        filesystem, inner = open_filesystem(path)
        with filesystem.open_input_file(inner) as remote:
            check_size(remote.size(), max_bytes)
            return bytes(remote.read())
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("no such file") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read: {reason}"[:200]) from error


def check_regular(path: str) -> None:
    """Checks that a local path is a file. Opening a pipe would wait for ever, and a device may have no end.

    Raises:
        DataError: it is something else.
        FileNotFoundError: there is nothing.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise DataError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file, but a pipe or a device")


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Checks a size.

    Raises:
        DataError: it is too large.
    """
    if num_bytes > max_bytes:
        raise DataError(f"{num_bytes:,} bytes are too many; accepted: at most {max_bytes:,}")


def suffix_of(source: str) -> str:
    """Returns the suffix of a path or URI, in lower case."""
    return posixpath.splitext(split_uri(source)[1] if "://" in source else source)[1].lower()


def read_table(source: str, data: "DataConfig") -> Listing:
    """Lists the rows of a .csv, .tsv or .jsonl file. A bad line becomes a row with a problem.

    Raises:
        DataError: the table or one of its columns cannot be found or read.
    """
    suffix = suffix_of(source)
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{source}: not a table of images; accepted: {', '.join(TABLE_SUFFIXES)}, or a folder")
    with reading(source):
        table = parse_text_table(read_file(source, MAX_TABLE_BYTES), suffix)
    if not table.columns:
        raise DataError(f"{source}: the table is empty")
    names, parse = table.columns, table.parse
    derived: list[str] = []
    if lacks_label(names, data):
        lines = list(parse())
        with reading(source):
            names, derived = add_label(names, lines, columns_of_no_class(data))
        parse = lines.__iter__ if derived else parse
    columns = find_columns(names, data, source)
    records = (record for _, record in parse() if isinstance(record, dict))
    images = Texts(name for name in (cell_name(record.get(columns.image)) for record in records) if name)
    with reading(source):
        paths, warnings = settle_paths(source, data, images)
    rows = Rows(_text_row(f"{source} line {line}", record, columns, paths) for line, record in parse())
    return Listing(rows, warnings=[*table.warnings, *derived, *warnings])


def _text_row(where: str, record: Record, columns: Columns, paths: RowPaths) -> Row:
    if isinstance(record, str):
        return Row(where, None, problem=record)
    row = row_of(where, record.get(columns.image), paths)
    split = record.get(columns.split) if columns.split else None
    group = record.get(columns.group) if columns.group else None
    row = row._replace(label=record.get(columns.label), split=split, group=group)
    return with_problem(row, columns.split is not None)


def row_of(where: str, cell: Any, paths: RowPaths) -> Row:
    """Returns the row of an image that a cell of a table names, without label and split.

    Args:
        where: Where the row was found.
        cell: The cell.
        paths: How the rows of the table name their images.
    """
    name = cell_name(cell)
    if name is None:
        return Row(where, None, problem="no image path")
    try:
        return Row(paths.path_of(name), None)
    except DataError as error:
        return Row(where, None, problem=str(error))


def with_problem(row: Row, has_split: bool) -> Row:
    """Returns the row with its problem, if it has one, or lacks a label, or a split in a source that has splits."""
    if row.problem is not None:
        return row
    if row.label is None or (isinstance(row.label, str) and not row.label.strip()) or row.label != row.label:
        return row._replace(problem="no label")
    if has_split and (row.split is None or str(row.split).strip() in ("", "nan")):
        return row._replace(problem="no split")
    return row


def find_columns(columns: Sequence[str], data: "DataConfig", source: str) -> Columns:
    """Finds the columns of the image, the label and, if there are any, the split and the group.

    Raises:
        DataError: a configured column is missing, or none has a usual name.
    """
    image = _find_column(columns, data.image, IMAGE_COLUMNS, "image", source)
    label = _find_column([name for name in columns if name != image], data.label, LABEL_COLUMNS, "label", source)
    group = _column_of_groups(data)
    if group is not None:
        _find_column(columns, group, (), "group", source)
    # "split" is the default. If there is no such column, the data has no splits, which is not an error.
    if data.split not in (None, "split"):
        _find_column(columns, data.split, (), "split", source)
    return Columns(image, label, data.split if data.split in columns else None, group)


def lacks_label(columns: Sequence[str], data: "DataConfig") -> bool:
    """Returns whether no column is the label by its name, so that columns of classes may make one."""
    return data.label is None and not any(name.lower() in LABEL_COLUMNS for name in columns)


def columns_of_no_class(data: "DataConfig") -> set[str | None]:
    """Returns names of columns that are no classes, whatever they contain."""
    return {*IMAGE_COLUMNS, data.image, data.split, _column_of_groups(data)}


def _column_of_groups(data: "DataConfig") -> str | None:
    return data.group if isinstance(data.group, str) else None


def _find_column(columns: Sequence[str], named: str | None, usual: Sequence[str], role: str, source: str) -> str:
    if named in columns:
        return str(named)
    listed = f"columns: {', '.join(columns)}"
    if named is not None:
        hint = did_you_mean(named, columns)
        raise DataError(f"data.{role}: {source} has no column '{named}'; {hint if 'mean' in hint else ''} {listed}")
    by_lower = {name.lower(): name for name in reversed(columns)}
    found = [by_lower[name] for name in usual if name in by_lower]
    if not found:
        raise DataError(f"{source}: no column for the {role}; looked for {', '.join(usual)}; set data.{role}; {listed}")
    return found[0]
