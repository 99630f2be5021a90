"""Where the images of a table are, if its paths name no files: the keys of the experiment that find them."""

import posixpath
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raysweep.errors import DataError
from raysweep.images.row_paths import RowPaths, sample, split_suffix
from raysweep.images.row_splits import split_of_path, split_of_table
from raysweep.storage.filesystems import absolute_source, join_source, list_names, parent_source, split_uri

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

MAX_FOLDERS, MAX_FILES = 200, 200_000  # that are looked through, the nearest first

# How ids may differ from names of files in ways that no key mends.
DIFFERENCES: dict[str, Callable[[str], str]] = {
    "the table's ids lack leading zeros that the files' names have; write them as text": lambda stem: stem.lstrip("0"),
    "the names differ in upper and lower case; write them as the files have them": str.lower,
}


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of the experiment with which names become paths; empty where a key is not needed."""

    image_prefix: str
    image_folder: str
    image_suffix: str


@dataclass(frozen=True, slots=True)
class Matches:
    """What names have in common with files, if a prefix is cut off them and they are looked for in a folder.

    Attributes:
        files: The file of each name, by the suffix of the file.
        own: Names that have the suffix of their file.
        shared: Number of folders at their ends that names and files share.
    """

    files: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    own: set[str] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        """All names that have a file."""
        return {name for files in self.files.values() for name in files}

    def suffixes(self) -> list[str]:
        """Returns each way to choose suffixes so that all names have a file."""
        if self.own == self.names:
            return [""]
        whole = sorted(suffix for suffix, files in self.files.items() if files.keys() == self.names)
        by_number = sorted(self.files, key=lambda suffix: (-len(self.files[suffix]), suffix))
        return whole or [", ".join(by_number)]


def settle_paths(table: str, data: "DataConfig", names: Sequence[str]) -> tuple[RowPaths, list[str]]:
    """Returns how the rows of a table name their images, and what a user should know about it.

    Raises:
        DataError: most of the named files do not exist, and it can be told how they would be found.
    """
    paths, warnings = RowPaths.of(table, data).settle(names)
    if absolute_source(data.source) != table:  # a folder, where `table_sets` looks for the images of its tables
        return paths, warnings
    looked_at = sample(names)
    missing = paths.missing(looked_at)
    if missing and len(missing) > max(0.5, data.max_bad_fraction) * len(looked_at):
        advice = _advice(paths, data, missing)
        if advice:
            raise DataError(
                f"{table}: {len(missing)} of {len(looked_at)} rows that were looked at name no file, such as "
                f"{missing[0]}; {advice}"
            )
    return paths, warnings


def _advice(paths: RowPaths, data: "DataConfig", missing: Sequence[str]) -> str:
    folder = parent_source(paths.table)
    for root in (folder, parent_source(folder)):
        if "://" in root and len(split_uri(root)[1].split("/")) < (3 if root.startswith("hf://") else 1):
            continue
        files = list(_images_below(root))
        if root != folder:  # farther away, the same ids often name other images
            files = [file for file in files if file.count("/") == 1]
        split, _ = split_of_table("/".join(paths.table.split("/")[-2:]))
        # The ids of train.csv are often those of the images of test too.
        own = [file for file in files if split is None or split_of_path(file) in (None, split)]
        files = own if own or split == "train" else files
        matches = _match(paths, missing, files)
        fits = _fitting_keys(matches, len(missing))
        if fits:
            written = [_lines(keys, data, root, folder) for keys in fits[:3]]
            several = f"{len(fits)} ways fit; write one of them" if len(fits) > 1 else "write"
            return f"they are found with other keys; {several}:" + "\n  or".join(written)
        places = {file.rpartition("/")[0] for found in matches.values() for file in _all_files(found)}
        found_names = {name for found in matches.values() for name in found.names}
        if 2 * len(found_names) > len(missing):
            return (
                f"files of these names lie in {len(places)} folders ({', '.join(sorted(places)[:3])}); accepted: rows "
                "that name the folder too, or a folder as data.source"
            )
        for difference, fold in DIFFERENCES.items():
            stems = {fold(split_suffix(file)[0].rpartition("/")[2]): file for file in files}
            alike = [(name, stems.get(fold(_stem(paths, name)))) for name in missing]
            alike = [(name, file) for name, file in alike if file]
            if 2 * len(alike) > len(missing):
                return f"{difference}, such as {join_source(root, str(alike[0][1]))} for {alike[0][0]}"
    return ""


def _all_files(found: Matches) -> set[str]:
    return {file for files in found.files.values() for file in files.values()}


def _stem(paths: RowPaths, name: str) -> str:
    return split_suffix(paths.spelt(name))[0].rpartition("/")[2]


def _images_below(root: str) -> Iterator[str]:
    """Yields the relative paths of the images in a folder, those of nearer folders first."""
    waiting, num_files, num_folders = [""], 0, 0
    while waiting and num_folders < MAX_FOLDERS and num_files < MAX_FILES:
        num_folders += 1
        folder = waiting.pop(0)
        try:
            entries = list_names(join_source(root, folder) if folder else root)
        except (OSError, ValueError, DataError):  # no permission
            continue
        for name, is_folder in entries:
            path = posixpath.join(folder, name)
            if name.startswith((".", "@")):
                continue
            if is_folder:
                waiting.append(path)
            elif split_suffix(name)[1]:
                num_files += 1
                yield path


def _match(paths: RowPaths, missing: Sequence[str], files: Sequence[str]) -> dict[tuple[str, str], Matches]:
    """Returns what names and files have in common, by prefix and folder."""
    by_stem: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file in files:
        stem, suffix = split_suffix(file)
        while suffix:  # the name 1.jpg may stand for the file 1.jpg.png
            by_stem[stem.rpartition("/")[2]].append((stem, file[len(stem) :]))
            stem, suffix = split_suffix(stem)
    matches: dict[tuple[str, str], Matches] = defaultdict(Matches)
    for name in missing:
        spelt = paths.spelt(name)
        for variant in dict.fromkeys((spelt, urllib.parse.unquote(spelt))):
            own_stem, own = split_suffix(variant)
            for stem, suffix in by_stem.get(own_stem.rpartition("/")[2], ()):
                for place, shared in _places_between(own_stem, stem):
                    matches[place].files[suffix][name] = stem + suffix
                    matches[place].shared.add(shared)
                    if suffix == own:
                        matches[place].own.add(name)
    return matches


def _fitting_keys(matches: Mapping[tuple[str, str], Matches], num_missing: int) -> list[Keys]:
    """Returns the keys that bring most of the names to files: one for each set of files, the simplest ones."""
    most = max((len(found.names) for found in matches.values()), default=0)
    if 2 * most <= num_missing:
        return []
    best: dict[frozenset[str], list[Keys]] = {}
    # The more folders a name and its file share, the less is cut off.
    for place in sorted(matches, key=lambda place: (-max(matches[place].shared), place[1])):
        found = matches[place]
        if len(found.names) == most:
            best.setdefault(frozenset(_all_files(found)), [Keys(*place, suffix) for suffix in found.suffixes()])
    return [keys for ways in best.values() for keys in ways]


def _places_between(name: str, file: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yields prefixes and folders between a name and a file, and how many folders the two share at their ends."""
    parts, folders = name.split("/"), file.split("/")
    for shared in range(min(len(parts), len(folders))):
        if parts[len(parts) - 1 - shared :] != folders[len(folders) - 1 - shared :]:
            return
        prefix = "/".join([*parts[: len(parts) - 1 - shared], ""])
        yield ("" if prefix in ("", "./") else prefix, "/".join(folders[: len(folders) - 1 - shared])), shared


def _lines(keys: Keys, data: "DataConfig", root: str, folder: str) -> str:
    """Returns keys as lines of YAML. A key that must be taken out of the experiment is written as null."""
    place = posixpath.normpath(posixpath.join("" if root == folder else "..", keys.image_folder))
    values = {"image_prefix": keys.image_prefix, "image_folder": place, "image_suffix": keys.image_suffix}
    if place == ".":
        values["image_folder"] = ""
    lines = [
        f"\n    {key}: {_quoted(value) if value else 'null'}"
        for key, value in values.items()
        if value or getattr(data, key)
    ]
    return "\n  data:" + "".join(lines)


def _quoted(value: str) -> str:
    is_plain = value.replace("/", "").replace(".", "").replace("_", "").replace("-", "").isalnum()
    return value if is_plain and not value.startswith("-") else f"'{value.replace(chr(39), 2 * chr(39))}'"
