"""An index that tasks make is the one that this process makes."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysweep.cluster.session import ray_session
from raysweep.errors import ResourceError
from raysweep.experiment.config import DataConfig
from raysweep.images import index_tasks
from raysweep.images.decode import DecodeOptions
from raysweep.images.index import load_index
from raysweep.images.index_tasks import check_in_task, check_listing
from raysweep.images.listing import list_source


def image(number: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4), number if mode == "I;16" else (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, num_files: int = 60) -> Path:
    """Class folders with copies, images of 16 bits, and files that are no images or are missing."""
    for number in range(num_files):
        path = folder / "images" / f"class_{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number % 50, "I;16" if number % 7 == 0 else "RGB"))
    (folder / "images" / "class_0" / "empty.png").write_bytes(b"")
    (folder / "images" / "class_1" / "link.png").symlink_to("nowhere.png")
    (folder / "images" / "class_2" / "text.png").write_text("text")
    return folder / "images"


def write_shards(folder: Path) -> Path:
    """Parquet files with row groups of several sizes, in which some rows have no image."""
    (folder / "shards").mkdir()
    for split, group_size in (("train", 5), ("test", 100)):
        cells = [{"bytes": image(n) if n % 11 else None, "path": None} for n in range(50)]
        table = pa.table({"image": cells, "label": [n % 2 for n in range(50)]})
        pq.write_table(table, folder / "shards" / f"{split}-00000.parquet", row_group_size=group_size)
    return folder / "shards"


def indexed(source: Path, start_ray=None):
    return load_index(DataConfig(source=str(source), max_bad_fraction=0.2), seed=0, start_ray=start_ray)


def assert_same(first, second):
    assert first.table.to_pydict() == second.table.to_pydict()
    assert first.table.schema == second.table.schema
    assert (first.row_signature, first.fingerprint) == (second.row_signature, second.fingerprint)
    assert (first.bad_rows, first.warnings, first.classes) == (second.bad_rows, second.warnings, second.classes)
    assert (first.derived_splits, first.decode_options) == (second.derived_splits, second.decode_options)
    assert first.num_rows_found == second.num_rows_found


@pytest.fixture
def by_tasks(monkeypatch):
    """Has tasks read few rows too, in several parts."""
    monkeypatch.setattr(index_tasks, "MIN_ROWS_FOR_TASKS", 1)
    monkeypatch.setattr(index_tasks, "ROWS_PER_TASK", 7)


@pytest.fixture(scope="module")
def running_ray():
    with ray_session(verbose=False):
        yield


def start_nothing():
    """Ray runs already."""


@pytest.mark.ray
@pytest.mark.parametrize("write", [write_files, write_shards])
def test_tasks_make_the_same_index(tmp_path, running_ray, by_tasks, write):
    source = write(tmp_path)
    expected = indexed(source)
    assert expected.bad_rows
    assert_same(indexed(source, start_nothing), expected)


@pytest.mark.ray
def test_what_a_dying_process_was_to_read_is_read_again(tmp_path, running_ray, by_tasks, monkeypatch):
    source, mark = write_files(tmp_path), tmp_path / "mark"
    expected = indexed(source)

    def die_once(*arguments):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return check_in_task(*arguments)

    monkeypatch.setattr(index_tasks, "check_in_task", die_once)
    assert_same(indexed(source, start_nothing), expected)
    assert mark.exists()


@pytest.mark.ray
def test_processes_that_die_each_time_are_an_error(tmp_path, running_ray, by_tasks, monkeypatch):
    source = write_files(tmp_path)
    monkeypatch.setattr(index_tasks, "check_in_task", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ResourceError, match="a process was ended from outside, or crashed, in each of 4 tries"):
        indexed(source, start_nothing)


@pytest.mark.ray
def test_files_that_only_this_node_can_read_are_read_here(tmp_path, running_ray, by_tasks, monkeypatch):
    source = write_files(tmp_path)
    expected = indexed(source)

    def elsewhere(rows, *arguments):
        paths = pa.array([path.replace("images", "other") for path in rows["path"].to_pylist()])
        checked = check_in_task(rows.set_column(0, "path", paths), *arguments)
        assert len(checked.unread) == len(rows)
        return checked

    monkeypatch.setattr(index_tasks, "check_in_task", elsewhere)
    assert_same(indexed(source, start_nothing), expected)


def test_few_images_start_no_ray(tmp_path):
    index = indexed(write_files(tmp_path), lambda: pytest.fail("Ray was started"))
    assert (len(index.table), len(index.bad_rows)) == (60, 3)


def test_many_images_start_ray_first(tmp_path, by_tasks):
    def start():
        raise ResourceError("no Ray here")

    with pytest.raises(ResourceError, match="no Ray here"):
        indexed(write_files(tmp_path), start)


@pytest.mark.parametrize("group_size", [3, 5, 20, 100])
def test_row_groups_are_left_whole(tmp_path, by_tasks, group_size):
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"image": [image(n) for n in range(50)], "label": [n % 2 for n in range(50)]}),
        path,
        row_group_size=group_size,
    )
    listing = list_source(DataConfig(source=str(path)))
    parts = list(index_tasks._parts(listing, np.ones(50, np.bool_), 1))
    assert np.concatenate(parts).tolist() == list(range(50))
    assert all(part[0] % group_size == 0 for part in parts)
    smallest = -(-7 // group_size) * group_size
    assert [len(part) for part in parts[:-1]] == [smallest] * (len(parts) - 1)


def test_rows_with_a_problem_keep_it_and_are_not_read(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("image,label\n0.png,a\n,a\n1.png,\n1.png,b\n")
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    checked = check_listing(list_source(DataConfig(source=str(table))), DecodeOptions(), None)
    assert checked.problems == {1: "no image path", 2: "no label"}
    assert checked.hashes.any(axis=1).tolist() == [True, False, False, True]
