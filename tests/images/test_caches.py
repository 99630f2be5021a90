import io
import json
import os
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.errors import DataError, RaysweepError
from raysweep.images import decode, passes
from raysweep.images import features as features_module
from raysweep.images import pixels as pixels_module
from raysweep.images.blocks import SMALLEST_BLOCK, list_blocks
from raysweep.images.cache import only_writer, open_cache
from raysweep.images.cache_files import write_rows
from raysweep.images.decode import decode_image
from raysweep.images.features import FeatureRequest, encode, feature_signature, feature_table, load_features
from raysweep.images.image_bytes import content_hash
from raysweep.images.image_hashes import hash_image, hashes_file, read_hashes
from raysweep.images.index import ImageIndex
from raysweep.images.pass_errors import raising_own_errors
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.passes import build_caches
from raysweep.images.pixels import (
    Geometry,
    PixelRequest,
    decode_rows,
    open_pixels,
    pixel_signature,
    write_pixels,
)
from raysweep.images.task_reports import Tally, build_reports
from raysweep.storage import copies as storage

NUM_ROWS, ROWS_PER_BLOCK = 25, 8  # three blocks, and one of a single row
TRUNCATED = (8, 24)  # the first of a block, and all there is of the last
FIRST_ID = 1000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ray_cluster(ray_with_a_gpu):
    with ray_with_a_gpu(ROWS_PER_BLOCK=ROWS_PER_BLOCK, GPU_BLOCK=10):
        passes.warm_up(2)
        yield


def tiny_encoder(image_size, seed):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    config = {"type": "dinov2", "use_pretrained": False, "config": tiny, "image_size": image_size}
    return build_encoder(config, seed=seed)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder(image_size=32, seed=0)


@pytest.fixture(scope="module")
def other_encoder():
    return tiny_encoder(image_size=24, seed=1)


def image_bytes(number, size=(40, 36)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_index(images, first_id=FIRST_ID, hashes=None):
    """An index of images in memory, whose row ids have a gap, as they have after bad rows."""
    count = len(images)
    columns = {
        "row_id": pa.array([first_id + 2 * number for number in range(count)], pa.int64()),
        "path": pa.array([f"memory/{number}.png" for number in range(count)], pa.string()),
        "position": pa.array([-1] * count, pa.int64()),
        "image": pa.array(images, pa.large_binary()),
        "label": pa.array([number % 2 for number in range(count)], pa.int32()),
        "split": pa.array(["train"] * count, pa.string()),
        "content_hash": pa.array(hashes or [b"%x" % number for number in range(count)], pa.binary()),
    }
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), count, "fingerprint")


@pytest.fixture(scope="module")
def images():
    return [image_bytes(number)[:60] if number in TRUNCATED else image_bytes(number) for number in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def index(images):
    return make_index(images)


@pytest.fixture(scope="module")
def good_ids(index):
    ids = index.table["row_id"].to_numpy()
    return ids[[number not in TRUNCATED for number in range(NUM_ROWS)]]


def feature_request(folder, encoder):
    import ray

    weights = ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})
    return FeatureRequest(folder, encoder.spec, weights, "fp32")


@pytest.fixture(scope="module")
def shared_pass(ray_cluster, tmp_path_factory, index, encoder, other_encoder):
    """Feature caches of two encoders and a pixel cache from one pass, and what was said of its progress."""
    told = []
    folder = tmp_path_factory.mktemp("shared")
    requests = [
        feature_request(folder / "features", encoder),
        PixelRequest(folder / "pixels", encoder.preprocessing),
        feature_request(folder / "others", other_encoder),
    ]
    return build_caches(
        requests, index, num_gpus=0, processes=PassProcesses(2), on_progress=lambda *numbers: told.append(numbers)
    ), told


@pytest.fixture(scope="module")
def features(shared_pass):
    return shared_pass[0][0]


@pytest.fixture(scope="module")
def pixels(shared_pass):
    return shared_pass[0][1]


def directly(encoder, images, numbers):
    """What the encoder gives for images by number, without any of the machinery."""
    pixels = [encoder.preprocessing.resize_and_crop(decode_image(images[number])) for number in numbers]
    with torch.inference_mode():
        return encoder(encoder.preprocessing.normalize(torch.from_numpy(np.stack(pixels))))


