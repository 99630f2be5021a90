"""Which file a row of a table names: the folder, suffix and spelling of its paths, and the places that it may name."""

import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from raysweep.errors import DataError
from raysweep.images.formats import IMAGE_SUFFIXES
from raysweep.storage.filesystems import (
    REMOTE_SCHEMES,
    absolute_source,
    join_source,
    list_names,
    object_uri,
    open_filesystem,
    parent_source,
    split_uri,
)

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

SAMPLE = 32  # rows of a table whose files are looked for in advance

# How programs and systems spell paths that name the same file. Each is tried where the path as it stands names no file.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "backslashes, read as slashes": lambda name: name.replace("\\", "/"),
    "percent escapes such as %20, which were decoded": urllib.parse.unquote,
    "accents that are composed, which the files' names have decomposed": lambda name: unicodedata.normalize(
        "NFD", name
    ),
    "accents that are decomposed, which the files' names have composed": lambda name: unicodedata.normalize(
        "NFC", name
    ),
}


def cell_name(cell: Any) -> str | None:
    """Returns the path or id in a table's cell as text, or None if it has none. A whole number is an id."""
    if isinstance(cell, dict):
        cell = cell.get("path")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return cell.strip() or None if isinstance(cell, str) else None


def split_suffix(name: str) -> tuple[str, str]:
    """Splits the suffix of an image off a name. In `patient.12`, which is an id, there is none."""
    stem, suffix = posixpath.splitext(name)
    return (stem, suffix) if suffix.lower() in IMAGE_SUFFIXES else (name, "")


@dataclass(frozen=True, slots=True)
class RowPaths:
    """How the rows of one table name their images.

    Attributes:
        table: Path or URI of the table.
        folder: Absolute path or URI of the folder that relative paths start from.
        suffixes: Suffixes that images have, in the order in which they are tried; none where the rows have them.
        prefix: Start of the rows' paths that is cut off.
        places: URIs and local folders that rows may name; a local table may name every local path too.
        spelling: Keys of `SPELLINGS` that all paths are read with.
        listed: Names of the files in folders that have been listed to find the suffixes of images.
    """

    table: str
    folder: str
    suffixes: tuple[str, ...]
    prefix: str
    places: tuple[str, ...]
    spelling: tuple[str, ...] = ()
    listed: dict[str, Set[str]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, table: str, data: "DataConfig") -> "RowPaths":
        """Returns how the experiment says that the rows of a table name their images.

        Raises:
            DataError: `data.image_folder` does not exist.
        """
        folder = parent_source(table)
        places = [_place_of(folder)]
        if data.image_folder:
            is_complete = "://" in data.image_folder or data.image_folder.startswith(("/", "~"))
            beside = folder
            folder = absolute_source(data.image_folder) if is_complete else normal_path(beside, data.image_folder)
            places.append(_place_of(folder))
            if "://" not in folder and not os.path.isdir(folder):
                raise DataError(
                    f"data.image_folder: {folder}: no such folder; accepted: a path relative to the table's folder, "
                    f"{beside}, an absolute path, or a URI"
                )
        places += map(absolute_source, data.allow_images_from)
        suffixes = tuple(suffix.strip() for suffix in data.image_suffix.split(",")) if data.image_suffix else ()
        return cls(table, folder, suffixes, data.image_prefix or "", tuple(dict.fromkeys(places)))

    def path_of(self, name: str) -> str:
        """Returns the absolute path or URI of the image that a row names.

        Raises:
            DataError: the row may not name it.
        """
        name = self.spelt(name).removeprefix(self.spelt(self.prefix))
        if not self.suffixes:
            return self._allowed(name)
        stem = split_suffix(name)[0]
        paths = [self._allowed(stem + suffix) for suffix in self.suffixes]
        # Where several are possible, the folder is listed once: in a bucket, every question takes a while.
        return next((path for path in paths[:-1] if self._is_listed(path)), paths[-1])

    def _allowed(self, name: str) -> str:
        """Returns the path or URI of a name that is complete, if the row may name it."""
        if name.startswith("file://"):
            name = absolute_source(name)
        if "://" in name:
            return self._remote(name)
        path = os.path.abspath(name) if posixpath.isabs(name) else normal_path(self.folder, name)
        if "://" in self.table and "://" not in path and not any(_lies_in(path, place) for place in self.places):
            raise DataError(
                f"names the local path {path}, which a table elsewhere may not; accepted: paths relative to the table, "
                "or a local folder that data.allow_images_from names"
            )
        return path

    def _is_listed(self, path: str) -> bool:
        folder = parent_source(path)
        if folder not in self.listed:
            self.listed[folder] = _files_in(folder)
        name = split_uri(path)[1] if "://" in path else path
        return name.rpartition("/")[2] in self.listed[folder]

    def spelt(self, name: str) -> str:
        """Returns a name of the table in the spelling that files have."""
        for key in self.spelling:
            name = SPELLINGS[key](name)
        return name

    def _remote(self, name: str) -> str:
        """Returns a URI of a row, with the options that the experiment gives for its bucket."""
        scheme, _, rest = name.partition("://")
        if scheme not in REMOTE_SCHEMES:
            raise DataError(f"names a '{scheme}://' address, which is not read; accepted: paths, s3://, gs://, hf://")
        split_uri(f"{name}?")  # raises if it has credentials
        if re.search(r"\?\w+=", rest):
            raise DataError(
                f"names {scheme}://{rest.partition('?')[0]} with options; only data.source may have options"
            )
        rest = rest.removeprefix("anonymous@")
        for place in self.places:
            if "://" in place:
                place_scheme, path, query = split_uri(place)
                if place_scheme == scheme and _lies_in(rest, path.removeprefix("anonymous@")):
                    return object_uri(scheme, path + rest[len(path.removeprefix("anonymous@")) :], query)
        other = _place_of(object_uri(scheme, rest, ""))
        raise DataError(
            f"names {other}, where data.source does not lie; to read images from there, set data.allow_images_from: "
            f"[{other}]"
        )

    def settle(self, names: Sequence[str]) -> tuple["RowPaths", list[str]]:
        """Returns these paths with the spelling under which files are found, and what a user should know about it."""
        paths, warnings = self, []
        for key, respell in SPELLINGS.items():
            spelt = [name for name in names if respell(name) != name]
            other = replace(paths, spelling=(*paths.spelling, key))
            looked_at = sample(spelt)
            # Slashes are the better guess where neither names a file: the folder may be missing too.
            guess = key.startswith("backslashes")
            if spelt and len(other.missing(looked_at)) < len(paths.missing(looked_at)) + guess:
                paths = other
                warnings.append(f"{len(spelt)} paths of images have {key}, such as {spelt[0]}")
        return paths, warnings

    def missing(self, names: Sequence[str]) -> list[str]:
        """Returns the names whose files do not exist."""
        paths: dict[str, str] = {}
        for name in names:
            try:
                paths[name] = self.path_of(name)
            except DataError:
                paths[name] = ""
        found = _existing([path for path in paths.values() if path])
        return [name for name in names if paths[name] not in found]


