from xml.etree import ElementTree

from raysweep.results.confusion_matrix import confusion_matrix_svg


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_every_count_that_is_not_zero_and_every_class_is_there():
    found = texts(confusion_matrix_svg(["cat", "dog"], [[7, 2], [0, 5]]))
    assert sorted(found) == sorted(["predicted", "true", "cat", "cat", "dog", "dog", "7", "2", "5"])


def test_names_from_the_data_are_text_and_long_ones_are_cut():
    found = texts(confusion_matrix_svg(["<script>alert(1)</script>"[:20], "x" * 100], [[1, 0], [0, 1]]))
    assert "<script>alert(1)</sc" in found
    assert max(map(len, found)) == 24


def test_control_characters_do_not_spoil_the_picture():
    svg = confusion_matrix_svg(["a\x00\x1b[31m", "b<\u202e"], [[1, 0], [0, 1]])
    assert ElementTree.fromstring(svg).tag.endswith("svg")
