"""Where files are kept: in folders, or in buckets (`s3://`, `gs://`) of which every node has a copy of what it uses.

All code works on local paths. A path under `scratch()` is the copy of an object: `publish` uploads it once it is whole,
`fetch` brings what another node has written, and `location` names it in words that mean the same on every node. For any
other path they do next to nothing, since its folder is the thing itself.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.errors import RaysweepError
from raysweep.storage.filesystems import BUCKETS, open_filesystem

if TYPE_CHECKING:
    from pyarrow import fs

SCRATCH = "RAYSWEEP_SCRATCH"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job server
TRANSFERS = 8  # files at a time


def scratch() -> Path:
    """The folder of this node's copies; `RAYSWEEP_SCRATCH` moves it."""
    # Resolved, as paths of results and caches are: a link would hide that a path lies in here.
    return Path(os.environ.get(SCRATCH) or "~/.cache/raysweep").expanduser().resolve()


def in_a_job() -> bool:
    """Whether this is the driver of a submitted job: its working directory is a copy that Ray removes."""
    return JOB in os.environ


def on_every_node(path: str) -> str:
    """What worker processes call a file: in a job's working directory, of which every node has a copy, relative."""
    return path.removeprefix(f"{Path.cwd()}/") if in_a_job() else path


def is_bucket(location: str) -> bool:
    """Whether a location is a URI of a bucket."""
    return location.partition("://")[0] in BUCKETS and "://" in location


def local_path(location: str) -> Path:
    """Where a location lies on this node: for a bucket's URI where its copy does, if it has been fetched."""
    if not is_bucket(location):
        return Path(location).expanduser()
    scheme, _, path = location.partition("://")
    return scratch() / scheme / posixpath.normpath(path)


def location(path: Path) -> str:
    """The inverse of `local_path`: what a path is called on every node."""
    if not path.is_absolute() or not path.is_relative_to(scratch()):
        return str(path)
    scheme, *parts = path.relative_to(scratch()).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if scheme in BUCKETS and parts else str(path)


def _remote(path: Path) -> tuple[fs.FileSystem, str] | None:
    """File system and path within it of what a path is a copy of; None where it is no copy."""
    uri = location(path)
    return open_filesystem(uri) if is_bucket(uri) else None


def publish(path: Path) -> None:
    """Uploads a file that is whole, or a folder, of which what the bucket has beside it is removed.

    Raises:
        RaysweepError: the bucket cannot be written to.
    """
    remote = _remote(path)
    if remote is None:
        return
    with _reaching(path):
        if path.is_dir():
            files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: _upload(path / name), sorted(files)))
            for name in set(_listed(path)) - files:
                remote[0].delete_file(f"{remote[1]}/{name}")
        else:
            _upload(path)


def upload(files: Mapping[str, Path]) -> None:
    """Copies files of this machine into a bucket, each to its URI; those that are there in their size already stay.

    Raises:
        RaysweepError: the bucket cannot be written to.
    """
    from pyarrow import fs

    def copy(uri: str) -> None:
        filesystem, inner = open_filesystem(uri)
        try:
            if filesystem.get_file_info(inner).size != files[uri].stat().st_size:
                local = fs.LocalFileSystem()
                fs.copy_files(str(files[uri]), inner, source_filesystem=local, destination_filesystem=filesystem)
        except OSError as error:
            raise RaysweepError(f"{uri}: cannot be written to ({' '.join(str(error).split())[:300]})") from error

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(copy, files))


