import pytest
from pyarrow import fs

from raysweep.storage import filesystems


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub made of a local folder, behind the fsspec interface that huggingface_hub has."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    def build():
        return DirFileSystem(str(tmp_path / "hub"), LocalFileSystem())

    monkeypatch.setattr("huggingface_hub.HfFileSystem", build)
    filesystems._connect.cache_clear()
    yield tmp_path / "hub"
    filesystems._connect.cache_clear()


@pytest.fixture
def buckets(tmp_path, monkeypatch):
    """A folder whose folders are the buckets of s3:// and gs://."""
    (tmp_path / "buckets").mkdir()
    connect, local = filesystems._connect, fs.SubTreeFileSystem(str(tmp_path / "buckets"), fs.LocalFileSystem())

    def to_folder(scheme, bucket, query):
        return local if scheme in filesystems.BUCKETS else connect(scheme, bucket, query)

    monkeypatch.setattr(filesystems, "_connect", to_folder)
    return tmp_path / "buckets"
