"""Columns of Parquet files that have one of a few plain types, which are the only ones that are read.

A file names the types of its columns itself, and values of some extension types run code when they become Python
objects: `ray.data.arrow_pickled_object` is unpickled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from raysweep.errors import DataError
from raysweep.images.tables import check_size

EXTENSION = b"ARROW:extension:name"  # key of a field's metadata, where the type is not registered in this process
MAX_TEXT_BYTES = 2**16  # of a label or path


def find_field(schema: pa.Schema, name: str) -> pa.Field:
    """Returns the field of a column.

    Raises:
        DataError: the file has several columns of this name.
    """
    if schema.names.count(name) != 1:
        raise DataError(f"column '{name}' stands twice in the file")
    return schema.field(name)


def is_text(kind: pa.DataType) -> bool:
    """Returns whether values of a type are text."""
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_bytes_or_null(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or bool(types.is_null(kind))


def is_value(kind: pa.DataType) -> bool:
    """Returns whether values of a type are text or numbers, or nothing at all."""
    return bool(is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or kind in (pa.bool_(), pa.null()))


def _check(field: pa.Field, is_accepted: Callable[[pa.DataType], bool], accepted: str) -> None:
    """Checks the type of a column, or of what it is made of.

    Raises:
        DataError: the type is none of those that are accepted, or an extension of one.
    """
    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    extension = (field.metadata or {}).get(EXTENSION)
    if extension is not None or isinstance(kind, pa.BaseExtensionType):
        name = kind.extension_name if extension is None else extension.decode(errors="replace")
        raise DataError(
            f"column '{field.name}' has the extension type '{name}', and values of such types can run code when they "
            f"are read; accepted: {accepted}"
        )
    if not is_accepted(kind):
        raise DataError(f"column '{field.name}' is {field.type}; accepted: {accepted}")


def names_images(field: pa.Field) -> bool:
    """Returns whether a column names its images, rather than contains them.

    Raises:
        DataError: it does neither.
    """
    accepted = "paths, bytes, or structs of {bytes, path}"
    if (
        types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and EXTENSION not in (field.metadata or {})
    ):
        _check(field.type.field("bytes").with_name(f"{field.name}.bytes"), _is_bytes_or_null, "bytes")
        if field.type.get_field_index("path") >= 0:
            _check(field.type.field("path").with_name(f"{field.name}.path"), is_value, "text")
        return False
    _check(field, lambda kind: is_text(kind) or types.is_integer(kind) or _is_bytes(kind), accepted)
    return not _is_bytes(field.type.value_type if types.is_dictionary(field.type) else field.type)


def read_values(opened: pa.NativeFile, file: pq.ParquetFile, names: Sequence[str]) -> dict[str, list[Any]]:
    """Reads columns of text or numbers. Text that stands in many rows is kept once.

    Raises:
        DataError: a column has another type, or a text is too long.
    """
    texts = []
    for name in names:
        field = find_field(file.schema_arrow, name)
        _check(field, is_value, "text or whole numbers")
        if is_text(field.type.value_type if types.is_dictionary(field.type) else field.type):
            texts.append(name)
    table = pq.ParquetFile(opened, metadata=file.metadata, read_dictionary=texts).read(columns=list(names))
    return {name: [value for chunk in table.column(name).chunks for value in _chunk_values(chunk)] for name in names}


def _chunk_values(chunk: pa.Array) -> list[Any]:
    if not types.is_dictionary(chunk.type):
        return list(chunk.to_pylist())
    if is_text(chunk.type.value_type):
        check_size(pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0, MAX_TEXT_BYTES)
    words = chunk.dictionary.to_pylist()
    return [None if place is None else words[place] for place in chunk.indices.to_pylist()]
