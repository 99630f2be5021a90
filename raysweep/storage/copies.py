"""Storage in folders or buckets (`s3://`, `gs://`). For a bucket, each node has local copies of the objects it uses.

All code works on local paths. A path under `scratch()` is the copy of an object: `publish` uploads it when it is
complete, `fetch` downloads what another node has written, and `location` returns its URI, which is valid on every node.
For any other path these functions do almost nothing, because there is no copy.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.errors import RaysweepError, ResourceError, one_line
from raysweep.storage.filesystems import BUCKETS, open_filesystem

if TYPE_CHECKING:
    from pyarrow import fs

SCRATCH_VARIABLE = "RAYSWEEP_SCRATCH"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job server
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_TRANSFERS = 8  # files at a time


def scratch() -> Path:
    """Returns the folder of this node's copies: `RAYSWEEP_SCRATCH`, or `~/.cache/raysweep`."""
    # Resolved like the paths of results and caches, so that a symbolic link does not break `is_relative_to`.
    return Path(os.environ.get(SCRATCH_VARIABLE) or "~/.cache/raysweep").expanduser().resolve()


def in_a_job() -> bool:
    """Returns whether this is the driver of a submitted job. Its working directory is a copy that Ray deletes."""
    return JOB_VARIABLE in os.environ


def on_every_node(path: str) -> str:
    """Returns a path that is valid on every node: relative inside a job's working directory, which each node has."""
    return path.removeprefix(f"{Path.cwd()}/") if in_a_job() else path


def is_bucket(location: str) -> bool:
    """Returns whether a location is the URI of a bucket."""
    return location.partition("://")[0] in BUCKETS and "://" in location


def local_path(location: str) -> Path:
    """Returns the local path of a location. For the URI of a bucket it is the path of the copy, fetched or not.

    Raises:
        RaysweepError: The copy of the URI would lie elsewhere than under `scratch()`.
    """
    if not is_bucket(location):
        return Path(location).expanduser()
    scheme, _, path = location.partition("://")
    _check_key(path.rstrip("/"), location)
    return scratch() / scheme / path.rstrip("/")


def _check_key(key: str, uri: str) -> None:
    """Refuses the key of an object that would not become one file below the folder of its copies.

    Who writes to a bucket names its objects: `prefix/../../.bashrc` must not become a file of that name here.
    """
    if not key or {"", ".", ".."} & set(key.split("/")) or "\\" in key or "\0" in key:
        raise RaysweepError(
            f"{uri!r}: this name cannot become the path of a local copy; accepted: parts of a path separated by "
            "single slashes, none of them empty, '.' or '..'"
        )


def location(path: Path) -> str:
    """Returns the location of a path, valid on every node. This is the inverse of `local_path`."""
    if not path.is_absolute() or not path.is_relative_to(scratch()):
        return str(path)
    scheme, *parts = path.relative_to(scratch()).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if scheme in BUCKETS and parts else str(path)


def _remote(path: Path) -> tuple[fs.FileSystem, str] | None:
    """Returns the file system and path of the object that a path is a copy of, or None if it is no copy."""
    uri = location(path)
    # "?" ends the URI, so that what follows a "?" in the name of an object is not read as options of the connection.
    return open_filesystem(f"{uri}?") if is_bucket(uri) else None


def publish(path: Path) -> None:
    """Uploads a complete file, or a folder. For a folder, all other objects under its prefix are deleted.

    Raises:
        RaysweepError: The bucket cannot be written to.
    """
    remote = _remote(path)
    if remote is None:
        return
    with _storage_errors(path):
        if path.is_dir():
            files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
            with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
                list(pool.map(lambda name: _upload(path / name), sorted(files)))
            for name in set(_list_objects(path)) - files:
                remote[0].delete_file(f"{remote[1]}/{name}")
        else:
            _upload(path)


def upload(files: Mapping[str, Path]) -> None:
    """Uploads local files, each to its URI. Skips files whose object exists with the same size.

    Raises:
        RaysweepError: The bucket cannot be written to.
    """
    from pyarrow import fs

    def copy(uri: str) -> None:
        filesystem, inner = open_filesystem(f"{uri}?")
        try:
            if filesystem.get_file_info(inner).size != files[uri].stat().st_size:
                local = fs.LocalFileSystem()
                fs.copy_files(str(files[uri]), inner, source_filesystem=local, destination_filesystem=filesystem)
        except OSError as error:
            raise RaysweepError(f"{uri}: cannot be written to ({one_line(error, 300)})") from error

    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        list(pool.map(copy, files))


