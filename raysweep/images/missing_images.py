"""Where the images of a table are, if its paths name no files: the keys of the experiment that find them."""

import posixpath
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyarrow import fs

from raysweep.errors import DataError
from raysweep.images.row_paths import RowPaths, sample, split_suffix
from raysweep.storage.filesystems import absolute_source, join_source, open_filesystem, parent_source, split_uri

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
    """Keys of the experiment with which a row's name becomes a path; empty where a key is not needed."""

    image_prefix: str
    image_folder: str
    image_suffix: str


@dataclass(frozen=True, slots=True)
class Found:
    """The names and the files that some keys bring together, and how many folders they share at their ends."""

    names: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)


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
        fits = _fitting_keys(paths, missing, files)
        if fits:
            written = [_lines(keys, data, root, folder) for keys in fits[:3]]
            several = f"{len(fits)} ways fit; write one of them" if len(fits) > 1 else "write"
            return f"they are found with other keys; {several}:" + "\n  or".join(written)
        for difference, fold in DIFFERENCES.items():
            stems = {fold(split_suffix(file)[0].rpartition("/")[2]): file for file in files}
            alike = [(name, stems.get(fold(_stem(paths, name)))) for name in missing]
            alike = [(name, file) for name, file in alike if file]
            if 2 * len(alike) > len(missing):
                return f"{difference}, such as {join_source(root, str(alike[0][1]))} for {alike[0][0]}"
    return ""


def _stem(paths: RowPaths, name: str) -> str:
    return split_suffix(paths.spelt(name))[0].rpartition("/")[2]


def _images_below(root: str) -> Iterator[str]:
    """Yields the relative paths of the images in a folder, those of nearer folders first."""
    filesystem, base = open_filesystem(root)
    depth = len([part for part in base.split("/") if part])
    waiting, num_files, num_folders = [base], 0, 0
    while waiting and num_folders < MAX_FOLDERS and num_files < MAX_FILES:
        num_folders += 1
        try:
            infos = filesystem.get_file_info(fs.FileSelector(waiting.pop(0)))
        except OSError:  # no permission
            continue
        for info in sorted(infos, key=lambda info: str(info.path)):
            name = info.path.rstrip("/").rpartition("/")[2]
            if name.startswith((".", "@")):
                continue
            if info.type == fs.FileType.Directory:
                waiting.append(info.path)
            elif split_suffix(name)[1]:
                num_files += 1
                yield "/".join([part for part in info.path.split("/") if part][depth:])


def _fitting_keys(paths: RowPaths, missing: Sequence[str], files: Sequence[str]) -> list[Keys]:
    """Returns the keys that bring most of the names to files: one for each set of files, the simplest ones."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_stem[split_suffix(file)[0].rpartition("/")[2]].append(file)
    found: dict[Keys, Found] = defaultdict(Found)
    for name in missing:
        spelt = paths.spelt(name)
        for variant in dict.fromkeys((spelt, urllib.parse.unquote(spelt))):
            for file in by_stem.get(split_suffix(variant)[0].rpartition("/")[2], ()):
                for keys, shared in _keys_between(variant, file):
                    found[keys].names.add(name)
                    found[keys].files.add(file)
                    found[keys].shared.add(shared)
    most = max((len(these.names) for these in found.values()), default=0)
    if 2 * most <= len(missing):
        return []
    best: dict[frozenset[str], Keys] = {}
    # The more folders a name and its file share, the less is cut off.
    for keys in sorted(found, key=lambda keys: (-max(found[keys].shared), keys.image_folder)):
        if len(found[keys].names) == most:
            best.setdefault(frozenset(found[keys].files), keys)
    return list(best.values())


def _keys_between(name: str, file: str) -> Iterator[tuple[Keys, int]]:
    """Yields keys with which a name becomes the path of a file, and how many folders the two share at their ends."""
    (stem, own), (path, suffix) = split_suffix(name), split_suffix(file)
    parts, folders = stem.split("/"), path.split("/")
    for shared in range(min(len(parts), len(folders))):
        if parts[len(parts) - 1 - shared :] != folders[len(folders) - 1 - shared :]:
            return
        prefix = "/".join([*parts[: len(parts) - 1 - shared], ""])
        prefix = "" if prefix in ("", "./") else prefix
        folder = "/".join(folders[: len(folders) - 1 - shared])
        yield Keys(prefix, folder, "" if suffix == own else suffix), shared


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
