import os

import pytest

from raysweep.errors import DataError
from raysweep.storage import copies, filesystems
from raysweep.storage.filesystems import (
    absolute_source,
    join_source,
    list_names,
    object_uri,
    open_filesystem,
    parent_source,
    split_uri,
)


@pytest.fixture
def asked(monkeypatch):
    """The connections that are opened: scheme, bucket and options."""
    connections = []
    monkeypatch.setattr(filesystems, "_connect", lambda *parts: connections.append(parts))
    return connections


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/key?region=x", ("s3", "bucket/key", "?region=x")),
        ("s3://bucket/what?.png", ("s3", "bucket/what?.png", "")),
        ("s3://bucket/a?b=c.png?", ("s3", "bucket/a?b=c.png", "")),
        ("s3://bucket/a?b=c?region=x", ("s3", "bucket/a?b=c", "?region=x")),
        ("s3://bucket", ("s3", "bucket", "")),
    ],
)
def test_a_uri_is_split(uri, parts):
    assert split_uri(uri) == parts


@pytest.mark.parametrize("path", ["b/x.png", "b/a?endpoint_override=h", "b/a?", "b/a??", "b/?a=b?c=d", "b/a b%20#1"])
@pytest.mark.parametrize("query", ["", "?region=x", "?region=x&scheme=http"])
def test_a_key_is_written_so_that_it_is_read_back(path, query):
    assert split_uri(object_uri("s3", path, query)) == ("s3", path, query)


@pytest.mark.parametrize("uri", ["s3://b/../other/x", "gs://b/a/./x", "hf://datasets/a/b/../../c/d/x", "s3://.."])
def test_dots_between_slashes_never_reach_a_server(asked, uri):
    with pytest.raises(DataError, match=r"has no '\.' and no '\.\.'"):
        open_filesystem(uri)
    assert asked == []
    assert open_filesystem("../here")[1] == "../here"


def test_an_object_of_the_storage_cannot_choose_who_gets_the_credentials(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path))
    name = "x?endpoint_override=127.0.0.1:9"
    copy = copies.local_path("s3://bucket/model") / name
    assert copies._remote(copy)[1] == f"bucket/model/{name}"
    assert asked == [("s3", "bucket", "")]


def test_paths_of_sources():
    base = "s3://bucket/folder?endpoint_override=localhost:9000"
    assert join_source(base, "b.png") == "s3://bucket/folder/b.png?endpoint_override=localhost:9000"
    assert parent_source("s3://bucket/folder/x.csv?region=y") == "s3://bucket/folder?region=y"
    assert join_source("/data", "../b.png") == "/b.png"
    assert absolute_source("file:///a%20b/c") == absolute_source("file://localhost/a%20b/c") == "/a b/c"
    assert absolute_source("~/x") == os.path.expanduser("~/x")
    assert absolute_source("s3://bucket/folder/") == "s3://bucket/folder"


@pytest.mark.parametrize("name", ["gs://other/x.png", "/etc/x", "x?endpoint_override=h&scheme=http", "?a=b", "a//b"])
def test_a_name_listed_in_a_bucket_stays_in_it(name):
    for query in ("", "?region=y"):
        scheme, path, options = split_uri(join_source(f"s3://bucket/folder{query}", name))
        assert (scheme, path, options) == ("s3", f"bucket/folder/{name}", query)


@pytest.mark.parametrize("source", ["file://host/x", "file://[/x", "file://a@b/x"])
def test_files_of_another_machine_are_not_read(source):
    with pytest.raises(DataError, match="names another machine"):
        absolute_source(source)


def test_a_folder_is_listed_whatever_lies_in_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "gone").symlink_to("nowhere")
    usual = [("folder", True), ("gone", False), ("itself", False), ("link", True)]
    assert list_names(str(tmp_path)) == usual
    try:
        open(os.path.join(os.fsencode(tmp_path), b"\xff.png"), "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list_names(str(tmp_path)) == usual
    assert list_names(str(tmp_path / "nothing")) == []
