"""Hashes of what images look like, which are nearly the same for an image and its copy in another size or quality.

The hash of an image has the signs of the 16 x 16 lowest terms of the discrete cosine transform of its 64 x 64 grey
pixels, without the constant (as pHash; Zauner 2010). In the mirrored image the terms of odd horizontal frequency have
the other sign, so one hash serves for both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysweep.errors import DataError
from raysweep.images.index import ImageIndex
from raysweep.storage.copies import fetch, publish, replacing
from raysweep.storage.paths import signature

SIDE, NUM_FREQUENCIES = 64, 16
HASH_BYTES = NUM_FREQUENCIES**2 // 8
NUM_ODD = NUM_FREQUENCIES**2 // 2  # terms of odd horizontal frequency, which are the last bits
MAX_BITS = 51  # .20 of 255
NEXT_BITS = 8  # so many bits beyond a limit tell whether images are below it by chance
FLAT = 2.0  # standard deviation of the grey pixels, of 255, below which the signs are those of noise
MAX_COMPARED = 50_000  # images of which every pair is compared
ROWS_AT_ONCE = 16  # so that a block of 50,000 columns stays in the cache of a processor
NUM_ORDERS, NUM_NEIGHBOURS = 16, 8
# Pairs an image: more are not copies, but images of one scene, as from a camera that does not move.
MOST_PAIRS = 10
METHOD = 1  # a new value has the hashes made again

_COSINES = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(NUM_FREQUENCIES)[:, None]).astype(np.float32)


def hash_image(image: Image.Image) -> np.ndarray:
    """Returns the hash of an RGB image, uint8 `(32,)`; zeros if the image has hardly more than one colour."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    grey = np.asarray(small, np.float32)
    if grey.std() < FLAT:
        return np.zeros(HASH_BYTES, np.uint8)
    is_positive = _COSINES @ grey @ _COSINES.T > 0
    is_positive[0, 0] = False
    return np.packbits(np.concatenate([is_positive[:, ::2].ravel(), is_positive[:, 1::2].ravel()]))


def find_pairs(hashes: np.ndarray) -> np.ndarray:
    """Finds the images that are near copies of one another, mirrored or not.

    Up to 50,000 images every pair is compared. Of more, those that stand side by side when the hashes are sorted by
    some of their bits, in several orders (Charikar 2002): copies that differ in many bits are then missed.

    Args:
        hashes: uint8 `(num_images, 32)`; images whose hash is zero are left out.

    Returns:
        int64 `(num_pairs, 2)`, positions of the images of each pair, the smaller one first.
    """
    known = np.flatnonzero(hashes.any(axis=1))
    words = np.ascontiguousarray(hashes[known]).view(np.uint64)
    found = _NearPairs(len(words))
    (_compare_all if len(words) <= MAX_COMPARED else _compare_sorted)(words, found)
    near = found.below_limit()
    return np.asarray(known[near[np.lexsort(near.T[::-1])]])


class _NearPairs:
    """Pairs of images with few differing bits, and how many pairs have how many; memory grows with the images only."""

    def __init__(self, num_images: int) -> None:
        self.most, self.cut = MOST_PAIRS * num_images, MAX_BITS
        self.counts = np.zeros(MAX_BITS + NEXT_BITS + 1, np.int64)  # by differing bits
        self.pairs, self.bits = np.empty((0, 2), np.int64), np.empty(0, np.uint8)

    def add(self, pairs: np.ndarray, bits: np.ndarray) -> None:
        """Adds pairs, int64 `(n, 2)`, with at most `MAX_BITS + NEXT_BITS` differing bits, uint8 `(n,)`."""
        self.counts += np.bincount(bits, minlength=len(self.counts))
        self.pairs, self.bits = np.concatenate([self.pairs, pairs]), np.concatenate([self.bits, bits])
        if len(self.pairs) > 2 * self.most:
            # Counts only grow, so that the limit can only be lower.
            few = np.flatnonzero(np.cumsum(self.counts)[: self.cut + 1] <= self.most)
            self.cut = int(few[-1]) if len(few) else -1
            kept = self.bits <= self.cut
            self.pairs, self.bits = self.pairs[kept], self.bits[kept]

    def below_limit(self) -> np.ndarray:
        """Returns the pairs that are of copies, int64 `(num_pairs, 2)`."""
        return self.pairs[self.bits.astype(np.int64) <= _limit(np.cumsum(self.counts), self.most)]


def _limit(up_to: np.ndarray, most: int) -> int:
    """Returns the number of differing bits up to which a pair is of copies; -1 for none.

    Images that look alike, such as drawn digits, have near hashes by chance: each bit more then has many more pairs. So
    the limit is lowered until the next bits have no more pairs than all bits up to it. Images of one scene are all near
    one another: the limit is also lowered until there are few pairs.

    Args:
        up_to: int64 `(MAX_BITS + NEXT_BITS + 1,)`, how many pairs have at most as many differing bits.
        most: most pairs of copies.
    """
    fits = (2 * up_to[: MAX_BITS + 1] >= up_to[NEXT_BITS:]) & (up_to[: MAX_BITS + 1] <= most)
    return int(np.flatnonzero(fits)[-1]) if fits.any() else -1


