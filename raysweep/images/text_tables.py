"""From the text of a CSV, TSV or JSON Lines file to its columns and lines. What a line means, `tables` knows."""

import codecs
import csv
import io
import json
from dataclasses import dataclass, field
from typing import Any

from raysweep.errors import DataError
from raysweep.images.splits import count_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES_OF_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

Record = dict[str, Any] | str  # the cells of a line by column, or the reason why there are none


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table as it was read.

    Attributes:
        columns: Names of the columns.
        lines: Number of each line, and its record or the reason why there is none.
        warnings: What was left out, and what was read in another way than the suffix says.
    """

    columns: list[str]
    lines: list[tuple[int, Record]]
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
    table = TextTable([], [])
    if delimiter != usual:
        table.warnings.append(f"the columns are separated by {NAMES_OF_DELIMITERS[delimiter]}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        _read_records(reader, table)
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}") from error
    return table


def _read_records(reader: Any, table: TextTable) -> None:
    """Adds columns and lines. Spreadsheets export empty rows, and empty columns at the right: both are left out."""
    header = next((names for names in ([cell.strip() for cell in cells] for cells in reader) if any(names)), [])
    named = {place: name for place, name in enumerate(header) if name}
    if len(set(named.values())) != len(named):
        raise DataError(f"a column name stands twice in the header: {', '.join(named.values())}")
    table.columns.extend(named.values())
    num_empty = 0
    unnamed: set[int] = set()
    for cells in reader:
        filled = [place for place, cell in enumerate(cells) if cell.strip()]
        if not filled:
            num_empty += bool(cells)
        elif len(cells) <= max(named, default=0) or filled[-1] >= len(header):
            table.lines.append((reader.line_num, f"{len(cells)} fields where the header has {len(header)}"))
        else:
            table.lines.append((reader.line_num, {name: cells[place] for place, name in named.items()}))
            unnamed.update(place for place in filled if place not in named)
    if num_empty:
        table.warnings.append(f"{num_empty} empty row{'s' * (num_empty > 1)} left out")
    if unnamed:
        table.warnings.append(f"{count_of(unnamed, 'column')} without a name left out")


def _json_lines(text: str) -> TextTable:
    lines: list[tuple[int, Record]] = []
    columns: dict[str, None] = {}
    # Not splitlines(), which would split at U+2028, a character that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _json_record(line)
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
        lines.append((number, record))
    return TextTable(list(columns), lines)


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
