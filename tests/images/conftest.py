import pytest

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
