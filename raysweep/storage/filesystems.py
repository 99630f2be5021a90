"""Opens file systems by URI: local folders, `s3://`, `gs://` and `hf://`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from raysweep.errors import DataError

if TYPE_CHECKING:
    from pyarrow import fs

BUCKETS = ("s3", "gs")
REMOTE_SCHEMES = (*BUCKETS, "hf")


def split_uri(uri: str) -> tuple[str, str, str]:
    """Splits `s3://bucket/key?region=x` into `("s3", "bucket/key", "?region=x")`. A `?` inside a key stays in the key.

    A `?` at the end means that there are no options, so that a key such as `a?region=x` can be written, as `a?region=x?`
    (see `object_uri`).

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
