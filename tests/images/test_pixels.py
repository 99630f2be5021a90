"""Rows whose images are not those that were hashed."""

import numpy as np
import pytest
import torch
from PIL import Image

from raysweep.cluster.session import ray_session
from raysweep.encoders.preprocess import Preprocessing
from raysweep.experiment.config import DataConfig
from raysweep.images.cache_files import is_whole
from raysweep.images.index import load_index
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches
from raysweep.images.pixels import Geometry, PixelRequest, decode_rows, open_pixels

PREPROCESSING = Preprocessing("shortest_edge", 8, 8, 3, (0.5,) * 3, (0.5,) * 3)
CHANGED = "not read in the pass: the image has changed since this sweep began"


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), (number, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(20):
        save(tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png", 10 * number)
    return tmp_path / "images"


def test_an_image_that_has_changed_since_it_was_hashed_is_bad(folder):
    index = load_index(DataConfig(source=str(folder)), seed=0)
    save(folder / "a" / "02.png", 255)
    (folder / "b" / "03.png").unlink()
    geometry = Geometry.of(PREPROCESSING, for_training=True)
    errors, pixels = decode_rows(index.table, None, [geometry], num_threads=2)
    paths = [path[-8:] for path in index.table["path"].to_pylist()]
    assert {path: error for path, error in zip(paths, errors, strict=True) if error} == {
        "a/02.png": CHANGED,
        "b/03.png": "not read in the pass: no such file",
    }
    assert pixels[geometry].max() == 190


@pytest.mark.ray
@pytest.mark.slow
def test_a_cache_does_not_keep_what_a_pass_did_not_get(folder, tmp_path):
    index = load_index(DataConfig(source=str(folder)), seed=0)
    before = (folder / "a" / "02.png").read_bytes()
    save(folder / "a" / "02.png", 255)
    request = PixelRequest(tmp_path / "cache", PREPROCESSING)
    with ray_session(verbose=False):
        (cache,) = build_caches([request], index, num_gpus=0, processes=PassProcesses(2))
        assert [row.reason for row in cache.bad_rows] == [CHANGED]
        assert cache.num_rows == 19
        assert not is_whole(request.folder)
        seen = []
        (folder / "a" / "02.png").write_bytes(before)
        (cache,) = build_caches(
            [request],
            index,
            num_gpus=0,
            processes=PassProcesses(2),
            on_progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(20, 20)]  # only the one image was decoded
    assert (cache.num_rows, cache.bad_rows, is_whole(request.folder)) == (20, (), True)
    ids = index.table["row_id"].to_numpy()
    files = open_pixels(cache.rows, ids, Geometry.of(PREPROCESSING, for_training=True).shape)
    (pixels,) = files.read([torch.arange(20)])
    expected = [10 * int(path[-6:-4]) for path in index.table["path"].to_pylist()]
    assert np.array_equal(pixels[:, 0, 0, 0].numpy(), expected)
