"""Near copies in a sweep: hashes that stand in for those of a pass, and what the state and the user get of them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from states import CACHE, make_state, text_of

from raysweep.images.image_hashes import HASH_BYTES, hashes_file, write_hashes
from raysweep.storage.paths import read_json
from raysweep.sweep import near_copies
from raysweep.sweep.leaderboard_entry import identity, open_baseline
from raysweep.sweep.near_copies import join_near_copies

NUM_ROWS = 120  # of each class 20 to train on, 10 to validate on, 10 to test on
NEAR = {30: 0, 31: 0, 20: 41}  # two test images and one of validation, which has another class, to one of train


def hashed_state(folder, near=NEAR, writes=True):
    """A state whose images are all different, but for those that are near another."""
    state = make_state(folder)
    table = state.index.table
    columns = {
        "path": [f"/images/{row}.png" for row in range(NUM_ROWS)],
        "position": np.full(NUM_ROWS, -1, np.int32),
        "content_hash": pa.array([row.to_bytes(32, "big") for row in range(NUM_ROWS)], pa.binary(32)),
    }
    table = table.drop_columns("content_hash")
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    state.index = replace(state.index, table=table)
    hashes = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, HASH_BYTES), np.uint8)
    for row, other in near.items():
        hashes[row] = hashes[other]
        hashes[row, 9] ^= row  # some bits differ
    if writes:
        write_hashes(hashes_file(state.paths.caches, state.index), table["row_id"].to_numpy(), hashes)
    return state


def test_near_copies_are_told_written_and_joined(tmp_path):
    state = hashed_state(tmp_path)
    join_near_copies(state)
    assert state.near_copies == ((0, 30, 31), (20, 41))
    said = text_of(state)
    assert "2 of 30 test images have a near copy in train (leakage), such as /images/30.png and /images/0.png" in said
    assert "1 of 30 validation images has a near copy in train (leakage), such as /images/20.png" in said
    conflict = "1 group of near copies in more than one class (conflicting labels): /images/20.png (a) and"
    assert conflict in said
    found = read_json(state.paths.near_copies)
    assert found["leaks"]["test"] == [
        {"image": "/images/30.png", "train_image": "/images/0.png"},
        {"image": "/images/31.png", "train_image": "/images/0.png"},
    ]
    assert found["groups"][1] == [
        {"image": "/images/20.png", "split": "validation", "class": "a"},
        {"image": "/images/41.png", "split": "train", "class": "b"},
    ]
    assert found["conflicts"] == [found["groups"][1]]
    numbers = state.index.groups
    assert numbers[0] == numbers[30] == numbers[31]
    assert numbers[20] == numbers[41]
    assert len(set(numbers.tolist())) == NUM_ROWS - 3
    assert state.rows["train"].groups[0] == state.rows["test"].groups[0]  # rows 0 and 30


def test_later_invocations_compare_no_images_and_say_the_same(tmp_path, monkeypatch):
    state = hashed_state(tmp_path)
    join_near_copies(state)
    monkeypatch.setattr(near_copies, "read_hashes", lambda *_: pytest.fail("hashes were read again"))
    again = hashed_state(tmp_path, writes=False)
    join_near_copies(again)
    assert again.near_copies == state.near_copies
    assert np.array_equal(again.index.groups, state.index.groups)
    assert text_of(again) == text_of(state)


@pytest.mark.parametrize("content", ["{", "[]", '{"signature": "SAME", "row_ids": "x"}', '{"signature": "SAME"}'])
def test_a_damaged_file_is_written_anew(tmp_path, content):
    state = hashed_state(tmp_path)
    join_near_copies(state)
    before = read_json(state.paths.near_copies)
    state.paths.near_copies.write_text(content.replace("SAME", before["signature"]))
    again = hashed_state(tmp_path)
    join_near_copies(again)
    assert read_json(state.paths.near_copies) == before
    assert again.near_copies == state.near_copies


def test_other_images_are_compared_again(tmp_path):
    join_near_copies(hashed_state(tmp_path))
    other = hashed_state(tmp_path, near={})
    other.index = replace(other.index, fingerprint="other")
    join_near_copies(other)
    assert other.near_copies == ()
    assert other.index.groups is None
    assert text_of(other) == ""
    assert read_json(other.paths.near_copies)["groups"] == []


def test_without_hashes_nothing_is_known_and_nothing_old_is_left(tmp_path):
    state = hashed_state(tmp_path, writes=False)
    state.paths.near_copies.parent.mkdir(parents=True)
    state.paths.near_copies.write_text("{}")
    join_near_copies(state)
    assert "near copies are not known: there are no readable hashes of these images" in text_of(state)
    assert state.near_copies == ()
    assert not state.paths.near_copies.exists()


def test_what_is_trained_depends_on_the_groups(tmp_path):
    """Folds do."""
    keys, others = [], []
    for near in ({}, NEAR, {30: 0}):
        state = hashed_state(tmp_path / str(len(near)), near)
        join_near_copies(state)
        study = state.experiment.studies()[0]
        config = next(one for one in state.experiment.baselines_of(study) if one.baseline == "ridge")
        keys.append(open_baseline(state, config, CACHE).key)
        others.append(str(identity(state, study, CACHE, None)))
    assert len(set(keys)) == 3
    assert len(set(others)) == 1, "trials make no folds"
