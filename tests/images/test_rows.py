"""Which rows a sweep uses: the usable ones of each split, few-shot draws, and the quarantine."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysweep.errors import DataError
from raysweep.images.index import BadRow, ImageIndex
from raysweep.images.rows import SplitRows, count_groups, draw_subsets, select_rows, write_quarantine
from raysweep.images.splits import few_shot


def index_of(num_per_class: int = 40, num_classes: int = 3) -> ImageIndex:
    """Row ids start at 100; of each class's rows half are train, a quarter validation, a quarter test."""
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), num_per_class)
    quarter = num_per_class // 4
    splits = (["train"] * 2 * quarter + ["validation"] * quarter + ["test"] * quarter) * num_classes
    table = pa.table({"row_id": np.arange(100, 100 + len(labels)), "label": labels, "split": splits})
    return ImageIndex(table, tuple("abc"[:num_classes]), (), (), len(labels), "fingerprint")


def test_every_usable_row_goes_to_its_split():
    rows = select_rows(index_of(), [BadRow(100, "a.jpg", "truncated")])
    assert {split: len(some) for split, some in rows.items()} == {"train": 59, "validation": 30, "test": 30}
    assert 100 not in rows["train"].ids
    assert np.concatenate([some.ids for some in rows.values()]).shape == (119,)
    assert all(some.ids.dtype == some.labels.dtype == np.int64 for some in rows.values())
    assert all(((some.ids - 100) // 40 == some.labels).all() for some in rows.values())


def test_a_split_that_lost_all_its_rows_is_named():
    index = index_of()
    test = index.table.filter(pc.equal(index.table["split"], "test"))["row_id"].to_pylist()
    with pytest.raises(DataError, match=r"no test images left of 30: see quarantine\.csv"):
        select_rows(index, [BadRow(row_id, "x.jpg", "truncated") for row_id in test])


def test_a_split_that_never_had_rows_is_named():
    index = index_of()
    only_train = replace(index, table=index.table.filter(pc.equal(index.table["split"], "train")))
    with pytest.raises(DataError, match=r"data: no validation images; each split needs one"):
        select_rows(only_train, [])


@pytest.mark.parametrize(
    "places", [[2, 0], np.array([False, True, True]), slice(1, None)], ids=["list", "mask", "slice"]
)
def test_rows_are_taken_with_their_labels(places):
    rows = SplitRows(np.array([7, 8, 9]), np.array([0, 1, 2]))
    taken = rows.take(places)
    assert taken.ids.tolist() == rows.ids[places].tolist()
    assert (taken.ids - 7).tolist() == taken.labels.tolist()
    assert len(taken) == 2


def test_groups_go_with_their_rows():
    index = index_of()
    grouped = replace(index, groups=np.arange(len(index.table), dtype=np.int32) // 2)
    rows = select_rows(grouped, [BadRow(100, "a.jpg", "truncated")])
    assert all((some.groups == (some.ids - 100) // 2).all() for some in rows.values())
    assert all(some.groups is None for some in select_rows(index, []).values())


def test_groups_are_counted_by_class_over_all_splits():
    index, bad = index_of(), [BadRow(100, "a.jpg", "truncated"), BadRow(101, "b.jpg", "truncated")]
    assert count_groups(index, []) == [40, 40, 40]
    assert count_groups(index, bad) == [38, 40, 40]
    # Groups of 30 consecutive rows: one with rows of both the first and the second class, one of the second and third.
    grouped = replace(index, groups=np.arange(len(index.table), dtype=np.int32) // 30)
    assert count_groups(grouped, bad) == [2, 2, 2]
    lost = [BadRow(row_id, "x.jpg", "truncated") for row_id in range(130, 140)]
    assert count_groups(grouped, lost) == [1, 2, 2]


# Few-shot draws


def test_all_images_need_no_draw():
    assert draw_subsets(select_rows(index_of(), []), "all", 5, 1) is None


def test_each_draw_takes_shots_per_class_and_caps_validation():
    rows = select_rows(index_of(160), [])
    draws = draw_subsets(rows, 5, 3, 1)
    assert draws.num_draws == 3
    assert (draws.train.shape, draws.train.dtype) == ((3, 15), np.int64)
    assert (draws.validation.shape, draws.validation.dtype) == ((3, 48), np.int64)
    for split, split_draws, expected in (("train", draws.train, 5), ("validation", draws.validation, 16)):
        for places in split_draws:
            assert len(set(places.tolist())) == len(places)
            assert np.bincount(rows[split].take(places).labels).tolist() == [expected] * 3


def test_a_class_with_fewer_images_gives_all_in_every_draw():
    rows = select_rows(index_of(), [BadRow(row_id, "x.jpg", "truncated") for row_id in range(100, 117)])
    draws = draw_subsets(rows, 5, 4, 1)
    assert [np.bincount(rows["train"].labels[places]).tolist() for places in draws.train] == [[3, 5, 5]] * 4


def test_draws_are_nested_over_shots_and_differ_from_each_other():
    rows = select_rows(index_of(), [])
    one, five, ten = (draw_subsets(rows, shots, 4, 1).train for shots in (1, 5, 10))
    for draw in range(4):
        assert set(one[draw]) < set(five[draw]) < set(ten[draw])
    assert len({tuple(places) for places in five}) == 4


def test_the_first_draw_is_that_of_the_seed_alone():
    rows = select_rows(index_of(), [])
    many, single, other = (draw_subsets(rows, 5, draws, seed) for draws, seed in ((3, 7), (1, 7), (1, 8)))
    for split, limit in (("train", 5), ("validation", 16)):
        expected = few_shot(rows[split].labels, limit, 7)
        assert getattr(many, split)[0].tolist() == getattr(single, split)[0].tolist() == expected.tolist()
    assert other.train.tolist() != single.train.tolist()


# The quarantine


def test_the_quarantine_lists_each_bad_row_with_its_reason(tmp_path):
    write_quarantine(tmp_path / "quarantine.csv", [BadRow(3, "a, b.jpg", "truncated")])
    assert (tmp_path / "quarantine.csv").read_text() == 'row_id,source,reason\n3,"a, b.jpg",truncated\n'


def test_an_empty_quarantine_has_its_header(tmp_path):
    write_quarantine(tmp_path / "quarantine.csv", [])
    assert (tmp_path / "quarantine.csv").read_text() == "row_id,source,reason\n"
