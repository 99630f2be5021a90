import pytest

from raysweep.errors import DataError
from raysweep.images.labels import label_names, sort_classes
from raysweep.images.tables import Row


def warnings_about(*labels):
    return label_names([Row("x.png", label) for label in labels])[1]


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
    names, warnings = label_names([Row("x.png", label) for label in ("cat ", "cat", "\u00a0dog")])
    assert names == ["cat", "cat", "dog"]
    assert warnings == [
        "2 labels had spaces around them, which were taken off: 'cat ' (1) is 'cat', '\\xa0dog' (1) is 'dog'"
    ]


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(DataError, match=r"label 0\.5; accepted: text or whole numbers"):
        label_names([Row("x.png", 0.5)])


def test_classes_are_sorted_by_value_if_all_are_numbers():
    assert sort_classes({"10", "9", "-1"}) == ("-1", "9", "10")
    assert sort_classes({"10", "9", "b"}) == ("10", "9", "b")
    assert sort_classes({"9" * 5000, "1"}) == ("1", "9" * 5000)
