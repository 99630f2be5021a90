import numpy as np

from raysweep.images.listed_rows import Row, Rows, Values

ROWS = [
    Row("a.png", "cat", "train", group="p"),
    Row("x.parquet", 1, None, 0),
    Row("x.parquet", True, None, 1),
    Row("t.csv line 3", None, problem="no label"),
    Row("b.png", 1.0, inline=b"png"),
    Row("c.png", ["no", "class"], "train"),
]


def test_rows_are_those_that_were_added_with_the_types_of_their_values():
    rows = Rows(ROWS)
    assert list(map(repr, rows)) == [repr(rows[place]) for place in range(len(ROWS))] == list(map(repr, ROWS))
    assert rows[-1].label == ["no", "class"]
    assert rows[1:3] == ROWS[1:3]
    assert rows.usable.tolist() == [True, True, True, False, True, True]
    assert rows.named_files.tolist() == [True, False, False, True, False, True]


def test_rows_that_are_kept_keep_all_that_belongs_to_them():
    rows = Rows(ROWS)
    rows.keep(np.array([False, True, False, True, True, True]))
    assert list(map(repr, rows)) == list(map(repr, [ROWS[1], *ROWS[3:]]))
    rows.append(ROWS[0])
    assert rows[-1] == ROWS[0]
    assert rows.problems == {1: "no label"}


def test_what_is_needed_to_read_rows_becomes_columns():
    table = Rows(ROWS).to_arrow(1, 5)
    assert table["path"].to_pylist() == ["x.parquet", "x.parquet", "t.csv line 3", "b.png"]
    assert table["position"].to_pylist() == [0, 1, -1, -1]
    assert table["image"].to_pylist() == [None, None, None, b"png"]


def test_values_are_counted_by_their_numbers():
    values = Values(["a", 1, "a", None, True])
    assert values.distinct == ["a", 1, None, True]
    assert values.counts() == {0: 2, 1: 1, 2: 1, 3: 1}
    assert values.counts(np.array([True, False, True, False, False])) == {0: 2}
