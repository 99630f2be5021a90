"""The files of a folder or bucket: which may be data, which other programs left there, and which are empty folders."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pyarrow import fs

from raysweep.images.formats import IMAGE_SUFFIXES
from raysweep.images.splits import count_of
from raysweep.images.texts import Texts
from raysweep.storage.filesystems import is_folder, open_filesystem

# Files and folders of operating systems, of network storage (Synology, QNAP) and of notebooks, in lower case.
_JUNK = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found", "__macosx"),
    *("system volume information", "$recycle.bin", "network trash folder"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__pycache__"),
    *(".ds_store", ".appledouble", ".thumbnails", ".@__thumb", ".ipynb_checkpoints", ".spotlight-v100", ".fseventsd"),
}
KINDS_SHOWN = 8
_JUNK_STARTS = ("synophoto_", "synofile_", "synoindex_", "._", ".trash", "~$")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """What lies in a folder, as sorted relative paths.

    Attributes:
        files: Files that may be data.
        folders: Folders that may contain data.
        ignored: Hidden images, and every file that is known to be of another program.
    """

    files: Texts
    folders: list[str]
    ignored: Texts

    def describe_ignored(self) -> list[str]:
        """Returns a warning that counts the ignored files, if there are any."""
        if not self.ignored:
            return []
        kinds = Counter(_junk_part(path) or "hidden image" for path in self.ignored)
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        return [f"{count_of(self.ignored, 'hidden or system file')} ignored: {counted}"]


def list_folder(source: str) -> FolderFiles:
    """Lists a local folder (absolute path) or a prefix of a bucket (URI), with all folders in it."""
    found = FolderFiles(Texts(), [], Texts())
    for path, is_a_folder in _walk(source, enter_ignored=True) if "://" not in source else _remote_entries(source):
        junk = _junk_part(path)
        if junk is None and not _is_hidden(path):
            (found.folders if is_a_folder else found.files).append(path)
        elif not is_a_folder and (junk or path.lower().endswith(IMAGE_SUFFIXES)):
            found.ignored.append(path)
    for paths in (found.files, found.folders, found.ignored):
        paths.sort()
    return found


def local_files(folder: str) -> list[str]:
    """Returns relative paths of the files in a folder, without hidden ones and files of other programs.

    Links are followed, but not in circles.
    """
    return [path for path, is_folder in _walk(folder, enter_ignored=False) if not is_folder and not _is_ignored(path)]


def kinds_of(files: Collection[str]) -> str:
    """Returns the suffixes of files and how many files have each, the most common first: `"30 .txt, 8 .xml"`."""
    bare = sum(not os.path.splitext(file)[1] for file in files)

    def kind(file: str) -> str:
        name = file.rpartition("/")[2]
        return os.path.splitext(name)[1].lower() or (name if bare <= KINDS_SHOWN else "without suffix")

    counts = Counter(map(kind, files)).most_common()
    others = sum(number for _, number in counts[KINDS_SHOWN:])
    shown = [f"{number} {kind}" for kind, number in counts[:KINDS_SHOWN]]
    return ", ".join([*shown, *([f"{others} others"] if others else [])])


def _walk(folder: str, enter_ignored: bool) -> Iterator[tuple[str, bool]]:
    """Yields the relative path of each file and folder, and whether it is a folder."""

    def walk(path: str, above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
        real = os.path.realpath(path)
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_folder(entry):
                    # A broken link is listed, and becomes a bad row. A pipe or socket is not: reading it would block.
                    if not os.path.exists(entry.path) or entry.is_file():
                        yield entry.path, False
                elif _is_ignored(entry.name):
                    yield from _files_within(entry.path) if enter_ignored else ()
                elif os.path.realpath(entry.path) not in (*above, real):
                    yield entry.path, True
                    yield from walk(entry.path, (*above, real))

    start = len(os.path.join(folder, ""))
    for path, is_a_folder in walk(folder, ()):
        yield path[start:].replace(os.sep, "/"), is_a_folder


def _files_within(folder: str) -> Iterator[tuple[str, bool]]:
    """Yields the files in an ignored folder, to count them. Such folders (lost+found) often cannot be read."""
    for path, _, names in os.walk(folder):
        for name in names:
            yield os.path.join(path, name), False


def _remote_entries(source: str) -> Iterator[tuple[str, bool]]:
    filesystem, base = open_filesystem(source)
    # Paths are cut by depth, because only some file systems repeat a leading slash.
    depth = len(base.strip("/").split("/"))
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive=True)):
        names = info.path.strip("/").split("/")[depth:]
        if names and info.type in (fs.FileType.File, fs.FileType.Directory):
            yield "/".join(names), info.type == fs.FileType.Directory


def _is_ignored(path: str) -> bool:
    return _junk_part(path) is not None or _is_hidden(path)


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _junk_part(path: str) -> str | None:
    """Returns the outermost file or folder in a path that is known to be of another program, under one name a kind."""
    for name in path.split("/"):
        lower = name.lower()
        if lower in _JUNK:
            return name.strip()
        if lower.startswith(_JUNK_STARTS):
            return next(f"{name[: len(start)]}*" for start in _JUNK_STARTS if lower.startswith(start))
    return None
