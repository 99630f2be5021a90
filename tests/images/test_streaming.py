"""Pixels that every epoch decodes anew: what comes, in which order, and how far ahead."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysweep.cluster.session import ray_session
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError
from raysweep.images import streaming
from raysweep.images.cache import has_cache, open_cache
from raysweep.images.image_bytes import content_hash
from raysweep.images.index import ImageIndex
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches, put_index
from raysweep.images.pixels import Geometry, PixelRequest, open_pixels
from raysweep.images.streaming import StreamedPixels, rebatch

NUM_ROWS = 30
PREPROCESSING = Preprocessing("shortest_edge", 14, 12, 3, (0.5,) * 3, (0.5,) * 3)
GEOMETRY = Geometry.of(PREPROCESSING, for_training=True)


@pytest.fixture(scope="module")
def ray_cluster():
    """Two CPUs: what holds one leaves one for decoding."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_cpus=2))
        patch.setattr(streaming, "BLOCK_ROWS", 4)
        with ray_session(verbose=False):
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in files, of which number 7 is no image."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(NUM_ROWS):
        Image.fromarray(random.integers(0, 256, (20, 16, 3), np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def index(folder):
    paths = sorted(map(str, folder.glob("*.png")))
    columns = {
        "row_id": pa.array(range(100, 100 + 3 * NUM_ROWS, 3), pa.int64()),
        "path": pa.array(paths, pa.string()),
        "position": pa.array([-1] * NUM_ROWS, pa.int64()),
        "image": pa.array([None] * NUM_ROWS, pa.large_binary()),
        "content_hash": pa.array([content_hash(Path(path).read_bytes()) for path in paths], pa.binary()),
    }
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), NUM_ROWS, "fingerprint")


@pytest.fixture(scope="module")
def row_ids(index):
    """Good rows, from the last to the first."""
    return np.delete(index.table["row_id"].to_numpy(), 7)[::-1].copy()


@pytest.fixture(scope="module")
def files(ray_cluster, tmp_path_factory, index, row_ids):
    """The same rows from a cache."""
    (cache,) = build_caches(
        [PixelRequest(tmp_path_factory.mktemp("cache"), PREPROCESSING)], index, num_gpus=0, processes=PassProcesses(2)
    )
    return open_pixels(cache.rows, row_ids, GEOMETRY.shape)


@pytest.fixture(scope="module")
def streamed(ray_cluster, index, row_ids):
    return StreamedPixels(put_index(index), row_ids, GEOMETRY)


UNEVEN = [torch.randperm(29, generator=torch.Generator().manual_seed(1))[:n] for n in (29, 0, 1, 10, 3)]
REPEATED = [torch.tensor([5, 5, 2, 28, 5]), torch.tensor([2, 28]), torch.tensor([2])]


@pytest.mark.ray
@pytest.mark.parametrize("batches", [UNEVEN, REPEATED, []], ids=["uneven", "repeated", "none"])
def test_what_is_decoded_anew_is_what_the_cache_has_in_exactly_the_batches_asked_for(streamed, files, batches):
    found, expected = list(streamed.read(batches)), list(files.read(batches))
    assert [len(batch) for batch in found] == [len(batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.ray
def test_training_runs_that_hold_all_cpus_but_one_can_decode(streamed, files):
    """In a placement group that would take their tasks in, as Tune's trials are, where there is no room for one."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready(), timeout=60)
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    read = ray.remote(num_cpus=1)(lambda rows: list(rows.read(UNEVEN)))
    found = ray.get(read.options(scheduling_strategy=inside).remote(streamed), timeout=120)
    ray.util.remove_placement_group(group)
    assert all(torch.equal(one, other) for one, other in zip(found, files.read(UNEVEN), strict=True))


@pytest.mark.ray
def test_rows_are_decoded_ahead_but_not_without_bound(streamed, index, folder, tmp_path, monkeypatch):
    """Fifty blocks of an image of 3 MB each, in 40 MB: counted by the files that the decoding tasks leave."""
    import ray

    large = Geometry.of(replace(PREPROCESSING, resize_size=1000, crop_size=1000), for_training=True)
    monkeypatch.setattr(streaming, "BLOCK_ROWS", 1)
    monkeypatch.setattr(streaming, "READ_AHEAD_BYTES", 40_000_000)
    decode = streaming._decode_block

    def counting(block, job):
        (tmp_path / f"{block['start'][0].as_py()}").touch()
        return decode(block, job)

    monkeypatch.setattr(streaming, "_decode_block", counting)
    rows = StreamedPixels(streamed.index, np.tile(streamed.row_ids, 2)[:50], large)
    reading = rows.read(torch.arange(50).split(1))
    next(reading)
    ahead, before = 0, -1
    deadline = time.monotonic() + 60
    while (ahead != before or ahead < 3) and time.monotonic() < deadline:  # until nothing has happened for a while
        time.sleep(3)
        before, ahead = ahead, len(list(tmp_path.iterdir()))
    assert 3 <= ahead <= 30
    reading.close()
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= ahead + 2, "what nobody waits for is not decoded"
    assert ray.is_initialized()


@pytest.mark.ray
def test_an_image_that_was_lost_meanwhile_is_named(ray_cluster, index):
    everything = StreamedPixels(put_index(index), index.table["row_id"].to_numpy(), GEOMETRY)
    with pytest.raises(DataError, match=r"07\.png: not an image in a known format; it could be decoded when"):
        list(everything.read([torch.arange(NUM_ROWS)]))


@pytest.mark.ray
def test_without_room_a_pass_looks_for_bad_rows_and_with_room_again_it_makes_the_cache(files, tmp_path, index, row_ids):
    for streamed, made_now in ((True, True), (True, False), (False, True), (True, False)):
        (cache,) = build_caches(
            [PixelRequest(tmp_path, PREPROCESSING, streamed)], index, num_gpus=0, processes=PassProcesses(2)
        )
        assert cache.made_now is made_now
        assert [row.row_id for row in cache.bad_rows] == [121]
        assert cache.num_rows == NUM_ROWS - 1
        if streamed and made_now:
            assert cache.streamed
            assert not list(tmp_path.rglob("rows-*"))
            assert (has_cache(tmp_path), has_cache(tmp_path, streamed=True)) == (False, True)
    assert not cache.streamed, "a cache that is there is used, room or none"
    assert not open_cache(tmp_path).streamed
    (found,), (expected,) = (
        rows.read([torch.arange(29)]) for rows in (open_pixels(cache.rows, row_ids, GEOMETRY.shape), files)
    )
    assert torch.equal(found, expected)


def test_blocks_are_cut_anew():
    rows = np.arange(24, dtype=np.uint8).reshape(12, 2)
    blocks = iter([rows[:5], rows[5:6], rows[6:6], rows[6:]])
    found = list(rebatch(blocks, [1, 0, 6, 2, 3], (2,)))
    assert [len(batch) for batch in found] == [1, 0, 6, 2, 3]
    assert torch.equal(torch.cat(found), torch.from_numpy(rows))
