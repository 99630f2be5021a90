"""Tables with one column a class, as Roboflow and the ISIC archive publish them, and their label."""

from collections.abc import Collection, Sequence
from typing import Any

from raysweep.errors import DataError
from raysweep.images.text_tables import Record

_VALUES = {"0": False, "0.0": False, "-1": False, "false": False, "1": True, "1.0": True, "true": True}
LABEL = "label"
DERIVED_LABEL = "the label of a row is the name of its column with a 1; name another column with data.label"


def add_label(
    columns: Sequence[str], lines: Sequence[tuple[int, Record]], not_classes: Collection[str | None]
) -> tuple[list[str], list[str]]:
    """Adds a column `label` to a table without one, if it has a column for each class with a single 1 in each row.

    A row without any 1 gets the label None.

    Args:
        columns: Names of the columns, none of which is a label.
        lines: Number and cells of each line. The label is added to the cells.
        not_classes: Columns that are no classes whatever they contain.

    Returns:
        The names of the columns, with `label` if there is one now; and a warning that says so.

    Raises:
        DataError: rows have several labels.
    """
    records = [record for _, record in lines if isinstance(record, dict)]
    classes = [
        name
        for name in columns
        if not {name, name.lower()} & set(not_classes)
        and all(_flag(record.get(name)) is not None for record in records)
    ]
    if not records or len(classes) < 2:
        return list(columns), []
    chosen = [[name for name in classes if _flag(record[name])] for record in records]
    several = sum(len(names) > 1 for names in chosen)
    if several:
        raise DataError(
            f"multi-label: {several} of {len(records)} rows have a 1 in several of the columns {', '.join(classes)}; "
            "accepted: one class per image, as one 1 per row or in a single column that data.label names"
        )
    for record, names in zip(records, chosen, strict=True):
        record[LABEL] = names[0] if names else None
    return [*columns, LABEL], [DERIVED_LABEL]


def _flag(value: Any) -> bool | None:
    """Returns whether a cell says yes, or None where it is neither 0 nor 1."""
    return _VALUES.get(str(value).strip().lower())
