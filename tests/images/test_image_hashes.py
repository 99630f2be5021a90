import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from raysweep.images import image_hashes
from raysweep.images.image_hashes import (
    FLAT,
    HASH_BYTES,
    MAX_BITS,
    add_hashes,
    find_pairs,
    hash_image,
    hashes_file,
    read_hashes,
    write_hashes,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def blobs(seed, size=(96, 80)):
    """An image of soft blobs of many sizes, as photos have."""
    random = np.random.default_rng(seed)
    layers = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for side in (3, 6, 12)
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.5), layers[2], 0.3)


def as_jpeg(image, quality=40):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image, share):
    """Without `share` of the width and of the height, half of it at each side."""
    x, y = (round(side * share / 2) for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES = {
    "quality 40": as_jpeg,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirror": ImageOps.mirror,
    "mirror, quality 40": lambda image: as_jpeg(ImageOps.mirror(image)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_a_near_copy(change):
    images = [blobs(seed) for seed in range(8)]
    hashes = np.stack([hash_image(image) for image in [*images, *map(CHANGES[change], images)]])
    assert find_pairs(hashes).tolist() == [[number, 8 + number] for number in range(8)]


def test_the_hash_has_the_signs_of_the_cosine_transform():
    from scipy.fft import dctn

    image = blobs(0, (64, 64))
    is_positive = dctn(np.asarray(image.convert("L"), float))[:16, :16] > 0
    is_positive[0, 0] = False
    bits = np.unpackbits(hash_image(image))
    assert np.array_equal(bits[:128].reshape(16, 8), is_positive[:, ::2])
    assert np.array_equal(bits[128:].reshape(16, 8), is_positive[:, 1::2])


@pytest.mark.parametrize("noise", [0, 0.5, 1])
def test_images_of_hardly_more_than_one_colour_have_no_hash(noise):
    random = np.random.default_rng(0)
    images = [
        as_jpeg(Image.fromarray((level + random.normal(0, noise, (96, 96, 3))).round().astype(np.uint8)))
        for level in (60, 60, 61, 200)
    ]
    hashes = np.stack([hash_image(image) for image in images])
    assert not hashes.any()
    assert find_pairs(hashes).shape == (0, 2)


def test_a_faint_image_has_a_hash():
    stripes = np.where(np.arange(64) % 32 < 16, 100, 100 + 3 * FLAT).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(stripes[:, None, None], (64, 64, 3)).copy())
    assert hash_image(image).any()


def random_hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, HASH_BYTES), np.uint8)


def with_flips(hashes, num_bits, seed=1):
    """Hashes that differ in so many bits; the first bit is none of the 255."""
    random, bits = np.random.default_rng(seed), np.unpackbits(hashes, axis=1)
    for row in bits:
        row[1 + random.permutation(255)[:num_bits]] ^= 1
    return np.packbits(bits, axis=1)


@pytest.mark.parametrize(("num_bits", "is_found"), [(0, True), (MAX_BITS, True), (MAX_BITS + 1, False)])
def test_pairs_have_at_most_a_fifth_of_different_bits(num_bits, is_found, monkeypatch):
    hashes = random_hashes(70)
    hashes[:, 0] &= 127
    everything = np.concatenate([hashes, with_flips(hashes[40:43], num_bits)])
    # Without the rule for pairs by chance, which looks at the next bits too.
    monkeypatch.setattr(image_hashes, "_limit", lambda _up_to, _most: MAX_BITS)
    assert find_pairs(everything).tolist() == [[40 + copy, 70 + copy] for copy in range(3)] * is_found


def test_pairs_are_those_of_a_plain_comparison():
    hashes = np.concatenate([random_hashes(90), with_flips(random_hashes(30), 25)])
    bits = np.unpackbits(hashes, axis=1).astype(int)
    expected = []
    for first in range(120):
        for second in range(first + 1, 120):
            differs = bits[first] != bits[second]
            even, odd = differs[:128].sum(), differs[128:].sum()
            if even + min(odd, 128 - odd) <= MAX_BITS:
                expected.append([first, second])
    assert len(expected) == 30
    assert find_pairs(hashes).tolist() == expected


