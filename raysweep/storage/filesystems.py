"""Paths and URIs of sources, and the file systems that they are on: local folders, `s3://`, `gs://` and `hf://`."""

from __future__ import annotations

import os
import posixpath
import re
import urllib.parse
from functools import lru_cache
from typing import TYPE_CHECKING

from raysweep.errors import DataError

if TYPE_CHECKING:
    from pyarrow import fs

BUCKETS = ("s3", "gs")
REMOTE_SCHEMES = (*BUCKETS, "hf")


def split_uri(uri: str) -> tuple[str, str, str]:
    """Splits `s3://bucket/key?region=x` into `("s3", "bucket/key", "?region=x")`. A `?` inside a key stays in the key.

    A `?` at the end means that there are no options. So the key `a?region=x` is written `a?region=x?`.

    Raises:
        DataError: The URI contains credentials.
    """
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    # Credentials would be copied into caches, logs and MLflow with every path. In Arrow, "anonymous@" means none.
    if at and user != "anonymous":
        raise DataError(f"{scheme}://...@...: credentials belong into the environment, not into the URI")
    match = re.search(r"\?(\w+=[^?]*)?$", rest)
    return (scheme, rest[: match.start()], match.group().rstrip("?")) if match else (scheme, rest, "")


def object_uri(scheme: str, path: str, query: str) -> str:
    """Returns the URI that `split_uri` splits into these parts, whatever characters the path contains.

    Names of objects and rows of tables are written by other people. What follows a `?` in them must never be read as
    options, because `?endpoint_override=` says which machine gets the credentials.
    """
    return f"{scheme}://{path}{query or '?' * ('?' in path)}"


def absolute_source(source: str) -> str:
    """Returns a local source as an absolute path, and a remote one without a slash at its end.

    Raises:
        DataError: the URI contains credentials, or names another machine's files.
    """
    if source.startswith("file://"):
        host, _, path = re.split(r"[?#]", source.removeprefix("file://"), maxsplit=1)[0].partition("/")
        if host not in ("", "localhost"):
            raise DataError(f"file://{host}/...: names another machine; accepted: file:///path")
        source = f"/{urllib.parse.unquote(path)}"
    if "://" in source:
        scheme, path, query = split_uri(source)
        return object_uri(scheme, path.rstrip("/"), query)
    return os.path.abspath(os.path.expanduser(source))


def join_source(folder: str, name: str) -> str:
    """Returns the absolute path or URI of a file in `folder`, given by its relative path.

    In a bucket the name stays as it is, whatever characters it has: it can name no other bucket and no options.
    """
    if "://" not in folder:
        return os.path.abspath(os.path.join(folder, name))
    scheme, path, query = split_uri(folder)
    return object_uri(scheme, f"{path}/{name}", query)


def parent_source(source: str) -> str:
    """Returns the folder that contains a path or URI."""
    if "://" not in source:
        return os.path.dirname(source)
    scheme, path, query = split_uri(source)
    return object_uri(scheme, posixpath.dirname(path), query)


def list_names(folder: str) -> list[tuple[str, bool]]:
    """Returns the name of each entry of a folder, and whether it is a folder, in order; nothing if there is no folder.

    Local names that are not UTF-8 are left out: no table can have them, and Arrow would stop at the first.

    Raises:
        DataError, OSError, ValueError: the folder cannot be listed.
    """
    if "://" in folder:
        from pyarrow import fs

        filesystem, inner = open_filesystem(folder)
        infos = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        named = ((str(info.path).rstrip("/").rpartition("/")[2], info.type == fs.FileType.Directory) for info in infos)
        return sorted(named)
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, is_folder(entry)) for entry in entries if _is_utf8(entry.name))
    except FileNotFoundError:
        return []


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder, or a link to one; a link to itself is none."""
    # `entry.is_dir()` raises an error for a link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_utf8(name: str) -> bool:
    # Python stands a surrogate for each byte that it cannot decode.
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Opens the file system of a path or URI.

    Returns:
        The file system, and the path within it.

    Raises:
        DataError: The scheme is unknown, or the URI contains credentials or `..`.
    """
    scheme, path, query = split_uri(uri) if "://" in uri else ("", uri, "")
    if scheme not in ("", *REMOTE_SCHEMES):
        raise DataError(
            f"{uri}: '{scheme}://' is not read; accepted: a local path, file://, s3://, gs://, hf://datasets/..., "
            "sklearn://digits"
        )
    if scheme == "hf" and not re.match(r"datasets/[^/]+/[^/]+", path):
        raise DataError(f"{uri}: a dataset on the Hugging Face hub is written hf://datasets/<organisation>/<name>")
    # Such parts may be taken out on the way to the server, so that the request names another object or bucket.
    if scheme and {".", ".."} & set(path.split("/")):
        raise DataError(f"{scheme}://{path}: a URI has no '.' and no '..' between its slashes")
    bucket = path.partition("/")[0]
    return _connect(scheme, bucket if scheme in BUCKETS else "", query), path.removeprefix("anonymous@")


@lru_cache(maxsize=16)
def _connect(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    from pyarrow import fs

    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
    if scheme == "gs" and "retry_limit_seconds" not in query:
        # Without this limit, a machine without network or credentials waits for 15 minutes.
        query = f"{query}&retry_limit_seconds=30" if query else "?retry_limit_seconds=30"
    # Arrow's URI parser gets the bucket only, because it refuses or decodes spaces and % in a key.
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")[0] if scheme else fs.LocalFileSystem()
