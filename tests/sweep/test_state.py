"""What the studies of a sweep share: here what becomes of images that cannot be used."""

import csv

import numpy as np
import pyarrow as pa
import pytest

from raysweep.errors import DataError
from raysweep.experiment.config import Experiment
from raysweep.images.index import BadRow, ImageIndex
from raysweep.storage.paths import SweepPaths
from raysweep.sweep.state import SweepState


def test_a_few_more_bad_rows_than_allowed_stop_the_sweep(tmp_path):
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s", "max_bad_fraction": 0.02}, "encoders": ({"type": "stacked_cnn"},)},
        strict=False,
    )
    index = ImageIndex(pa.table({"row_id": np.arange(100, 220)}), ("a", "b"), (), (), 120, "fingerprint")
    state = SweepState(experiment, SweepPaths(str(tmp_path), "x"), index, None, None, None)
    state.set_aside([BadRow(100, "a.jpg", "truncated"), BadRow(101, "b.jpg", "empty file")])
    with pytest.raises(DataError, match=r"3 of 120 images \(2.5%\).*max_bad_fraction.*2.0%.*truncated"):
        state.set_aside([BadRow(102, "c.jpg", "empty file")])
    with state.paths.quarantine.open() as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["a.jpg", "b.jpg", "c.jpg"]
