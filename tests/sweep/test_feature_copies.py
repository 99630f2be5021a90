"""The warning about near copies, with features and a state that stand in for those of a sweep."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysweep.images.rows import SplitRows
from raysweep.storage.paths import read_json
from raysweep.sweep import feature_copies
from raysweep.sweep.feature_copies import warn_of_feature_copies

NUM_ROWS = 60  # 40 to train on, 10 to validate on, 10 to test on


@pytest.fixture
def features(monkeypatch):
    """Half floats of every row by its id, which is twice its number; row 55 is nearly row 3, and 45 exactly row 4."""
    values = np.random.default_rng(0).normal(size=(NUM_ROWS, 32)) + 5
    values[55] = values[3] + 0.02
    values[45] = values[4]
    reads = []

    def load(folder, ids, parts):
        reads.append((folder, len(ids)))
        return {parts[0]: torch.from_numpy(values[ids // 2].astype(np.float16))}

    monkeypatch.setattr(feature_copies, "load_features", load)
    monkeypatch.setattr(feature_copies, "fetched", lambda rows: rows)
    return reads


def make_state(folder, fingerprint="f", near_copies=()):
    ids, labels = 2 * np.arange(NUM_ROWS), np.arange(NUM_ROWS) % 2
    columns = {
        "row_id": ids,
        "path": [f"/images/{number}.png" for number in range(NUM_ROWS)],
        "position": np.full(NUM_ROWS, -1),
        "content_hash": [str(4 if number == 45 else number) for number in range(NUM_ROWS)],
    }
    said = []
    return SimpleNamespace(
        index=SimpleNamespace(table=pa.table(columns), fingerprint=fingerprint),
        rows={
            split: SplitRows(ids[part], labels[part])
            for split, part in {"train": slice(0, 40), "validation": slice(40, 50), "test": slice(50, 60)}.items()
        },
        bad_rows={},
        near_copies=near_copies,
        paths=SimpleNamespace(feature_copies=folder / "feature_copies.json"),
        progress=SimpleNamespace(warn=said.append),
        encoder=lambda _config: SimpleNamespace(spec=SimpleNamespace(parts={"cls": 32})),
        said=said,
    )


STUDIES = [
    SimpleNamespace(name="fine", reads_features=False, encoder_name="e"),
    SimpleNamespace(name="probe", reads_features=True, encoder_name="e"),
]
CACHES = {"probe": SimpleNamespace(folder="/c/features-1", rows="/c/features-1/p"), "fine": None}


def test_the_pairs_are_said_and_written_once(tmp_path, features):
    state = make_state(tmp_path)
    warn_of_feature_copies(state, STUDIES, CACHES)
    (warning,) = state.said
    assert warning.startswith(
        "1 of 10 test images has nearly the features of one in train (leakage), such as /images/55.png "
        "and /images/3.png."
    )
    assert "set data.group" in warning
    found = read_json(tmp_path / "feature_copies.json")["splits"]
    assert [pair["train_image"] for pair in found["test"]["pairs"]] == ["/images/3.png"]
    # The exact copy has its own warning, from the index.
    assert found["validation"] == {"num_images": 9, "num_checked": 9, "pairs": []}
    num_reads = len(features)
    again = make_state(tmp_path)
    warn_of_feature_copies(again, STUDIES, CACHES)
    assert (again.said, len(features)) == (state.said, num_reads)


def test_other_data_are_checked_again_and_a_damaged_file_too(tmp_path, features):
    warn_of_feature_copies(make_state(tmp_path), STUDIES, CACHES)
    num_reads = len(features)
    warn_of_feature_copies(make_state(tmp_path, "other"), STUDIES, CACHES)
    assert len(features) == 2 * num_reads
    (tmp_path / "feature_copies.json").write_text("{")
    state = make_state(tmp_path, "other")
    warn_of_feature_copies(state, STUDIES, CACHES)
    assert len(state.said) == 1


def test_what_looks_the_same_is_not_told_of_twice(tmp_path, features):
    state = make_state(tmp_path, near_copies=((6, 110),))  # the ids of rows 3 and 55
    warn_of_feature_copies(state, STUDIES, CACHES)
    assert state.said == []
    assert read_json(tmp_path / "feature_copies.json")["splits"]["test"]["num_images"] == 9


def test_without_features_nothing_is_checked(tmp_path, features):
    state = make_state(tmp_path)
    warn_of_feature_copies(state, STUDIES[:1], CACHES)
    assert not features
    assert not list(tmp_path.iterdir())
