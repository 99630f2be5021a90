from contextlib import contextmanager
from functools import partial

import pytest
from pyarrow import fs

from raysweep.cluster.session import ray_session
from raysweep.images import passes
from raysweep.storage import filesystems


@pytest.fixture(scope="session")
def ray_with_a_gpu():
    """Starts Ray with a GPU in its books, so that the way through GPU actors is taken on any machine."""

    @contextmanager
    def start(**constants_of_passes):
        import ray

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "init", partial(ray.init, num_gpus=1))
            for name, value in constants_of_passes.items():
                patch.setattr(passes, name, value)
            with ray_session(verbose=False):
                yield

    return start


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
