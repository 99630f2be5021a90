import csv

import numpy as np
import pyarrow as pa
import pytest

from raysweep.context import SweepContext, select_rows, write_quarantine
from raysweep.errors import DataError
from raysweep.experiment.config import Experiment
from raysweep.images.sources import BadRow, ImageIndex
from raysweep.paths import SweepPaths


def index_of(num_per_class: int = 40, num_classes: int = 3) -> ImageIndex:
    """Row ids start at 100; of each class's rows half are train, a quarter validation, a quarter test."""
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), num_per_class)
    quarter = num_per_class // 4
    splits = (["train"] * 2 * quarter + ["validation"] * quarter + ["test"] * quarter) * num_classes
    table = pa.table({"row_id": np.arange(100, 100 + len(labels)), "label": labels, "split": splits})
    return ImageIndex(table, tuple("abc"[:num_classes]), (), (), len(labels), "fingerprint")


def by_split(rows):
    return {split: set(ids.tolist()) for split, (ids, _) in rows.items()}


def test_every_usable_row_goes_to_its_split():
    rows = select_rows(index_of(), [BadRow(100, "a.jpg", "truncated")], "all", 1)
    assert {split: len(labels) for split, (_, labels) in rows.items()} == {"train": 59, "validation": 30, "test": 30}
    assert 100 not in by_split(rows)["train"]


def test_few_shot_takes_shots_per_class_caps_validation_and_leaves_test_whole():
    everything, few = select_rows(index_of(160), [], "all", 1), select_rows(index_of(160), [], 5, 1)
    for split, expected in (("train", 5), ("validation", 16), ("test", 40)):
        assert np.bincount(few[split][1]).tolist() == [expected] * 3
    assert by_split(few)["test"] == by_split(everything)["test"]
    assert by_split(few)["train"] <= by_split(everything)["train"]
    assert by_split(few)["validation"] <= by_split(everything)["validation"]


def test_few_shot_subsets_are_nested_and_follow_the_seed():
    sets = [by_split(select_rows(index_of(), [], shots, 1))["train"] for shots in (1, 5, 10)]
    assert sets[0] < sets[1] < sets[2]
    assert by_split(select_rows(index_of(), [], 5, 2))["train"] != sets[1]


def test_a_few_more_bad_rows_than_allowed_stop_the_sweep(tmp_path):
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s", "max_bad_fraction": 0.02}, "encoders": ({"type": "stacked_cnn"},)},
        strict=False,
    )
    paths = SweepPaths(tmp_path, "x")
    context = SweepContext(experiment, paths, index_of(), None, None, False, None)
    context.set_aside([BadRow(100, "a.jpg", "truncated"), BadRow(101, "b.jpg", "empty file")])
    with pytest.raises(DataError, match=r"3 of 120 images \(2.5%\).*max_bad_fraction.*2.0%.*truncated"):
        context.set_aside([BadRow(102, "c.jpg", "empty file")])
    with paths.quarantine.open() as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_an_empty_quarantine_has_its_header(tmp_path):
    write_quarantine(tmp_path / "quarantine.csv", [])
    assert (tmp_path / "quarantine.csv").read_text() == "row_id,source,reason\n"
