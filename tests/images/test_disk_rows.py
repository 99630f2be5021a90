import os
import pickle
import stat

import numpy as np
import pytest
import torch

from raysweep.errors import DataError
from raysweep.images import disk_rows
from raysweep.images.disk_rows import DiskRows

MATRIX = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float16)


def shuffled_blocks(length=7):
    order = np.random.default_rng(1).permutation(len(MATRIX))
    return [(order[start : start + length], MATRIX[order[start : start + length]]) for start in range(0, 40, length)]


@pytest.fixture
def rows(tmp_path):
    return DiskRows.create(tmp_path / "new" / "cls.f16", 40, 5, shuffled_blocks())


def test_the_file_is_the_matrix_whatever_the_order_of_the_blocks(rows):
    assert rows.path.read_bytes() == MATRIX.tobytes()
    assert rows.shape == (40, 5)
    assert len(rows) == 40
    assert stat.S_IMODE(rows.path.stat().st_mode) == 0o644
    assert [path.name for path in rows.path.parent.iterdir()] == ["cls.f16"]
    assert DiskRows.open(rows.path, 5) == rows


@pytest.mark.parametrize(
    "numbers",
    [[], [3], [5, 6, 7], [39, 0, 3, 3, 4, 2], list(range(40)), [[1, 0], [1, 17]], [[]]],
    ids=["none", "one", "run", "mixed", "all", "table", "empty table"],
)
def test_indexing_is_that_of_a_tensor(rows, numbers):
    index = torch.tensor(numbers, dtype=torch.long)
    found = rows[index]
    assert found.dtype == torch.float16
    assert found.shape == (*index.shape, 5)
    assert torch.equal(found, torch.from_numpy(MATRIX)[index])


def test_consecutive_rows_are_one_read(rows, monkeypatch):
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(arguments[2]) or preadv(*arguments))
    rows[torch.tensor([12, 3, 11, 4, 10, 5])]
    assert read == [3 * 10, 10 * 10]


def test_a_read_that_stops_short_goes_on(rows, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    assert torch.equal(rows[torch.arange(4, 9)], torch.from_numpy(MATRIX[4:9]))


def test_a_write_that_stops_short_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    assert DiskRows.create(tmp_path / "x", 40, 5, shuffled_blocks()).path.read_bytes() == MATRIX.tobytes()


@pytest.mark.parametrize("number", [-1, 40])
def test_rows_that_are_not_there(rows, number):
    with pytest.raises(IndexError, match=f"{number}.* of 40"):
        rows[torch.tensor([number])]


def test_a_copy_in_another_process_reads_the_same(rows):
    assert torch.equal(pickle.loads(pickle.dumps(rows))[torch.tensor([8])], torch.from_numpy(MATRIX[[8]]))


def test_a_device_is_that_of_what_is_read(rows):
    moved = rows.to("meta")
    assert moved.shape == rows.shape
    assert moved[torch.arange(3)].device == torch.device("meta")
    assert rows[torch.arange(3)].device == torch.device("cpu")


@pytest.mark.parametrize("fault", ["missing", "raises"])
def test_nothing_half_written_stays(rows, fault):
    def blocks():
        yield shuffled_blocks()[0]
        if fault == "raises":
            raise KeyError("the source is gone")

    error, match = (DataError, "33 of 40 rows") if fault == "missing" else (KeyError, "gone")
    with pytest.raises(error, match=match):
        DiskRows.create(rows.path, 40, 5, blocks())
    assert rows.path.read_bytes() == MATRIX.tobytes()
    assert len(list(rows.path.parent.iterdir())) == 1


def test_a_size_that_is_not_whole_rows(rows):
    with pytest.raises(DataError, match="400 bytes are not whole rows of 7 half floats"):
        DiskRows.open(rows.path, 7)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"x\.f16: no such file"):
        DiskRows.open(tmp_path / "x.f16", 7)


def test_a_file_that_has_become_shorter(rows):
    os.truncate(rows.path, 399)
    assert torch.equal(rows[torch.tensor([38])], torch.from_numpy(MATRIX[[38]]))
    with pytest.raises(DataError, match="ends before row 40 of 40"):
        rows[torch.tensor([39])]


def test_runs_are_of_consecutive_numbers():
    assert disk_rows.runs(np.array([1, 2, 3, 7, 9, 10])) == [(0, 3), (3, 4), (4, 6)]
    assert disk_rows.runs(np.array([1, 2, 3, 4]), np.array([5, 6, 0, 1])) == [(0, 2), (2, 4)]