def names(folder, pattern):
    return sorted(path.name for path in folder.glob(pattern))


def number_of(row_ids):
    return ((row_ids - FIRST_ID) // 2).tolist()


def load_pixels(folder, row_ids, size):
    """All rows, in one batch."""
    (pixels,) = open_pixels(folder, row_ids, (*size, 3)).read([torch.arange(len(row_ids))])
    return pixels


# Feature caches


@pytest.mark.ray
def test_cached_features_are_what_the_encoder_gives(features, encoder, images, good_ids):
    found = load_features(features.rows, good_ids, list(encoder.parts))
    expected = directly(encoder, images, number_of(good_ids))
    assert found.keys() == expected.keys() == {"cls", "mean"}
    for part, values in expected.items():
        assert found[part].dtype == torch.float16
        assert found[part].shape == (NUM_ROWS - 2, 16)
        torch.testing.assert_close(found[part].float(), values, rtol=2e-3, atol=2e-3)


@pytest.mark.ray
def test_features_come_in_the_order_asked_for(features, good_ids):
    everything = load_features(features.rows, good_ids, ["cls"])["cls"]
    order = np.random.default_rng(0).permutation(len(good_ids))[:9]
    found = load_features(features.rows, good_ids[order], ["cls"])["cls"]
    assert torch.equal(found, everything[torch.from_numpy(order)])
    assert torch.equal(load_features(features.rows, good_ids[-1:], ["cls"])["cls"], everything[-1:])


@pytest.mark.ray
def test_the_cache_says_what_it_cost_and_which_rows_are_bad(features):
    assert features.made_now
    assert features.num_rows == NUM_ROWS - 2
    assert features.peak_memory_bytes > 50e6  # a process with torch loaded
    assert features.peak_gpu_memory_bytes == 0
    assert [(row.row_id, row.source) for row in features.bad_rows] == [(1016, "memory/8.png"), (1048, "memory/24.png")]
    assert all("truncated" in row.reason or "cannot be decoded" in row.reason for row in features.bad_rows)


@pytest.mark.ray
def test_a_pass_leaves_the_hash_of_every_image(features, index, images):
    hashes = read_hashes(hashes_file(Path(features.folder).parent, index), index.table["row_id"].to_numpy())
    for number, found in enumerate(hashes):
        expected = 0 if number in TRUNCATED else hash_image(decode_image(images[number]))
        assert np.array_equal(found, np.zeros_like(found) + expected)


@pytest.mark.ray
def test_a_bad_row_is_missing_from_the_cache(features, index):
    with pytest.raises(DataError, match="2 rows are missing"):
        load_features(features.rows, index.table["row_id"].to_numpy(), ["cls"])


def test_features_beyond_the_memory_allowed_are_read_from_a_file_written_once(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float16)
    for start in (0, 6):
        rows = slice(start, start + 6)
        write_rows(str(tmp_path), feature_table(np.arange(10)[rows], {"cls": values[rows], "mean": -values[rows]}))
    row_ids = np.array([7, 1, 9, 2])
    in_memory = load_features(str(tmp_path), row_ids, ["cls", "mean"], memory_bytes=4 * 2 * 4 * 2)
    assert all(isinstance(part, torch.Tensor) for part in in_memory.values())
    on_disk = load_features(str(tmp_path), row_ids, ["cls", "mean"], memory_bytes=4 * 2 * 4 * 2 - 1)
    everything = torch.arange(len(row_ids))
    for part, sign in {"cls": 1, "mean": -1}.items():
        assert not isinstance(on_disk[part], torch.Tensor)
        assert on_disk[part].shape == (4, 4)
        assert torch.equal(on_disk[part][everything], torch.from_numpy(sign * values[row_ids]))
        assert torch.equal(in_memory[part], on_disk[part][everything])
    assert len(list(tmp_path.glob("rows-*.f16"))) == 2
    other_rows = load_features(str(tmp_path), row_ids[:2].copy(), ["cls"], memory_bytes=0)
    assert torch.equal(other_rows["cls"][everything[:2]], in_memory["cls"][:2])
    monkeypatch.setattr(features_module, "read_blocks", None)
    again = load_features(str(tmp_path), row_ids, ["cls"], memory_bytes=0)
    assert torch.equal(again["cls"][everything], in_memory["cls"])


# Pixel caches


@pytest.mark.ray
def test_cached_pixels_are_what_resize_for_training_gives(pixels, encoder, images, good_ids):
    preprocessing = encoder.preprocessing
    order = good_ids[::-7].copy()
    found = load_pixels(pixels.rows, order, preprocessing.training_size)
    expected = [preprocessing.resize_for_training(decode_image(images[number])) for number in number_of(order)]
    assert torch.equal(found, torch.from_numpy(np.stack(expected)))
    assert found.dtype == torch.uint8


@pytest.mark.ray
def test_the_pixel_cache_has_the_same_bad_rows(pixels, features):
    assert pixels.made_now
    assert pixels.bad_rows == features.bad_rows
    assert pixels.num_rows == NUM_ROWS - 2


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8)
ROW_IDS = 100 + 2 * np.arange(20)


