import hashlib
import random

import numpy as np
import pytest

from raysweep.images.contents import contents_of


def random_hashes(seed, num, num_distinct):
    dice = random.Random(seed)
    return [hashlib.sha256(bytes([dice.randrange(num_distinct)])).digest() for _ in range(num)]


def same_start(number):
    return b"12345678" + hashlib.sha256(bytes([number])).digest()[8:]


@pytest.mark.parametrize(
    "hashes",
    [
        random_hashes(0, 50, 200),
        random_hashes(1, 90, 7),
        [same_start(number) for number in (3, 1, 2, 3, 1)],
        [b"0" * 32],
    ],
)
def test_rows_are_ordered_and_numbered_by_their_hashes(hashes):
    contents = contents_of(hashes)
    assert contents.order.tolist() == sorted(range(len(hashes)), key=hashes.__getitem__)
    distinct = sorted(set(hashes))
    assert contents.numbers.tolist() == [distinct.index(content) for content in hashes]
    together = contents.together()
    assert [together.name_of(number) for number in together.numbers.tolist()] == [one.hex() for one in hashes]
    assert contents.to_arrow().to_pylist() == hashes


def test_more_rows_than_are_compared_at_once():
    hashes = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(2**16 + 5)]
    numbers = contents_of([*hashes, *hashes[::-1]]).numbers
    assert (numbers[: len(hashes)] == numbers[len(hashes) :][::-1]).all()
    assert len(set(numbers.tolist())) == len(hashes)


def test_images_with_differing_values_are_counted_and_the_first_is_the_example():
    contents = contents_of([b"9" * 32, b"1" * 32, b"9" * 32, b"1" * 32, b"5" * 32])
    num_images, rows = contents.differing(np.array([0, 0, 1, 1, 1]))
    assert (num_images, rows.tolist()) == (2, [0, 2])
    num_images, rows = contents.differing(np.array([0, 0, 0, 0, 1]))
    assert (num_images, rows.tolist()) == (0, [])