def sample(names: Sequence[str]) -> list[str]:
    """Returns a few of the names, from the whole table."""
    step = max(1, len(names) // SAMPLE)
    return list(names[::step])[:SAMPLE]


def normal_path(folder: str, name: str) -> str:
    """Returns the path or URI of `name` in `folder`; `..` may leave the folder, but not its bucket or repository.

    Raises:
        DataError: it would.
    """
    if "://" not in folder or not {".", ".."} & set(name.split("/")):
        return join_source(folder, name)
    scheme, path, query = split_uri(folder)
    path = posixpath.normpath(posixpath.join(path, name))
    if not _lies_in(path, split_uri(_place_of(folder))[1]):
        raise DataError(f"'{name}' leaves {_place_of(folder).partition('?')[0]}")
    return object_uri(scheme, path, query)


def _place_of(folder: str) -> str:
    """Returns the bucket or hub dataset of a URI, with its options. A local folder is its own place."""
    if "://" not in folder:
        return folder
    scheme, path, query = split_uri(folder)
    parts = path.split("/")
    num_parts = 1
    if scheme == "hf":  # anyone may propose a change to a dataset, which is the revision refs/pr/1
        num_parts = 5 if len(parts) > 2 and parts[2].endswith("@refs") else 3
    return object_uri(scheme, "/".join(parts[:num_parts]), query)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _existing(paths: Sequence[str]) -> set[str]:
    """Returns those of the paths and URIs that exist, as far as can be told."""
    with ThreadPoolExecutor(16) as pool:
        return {path for path, exists in zip(paths, pool.map(_exists, paths), strict=True) if exists}


def _exists(path: str) -> bool:
    if "://" not in path:
        return os.path.exists(path)
    try:
        filesystem, inner = open_filesystem(path)
        return bool(filesystem.get_file_info(inner).type != fs.FileType.NotFound)
    except (DataError, OSError, ValueError):  # among them no permission to list a bucket
        return False


def _files_in(folder: str) -> Set[str]:
    try:
        return {name for name, _ in list_names(folder)}
    except (OSError, ValueError):  # a row may name what is no folder; reading its image tells what is wrong
        return frozenset()