@pytest.fixture
def pixel_files(tmp_path):
    """Twenty images in files of seven; opened without every fourth, from the last to the first."""
    for start in range(0, 20, 7):
        write_pixels(str(tmp_path), ROW_IDS[start : start + 7], PIXELS[start : start + 7])
    kept = np.flatnonzero(np.arange(20) % 4 != 0)[::-1].copy()
    return open_pixels(str(tmp_path), ROW_IDS[kept], (6, 5, 3)), torch.from_numpy(PIXELS[kept])


BATCHES = [[3], [5, 6, 7], [14, 0, 3, 3, 4, 2], list(range(15)), [], [9, 8, 7, 1]]


def test_rows_are_read_in_exactly_the_batches_asked_for(pixel_files):
    files, expected = pixel_files
    batches = [torch.tensor(batch, dtype=torch.int64) for batch in BATCHES]
    found = list(files.read(batches))
    assert [(len(batch), batch.dtype) for batch in found] == [(len(batch), torch.uint8) for batch in BATCHES]
    assert all(torch.equal(one, expected[batch]) for one, batch in zip(found, batches, strict=True))


def test_rows_in_a_row_are_read_at_once(pixel_files, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(pixels_module, "read_into", lambda _file, buffer, _offset: reads.append(len(buffer)) or True)
    list(open_pixels(str(tmp_path), ROW_IDS, (6, 5, 3)).read([torch.arange(20)]))
    assert reads == [7 * 90, 7 * 90, 6 * 90]


def test_opened_pixels_travel_and_are_read_by_several_threads(pixel_files):
    files, expected = pixel_files
    batches = torch.from_numpy(np.random.default_rng(1).integers(0, 15, (200, 8)))
    copy = pickle.loads(pickle.dumps(files))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rows: next(copy.read([rows])), batches))
    assert torch.equal(torch.stack(found), expected[batches])


def test_pixels_are_neither_mapped_nor_held_open(pixel_files):
    files, _ = pixel_files
    list(files.read([torch.arange(15)]))
    open_files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
                  if os.path.exists(f"/proc/self/fd/{name}")]  # fmt: skip
    assert not [path for path in open_files if path.endswith(".arrow")]
    assert str(files.paths[0].parent) not in Path("/proc/self/maps").read_text()


