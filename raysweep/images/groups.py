"""Groups of images that belong together, such as the photos of one patient: `data.group`. Each stays in one split."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.errors import DataError
from raysweep.images.splits import count_of
from raysweep.images.tables import TABLE_SUFFIXES, Row, suffix_of
from raysweep.storage.filesystems import absolute_source, parent_source

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

GROUPS_SHOWN = 3


def find_groups(rows: Sequence[Row], data: "DataConfig") -> tuple[list[str | None], list[str]]:
    """Returns the group of each row, None where it has none, and a warning if some have none.

    Raises:
        DataError: no row has one.
    """
    if data.group is None:
        return [None] * len(rows), []
    if isinstance(data.group, str):
        groups = [_name_of(row.group) for row in rows]
        lacking = f"no value in column '{data.group}'"
    else:
        groups = _matched(rows, data.group.pattern, data.source)
        lacking = f"a path that '{data.group.pattern}' does not match"
    without = [row for row, group in zip(rows, groups, strict=True) if group is None]
    if len(without) == len(rows):
        raise DataError(
            f"data.group: every image has {lacking}, such as {rows[0].source}; accepted: the name of a column of "
            "a table, or {pattern: regular expression} for the paths of the images"
        )
    if not without:
        return groups, []
    each = f"each of them is a group of its own: {without[0].source}"
    return groups, [f"{count_of(without, 'image')} with {lacking}; {each}"]


def _name_of(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip() or None


def _matched(rows: Sequence[Row], pattern: str, source: str) -> list[str | None]:
    """Returns what the pattern finds in the path of each image below the folder of the source."""
    folder = absolute_source(source)
    folder = parent_source(folder) if suffix_of(folder) in TABLE_SUFFIXES else folder
    expression = re.compile(pattern)
    found = [
        expression.search(row.path.removeprefix(f"{folder.partition('?')[0]}/")) if row.position < 0 else None
        for row in rows
    ]
    return [None if match is None else match[match.re.groups] for match in found]


def join_copies(groups: Sequence[str | None], hashes: Sequence[str]) -> list[str]:
    """Joins groups that have copies of one image.

    Args:
        groups: The group of each row; None for a row that is related only to its copies.
        hashes: Content hash of each row.

    Returns:
        A name for each row, the same for all rows that must stay together. It does not depend on the order of the rows.
        A row whose copies have no group has its content hash.
    """
    if not any(groups):
        return list(hashes)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named = [f"group:{group}" if group else content for group, content in zip(groups, hashes, strict=True)]
    nodes = {name: number for number, name in enumerate(dict.fromkeys([*hashes, *named]))}
    ends = [nodes[content] for content in hashes], [nodes[name] for name in named]
    links = coo_array((np.ones(len(named), np.int8), ends), shape=(len(nodes), len(nodes)))
    _, component = connected_components(links, directed=False)
    smallest: dict[int, str] = {}
    for name in named:
        joined = int(component[nodes[name]])
        smallest[joined] = min(name, smallest.get(joined, name))
    return [smallest[int(component[nodes[name]])] for name in named]


def describe_groups(groups: Sequence[str | None], splits: Sequence[str]) -> list[str]:
    """Returns a warning about groups whose images are in several splits, which only the source can have done."""
    found: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        if group is not None:
            found[group].add(split)
    crossing = sorted(group for group, names in found.items() if len(names) > 1)
    if not crossing:
        return []
    examples = "; ".join(f"{group} ({', '.join(sorted(found[group]))})" for group in crossing[:GROUPS_SHOWN])
    more = f" and {len(crossing) - GROUPS_SHOWN:,} more" if len(crossing) > GROUPS_SHOWN else ""
    return [f"{len(crossing):,} of {len(found):,} groups are in more than one split (leakage): {examples}{more}"]
