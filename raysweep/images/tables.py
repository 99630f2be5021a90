"""Tables of images in CSV, TSV, JSON Lines and Parquet: rows as listed, before an image is opened."""

import csv
import io
import json
import os
import posixpath
import re
import urllib.parse
import urllib.request
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq
from pyarrow import types

from raysweep.errors import DataError, did_you_mean
from raysweep.filesystems import open_filesystem, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

# In order of preference where a table has several of them: the first holds pixels, the later ones often only names.
# fmt: off
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file_path", "filepath", "image_file_path", "file_name",
                 "filename", "file")
# fmt: on
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")
BUFFER_BYTES = 8 << 20


class Row(NamedTuple):
    """One image as its source lists it.

    `path` is absolute: the image, or the Parquet file of which it is row `position`. `label` and `split` are the
    source's own values. A row with a `problem` is bad before it is read, and `path` then says where it stands.
    """

    path: str
    label: Any
    split: Any = None
    position: int = -1
    inline: bytes | None = None
    problem: str | None = None

    @property
    def source(self) -> str:
        """Where the row stands, for people."""
        return self.path if self.position < 0 else f"{self.path} row {self.position}"


@dataclass
class Listing:
    """All rows of a source, and the Parquet column that holds the images where there is one."""

    rows: list[Row]
    image_column: str | None = None
    warnings: list[str] = field(default_factory=list)


def absolute_source(source: str) -> str:
    """Returns a local source as an absolute path, a remote one without a closing slash.

    Raises:
        DataError: the URI carries credentials.
    """
    if source.startswith("file://"):
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if "://" in source:
        scheme, path, query = split_uri(source)
        return f"{scheme}://{path.rstrip('/')}{query}"
    return os.path.abspath(os.path.expanduser(source))


def join_source(folder: str, relative: str) -> str:
    """Returns the absolute path or URI of a file that a table or listing under `folder` names."""
    if "://" in relative or os.path.isabs(relative):
        return absolute_source(relative)
    if "://" not in folder:
        return os.path.abspath(os.path.join(folder, relative))
    scheme, path, query = split_uri(folder)
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, relative))}{query}"