def test_a_file_that_shrinks_or_goes_after_it_was_opened_is_named(pixel_files):
    files, _ = pixel_files
    middle = files.paths[1]
    os.truncate(middle, middle.stat().st_size // 2)
    with pytest.raises(
        DataError, match=r"rows-0+114\.arrow: damaged \(it has become shorter\); run the same command again"
    ):
        list(files.read([torch.arange(15)]))
    middle.unlink()
    with pytest.raises(DataError, match=r"rows-0+114\.arrow: damaged \(.*No such file"):
        list(files.read([torch.arange(15)]))


def test_missing_rows_and_pixels_of_another_shape_are_told(pixel_files, tmp_path):
    with pytest.raises(DataError, match="2 rows are missing; delete "):
        open_pixels(str(tmp_path), np.array([100, 101, 102, 999]), (6, 5, 3))
    with pytest.raises(DataError, match=r"rows-0+100\.arrow: damaged \(.*75 bytes are expected"):
        open_pixels(str(tmp_path), ROW_IDS, (5, 5, 3))
    with pytest.raises(DataError, match="1 rows are missing"):
        open_pixels(str(tmp_path / "empty"), ROW_IDS[:1], (6, 5, 3))


def test_a_retried_task_replaces_its_own_file(tmp_path):
    for value in (1, 2):
        write_pixels(str(tmp_path), ROW_IDS[:3], np.full((3, 2, 2, 3), value, np.uint8))
    assert names(tmp_path, "*") == ["rows-000000000100.arrow"]
    assert (load_pixels(str(tmp_path), ROW_IDS[:3], (2, 2)) == 2).all()
    write_pixels(str(tmp_path), ROW_IDS[:0], PIXELS[:0])
    assert len(names(tmp_path, "*")) == 1


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pixels(str(tmp_path), ROW_IDS, PIXELS)
    assert names(tmp_path, "*") == []


# Passes


@pytest.mark.ray
def test_one_pass_makes_all_caches_and_tells_of_each_image_once(shared_pass):
    _, told = shared_pass
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (NUM_ROWS, NUM_ROWS)


@pytest.mark.ray
def test_a_shared_pass_gives_the_bits_of_separate_ones(shared_pass, tmp_path, index, good_ids, encoder, other_encoder):
    for cache, encoder_alone in zip(shared_pass[0][::2], (encoder, other_encoder), strict=True):
        request = feature_request(tmp_path / str(encoder_alone.preprocessing.crop_size), encoder_alone)
        (alone,) = build_caches([request], index, num_gpus=0, processes=PassProcesses(2))
        expected, found = (load_features(folder, good_ids, ["cls", "mean"]) for folder in (alone.rows, cache.rows))
        for part, values in expected.items():
            assert torch.equal(found[part], values)


@pytest.mark.ray
def test_gpu_actors_give_the_same_features_from_pixels_decoded_elsewhere(
    shared_pass, tmp_path, index, good_ids, encoder, other_encoder, pixels
):
    requests = [
        PixelRequest(tmp_path / "pixels", encoder.preprocessing),
        feature_request(tmp_path / "others", other_encoder),
        feature_request(tmp_path / "features", encoder),
    ]
    told, lines = [], []
    caches = build_caches(
        requests,
        index,
        num_gpus=1,
        processes=PassProcesses(2),
        on_progress=lambda *numbers: told.append(numbers),
        say=lines.append,
    )
    assert told[-1] == (NUM_ROWS, NUM_ROWS)
    assert len(lines) == 1
    assert re.fullmatch(r"the GPUs waited \d+% of the time for decoded images", lines[0])
    assert all(cache.bad_rows == pixels.bad_rows and cache.seconds > 0 for cache in caches)
    for cache, expected in zip(caches[1:], (shared_pass[0][2], shared_pass[0][0]), strict=True):
        found, wanted = (load_features(folder, good_ids, ["mean"])["mean"] for folder in (cache.rows, expected.rows))
        torch.testing.assert_close(found.float(), wanted.float(), rtol=2e-3, atol=2e-3)
    size = encoder.preprocessing.training_size
    assert torch.equal(load_pixels(caches[0].rows, good_ids, size), load_pixels(pixels.rows, good_ids, size))


@pytest.mark.ray
def test_decoding_stays_a_bounded_number_of_images_ahead_of_gpus(ray_cluster, tmp_path, monkeypatch, index, encoder):
    import ray

    monkeypatch.setattr(passes, "MAX_WAITING_IMAGES", 1_000)
    requests = [feature_request(tmp_path, encoder)]
    for num_gpus in (1, 4):
        processors = passes._Processors(num_gpus, PassProcesses())
        options = passes._dataset(requests, "key", index, processors).context.execution_options
        in_progress = int(ray.cluster_resources()["CPU"]) * 2 * 3  # rows of a block of the 25
        assert options.resource_limits.object_store_memory == 32 * 32 * 3 * (num_gpus * 1_000 + in_progress)


@pytest.mark.ray
def test_only_missing_caches_are_made(shared_pass, tmp_path, index, encoder):
    def never(_done, _total):
        raise AssertionError("a pass was made")

    caches = shared_pass[0]
    requests = [
        FeatureRequest(Path(caches[0].folder), encoder.spec, None, "fp32"),
        PixelRequest(Path(caches[1].folder), encoder.preprocessing),
    ]
    again = build_caches(requests, index, num_gpus=0, processes=PassProcesses(2), on_progress=never)
    assert again == [replace(cache, made_now=False) for cache in caches[:2]]
    requests.insert(1, PixelRequest(tmp_path, encoder.preprocessing))
    assert [cache.made_now for cache in build_caches(requests, index, num_gpus=0, processes=PassProcesses(2))] == [
        False,
        True,
        False,
    ]


@pytest.mark.ray
def test_a_cache_without_manifest_is_rebuilt_without_what_was_left(ray_cluster, tmp_path, encoder, images):
    index = make_index(images[:3])
    # A pass that was cut short had put the same rows into other blocks.
    write_pixels(str(tmp_path), np.array([1002]), np.zeros((1, 40, 40, 3), np.uint8))
    (tmp_path / "another-pass").mkdir()
    for name in ("rows-000000000007.parquet", "another-pass/rows-1.f16", "another-pass/.rows-000000001002.arrow.abc"):
        (tmp_path / name).touch()
    assert open_cache(tmp_path) is None
    (cache,) = build_caches(
        [PixelRequest(tmp_path, encoder.preprocessing)], index, num_gpus=0, processes=PassProcesses(2)
    )
    assert cache.made_now
    found = load_pixels(cache.rows, np.array([1002]), encoder.preprocessing.training_size)
    assert np.array_equal(found[0], encoder.preprocessing.resize_for_training(decode_image(images[1])))
    rows = Path(cache.rows)
    assert rows.parent == tmp_path
    assert names(tmp_path, "*") == sorted([".lock", "manifest.json", rows.name])
    assert names(rows, "*") == [f"rows-{number:012d}.arrow" for number in (1000, 1002, 1004)]


def reports(row_ids, seconds, errors=None, memory=1):
    errors = pa.array(errors or [None] * len(row_ids), pa.string())
    return build_reports(np.array(row_ids), errors, np.array(seconds), memory)


def test_a_tally_tells_each_warning_once_and_how_long_encoders_waited():
    tally = Tally(num_caches=1)
    assert tally.lines() == []
    for waiting, working in ((3.0, 1.0), (0.0, 4.0)):
        times, rows = np.array([waiting, working]), np.arange(5)
        tally.add(build_reports(rows, pa.nulls(5, pa.string()), np.ones(2), encoder_seconds=times, warnings=["slow"]))
    assert tally.lines() == ["slow", "the GPUs waited 38% of the time for decoded images"]


def test_the_shares_of_all_caches_add_up_to_the_wall_time():
    tally = Tally(num_caches=2)
    tally.add(reports([1, 2, 3], seconds=[4.0, 1.0, 5.0], errors=[None, "broken", None]))
    tally.add(reports([4], seconds=[2.0, 1.0, 7.0], memory=10**15))
    # 2 of 20 seconds for the first alone, 12 for the second, 3 each of decoding.
    assert tally.shares(40.0) == pytest.approx([10.0, 30.0])
    assert (tally.num_rows, tally.errors, tally.memory) == (4, {2: "broken"}, 10**15)


def test_a_pass_that_loses_rows_leaves_no_manifest(tmp_path, monkeypatch, encoder):
    class Lossy:
        def iter_batches(self, **_options):
            yield reports([1000, 1002], seconds=[1.0, 1.0])

    monkeypatch.setattr(passes, "_dataset", lambda *_arguments: Lossy())
    with pytest.raises(DataError, match="saw 2 of 3 images"):
        build_caches(
            [PixelRequest(tmp_path, encoder.preprocessing)],
            make_index([b""] * 3),
            num_gpus=0,
            processes=PassProcesses(2),
        )
    assert open_cache(tmp_path) is None


# Damage, and several sweeps at once


@pytest.mark.ray
def test_a_missing_and_a_damaged_file_are_named(ray_cluster, tmp_path, encoder, images):
    index = make_index(images[:3])
    (cache,) = build_caches(
        [PixelRequest(tmp_path, encoder.preprocessing)], index, num_gpus=0, processes=PassProcesses(2)
    )
    ids, file = index.table["row_id"].to_numpy(), min(Path(cache.rows).glob("rows-*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"rows-0+1000\.arrow: damaged .*; run the same command again"):
        load_pixels(cache.rows, ids, encoder.preprocessing.training_size)
    file.unlink()
    with pytest.raises(DataError, match=r"rows-0+1000\.arrow: damaged .*; run the same command again"):
        load_pixels(cache.rows, ids, encoder.preprocessing.training_size)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=f"1 rows are missing; delete {tmp_path} to have it made again"):
        load_pixels(cache.rows, ids, encoder.preprocessing.training_size)


def test_a_missing_and_a_damaged_file_of_features_are_named(tmp_path):
    with pytest.raises(DataError, match="no rows; delete "):
        load_features(str(tmp_path), np.array([1]), ["cls"])
    write_rows(str(tmp_path), feature_table(np.array([1]), {"cls": np.ones((1, 4), np.float32)}))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"rows-0+1\.parquet: damaged .*; run the same command again"):
        load_features(str(tmp_path), np.array([1]), ["cls"])


MANIFEST = {
    "num_rows": 3, "bad_rows": [], "seconds": 1.0, "peak_memory_bytes": 1, "peak_gpu_memory_bytes": 0, "rows": "a-pass",
}  # fmt: skip


def finish(folder):
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))


