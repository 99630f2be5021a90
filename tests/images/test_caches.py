import io
import json
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysweep.cluster import ray_session
from raysweep.encoders import build_encoder, weights_signature
from raysweep.errors import DataError
from raysweep.images import cache as caches
from raysweep.images.cache import BLOCKS, good_pixels, open_cache, write_block, write_cache
from raysweep.images.decode import decode_image
from raysweep.images.features import build_feature_cache, encode, feature_signature, load_features
from raysweep.images.pixels import build_pixel_cache, load_pixels, pixel_signature
from raysweep.images.sources import ImageIndex

NUM_ROWS, ROWS_PER_FILE = 25, 8  # three blocks, and one of a single row
TRUNCATED = (8, 24)  # the first of a block, and all there is of the last
FIRST_ID = 1000


@pytest.fixture(scope="module")
def ray_cluster():
    with ray_session(verbose=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "ROWS_PER_FILE", ROWS_PER_FILE)
        yield


@pytest.fixture(scope="module")
def encoder():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    return build_encoder({"type": "dinov2", "use_pretrained": False, "config": tiny, "image_size": 32}, seed=0)


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
        "content_hash": pa.array(hashes or [f"{number:x}" for number in range(count)], pa.string()),
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


def reference_to(encoder):
    import ray

    return ray.put({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})


def build(folder, index, encoder, on_progress=lambda _done, _total: None):
    weights = reference_to(encoder)
    return build_feature_cache(folder, index, encoder, weights, precision="fp32", num_gpus=0, on_progress=on_progress)


@pytest.fixture(scope="module")
def features(ray_cluster, tmp_path_factory, index, encoder):
    """A feature cache, and what was said of its progress."""
    told = []
    folder = tmp_path_factory.mktemp("features")
    return build(folder, index, encoder, lambda *numbers: told.append(numbers)), told


@pytest.fixture(scope="module")
def pixels(ray_cluster, tmp_path_factory, index, encoder):
    return build_pixel_cache(tmp_path_factory.mktemp("pixels"), index, encoder.preprocessing)


def directly(encoder, images, numbers):
    """What the encoder gives for images by number, without any of the machinery."""
    pixels = [encoder.preprocessing.resize_and_crop(decode_image(images[number])) for number in numbers]
    with torch.inference_mode():
        return encoder(encoder.preprocessing.normalize(torch.from_numpy(np.stack(pixels))))


