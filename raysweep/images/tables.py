"""Rows and columns of tables of images, tables in CSV, TSV and JSON Lines, and paths of sources. Opens no image."""

import csv
import io
import json
import os
import posixpath
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from raysweep.errors import DataError, did_you_mean
from raysweep.storage.filesystems import open_filesystem, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

# In order of preference, for tables with several of them: the first contain images, the last often only names.
# fmt: off
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file_path", "filepath", "image_file_path", "file_name",
                 "filename", "file")
# fmt: on
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".parquet")


class Row(NamedTuple):
    """One image as its source lists it.

    Attributes:
        path: Absolute path or URI of the image, or of the Parquet file that contains it. For a row with a problem, the
            place where the row was found.
        label: The value in the source.
        split: The value in the source; None where it has none.
        position: Number of the row in the Parquet file; -1 where `path` is the image itself.
        inline: The encoded image, for sources that are generated in memory.
        problem: The reason why the row is bad, if that is known before the image is read.
    """

    path: str
    label: Any
    split: Any = None
    position: int = -1
    inline: bytes | None = None
    problem: str | None = None

    @property
    def source(self) -> str:
        """Where the row was found, for messages."""
        return self.path if self.position < 0 else f"{self.path} row {self.position}"


class Columns(NamedTuple):
    """Names of the columns of a table; `split` is None where it has no such column."""

    image: str
    label: str
    split: str | None


@dataclass
class Listing:
    """All rows of a source.

    Attributes:
        rows: The rows, good and bad.
        image_column: Column of the images in Parquet files; None where there are none.
        warnings: What a user should know about the source.
    """

    rows: list[Row]
    image_column: str | None = None
    warnings: list[str] = field(default_factory=list)


def absolute_source(source: str) -> str:
    """Returns a local source as an absolute path, and a remote one without a slash at its end.

    Raises:
        DataError: the URI contains credentials.
    """
    if source.startswith("file://"):
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if "://" in source:
        scheme, path, query = split_uri(source)
        return f"{scheme}://{path.rstrip('/')}{query}"
    return os.path.abspath(os.path.expanduser(source))


def join_source(folder: str, relative: str) -> str:
    """Returns the absolute path or URI of a file whose name a table or listing in `folder` gives."""
    if "://" in relative or os.path.isabs(relative):
        return absolute_source(relative)
    if "://" not in folder:
        return os.path.abspath(os.path.join(folder, relative))
    scheme, path, query = split_uri(folder)
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, relative))}{query}"


def parent_source(source: str) -> str:
    """Returns the folder that contains a path or URI."""
    if "://" not in source:
        return os.path.dirname(source)
    scheme, path, query = split_uri(source)
    return f"{scheme}://{posixpath.dirname(path)}{query}"


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
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{source}: cannot be read ({type(error).__name__}: {text})") from error


def read_file(path: str) -> bytes:
    """Reads one file, local or remote.

    Raises:
        DataError: the file cannot be read; the message is a short reason without the path.
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
        text = _decode_text(read_file(source))
        columns, lines = _json_lines(text) if suffix == ".jsonl" else _delimited(text, DELIMITERS[suffix])
    if not columns:
        raise DataError(f"{source}: the table is empty")
    names = find_columns(columns, data, source)
    return Listing([_text_row(line, record, names, source) for line, record in lines])


Lines = list[tuple[int, dict[str, Any] | str]]  # line number, and the record or the reason why there is none


def _decode_text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # Excel writes a byte order mark before the first column's name
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
    # Not splitlines(), which would split at U+2028, a character that JSON strings may contain.
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


def _text_row(line: int, record: dict[str, Any] | str, names: Columns, source: str) -> Row:
    where = f"{source} line {line}"
    if isinstance(record, str):
        return Row(where, None, problem=record)
    path = record.get(names.image)
    path = path.get("path") if isinstance(path, dict) else path
    if not isinstance(path, str) or not path.strip():
        return Row(where, None, problem="no image path")
    path = join_source(parent_source(source), path.strip())
    split = record.get(names.split) if names.split else None
    return with_problem(Row(path, record.get(names.label), split), names.split is not None)


def with_problem(row: Row, has_split: bool) -> Row:
    """Returns the row with its problem, if it lacks a label, or a split in a source that has splits."""
    if row.label is None or (isinstance(row.label, str) and not row.label.strip()) or row.label != row.label:
        return row._replace(problem="no label")
    if has_split and (row.split is None or str(row.split).strip() in ("", "nan")):
        return row._replace(problem="no split")
    return row


def find_columns(columns: Sequence[str], data: "DataConfig", source: str) -> Columns:
    """Finds the columns of the image, the label and, if there is one, the split.

    Raises:
        DataError: a configured column is missing, or none has a usual name.
    """
    image = _find_column(columns, data.image, IMAGE_COLUMNS, "image", source)
    label = _find_column([name for name in columns if name != image], data.label, LABEL_COLUMNS, "label", source)
    if data.split in columns:
        return Columns(image, label, data.split)
    # "split" is the default. If there is no such column, the data has no splits, which is not an error.
    if data.split not in (None, "split"):
        _find_column(columns, data.split, (), "split", source)
    return Columns(image, label, None)


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
