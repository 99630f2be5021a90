"""Caches that are damaged on the disk: what is damaged is found, and it alone is made again."""

import io
import json
import os
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysweep.encoders.build import build_encoder
from raysweep.errors import DataError, EncoderError, ResourceError
from raysweep.images.cache import MANIFEST, Cache, damage_of_manifest, has_cache, open_cache, write_manifest
from raysweep.images.cache_files import (
    add_checksums,
    damaged_files,
    fetched,
    is_whole,
    list_files,
    read_row_ids,
    write_rows,
)
from raysweep.images.features import feature_table, load_features
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches
from raysweep.images.pixels import PixelRequest, is_blank, open_pixels, write_pixels
from raysweep.storage.copies import local_path, publish

NUM_ROWS, FILE_ROWS, WIDTH = 24, 8, 40
IDS = np.arange(NUM_ROWS)
FEATURES = np.random.default_rng(0).standard_normal((NUM_ROWS, WIDTH)).astype(np.float32)


def make_cache(folder, files=True):
    """A cache of features in three files, as a pass leaves it; without checksums, as an earlier version left it."""
    rows, checksums = folder / "a-pass", {}
    for start in range(0, NUM_ROWS, FILE_ROWS):
        part = slice(start, start + FILE_ROWS)
        checksums |= write_rows(str(rows), feature_table(IDS[part], {"cls": FEATURES[part]}))
    cache = Cache(str(folder), str(rows), NUM_ROWS, (), 1.0, 1, 0, made_now=False, files=checksums if files else None)
    write_manifest(folder, cache)
    return open_cache(folder)


