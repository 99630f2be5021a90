import random

import numpy as np
import pytest

from raysweep.images import texts
from raysweep.images.texts import Lookup, Texts

WORDS = ["a", "é/", "x" * 5, "a-b/c", "a/b", "a b", "\U0001f600"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(texts, "TEXTS_PER_CHUNK", 8)


def random_texts(seed, num, words=WORDS):
    dice = random.Random(seed)
    return [dice.choice(words) + str(dice.randint(0, 9)) for _ in range(num)]


@pytest.mark.parametrize("num", [0, 1, 7, 8, 9, 40])
def test_texts_are_those_that_were_added(num):
    expected = random_texts(num, num, [*WORDS, "\udcff"])
    found = Texts(expected)
    assert len(found) == num
    assert list(found) == [found[place] for place in range(num)] == expected
    assert found[2:30:3] == expected[2:30:3]
    if num:
        assert found[-1] == expected[-1]
    with pytest.raises(IndexError):
        found[num]


@pytest.mark.parametrize("num", [0, 1, 8, 40])
def test_they_are_sorted_as_python_sorts_them(num):
    expected = random_texts(num, num, [*WORDS, "\udcff", "\uffee"])
    found = Texts(expected)
    found.sort()
    assert list(found) == sorted(expected)
    found.append("z")
    assert list(found) == [*sorted(expected), "z"]


def test_some_are_kept():
    expected = random_texts(0, 30) + ["same"] * 30
    is_kept = np.arange(60) % 3 > 0
    found = Texts(expected)
    found.keep(is_kept)
    assert list(found) == [found[place] for place in range(len(found))]
    assert list(found) == [text for text, kept in zip(expected, is_kept, strict=True) if kept]


def test_any_part_becomes_a_column():
    expected = random_texts(0, 20) + ["same"] * 20
    found = Texts(expected)
    for start in range(41):
        for stop in range(start, 41):
            assert found.to_arrow(start, stop).to_pylist() == expected[start:stop]


def test_a_long_text_that_many_rows_have_is_kept_once(monkeypatch):
    monkeypatch.setattr(texts, "TEXTS_PER_CHUNK", 1_000)
    found = Texts(["x" * 100] * 10_000)
    assert found.to_arrow().nbytes < 6 * 10_000


def test_texts_are_found_by_their_keys():
    expected = [*dict.fromkeys(random_texts(0, 40))]
    lookup = Lookup(Texts(expected), key=lambda text: f"/folder/{text}")
    assert [lookup.find(f"/folder/{text}") for text in expected] == list(range(len(expected)))
    assert expected[0] not in lookup
    assert "/folder/none" not in lookup


def test_texts_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(texts, "hash", len, raising=False)
    lookup = Lookup(Texts(["aa", "bb", "c"]))
    assert [lookup.find(text) for text in ("aa", "bb", "c", "dd")] == [0, 1, 2, -1]