def test_a_second_sweep_waits_for_the_pass_of_the_first(tmp_path, monkeypatch, encoder):
    def never(*_arguments):
        raise AssertionError("a pass was made")

    monkeypatch.setattr(passes, "_make_pass", never)
    found = []
    requests = [PixelRequest(tmp_path, encoder.preprocessing)]
    second = threading.Thread(
        target=lambda: found.extend(build_caches(requests, make_index([]), num_gpus=0, processes=PassProcesses(2)))
    )
    with only_writer(tmp_path):
        second.start()
        second.join(0.2)
        assert second.is_alive()
        finish(tmp_path)
    second.join(30)
    assert [cache.made_now for cache in found] == [False]


def test_two_sweeps_that_want_caches_in_opposite_order_share_the_work(tmp_path, monkeypatch, encoder):
    made = []

    def make_pass(requests, *_arguments):
        time.sleep(0.05)
        for request in requests:
            made.append(request.folder)
            finish(request.folder)

    monkeypatch.setattr(passes, "_make_pass", make_pass)
    folders = [tmp_path / name for name in "abc"]

    def sweep(order):
        requests = [PixelRequest(folder, encoder.preprocessing) for folder in order]
        caches = build_caches([*requests, requests[0]], make_index([]), num_gpus=0, processes=PassProcesses(2))
        assert [cache.rows for cache in caches] == [str(folder / "a-pass") for folder in (*order, order[0])]

    threads = [threading.Thread(target=sweep, args=(order,)) for order in (folders, folders[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(made) == folders


# Blocks, without Ray


def test_blocks_hold_every_row_once_and_are_neither_few_nor_huge(monkeypatch):
    monkeypatch.setattr(passes, "ROWS_PER_BLOCK", 64)
    for num_rows, num_blocks in {1: 1, 5: 5, 100: 9, 1000: 16, 200_000: 1563, 10**6: 1954}.items():
        blocks = list_blocks(num_rows, passes._block_size(num_rows))
        assert len(blocks) == num_blocks
        assert [block["start"] for block in blocks] == list(range(0, num_rows, blocks[0]["size"]))
        assert len({block["size"] for block in blocks[:-1]}) <= 1
        assert sum(block["size"] for block in blocks) == num_rows


@pytest.mark.parametrize("num_takers", [2, 3, 64])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 100, 1_300, 10**5])
def test_the_last_blocks_are_small_if_several_processes_take_them(num_rows, num_takers):
    blocks = list_blocks(num_rows, passes._block_size(num_rows), num_takers)
    sizes = [block["size"] for block in blocks]
    assert [block["start"] for block in blocks] == [sum(sizes[:number]) for number in range(len(sizes))]
    assert sum(sizes) == num_rows
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= SMALLEST_BLOCK
    assert all(size >= min(SMALLEST_BLOCK, passes._block_size(num_rows)) for size in sizes[:-1])


def eval_geometry(encoder):
    return Geometry.of(encoder.preprocessing, for_training=False)


def test_a_block_is_decoded_row_by_row(encoder):
    rows = make_index([image_bytes(0), b"", image_bytes(1)[:80], image_bytes(2)]).table
    geometry = eval_geometry(encoder)
    for num_threads in (1, 3):
        errors, pixels = decode_rows(rows, None, [geometry], num_threads)
        assert [error is None for error in errors] == [True, False, False, True]
        assert errors[1] == "empty (0 bytes)"
        for row, number in {0: 0, 3: 2}.items():
            expected = encoder.preprocessing.resize_and_crop(decode_image(image_bytes(number)))
            assert np.array_equal(pixels[geometry][row], expected)


def test_rows_are_read_from_files(tmp_path, encoder):
    (tmp_path / "0.png").write_bytes(image_bytes(0))
    table = make_index([None, None], hashes=[content_hash(image_bytes(0)), b"gone"]).table
    paths = pa.array([str(tmp_path / "0.png"), str(tmp_path / "missing.png")])
    errors, pixels = decode_rows(table.set_column(1, "path", paths), None, [eval_geometry(encoder)], 2)
    assert errors[0] is None
    assert errors[1] is not None
    expected = encoder.preprocessing.resize_and_crop(decode_image(image_bytes(0)))
    assert np.array_equal(pixels[eval_geometry(encoder)][0], expected)


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image_bytes(0, (width, height)))).save(buffer, "JPEG")
    return buffer.getvalue()