def change(path, offset, count=64):
    """Changes bytes in a file, and neither its size nor its time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    for place in range(offset, min(offset + count, len(content))):
        content[place] ^= 0x5A
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_64_changed_bytes_are_found_wherever_they_are_in_a_file(tmp_path):
    cache = make_cache(tmp_path)
    file = Path(cache.rows) / "rows-000000000008.parquet"
    content, size = file.read_bytes(), file.stat().st_size
    assert damaged_files(cache) == []
    for offset in range(0, size, 64):
        change(file, offset)
        assert damaged_files(cache) == [file.name]
        assert not is_whole(tmp_path)
        with pytest.raises(DataError, match=r"rows-000000000008\.parquet: damaged \(it has changed since"):
            load_features(cache.rows, IDS, ["cls"])
        file.write_bytes(content)
    assert is_whole(tmp_path)
    assert torch.equal(load_features(cache.rows, IDS, ["cls"])["cls"], torch.from_numpy(FEATURES.astype(np.float16)))


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: os.truncate(f, 100), lambda f: os.truncate(f, 0)])
def test_missing_cut_and_empty_files_are_found(tmp_path, damage):
    cache = make_cache(tmp_path)
    damage(Path(cache.rows) / "rows-000000000016.parquet")
    assert damaged_files(cache) == ["rows-000000000016.parquet"]
    with pytest.raises(DataError, match=r"rows-000000000016\.parquet: damaged .*; run the same command again"):
        load_features(cache.rows, IDS, ["cls"])


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    cache = make_cache(tmp_path)
    write_rows(cache.rows, feature_table(np.array([3]), {"cls": np.zeros((1, WIDTH), np.float32)}))
    assert len(list(Path(cache.rows).iterdir())) == 4
    assert load_features(cache.rows, IDS, ["cls"])["cls"][3].abs().sum() > 0


def test_features_on_the_disk_are_made_again_when_their_file_is_damaged(tmp_path):
    cache, expected = make_cache(tmp_path), torch.from_numpy(FEATURES.astype(np.float16))
    for _ in range(2):
        features = load_features(cache.rows, IDS, ["cls"], memory_bytes=0)["cls"]
        assert torch.equal(features[torch.arange(NUM_ROWS)], expected)
        change(features.path, 200)
        assert not torch.equal(features[torch.arange(NUM_ROWS)], expected)
    assert len(list(Path(cache.rows).glob("*.f16"))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_neither_written_nor_read(tmp_path, value, monkeypatch):
    wrong = FEATURES[:3].copy()
    wrong[1, 2] = value
    with pytest.raises(EncoderError, match="'cls' of 1 of 3 images, the first with row id 1"):
        feature_table(IDS[:3], {"cls": wrong})
    monkeypatch.setattr(np, "isfinite", np.ones_like)  # as an earlier version, which did not look
    monkeypatch.setattr(np, "clip", lambda values, *_limits: values)
    write_rows(str(tmp_path), feature_table(IDS[:3], {"cls": wrong}))
    with pytest.raises(DataError, match=r"damaged \(cls: NaN or infinity\)"):
        load_features(str(tmp_path), IDS[:3], ["cls"])


# Manifests


def test_a_manifest_with_any_byte_changed_is_no_manifest(tmp_path):
    make_cache(tmp_path)
    manifest = tmp_path / MANIFEST
    content, good, found = manifest.read_bytes(), open_cache(tmp_path), 0
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        cache = open_cache(tmp_path)
        assert cache in (None, good), content[place : place + 1]  # some blanks are other blanks then
        assert bool(damage_of_manifest(tmp_path)) == (cache is None)
        found += cache is None
    assert found > 0.8 * len(content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not readable as JSON"),
        ('{"num_rows": 3, "bad_', "not readable as JSON"),
        ("[]", "not a JSON object"),
        ("\x00\x01", "not readable as JSON"),
        ('{"rows": "a-pass"}', "num_rows: field required"),
        ('{"rows": "a-pass", "num_rows": "many"}', "num_rows: input should be a valid integer"),
        ({"bad_rows": [{"row_id": 1}]}, "bad_rows.0.source: field required"),
        ({"rows": "../../elsewhere"}, "is not the name of a file"),
        ({"files": {"../x": 1}}, "is not the name of a file"),
    ],
)
def test_a_garbled_manifest_is_told_and_its_cache_counts_as_missing(tmp_path, content, told):
    make_cache(tmp_path)
    manifest = tmp_path / MANIFEST
    values = json.loads(manifest.read_text())
    del values["checksum"]
    manifest.write_text(json.dumps(values | content) if isinstance(content, dict) else content)
    assert open_cache(tmp_path) is None
    assert not has_cache(tmp_path)
    assert told in damage_of_manifest(tmp_path)
    assert str(manifest) in damage_of_manifest(tmp_path)


def test_a_cache_of_an_earlier_version_gets_its_checksums_once(tmp_path):
    old = make_cache(tmp_path, files=False)
    assert old.files is None
    assert load_features(old.rows, IDS, ["cls"])["cls"].shape == (NUM_ROWS, WIDTH)
    assert add_checksums(tmp_path) == ""
    cache = open_cache(tmp_path)
    assert cache == replace(old, files=cache.files)
    assert len(cache.files) == 3
    assert damaged_files(cache) == []
    assert add_checksums(tmp_path) == ""


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: os.truncate(f, 100)])
def test_a_damaged_cache_of_an_earlier_version_is_told(tmp_path, damage, suffix):
    cache = make_cache(tmp_path, files=False)
    if suffix == "arrow":
        shutil.rmtree(cache.rows)
        for start in range(0, NUM_ROWS, FILE_ROWS):
            write_pixels(cache.rows, IDS[start : start + FILE_ROWS], np.zeros((FILE_ROWS, 4, 4, 3), np.uint8))
    damage(Path(cache.rows) / f"rows-000000000008.{suffix}")
    told = add_checksums(tmp_path)
    assert f"rows-000000000008.{suffix}: damaged" in told or "16 rows, 24 were written" in told
    assert open_cache(tmp_path).files is None


# In a bucket


def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_deleted(bucket, monkeypatch, tmp_path):
    folder = local_path(f"{bucket}/features-1")
    cache = make_cache(folder)
    assert cache.rows == f"{bucket}/features-1/a-pass"
    copy = local_path(cache.rows) / "rows-000000000008.parquet"
    assert damaged_files(cache) == []
    change(copy, 100)
    rows = fetched(cache.rows)
    assert load_features(rows, IDS, ["cls"])["cls"].shape == (NUM_ROWS, WIDTH)
    change(copy, 100)
    publish(copy)
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "another-node"))
    with pytest.raises(DataError, match=r"rows-000000000008\.parquet: damaged .*they are deleted; run the same"):
        fetched(cache.rows)
    assert damaged_files(cache) == [copy.name]


# Made again


@pytest.fixture(scope="module")
def ray_started(ray_with_a_gpu):
    with ray_with_a_gpu(ROWS_PER_BLOCK=FILE_ROWS, MIN_BLOCKS=1, GPU_BLOCK=10):
        yield


@pytest.fixture(scope="module")
def encoder():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    return build_encoder({"type": "dinov2", "use_pretrained": False, "config": tiny, "image_size": 32}, seed=0)


def read_features(cache):
    return load_features(cache.rows, IDS[good_rows()], ["cls"])["cls"]


def read_pixels(cache):
    ids = IDS[good_rows()]
    return next(open_pixels(cache.rows, ids, (37, 37, 3)).read([torch.arange(len(ids))]))


def good_rows():
    return np.delete(IDS, 5)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("kind", "num_gpus", "damage"),
    [
        ("features", 0, partial(change, offset=700)),
        pytest.param("features", 0, Path.unlink, marks=pytest.mark.slow),
        ("pixels", 0, partial(change, offset=700)),
        pytest.param("features", 1, Path.unlink, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_alone_is_made_again(ray_started, tmp_path, encoder, image_index, kind, num_gpus, damage):
    if kind == "features":
        request, read = feature_request(tmp_path, encoder), read_features
    else:
        request, read = PixelRequest(tmp_path, encoder.preprocessing), read_pixels
    build = partial(build_caches, [request], image_index, num_gpus=num_gpus, processes=PassProcesses())
    (cache,) = build()
    assert cache.made_now
    assert [row.row_id for row in cache.bad_rows] == [5]
    assert cache.blank_rows == (9,)
    expected, files = read(cache), [path for path, _ in list_files(cache.rows)]
    damaged, lost = files[1], read_row_ids(files[1])
    others = {path: path.stat().st_mtime_ns for path in files if path != damaged}
    damage(damaged)
    (Path(cache.rows) / "rows-000000000099.parquet").touch()  # a repair that was cut short
    told = []
    (again,) = build(on_progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (NUM_ROWS, NUM_ROWS)
    assert told[0][0] > NUM_ROWS - len(lost)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert torch.allclose(read(again).float(), expected.float(), atol=1e-3)
    assert (again.num_rows, again.bad_rows, again.made_now) == (NUM_ROWS - 1, cache.bad_rows, False)
    assert again.blank_rows == (9,)
    assert open_cache(tmp_path) == again
    assert damaged_files(again) == []
    assert not (Path(cache.rows) / "rows-000000000099.parquet").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 64 kB, and a function that gives it more room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["features", pytest.param("pixels", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_leaves_nothing(ray_started, encoder, image_index, small_disk, kind):
    folder, give_room = small_disk
    cache = folder / "cache"
    request = feature_request(cache, encoder) if kind == "features" else PixelRequest(cache, encoder.preprocessing)
    filler = folder / "filler"
    filler.write_bytes(bytes(56_000))
    build = partial(build_caches, [request], image_index, num_gpus=0, processes=PassProcesses())
    with pytest.raises(ResourceError, match=rf"it cannot be written: the disk of {cache}.* is full.*GB are free"):
        build()
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    give_room()
    (made,) = build()
    assert made.made_now
    assert damaged_files(made) == []


def test_blank_images_are_known_by_all_their_pixels():
    pixels = np.zeros((5, 20, 30, 3), np.uint8)
    pixels[1] = [7, 8, 9]
    pixels[2, 19, 29, 2] = pixels[3, 1, 1, 0] = pixels[4, 8, 16, 1] = 1
    assert is_blank(pixels).tolist() == [True, True, False, False, False]


def feature_request(folder, encoder):
    import ray

    from raysweep.images.features import FeatureRequest

    weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
    return FeatureRequest(folder, encoder.spec, weights, "fp32")


@pytest.fixture(scope="module")
def image_index():
    """Images in memory, of which one cannot be decoded and one is black."""
    import pyarrow as pa

    from raysweep.images.index import ImageIndex
    from tests.images.test_caches import image_bytes

    images = [image_bytes(number) for number in range(NUM_ROWS)]
    images[5] = images[5][:60]
    black = io.BytesIO()
    Image.new("RGB", (40, 36)).save(black, "PNG")
    images[9] = black.getvalue()
    columns = {
        "row_id": pa.array(IDS),
        "path": [f"memory/{number}.png" for number in range(NUM_ROWS)],
        "position": [-1] * NUM_ROWS,
        "image": pa.array(images, pa.large_binary()),
        "label": pa.array([0, 1] * (NUM_ROWS // 2), pa.int32()),
        "split": ["train"] * NUM_ROWS,
        "content_hash": [b"%d" % number for number in range(NUM_ROWS)],
    }
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), NUM_ROWS, "fingerprint")