def _upload(path: Path) -> None:
    from pyarrow import fs

    remote = _remote(path)
    assert remote is not None
    filesystem, inner = remote
    # An object becomes visible only when it is complete, so no temporary name is needed.
    fs.copy_files(str(path), inner, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    _set_object_time(path, filesystem.get_file_info(inner))


def _set_object_time(path: Path, info: fs.FileInfo) -> None:
    """Sets a copy's modification time to that of its object. `_download` compares the two."""
    os.utime(path, ns=(info.mtime_ns, info.mtime_ns))


def fetch(path: Path) -> Path:
    """Downloads an object if this node's copy is missing or old. Deletes the copy if there is no object.

    Returns:
        The path.

    Raises:
        RaysweepError: The bucket cannot be read.
    """
    remote = _remote(path)
    if remote is not None:
        with _storage_errors(path):
            info = remote[0].get_file_info(remote[1])
            if info.is_file:
                _download(path, info)
            else:
                path.unlink(missing_ok=True)
    return path


def fetch_folder(folder: Path, wanted: Callable[[str], bool] = lambda _name: True) -> list[str]:
    """Updates this node's copy of a folder and its subfolders: downloads new objects, deletes copies without an object.

    Args:
        folder: The local path of the folder.
        wanted: Called with each file's path relative to the folder. Files for which it returns False are left alone.

    Returns:
        Relative paths of the wanted files that exist.

    Raises:
        RaysweepError: The bucket cannot be read.
    """
    if _remote(folder) is None:
        return sorted(name for name in _files_in(folder) if wanted(name))
    with _storage_errors(folder):
        found = {name: info for name, info in _list_objects(folder).items() if wanted(name)}
        for name in _files_in(folder):
            if wanted(name) and name not in found and not Path(name).name.startswith("."):
                (folder / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
            list(pool.map(lambda name: _download(folder / name, found[name]), sorted(found)))
    return sorted(found)


def list_files(folder: Path) -> list[str]:
    """Returns relative paths of the files in a folder and its subfolders. For a copy, the bucket is asked.

    Raises:
        RaysweepError: The bucket cannot be read.
    """
    if _remote(folder) is None:
        return sorted(_files_in(folder))
    with _storage_errors(folder):
        return sorted(_list_objects(folder))


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _list_objects(folder: Path) -> dict[str, fs.FileInfo]:
    """Returns the objects under a folder's prefix, by relative path."""
    from pyarrow import fs

    remote = _remote(folder)
    assert remote is not None
    filesystem, inner = remote
    infos = filesystem.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    objects = {info.path.removeprefix(f"{inner}/"): info for info in infos if info.is_file}
    for name in objects:
        _check_key(name, f"{location(folder)}/{name}")
    return objects


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
        _set_object_time(temporary, info)


def exists(path: Path) -> bool:
    """Returns whether a file exists. For a copy, the bucket is asked, not the local disk.

    Raises:
        RaysweepError: The bucket cannot be read.
    """
    remote = _remote(path)
    if remote is None:
        return path.exists()
    with _storage_errors(path):
        return bool(remote[0].get_file_info(remote[1]).is_file)


def remove(path: Path) -> None:
    """Deletes a file or a folder if it exists. For a copy, the objects are deleted too.

    Raises:
        RaysweepError: The bucket cannot be written to.
    """
    _delete_objects(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _delete_objects(path: Path) -> None:
    """Deletes the objects that a file or folder is a copy of, and keeps the copy."""
    remote = _remote(path)
    if remote is None:
        return
    filesystem, inner = remote
    with _storage_errors(path):
        is_file = filesystem.get_file_info(inner).is_file
        for object_path in [inner] if is_file else [f"{inner}/{name}" for name in _list_objects(path)]:
            with suppress(FileNotFoundError):  # another node has deleted it
                filesystem.delete_file(object_path)


def written(folder: Path) -> dict[str, int]:
    """Returns when each object under a folder's prefix was written (ns, the bucket's clock), by relative path.

    Raises:
        RaysweepError: The bucket cannot be read.
    """
    with _storage_errors(folder):
        return {name: info.mtime_ns for name, info in _list_objects(folder).items()}


def forget(folder: Path) -> None:
    """Deletes this node's copy of a folder, and keeps the objects. A folder that is no copy is kept."""
    if _remote(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the only errors that Arrow's file systems raise
        reason = one_line(error, 300)
        raise RaysweepError(f"{location(path)}: the storage cannot be used ({reason})") from error


TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # the names that `replacing` gives


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new, empty file beside `path`. It replaces `path` at the end, or is deleted after an error.

    The user's umask says who may read it, as for any other file.

    Raises:
        ResourceError: The disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # some libraries write files that only their owner can read
        os.replace(temporary, path)
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"{path}: it cannot be written: {describe_space(path.parent)}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what processes that were killed within `replacing` have left in a folder and its subfolders."""
    for path in folder.rglob(".*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or the permitted size of a file is exhausted."""
    # safetensors raises errors of its own, whose text has the number.
    return any(getattr(error, "errno", None) == number or f"(os error {number})" in str(error) for number in DISK_FULL)


def describe_space(folder: Path) -> str:
    """Returns what is free on the disk of a folder, and what helps, for error messages."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    return (
        f"the disk of {existing} is full, or a quota is ({usage.free / 1e9:,.3f} of {usage.total / 1e9:,.3f} GB are "
        "free); free some space, or set storage to another disk; the same command goes on from here"
    )