def _differing_bits(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns in how many bits hashes differ, or one of them mirrored, if that is less; uint8 of the broadcast shape.

    Args:
        words: uint64 `(..., 4)`.
        others: uint64 `(..., 4)`.
    """
    counts = np.bitwise_count(words ^ others)
    odd = counts[..., 2] + counts[..., 3]
    return np.asarray(counts[..., 0] + counts[..., 1] + np.minimum(odd, NUM_ODD - odd))


def _compare_all(words: np.ndarray, found: _NearPairs) -> None:
    """Compares every hash, uint64 `(num_images, 4)`, with every other."""
    columns, most = np.ascontiguousarray(words.T), MAX_BITS + NEXT_BITS
    for start in range(0, len(words), ROWS_AT_ONCE):
        block = words[start : start + ROWS_AT_ONCE, :, None]
        # Of even frequencies alone, few pairs of different images have so few differing bits.
        even = np.bitwise_count(block[:, 0] ^ columns[0, start:])
        even += np.bitwise_count(block[:, 1] ^ columns[1, start:])
        first, second = np.nonzero(even <= most)
        is_later = second > first
        found.add(*_near(words, start + first[is_later], start + second[is_later]))


def _near(words: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = _differing_bits(words[first], words[second])
    is_near = bits <= MAX_BITS + NEXT_BITS
    return np.stack([first[is_near], second[is_near]], axis=1), bits[is_near]


def _compare_sorted(words: np.ndarray, found: _NearPairs) -> None:
    """Compares hashes, uint64 `(num_images, 4)`, that are neighbours in sorted orders."""
    generator, num_images = np.random.default_rng(0), len(words)
    mirrored = words ^ np.array([0, 0, ~np.uint64(0), ~np.uint64(0)], np.uint64)
    as_bytes = np.concatenate([words, mirrored]).view(np.uint8)
    pairs = np.empty((0, 2), np.int64)
    for _ in range(NUM_ORDERS):
        chosen = 1 + generator.permutation(8 * HASH_BYTES - 1)[:64]
        keys = np.zeros(len(as_bytes), np.uint64)
        for bit in chosen.tolist():
            keys = (keys << np.uint64(1)) | ((as_bytes[:, bit // 8] >> (7 - bit % 8)) & 1)
        order = np.argsort(keys, kind="stable") % num_images
        for step in range(1, NUM_NEIGHBOURS + 1):
            new, _ = _near(words, order[:-step], order[step:])
            pairs = np.concatenate([pairs, np.sort(new[new[:, 0] != new[:, 1]], axis=1)])
        pairs = np.unique(pairs, axis=0)
        if len(pairs) > 2 * found.most:  # images of one scene, of which more pairs would be left out all the same
            break
    found.add(pairs, _differing_bits(words[pairs[:, 0]], words[pairs[:, 1]]))


def hashes_file(caches: Path, index: ImageIndex) -> Path:
    """Returns the path of the hashes of an index's images, which all caches of these images share."""
    return caches / f"hashes-{signature(['hashes', METHOD, index.row_signature])}.parquet"


def write_hashes(path: Path, row_ids: np.ndarray, hashes: np.ndarray) -> None:
    """Writes the hashes of all rows of an index.

    Args:
        path: From `hashes_file`.
        row_ids: int64 `(num_rows,)`.
        hashes: uint8 `(num_rows, 32)`; zeros where there is none.
    """
    order = np.argsort(row_ids)
    flat = pa.py_buffer(np.ascontiguousarray(hashes[order]))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(order), [None, flat])
    with replacing(path) as temporary:
        pq.write_table(pa.table({"row_id": row_ids[order], "hash": column}), temporary, write_page_checksum=True)
    publish(path)


def add_hashes(path: Path, all_ids: np.ndarray, row_ids: np.ndarray, hashes: np.ndarray) -> None:
    """Writes the hashes of rows that were read later to the file that has those of the others, if there is one.

    Args:
        path: From `hashes_file`.
        all_ids: int64 `(num_rows,)`, all rows of the index, ascending.
        row_ids: int64 `(num_new,)`, some of them.
        hashes: uint8 `(num_new, 32)`.
    """
    known = read_hashes(path, all_ids)
    if known is not None:
        known[np.searchsorted(all_ids, row_ids)] = hashes
        write_hashes(path, all_ids, known)


def read_hashes(path: Path, row_ids: np.ndarray) -> np.ndarray | None:
    """Reads the hashes of rows, uint8 `(num_rows, 32)`; None if they were never written, or are damaged.

    Args:
        path: From `hashes_file`.
        row_ids: int64 `(num_rows,)`, all rows of the index, ascending.
    """
    try:
        if not fetch(path).exists():
            return None
        table = pq.read_table(path, page_checksum_verification=True).combine_chunks()
        if table.schema.field("hash").type != pa.binary(HASH_BYTES) or not np.array_equal(table["row_id"], row_ids):
            return None
        return np.frombuffer(bytearray().join(table["hash"].to_pylist()), np.uint8).reshape(-1, HASH_BYTES)
    except (pa.ArrowException, OSError, KeyError, DataError):
        return None
