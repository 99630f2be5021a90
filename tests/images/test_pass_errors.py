"""What a pass says when its processes are killed, run out of memory or find the disk full; and that retries end."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from raysweep.cluster.session import ray_session
from raysweep.errors import DataError, EncoderError, ResourceError
from raysweep.images.blocks import MAX_RETRIES, map_blocks
from raysweep.images.pass_errors import raising_own_errors


@pytest.fixture(scope="module")
def ray_started():
    with ray_session(verbose=False):
        yield


def dies(block, folder, times):
    """Kills its own process the first so many times."""
    number = len(list(Path(folder).iterdir()))
    if number < times:
        (Path(folder) / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return block


class Dies:
    def __init__(self, folder, times):
        self.job = (folder, times)

    def __call__(self, block):
        return dies(block, *self.job)


def run(folder, times, in_actor):
    import ray.data

    blocks = ray.data.from_items([{"start": 0}])
    if in_actor:
        options = {"compute": ray.data.ActorPoolStrategy(size=1), "fn_constructor_args": (str(folder), times)}
        dataset = map_blocks(blocks, Dies, **options)
    else:
        dataset = map_blocks(blocks, partial(dies, folder=str(folder), times=times))
    with raising_own_errors():
        return dataset.to_arrow_refs() and dataset.count()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("in_actor", [False, True])
def test_a_process_that_is_killed_is_started_again_and_not_without_end(ray_started, tmp_path, in_actor):
    (tmp_path / "some").mkdir()
    assert run(tmp_path / "some", 1, in_actor) == 1
    assert len(list((tmp_path / "some").iterdir())) == 1
    (tmp_path / "always").mkdir()
    with pytest.raises(ResourceError, match=f"was ended from outside, or crashed, in each of {1 + MAX_RETRIES} tries"):
        run(tmp_path / "always", 100, in_actor)
    # Ray counts a try too when an actor has not started again yet.
    assert 2 <= len(list((tmp_path / "always").iterdir())) <= 1 + MAX_RETRIES


def raises(_block, error):
    raise error


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (MemoryError("Unable to allocate 3 GiB"), ResourceError, "ran out of memory .Unable to allocate 3 GiB.; free"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "ran out of memory .CUDA out of memory.; free"),
        (OSError(30, "Read-only file system", "/x"), ResourceError, "the pass over the images: Read-only file system$"),
        (ResourceError("/x: the disk is full"), ResourceError, "^/x: the disk is full$"),
        (EncoderError("NaN"), EncoderError, "^NaN$"),
        (DataError("bad"), DataError, "^bad$"),
    ],
)
def test_what_a_task_lacks_is_told_without_tracebacks(ray_started, error, kind, told):
    import ray.data

    dataset = map_blocks(ray.data.from_items([{"start": 0}]), partial(raises, error=error))
    with pytest.raises(kind, match=told) as found, raising_own_errors():
        dataset.materialize()
    assert "Traceback" not in str(found.value)


@pytest.mark.ray
def test_programming_errors_stay_what_they_are(ray_started):
    import ray.data

    dataset = map_blocks(ray.data.from_items([{"start": 0}]), partial(raises, error=ZeroDivisionError("x")))
    with pytest.raises(ZeroDivisionError), raising_own_errors():
        dataset.materialize()