def number_of(row_ids):
    return ((row_ids - FIRST_ID) // 2).tolist()


# Feature caches


@pytest.mark.ray
def test_cached_features_are_what_the_encoder_gives(features, encoder, images, good_ids):
    cache, _ = features
    found = load_features(cache.folder, good_ids, list(encoder.parts))
    expected = directly(encoder, images, number_of(good_ids))
    assert found.keys() == expected.keys() == {"cls", "mean"}
    for part, values in expected.items():
        assert found[part].dtype == torch.float16
        assert found[part].shape == (NUM_ROWS - 2, 16)
        torch.testing.assert_close(found[part].float(), values, rtol=2e-3, atol=2e-3)


@pytest.mark.ray
def test_features_come_in_the_order_asked_for(features, good_ids):
    folder = features[0].folder
    everything = load_features(folder, good_ids, ["cls"])["cls"]
    order = np.random.default_rng(0).permutation(len(good_ids))[:9]
    assert torch.equal(load_features(folder, good_ids[order], ["cls"])["cls"], everything[torch.from_numpy(order)])
    assert torch.equal(load_features(folder, good_ids[-1:], ["cls"])["cls"], everything[-1:])


@pytest.mark.ray
def test_the_cache_says_what_it_cost_and_which_rows_are_bad(features):
    cache, told = features
    assert cache.made_now
    assert cache.num_rows == NUM_ROWS - 2
    assert cache.seconds > 0
    assert cache.peak_memory_bytes > 50e6  # a process with torch loaded
    assert cache.peak_gpu_memory_bytes == 0
    assert [(row.row_id, row.source) for row in cache.bad_rows] == [(1016, "memory/8.png"), (1048, "memory/24.png")]
    assert all("truncated" in row.reason or "cannot be decoded" in row.reason for row in cache.bad_rows)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (NUM_ROWS, NUM_ROWS)


@pytest.mark.ray
def test_a_bad_row_is_missing_from_the_cache(features, index):
    with pytest.raises(DataError, match="2 rows are missing"):
        load_features(features[0].folder, index.table["row_id"].to_numpy(), ["cls"])


@pytest.mark.ray
def test_a_second_build_makes_no_pass(features, index, encoder):
    cache, _ = features

    def never(_done, _total):
        raise AssertionError("a pass was made")

    again = build_feature_cache(
        caches.Path(cache.folder), index, encoder, None, precision="fp32", num_gpus=0, on_progress=never
    )
    assert not again.made_now
    assert again == replace(cache, made_now=False)


# Pixel caches


@pytest.mark.ray
def test_cached_pixels_are_what_resize_for_training_gives(pixels, encoder, images, good_ids):
    preprocessing = encoder.preprocessing
    order = good_ids[::-7].copy()
    found = load_pixels(pixels.folder, order, preprocessing.training_size)
    expected = [preprocessing.resize_for_training(decode_image(images[number])) for number in number_of(order)]
    assert torch.equal(found, torch.from_numpy(np.stack(expected)))
    assert found.dtype == torch.uint8


@pytest.mark.ray
def test_the_pixel_cache_has_the_same_bad_rows(pixels, features, index, encoder):
    assert pixels.made_now
    assert pixels.bad_rows == features[0].bad_rows
    assert pixels.num_rows == NUM_ROWS - 2
    assert not build_pixel_cache(caches.Path(pixels.folder), index, encoder.preprocessing).made_now


@pytest.mark.ray
def test_a_cache_without_manifest_is_rebuilt_without_what_was_left(ray_cluster, tmp_path, encoder, images):
    index = make_index(images[:3])
    # A pass that was cut short had put the same rows into other blocks.
    leftover = pa.table({"row_id": pa.array([1002], pa.int64()), "pixels": pa.array([b"stale"], pa.large_binary())})
    pq.write_table(leftover, tmp_path / "rows-000000001002.parquet")
    assert open_cache(tmp_path) is None
    cache = build_pixel_cache(tmp_path, index, encoder.preprocessing)
    assert cache.made_now
    found = load_pixels(cache.folder, np.array([1002]), encoder.preprocessing.training_size)
    assert np.array_equal(found[0], encoder.preprocessing.resize_for_training(decode_image(images[1])))


# Damage, and several sweeps at once


@pytest.mark.ray
def test_a_missing_and_a_damaged_file_are_named(ray_cluster, tmp_path, encoder, images):
    index = make_index(images[:3])
    cache = build_pixel_cache(tmp_path, index, encoder.preprocessing)
    ids, file = index.table["row_id"].to_numpy(), min(tmp_path.glob("rows-*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"rows-0+1000\.parquet: damaged .*delete the folder"):
        load_pixels(cache.folder, ids, encoder.preprocessing.training_size)
    file.unlink()
    with pytest.raises(DataError, match="1 rows are missing; delete the folder"):
        load_pixels(cache.folder, ids, encoder.preprocessing.training_size)


def _hold_lock(folder, locked, release):
    with caches._only_writer(folder):
        locked.set()
        release.wait(30)
        (folder / "manifest.json").write_text(json.dumps(MANIFEST))


MANIFEST = {"num_rows": 3, "bad_rows": [], "seconds": 1.0, "peak_memory_bytes": 1, "peak_gpu_memory_bytes": 0}


def test_a_second_sweep_waits_for_the_pass_of_the_first(tmp_path):
    locked, release = threading.Event(), threading.Event()
    first = threading.Thread(target=_hold_lock, args=(tmp_path, locked, release))
    first.start()
    found = []

    def never(_dataset, _folder):
        raise AssertionError("a pass was made")

    second = threading.Thread(target=lambda: found.append(write_cache(tmp_path, make_index([]), {}, never, print)))
    assert locked.wait(30)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    release.set()
    second.join(30)
    first.join(30)
    assert not found[0].made_now
    assert found[0].num_rows == 3


# Blocks, without Ray


def test_a_block_is_decoded_row_by_row(encoder):
    index = make_index([image_bytes(0), b"", image_bytes(1)[:80]])
    rows = index.table.append_column("image_column", pa.array([None] * 3, pa.string()))
    decoded = caches._decode(rows, encoder.preprocessing.to_dict(), for_training=False)
    assert decoded["row_id"].to_pylist() == [1000, 1002, 1004]
    assert [error is None for error in decoded["error"].to_pylist()] == [True, False, False]
    assert decoded["error"][1].as_py() == "empty (0 bytes)"
    ids, pixels = good_pixels(decoded, encoder.preprocessing.output_size)
    assert ids.to_pylist() == [1000]
    expected = encoder.preprocessing.resize_and_crop(decode_image(image_bytes(0)))
    assert np.array_equal(pixels, expected[None])


def test_a_block_without_good_rows_leaves_receipts_and_no_file(encoder, tmp_path):
    rows = make_index([b"", b""]).table.append_column("image_column", pa.array([None] * 2, pa.string()))
    decoded = caches._decode(rows, encoder.preprocessing.to_dict(), for_training=False)
    ids, pixels = good_pixels(decoded, (32, 32))
    assert pixels.shape == (0, 32, 32, 3)
    assert {part: values.shape for part, values in encode(encoder, pixels, torch.device("cpu"), "fp32").items()} == {
        "cls": (0, 16),
        "mean": (0, 16),
    }
    receipts = write_block(str(tmp_path), pa.table({"row_id": ids}), decoded)
    assert receipts["error"].to_pylist() == ["empty (0 bytes)"] * 2
    assert list(tmp_path.iterdir()) == []


def test_bf16_features_are_near_those_of_fp32(encoder):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    exact, rounded = (encode(encoder, pixels, torch.device("cpu"), precision)["cls"] for precision in ("fp32", "bf16"))
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.1)


def test_blocks_go_one_to_a_file():
    assert BLOCKS["batch_size"] is None


# Signatures


def signed(index, encoder, precision="fp32"):
    return feature_signature(index, encoder, weights_signature(encoder), precision)


def test_the_feature_signature_follows_what_features_depend_on(encoder, images):
    index = make_index(images[:3])
    signatures = [
        signed(index, encoder),
        signed(make_index(images[:2]), encoder),
        signed(make_index(images[:3], hashes=["0", "1", "changed"]), encoder),
        signed(make_index(images[:3], first_id=7), encoder),
        signed(index, encoder, "bf16"),
        feature_signature(index, encoder, "other weights", "fp32"),
    ]
    preprocessing = encoder.preprocessing
    encoder.preprocessing = replace(preprocessing, std=(0.5,) * 3)
    signatures.append(signed(index, encoder))
    encoder.preprocessing = preprocessing
    assert len(set(signatures)) == len(signatures)
    assert signed(index, encoder) == signatures[0]


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
