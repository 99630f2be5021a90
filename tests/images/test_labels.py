import pytest

from raysweep.errors import DataError
from raysweep.images.labels import number_labels, sort_classes
from raysweep.images.listed_rows import Row, Rows


def rows_with(*labels_of_files):
    return Rows(Row(f"{number}.png", label) for number, labels in enumerate(labels_of_files) for label in labels)


def label_names(rows):
    numbers, classes, warnings = number_labels(rows)
    return [classes[number] for number in numbers], warnings


def warnings_about(*labels):
    return label_names(rows_with(*([label] for label in labels)))[1]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("01", "1", "1"), ["'01' (1) and '1' (2)"]),
        (("1", "1.0", "2"), ["'1' (1) and '1.0' (1)"]),
        (("Cat", "cat", "CAT"), ["'CAT' (1) and 'Cat' (1) and 'cat' (1)"]),
        (("hot dog", "hot_dog", "Hot-Dog"), ["'Hot-Dog' (1) and 'hot dog' (1) and 'hot_dog' (1)"]),
        (("ﬁg", "fig"), ["'fig' (1) and 'ﬁg' (1)"]),
        (("\uff43\uff41\uff54", "cat"), ["'cat' (1) and '\uff43\uff41\uff54' (1)"]),
        (("cat", "ca\u200bt"), ["'cat' (1) and 'ca\\u200bt' (1)"]),
        (("Straße", "STRASSE"), ["'STRASSE' (1) and 'Straße' (1)"]),
        (("class_01", "class 1"), ["'class 1' (1) and 'class_01' (1)"]),
        (("a", "A", "b", "B"), ["'A' (1) and 'a' (1)", "'B' (1) and 'b' (1)"]),
    ],
)
def test_labels_that_look_alike_are_named_with_their_counts_in_one_warning(labels, words):
    (warning,) = warnings_about(*labels)
    assert "look alike" in warning
    assert all(word in warning for word in words), warning


@pytest.mark.parametrize(
    "labels", [("-1", "1"), ("1", "10", "11"), ("1-1", "11"), ("1.05", "1.5"), ("caf\u00e9", "cafe"), ("cat", "cats")]
)
def test_labels_that_differ_are_not_warned_about(labels):
    assert warnings_about(*labels) == []


def test_many_pairs_are_cut_short_with_their_number():
    (warning,) = warnings_about(*"abcdefg", *"ABCDEFG")
    assert warning.endswith("and 2 more")


def test_blanks_around_labels_are_taken_off_and_named():
    names, warnings = label_names(rows_with(["cat "], ["cat"], ["\u00a0dog"]))
    assert names == ["cat", "cat", "dog"]
    assert warnings == [
        "2 labels had spaces around them, which were taken off: 'cat ' (1) is 'cat', '\\xa0dog' (1) is 'dog'"
    ]


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(DataError, match=r"label 0\.5; accepted: text or whole numbers"):
        label_names(Rows([Row("x.png", 0.5)]))


def test_classes_are_sorted_by_value_if_all_are_numbers():
    assert sort_classes({"10", "9", "-1"}) == ("-1", "9", "10")
    assert sort_classes({"10", "9", "b"}) == ("10", "9", "b")
    assert sort_classes({"9" * 5000, "1"}) == ("1", "9" * 5000)


def test_images_with_several_labels_are_refused_as_multi_label():
    with pytest.raises(DataError, match=r"multi-label: 2 of 3 images have rows with different labels, such as 0.png"):
        label_names(rows_with("ab", "ab", "b"))


def test_images_in_several_rows_are_counted():
    words = "rows name an image that another row names too; such images count several times"
    assert label_names(rows_with("aa", "b", "bbb"))[1] == [f"3 {words}"]
    assert label_names(rows_with("ab", *"b" * 20))[1] == [f"1 {words}"]
    assert label_names(Rows([Row("x.parquet", "a", position=0), Row("x.parquet", "b", position=1)]))[1] == []