def parent_source(source: str) -> str:
    """Returns the folder that a path or URI lies in."""
    if "://" not in source:
        return os.path.dirname(source)
    scheme, path, query = split_uri(source)
    return f"{scheme}://{posixpath.dirname(path)}{query}"


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns whatever a file system, Arrow or the network raises into a DataError that names the source."""
    try:
        yield
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{source}: cannot be read ({type(error).__name__}: {text})") from error


def read_file(path: str) -> bytes:
    """Reads one file, local or remote.

    Raises:
        DataError: with a short reason that leaves the path out.
    """
    try:
        if "://" not in path:
            with open(path, "rb") as local:
                return local.read()
        filesystem, inner = open_filesystem(path)
        with filesystem.open_input_file(inner) as remote:
            return bytes(remote.read())
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("no such file") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read: {reason}"[:200]) from error


def read_table(source: str, data: "DataConfig") -> Listing:
    """Lists the rows of a .csv, .tsv, .jsonl or .parquet file.

    Raises:
        DataError: the table or one of its columns cannot be found or read. A single bad line is a row with a problem.
    """
    suffix = posixpath.splitext(split_uri(source)[1] if "://" in source else source)[1].lower()
    if suffix == ".parquet":
        return read_parquet_files([(source, None)], data)
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{source}: not a table of images; accepted: {', '.join(TABLE_SUFFIXES)}, or a folder")
    with reading(source):
        text = _decode_text(read_file(source))
        columns, lines = _json_lines(text) if suffix == ".jsonl" else _delimited(text, DELIMITERS[suffix])
    if not columns:
        raise DataError(f"{source}: the table is empty")
    names = _find_columns(columns, data, source)
    return Listing([_text_row(line, record, names, source) for line, record in lines])


Lines = list[tuple[int, dict[str, Any] | str]]  # line number, and the record or what is wrong with it


def _decode_text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # Excel puts a byte order mark before the first column's name
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start}); save the table as UTF-8") from error


def _delimited(text: str, delimiter: str) -> tuple[list[str], Lines]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    if len(columns) != len(set(columns)):
        raise DataError(f"a column name stands twice in the header: {', '.join(columns)}")
    lines: Lines = []
    for values in reader:
        if len(values) == len(columns):
            lines.append((reader.line_num, dict(zip(columns, values, strict=True))))
        elif values:
            lines.append((reader.line_num, f"{len(values)} fields where the header has {len(columns)}"))
    return columns, lines


def _json_lines(text: str) -> tuple[list[str], Lines]:
    lines: Lines = []
    columns: dict[str, None] = {}
    # Not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            lines.append((number, f"not JSON ({error})"))
            continue
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
        lines.append((number, record if isinstance(record, dict) else "not a JSON object"))
    return list(columns), lines


def _text_row(line: int, record: dict[str, Any] | str, names: tuple[str, str, str | None], source: str) -> Row:
    where = f"{source} line {line}"
    if isinstance(record, str):
        return Row(where, None, problem=record)
    image, label, split = names
    path = record.get(image)
    path = path.get("path") if isinstance(path, dict) else path
    if not isinstance(path, str) or not path.strip():
        return Row(where, None, problem="no image path")
    path = join_source(parent_source(source), path.strip())
    return _checked(Row(path, record.get(label), record.get(split) if split else None), split is not None)


def _checked(row: Row, has_split: bool) -> Row:
    """Marks a row that lacks its label or split."""
    if row.label is None or (isinstance(row.label, str) and not row.label.strip()) or row.label != row.label:
        return row._replace(problem="no label")
    if has_split and (row.split is None or str(row.split).strip() in ("", "nan")):
        return row._replace(problem="no split")
    return row


def _find_columns(columns: Sequence[str], data: "DataConfig", source: str) -> tuple[str, str, str | None]:
    """The columns of image, label and, where there is one, split."""
    image = _find_column(columns, data.image, IMAGE_COLUMNS, "image", source)
    label = _find_column([name for name in columns if name != image], data.label, LABEL_COLUMNS, "label", source)
    if data.split in columns:
        return image, label, data.split
    # "split" is the default, so its absence means no more than that the data comes unsplit.
    if data.split not in (None, "split"):
        _find_column(columns, data.split, (), "split", source)
    return image, label, None


def _find_column(columns: Sequence[str], named: str | None, usual: Sequence[str], role: str, source: str) -> str:
    if named in columns:
        return str(named)
    listed = f"columns: {', '.join(columns)}"
    if len(columns) == 1 and re.search(r"[;\t|]", columns[0]):
        listed += " (are they separated by something else than the file's suffix says?)"
    if named is not None:
        hint = did_you_mean(named, columns)
        raise DataError(f"data.{role}: {source} has no column '{named}'; {hint if 'mean' in hint else ''} {listed}")
    by_lower = {name.lower(): name for name in reversed(columns)}
    found = [by_lower[name] for name in usual if name in by_lower]
    if not found:
        raise DataError(f"{source}: no column for the {role}; looked for {', '.join(usual)}; set data.{role}; {listed}")
    return found[0]


def read_parquet_files(files: Sequence[tuple[str, str | None]], data: "DataConfig") -> Listing:
    """Lists the rows of Parquet files, each given with its split or None; images stay unread.

    Raises:
        DataError: a file or column cannot be read, or the image column holds neither paths nor bytes.
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
    """Appends the file's rows; returns its image column unless that holds mere paths."""
    filesystem, inner = open_filesystem(source)
    with filesystem.open_input_file(inner) as opened, pq.ParquetFile(opened) as file:
        schema = file.schema_arrow
        image, label, split_column = _find_columns(schema.names, data, source)
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
            # The hub writes -1 where a label is withheld.
            row = row._replace(label=names[value] if 0 <= value < len(names) else None)
        rows.append(_checked(row, split_column is not None))
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
    """Class names that Hugging Face's datasets library keeps in a Parquet file's schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def parquet_images(source: str, column: str, positions: Sequence[int]) -> Iterator[tuple[int, bytes | DataError]]:
    """Reads images out of a Parquet file, each row group that holds one of them once, a few dozen rows at a time.

    Yields:
        Position and image bytes, or the reason why there are none, for each distinct position, ascending.
    """
    wanted = sorted(set(positions))
    filesystem, inner = open_filesystem(source)
    options = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
    with filesystem.open_input_file(inner) as opened, pq.ParquetFile(opened, **options) as file:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            due = wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]
            # One row group may be gigabytes (pandas writes a single one), so it is read in small batches.
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
