"""From the text of a CSV, TSV or JSON Lines file to its columns and lines. What a line means, `tables` knows."""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from raysweep.errors import DataError
from raysweep.images.splits import count_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES_OF_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")

Record = dict[str, Any] | str  # the cells of a line by column, or the reason why there are none


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table as it was read.

    Attributes:
        columns: Names of the columns.
        parse: Yields the number of each line, and its record or the reason why there is none. Lines are parsed each
            time, not kept, because they need ten times the memory of their text.
        warnings: What was left out, and what was read in another way than the suffix says.
    """

    columns: list[str]
    parse: Callable[[], Iterator[tuple[int, Record]]]
    warnings: list[str] = field(default_factory=list)


def parse_text_table(content: bytes, suffix: str) -> TextTable:
    """Reads a table of the given suffix: .csv, .tsv or .jsonl.

    Raises:
        DataError: the content is no text, or no such table.
    """
    text = decode_text(content)
    return _json_lines(text) if suffix == ".jsonl" else _delimited(text, DELIMITERS[suffix])


def decode_text(content: bytes) -> str:
    """Returns the text of a table.

    Raises:
        DataError: it is in another encoding than UTF-8 and UTF-16.
    """
    # Excel writes a byte order mark before the first column's name, and UTF-16 as "Unicode text".
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start}); save the table as UTF-8") from error


def _delimited(text: str, usual: str) -> TextTable:
    first, _, rest = text.lstrip("\r\n").partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # a hint to Excel
        text, first = rest, rest.partition("\n")[0]
    delimiter = usual if usual in first else max(NAMES_OF_DELIMITERS, key=first.count)
    delimiter = delimiter if delimiter in first else usual
    warnings = []
    if delimiter != usual:
        warnings.append(f"the columns are separated by {NAMES_OF_DELIMITERS[delimiter]}")
    reader = csv.reader(_lines_of(text), delimiter=delimiter)
    try:
        header = _read_header(reader)
        num_empty = 0
        unnamed: set[int] = set()
        for cells in reader:
            filled = [place for place, cell in enumerate(cells) if cell.strip()]
            num_empty += bool(cells) and not filled
            if not _problem_of(cells, header):
                unnamed.update(place for place in filled if not header[place])
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}") from error
    if num_empty:
        warnings.append(f"{num_empty} empty row{'s' * (num_empty > 1)} left out")
    if unnamed:
        warnings.append(f"{count_of(unnamed, 'column')} without a name left out")
    return TextTable(list(filter(None, header)), partial(_delimited_lines, text, delimiter), warnings)


def _lines_of(text: str) -> Iterator[str]:
    """Yields the lines of a text with their ends, as a file does that is opened with `newline=""`."""
    return (match.group() for match in _LINE.finditer(text))


def _read_header(reader: Iterator[list[str]]) -> list[str]:
    header = next((names for names in ([cell.strip() for cell in cells] for cells in reader) if any(names)), [])
    named = list(filter(None, header))
    if len(set(named)) != len(named):
        raise DataError(f"a column name stands twice in the header: {', '.join(named)}")
    return header


def _delimited_lines(text: str, delimiter: str) -> Iterator[tuple[int, Record]]:
    """Yields lines. Spreadsheets export empty rows, and empty columns at the right: both are left out."""
    reader = csv.reader(_lines_of(text), delimiter=delimiter)
    header = _read_header(reader)
    named = {place: name for place, name in enumerate(header) if name}
    for cells in reader:
        if any(cell.strip() for cell in cells):
            problem = _problem_of(cells, header)
            yield reader.line_num, problem or {name: cells[place] for place, name in named.items()}


def _problem_of(cells: list[str], header: list[str]) -> str:
    """Returns why a line that is not empty is no record; nothing if it is one."""
    needed = max((place for place, name in enumerate(header) if name), default=0)
    if len(cells) > needed and not any(cell.strip() for cell in cells[len(header) :]):
        return ""
    return f"{len(cells)} fields where the header has {len(header)}"


def _json_lines(text: str) -> TextTable:
    columns: dict[str, None] = {}
    for _, record in _parsed_json_lines(text):
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
    return TextTable(list(columns), partial(_parsed_json_lines, text))


def _parsed_json_lines(text: str) -> Iterator[tuple[int, Record]]:
    # Not splitlines(), which would split at U+2028, a character that JSON strings may contain.
    start, number = 0, 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, start, number = text[start:end], end + 1, number + 1
        if line.strip():
            yield number, _json_record(line)


def _json_record(line: str) -> Record:
    """Returns the record of a line, or the reason why it has none."""
    try:
        record = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"half of a character (\\u{ord(error.object[error.start]):04x})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return record if isinstance(record, dict) else "not a JSON object"
