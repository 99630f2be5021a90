"""Groups of images that belong together, such as the photos of one patient: `data.group`. Each stays in one split."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.errors import DataError
from raysweep.images.contents import Contents, Together
from raysweep.images.listed_rows import Rows, Values
from raysweep.images.splits import SPLITS, count_of
from raysweep.images.tables import TABLE_SUFFIXES, suffix_of
from raysweep.storage.filesystems import absolute_source, parent_source

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

GROUPS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups that a source gives its rows.

    Attributes:
        numbers: int32 `(rows,)`, the group of each row; -1 where it has none.
        names: Name of each group.
    """

    numbers: np.ndarray
    names: list[str]


def find_groups(rows: Rows, data: "DataConfig") -> tuple[Groups, list[str]]:
    """Returns the group of each row, and a warning if some have none.

    Raises:
        DataError: no row has one.
    """
    if data.group is None:
        return Groups(np.broadcast_to(np.int32(-1), len(rows)), []), []
    if isinstance(data.group, str):
        found = Values(map(_name_of, rows.groups.distinct))
        numbers = found.numbers[rows.groups.numbers]
        lacking = f"no value in column '{data.group}'"
    else:
        found = Values(_matched(rows, data.group.pattern, data.source))
        numbers = found.numbers
        lacking = f"a path that '{data.group.pattern}' does not match"
    names = [name for name in found.distinct if name is not None]
    numbered = {name: number for number, name in enumerate(names)}
    renumbered = np.array([numbered.get(name, -1) for name in found.distinct], np.int32)
    groups = Groups(renumbered[numbers], names)
    without = np.flatnonzero(groups.numbers < 0)
    if len(without) == len(rows):
        raise DataError(
            f"data.group: every image has {lacking}, such as {rows[0].source}; accepted: the name of a column of "
            "a table, or {pattern: regular expression} for the paths of the images"
        )
    if not len(without):
        return groups, []
    each = f"each of them is a group of its own: {rows[int(without[0])].source}"
    return groups, [f"{count_of(without, 'image')} with {lacking}; {each}"]


def _name_of(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip() or None


def _matched(rows: Rows, pattern: str, source: str) -> Iterator[str | None]:
    """Yields what the pattern finds in the path of each image below the folder of the source."""
    folder = absolute_source(source)
    folder = parent_source(folder) if suffix_of(folder) in TABLE_SUFFIXES else folder
    start, expression = f"{folder.partition('?')[0]}/", re.compile(pattern)
    for row in rows:
        match = expression.search(row.path.removeprefix(start)) if row.position < 0 else None
        yield None if match is None else match[match.re.groups]


def join_copies(groups: Groups, contents: Contents) -> Together:
    """Joins groups that have copies of one image.

    Args:
        groups: The group of each row; a row without one is related only to its copies.
        contents: The encoded image of each row.

    Returns:
        The rows that must stay together. The names do not depend on the order of the rows: that of rows whose copies
        have no group is their content hash.
    """
    by_content = contents.together()
    numbers = groups.numbers
    if "" in groups.names:  # a pattern that matched nothing
        numbers = np.where(numbers == groups.names.index(""), -1, numbers)
    grouped = np.flatnonzero(numbers >= 0)
    if not len(grouped):
        return by_content
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # The nodes are the distinct contents, and after them the groups by name.
    num_contents = int(by_content.numbers.max()) + 1
    by_name = sorted(range(len(groups.names)), key=groups.names.__getitem__)
    nodes = np.empty(len(by_name), np.int32)
    nodes[by_name] = np.arange(num_contents, num_contents + len(by_name), dtype=np.int32)
    ends = by_content.numbers[grouped], nodes[numbers[grouped]]
    num_nodes = num_contents + len(by_name)
    links = coo_array((np.ones(len(grouped), np.int8), ends), shape=(num_nodes, num_nodes))
    num_joined, joined = connected_components(links, directed=False)
    joined = joined[by_content.numbers]
    # Hashes come before names of groups, as they would by their texts.
    named = by_content.numbers.copy()
    named[grouped] = ends[1]
    smallest = np.full(num_joined, num_nodes, np.int32)
    np.minimum.at(smallest, joined, named)

    def name_of(number: int) -> str:
        node = int(smallest[number])
        return (
            by_content.name_of(node) if node < num_contents else f"group:{groups.names[by_name[node - num_contents]]}"
        )

    return Together(joined, name_of)


def describe_groups(groups: Groups, splits: np.ndarray) -> list[str]:
    """Returns a warning about groups whose images are in several splits, which only the source can have done.

    Args:
        groups: The group of each row.
        splits: The split of each row, as its number in `SPLITS`.
    """
    found = np.zeros((len(groups.names), len(SPLITS)), np.bool_)
    rows = np.flatnonzero(groups.numbers >= 0)
    found[groups.numbers[rows], splits[rows]] = True
    crossing = sorted((groups.names[number], number) for number in np.flatnonzero(found.sum(axis=1) > 1).tolist())
    if not crossing:
        return []
    names = {number: ", ".join(sorted(np.array(SPLITS)[found[number]])) for _, number in crossing[:GROUPS_SHOWN]}
    examples = "; ".join(f"{group} ({names[number]})" for group, number in crossing[:GROUPS_SHOWN])
    more = f" and {len(crossing) - GROUPS_SHOWN:,} more" if len(crossing) > GROUPS_SHOWN else ""
    num_groups = int(found.any(axis=1).sum())
    return [f"{len(crossing):,} of {num_groups:,} groups are in more than one split (leakage): {examples}{more}"]