def test_images_that_look_alike_by_chance_are_no_copies():
    """Around one hash, pairs are the more the farther apart; two of them are copies."""
    around = np.concatenate([with_flips(np.repeat(random_hashes(1), 60, 0), bits, bits) for bits in (28, 30, 32)])
    assert find_pairs(around).tolist() == []
    assert find_pairs(np.concatenate([around, with_flips(around[7:9], 2)])).tolist() == [[7, 180], [8, 181]]


@pytest.mark.parametrize("compared", [50_000, 100])
def test_images_of_one_scene_are_no_copies(monkeypatch, compared):
    """As from a camera that does not move: nearly all pairs are below the limit."""
    monkeypatch.setattr(image_hashes, "MAX_COMPARED", compared)
    scene = with_flips(np.repeat(random_hashes(1), 200, 0), 15, 15)
    assert find_pairs(scene).tolist() == []
    if compared > 200:
        assert find_pairs(np.concatenate([scene, with_flips(scene[7:8], 1)])).tolist() == [[7, 200]]


def test_memory_does_not_grow_with_the_pairs():
    found = image_hashes._NearPairs(10)
    for _ in range(50):
        found.add(np.zeros((100, 2), np.int64), np.full(100, 40, np.uint8))
        assert len(found.pairs) <= 300
    found.add(np.array([[1, 2]]), np.array([3], np.uint8))
    assert found.below_limit().tolist() == [[1, 2]]


def test_among_many_images_those_with_few_different_bits_are_found(monkeypatch):
    monkeypatch.setattr(image_hashes, "MAX_COMPARED", 1000)
    hashes = random_hashes(3000)
    mirrored = with_flips(hashes[10:15], 6)
    mirrored[:, HASH_BYTES // 2 :] ^= 255
    found = find_pairs(np.concatenate([hashes, with_flips(hashes[:5], 6), mirrored]))
    assert found.tolist() == [[copy + 5 * (copy >= 5), 3000 + copy] for copy in range(10)]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count):
    assert find_pairs(random_hashes(count)).shape == (0, 2)


def test_hashes_are_read_in_the_order_of_the_rows(tmp_path):
    path, hashes = tmp_path / "caches" / "hashes.parquet", random_hashes(5)
    ids = np.array([4, 2, 10, 6, 8])
    write_hashes(path, ids, hashes)
    order = np.argsort(ids)
    assert np.array_equal(read_hashes(path, ids[order]), hashes[order])
    assert read_hashes(path, ids[order] + 1) is None  # of other rows
    content = bytearray(path.read_bytes())
    content[content.index(hashes[2].tobytes())] ^= 1
    path.write_bytes(content)
    assert read_hashes(path, ids[order]) is None
    path.write_bytes(b"PAR1")
    assert read_hashes(path, ids[order]) is None
    assert read_hashes(tmp_path / "none.parquet", ids) is None


def test_hashes_of_rows_that_are_read_later_are_added(tmp_path):
    path, hashes, ids = tmp_path / "hashes.parquet", random_hashes(5), np.arange(2, 12, 2)
    add_hashes(path, ids, ids[:1], hashes[:1])
    assert not path.exists()
    write_hashes(path, ids, hashes)
    later = random_hashes(2, seed=1)
    add_hashes(path, ids, np.array([8, 2]), later)
    assert np.array_equal(read_hashes(path, ids), np.stack([later[1], *hashes[1:3], later[0], hashes[4]]))


def test_other_rows_have_another_file(tmp_path):
    one, same, other = (hashes_file(tmp_path, SimpleNamespace(row_signature=name)) for name in ("a", "a", "b"))
    assert one == same
    assert one != other
    assert one.parent == tmp_path


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared beans images are not here")
def test_changed_photos_are_found_and_other_photos_are_not():
    images = [Image.open(path).convert("RGB") for path in sorted((SHARED / "beans").glob("*/*/*.jpg"))[::10]]
    hashes = np.stack([hash_image(image) for image in images])
    assert find_pairs(hashes).shape == (0, 2)
    for change in CHANGES.values():
        changed = np.stack([hash_image(change(image)) for image in images])
        pairs = find_pairs(np.concatenate([hashes, changed])).tolist()
        assert pairs == [[number, len(images) + number] for number in range(len(images))]
    found = [
        len(find_pairs(np.stack([hashes[number], hash_image(cropped(image, 0.05))])))
        for number, image in enumerate(images)
    ]
    assert np.mean(found) >= 0.8
