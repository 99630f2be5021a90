import numpy as np
import pyarrow as pa
import pytest

from raysweep.images import near_copies
from raysweep.images.index import ImageIndex
from raysweep.images.near_copies import (
    describe_conflicts,
    describe_leaks,
    group_near_copies,
    join_groups,
    judge_groups,
)
from raysweep.training.folds import stratified_folds

SPLIT_OF = {"t": "train", "v": "validation", "e": "test"}


def make_index(splits, labels=None, contents=None, groups=None):
    """Rows with the ids 10, 12, 14 ..., each with the first letter of its split (e for test)."""
    count = len(splits)
    columns = {
        "row_id": np.arange(10, 10 + 2 * count, 2),
        "label": np.array(labels or [0] * count, np.int32),
        "split": [SPLIT_OF[split] for split in splits],
        "content_hash": [content.encode() for content in contents or map(str, range(count))],
    }
    groups = None if groups is None else np.array(groups, np.int32)
    return ImageIndex(pa.table(columns), ("a", "b"), (), (), count, "f", groups=groups)


@pytest.fixture
def looks(monkeypatch):
    """Stands in for hashes: one number for each row; rows are near copies if theirs differ by one at most."""

    def find(hashes):
        numbers = hashes[:, 0].astype(int)
        near = np.abs(numbers[:, None] - numbers) <= 1
        return np.argwhere(np.triu(near, 1))

    monkeypatch.setattr(near_copies, "find_pairs", find)
    return lambda *numbers: np.array(numbers, np.uint8)[:, None]


def test_groups_are_chains_of_pairs(looks):
    index = make_index("tttttt")
    assert group_near_copies(index, looks(1, 9, 2, 5, 3, 8), []) == ((10, 14, 18), (12, 20))
    assert group_near_copies(index, looks(1, 20, 40, 60, 80, 100), []) == ()


def test_bad_rows_are_in_no_group(looks):
    assert group_near_copies(make_index("tttttt"), looks(1, 9, 2, 5, 3, 8), [14, 20]) == ()


def test_exact_copies_belong_to_a_group_only_with_a_near_copy(looks):
    index = make_index("tttttt", contents=list("abacdd"))
    assert group_near_copies(index, looks(1, 2, 1, 50, 90, 90), []) == ((10, 12, 14),)


def test_images_that_leak_are_those_without_an_exact_copy_in_train():
    index = make_index("tevetev", contents=list("abcaxyz"))
    found = judge_groups(index, ((10, 12, 14, 16), (20, 22)))
    assert found.leaks == {"test": [(12, 10)], "validation": [(14, 10)]}
    assert judge_groups(index, ((18, 10),)).leaks == {"test": [], "validation": []}


def test_a_conflict_is_a_group_with_several_labels():
    found = judge_groups(make_index("tttte", labels=[0, 0, 1, 1, 1]), ((10, 12, 14), (16, 18)))
    assert found.conflicts == [(10, 14)]


def test_rows_of_near_copies_have_one_group_and_others_stay_alone():
    index = join_groups(make_index("tttttt"), ((10, 14), (16, 18, 20)))
    numbers = index.groups.tolist()
    assert index.groups.dtype == np.int32
    assert [numbers.index(number) for number in numbers] == [0, 1, 0, 3, 3, 3]


def test_near_copies_join_the_groups_that_an_index_has():
    index = join_groups(make_index("tttttt", groups=[0, 0, 1, 1, 2, 3]), ((12, 14), (18, 20)))
    numbers = index.groups.tolist()
    assert [numbers.index(number) for number in numbers] == [0, 0, 0, 0, 4, 4]


def test_without_near_copies_an_index_stays_as_it_is():
    index = make_index("ttt")
    assert join_groups(index, ()) is index


def test_folds_keep_near_copies_together():
    num_rows = 60
    pairs = tuple((10 + 2 * row, 10 + 2 * (row + 30)) for row in range(30))
    index = join_groups(make_index("t" * num_rows, labels=[row % 2 for row in range(num_rows)]), pairs)
    folds = stratified_folds(index.table["label"].to_numpy(), 5, 0, index.groups.tolist())
    assert np.array_equal(folds[:30], folds[30:])
    assert len(set(folds.tolist())) == 5


def test_the_warnings_count_and_give_an_example():
    assert describe_leaks("test", 60, 1, "a.png", "b.png") == (
        "1 of 60 test images has a near copy in train (leakage), such as a.png and b.png; remove them, or set "
        "data.group to keep them in one split; all are in near_copies.json"
    )
    assert describe_leaks("test", 9000, 1200, "a", "b").startswith("1,200 of 9,000 test images have a near copy in")
    assert describe_conflicts(2, ("a.png", "b.png"), ("cat", "dog")) == (
        "2 groups of near copies in more than one class (conflicting labels): a.png (cat) and b.png (dog); all are in "
        "near_copies.json"
    )
    assert describe_conflicts(1, ("a", "b"), ("c", "d")).startswith("1 group of")