def test_an_image_is_decoded_once_for_all_geometries_of_one_draft_size(monkeypatch, encoder, other_encoder):
    decoded = []
    original = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda image, *rest: decoded.append(image.size) or original(image, *rest))
    geometries = [eval_geometry(encoder), eval_geometry(other_encoder)]
    geometries.append(Geometry.of(encoder.preprocessing, for_training=True))
    # Shorter sides of 74 and 54 must be kept: 300 allows a quarter for both, 240 a half for the one.
    assert {geometry.preprocessing.min_side for geometry in geometries} == {74, 54}
    for size, num_decoded in {(400, 300): 1, (440, 240): 2}.items():
        rows = make_index([jpeg(*size)]).table
        alone = [decode_rows(rows, None, [geometry], 1)[1][geometry] for geometry in geometries]
        decoded.clear()
        errors, pixels = decode_rows(rows, None, geometries, 1)
        assert errors == [None]
        assert len(decoded) == num_decoded
        for geometry, expected in zip(geometries, alone, strict=True):
            assert np.array_equal(pixels[geometry], expected)


def test_geometries_are_equal_where_only_colours_differ(encoder):
    preprocessing = encoder.preprocessing
    colours = replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 127.5)
    assert Geometry.of(colours, for_training=True) == Geometry.of(preprocessing, for_training=True)
    assert Geometry.of(preprocessing, for_training=True) != eval_geometry(encoder)
    assert Geometry.of(replace(preprocessing, resample=2), for_training=False) != eval_geometry(encoder)


