from dataclasses import replace

import pytest
from run_folder import make_row

from raysweep.results.conclusion import conclusion, describe_choice, recommended

BEST = make_row(tied_with_best=True)
CHEAP = make_row("dino-linear_probe", tied_with_best=True, is_recommended=True, train_seconds=10.0, test_accuracy=0.79)
WORSE = make_row("dino-knn", test_accuracy=0.5, train_seconds=1.0)


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        ([BEST], "cnn fine_tune has a test accuracy of 0.800 [0.610, 0.920], with lr 0.01, 4 epochs."),
        ([replace(BEST, is_recommended=True), WORSE], "and no other may be the best on these 30 test images."),
        ([BEST, CHEAP, WORSE], "took 10.0 s to train instead of 1 min 00 s."),
        (
            [BEST, replace(CHEAP, train_seconds=58.0)],
            "cannot be told from it on 30 test images, and took no longer to train.",
        ),
        (
            [replace(BEST, is_recommended=True), replace(CHEAP, is_recommended=False)],
            "1 other cannot be told from it on 30 test images, and none takes less than half of its time to train.",
        ),
        (
            [replace(BEST, tied_with_best=False), CHEAP],
            "and another is better on test; recommended: dino linear_probe (0.790).",
        ),
    ],
)
def test_what_was_found_is_a_sentence(rows, end):
    assert conclusion(rows).endswith(end)


def test_few_shot_rows_have_no_part_in_it():
    few = make_row("dino-linear_probe", shots=5, tied_with_best=True, is_recommended=True)
    rows = [replace(BEST, is_recommended=True), few]
    assert recommended(rows) is rows[0]
    assert "has a test accuracy of 0.800" in conclusion(rows)
    assert describe_choice([few]) == "dino linear_probe, 5 shots with lr 0.01, 4 epochs"