def _upload(path: Path) -> None:
    from pyarrow import fs

    remote = _remote(path)
    assert remote is not None
    filesystem, inner = remote
    # An object appears when it is whole: there is no need of another name meanwhile.
    fs.copy_files(str(path), inner, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    _stamp(path, filesystem.get_file_info(inner))


def _stamp(path: Path, info: fs.FileInfo) -> None:
    """Gives a copy the time of its object, by which it is known to be the same."""
    os.utime(path, ns=(info.mtime_ns, info.mtime_ns))


def fetch(path: Path) -> Path:
    """Brings this node's copy of a file up to date, where there is such an object; returns the path.

    Raises:
        RaysweepError: the bucket cannot be read.
    """
    remote = _remote(path)
    if remote is not None:
        with _reaching(path):
            info = remote[0].get_file_info(remote[1])
            if info.is_file:
                _download(path, info)
            else:
                path.unlink(missing_ok=True)
    return path


def fetch_folder(folder: Path, wanted: Callable[[str], bool] = lambda _name: True) -> list[str]:
    """Makes this node's copy of a folder what the bucket has, in as far as files are wanted.

    Args:
        folder: of any depth.
        wanted: whether a file, by its path relative to the folder, is to be fetched, and removed where there is none.

    Returns:
        Relative paths of the wanted files there are.

    Raises:
        RaysweepError: the bucket cannot be read.
    """
    if _remote(folder) is None:
        return sorted(name for name in _files_in(folder) if wanted(name))
    with _reaching(folder):
        found = {name: info for name, info in _listed(folder).items() if wanted(name)}
        for name in _files_in(folder):
            if wanted(name) and name not in found and not Path(name).name.startswith("."):
                (folder / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: _download(folder / name, found[name]), sorted(found)))
    return sorted(found)


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _listed(folder: Path) -> dict[str, fs.FileInfo]:
    """Objects under a folder's prefix, by relative path."""
    from pyarrow import fs

    remote = _remote(folder)
    assert remote is not None
    filesystem, inner = remote
    infos = filesystem.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    return {posixpath.relpath(info.path, inner): info for info in infos if info.is_file}


def _download(path: Path, info: fs.FileInfo) -> None:
    from pyarrow import fs

    with suppress(FileNotFoundError):
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (info.size, info.mtime_ns):
            return
    remote = _remote(path)
    assert remote is not None
    with replacing(path) as temporary:
        fs.copy_files(
            remote[1], str(temporary), source_filesystem=remote[0], destination_filesystem=fs.LocalFileSystem()
        )
        _stamp(temporary, info)


def exists(path: Path) -> bool:
    """Whether there is such a file, or such an object, whatever this node has a copy of.

    Raises:
        RaysweepError: the bucket cannot be read.
    """
    remote = _remote(path)
    if remote is None:
        return path.exists()
    with _reaching(path):
        return bool(remote[0].get_file_info(remote[1]).is_file)


def remove(path: Path) -> None:
    """Removes a file or a folder, and what it is a copy of; nothing where there is none.

    Raises:
        RaysweepError: the bucket cannot be written to.
    """
    _unpublish(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unpublish(path: Path) -> None:
    """Removes what a file or folder is a copy of, and leaves the copy."""
    remote = _remote(path)
    if remote is None:
        return
    filesystem, inner = remote
    with _reaching(path):
        is_file = filesystem.get_file_info(inner).is_file
        for object_path in [inner] if is_file else [f"{inner}/{name}" for name in _listed(path)]:
            with suppress(FileNotFoundError):  # another node removes it too
                filesystem.delete_file(object_path)


def written(folder: Path) -> dict[str, int]:
    """When each object under a folder of a bucket was written, in ns by the bucket's clock, by its relative path.

    Raises:
        RaysweepError: the bucket cannot be read.
    """
    with _reaching(folder):
        return {name: info.mtime_ns for name, info in _listed(folder).items()}


def forget(folder: Path) -> None:
    """Removes this node's copy of a folder, where it is one: whatever needs it again fetches it."""
    if _remote(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reaching(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # all that Arrow's file systems raise
        reason = " ".join(str(error).split())[:300]
        raise RaysweepError(f"{location(path)}: the storage cannot be used ({reason})") from error


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yields a temporary file beside `path` that takes its place when all went well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