# Encoding


class Crowded(torch.nn.Module):
    """An encoder on a device with memory for few images."""

    def __init__(self, preprocessing, limit):
        super().__init__()
        self.parts = {"mean": 3}
        self.preprocessing, self.limit, self.batches = preprocessing, limit, []

    def forward(self, pixels):
        self.batches.append(len(pixels))
        if len(pixels) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return {"mean": pixels.mean(dim=(2, 3))}


def test_batches_that_do_not_fit_are_halved(encoder, monkeypatch):
    monkeypatch.setitem(features_module.ENCODER_BATCH, ("cpu", "fp32"), 8)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    crowded, roomy = (Crowded(encoder.preprocessing, limit) for limit in (3, 100))
    found = encode(crowded, pixels, CPU, "fp32")["mean"]
    np.testing.assert_allclose(found, encode(roomy, pixels, CPU, "fp32")["mean"], atol=1e-6)
    assert crowded.batches == [8, 4, 2, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        encode(Crowded(encoder.preprocessing, limit=0), pixels, CPU, "fp32")


def test_no_pixels_give_no_features(encoder, tmp_path):
    features = encode(encoder, np.empty((0, 32, 32, 3), np.uint8), CPU, "fp32")
    assert {part: values.shape for part, values in features.items()} == {"cls": (0, 16), "mean": (0, 16)}
    write_rows(str(tmp_path), feature_table(np.empty(0, np.int64), features))
    assert list(tmp_path.iterdir()) == []


def test_an_outlier_stays_finite_as_a_half_float():
    table = feature_table(np.array([3]), {"cls": np.array([[1e9, -1e9]], np.float32)})
    assert table["cls"].to_pylist() == [[65504.0, -65504.0]]


def test_bf16_features_are_near_those_of_fp32(encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    exact, rounded = (encode(encoder, pixels, CPU, precision)["cls"] for precision in ("fp32", "bf16"))
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.1)


@pytest.mark.ray
def test_what_a_task_of_a_pass_raises_is_told_in_its_own_words(ray_cluster):
    """Ray Data would wrap it, and its cause gets lost between processes."""
    import ray.data

    def fail(batch):
        raise RaysweepError("s3://bucket/x: the storage cannot be used")

    class Fails:
        def __call__(self, batch):
            return fail(batch)

    for function, compute in ((fail, None), (Fails, ray.data.ActorPoolStrategy(size=1))):
        dataset = ray.data.from_items([{"start": 0}]).map_batches(function, compute=compute)
        with pytest.raises(RaysweepError) as error, raising_own_errors():
            dataset.materialize()
        assert str(error.value) == "s3://bucket/x: the storage cannot be used"
        assert type(error.value) is RaysweepError
    with pytest.raises(ray.exceptions.RayTaskError), raising_own_errors():
        ray.data.from_items([{"start": 0}]).map_batches(lambda batch: 1 / 0).materialize()


# Signatures


def signed(index, encoder, precision="fp32"):
    return feature_signature(index, encoder.spec, weights_signature(encoder), precision)


def test_the_feature_signature_follows_what_features_depend_on(encoder, images):
    index = make_index(images[:3])
    signatures = [
        signed(index, encoder),
        signed(make_index(images[:2]), encoder),
        signed(make_index(images[:3], hashes=["0", "1", "changed"]), encoder),
        signed(make_index(images[:3], first_id=7), encoder),
        signed(index, encoder, "bf16"),
        feature_signature(index, encoder.spec, "other weights", "fp32"),
    ]
    other = replace(encoder.spec, preprocessing=replace(encoder.preprocessing, std=(0.5,) * 3))
    signatures.append(feature_signature(index, other, weights_signature(encoder), "fp32"))
    assert len(set(signatures)) == len(signatures)
    assert signed(index, encoder) == signatures[0]


def test_the_row_signature_does_not_know_chunks(images):
    index = make_index(images[:3])
    chunked = pa.concat_tables([index.table.slice(0, 2), index.table.slice(2)])
    assert replace(index, table=chunked).row_signature == index.row_signature
    shifted = make_index(images[:3], hashes=["0", "12", ""])  # the same characters, in other places
    assert shifted.row_signature != make_index(images[:3], hashes=["0", "1", "2"]).row_signature


def relabelled(index):
    table = index.table.drop_columns(["label", "split", "path"])
    count = len(table)
    table = table.append_column("label", pa.array([0] * count, pa.int32()))
    table = table.append_column("split", pa.array(["test"] * count, pa.string()))
    table = table.append_column("path", pa.array(["moved"] * count, pa.string()))
    return replace(index, table=table, classes=("x", "y"), fingerprint="another")


def test_relabelling_resplitting_and_moving_cost_no_pass(encoder, images):
    index = make_index(images[:3])
    assert signed(relabelled(index), encoder) == signed(index, encoder)
    assert pixel_signature(relabelled(index), encoder.preprocessing) == pixel_signature(index, encoder.preprocessing)


def test_the_pixel_signature_follows_contents_and_geometry_but_not_colours(encoder, images):
    index, preprocessing = make_index(images[:3]), encoder.preprocessing
    first = pixel_signature(index, preprocessing)
    assert pixel_signature(index, replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3)) == first
    others = [
        pixel_signature(make_index(images[:3], hashes=["0", "1", "changed"]), preprocessing),
        pixel_signature(index, preprocessing.with_image_size(48)),
        pixel_signature(index, replace(preprocessing, resample=2)),
        pixel_signature(index, replace(preprocessing, crop_size=31)),
    ]
    assert len({first, *others}) == 5
