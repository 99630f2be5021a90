"""Buckets over real HTTP, against a server of this machine; two scratch folders stand for two nodes."""

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError, RaysweepError, ResourceError
from raysweep.images import passes
from raysweep.images.cache import has_cache, num_leftover_bytes, remove_leftovers, remove_older_passes
from raysweep.images.cache_files import fetched
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.pixels import PixelRequest, open_pixels, write_pixels
from raysweep.images.task_reports import build_reports
from raysweep.storage import copies as storage
from raysweep.storage.copies import (
    exists,
    fetch,
    fetch_folder,
    forget,
    in_a_job,
    is_bucket,
    local_path,
    location,
    on_every_node,
    publish,
    remove,
    remove_temporaries,
    replacing,
    upload,
    written,
)
from raysweep.storage.paths import SweepPaths, write_atomically, write_json


@pytest.fixture
def on_node(monkeypatch, tmp_path):
    """A function that goes on on another node."""
    return lambda number: monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / f"node-{number}"))


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Names


def test_a_location_means_the_same_on_every_node(on_node, tmp_path):
    uri = "gs://bucket/a/b.json"
    for number in (0, 1):
        on_node(number)
        path = local_path(uri)
        assert path == tmp_path / f"node-{number}" / "gs" / "bucket" / "a" / "b.json"
        assert location(path) == uri
    assert location(local_path("/shared/runs")) == "/shared/runs"
    assert location(Path("runs")) == "runs"
    beside = tmp_path / "node-1" / "runs" / "x"  # an ordinary folder that happens to lie there
    assert (location(beside), local_path(str(beside))) == (str(beside), beside)
    assert [is_bucket(place) for place in ("s3://b/x", "gs://b", "hf://datasets/x", "/s3/x", "s3")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_files_of_a_jobs_working_directory_are_relative(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside = str(tmp_path / "uploaded" / "1.png")
    assert on_every_node(inside) == inside
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_a_job()
    assert on_every_node(inside) == "uploaded/1.png"
    assert on_every_node("/shared/1.png") == "/shared/1.png"
    assert on_every_node("s3://b/1.png") == "s3://b/1.png"


# Files


def test_what_one_node_writes_another_reads(bucket, on_node):
    write_json(local_path(f"{bucket}/x/a.json"), {"a": 1})
    on_node(1)
    path = local_path(f"{bucket}/x/a.json")
    assert not path.exists()
    assert exists(path)
    assert json.loads(fetch(path).read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_copy_that_is_up_to_date_is_not_fetched_again(bucket, on_node, monkeypatch):
    path = local_path(f"{bucket}/a")
    write_atomically(path, "one")
    on_node(1)
    other = fetch(local_path(f"{bucket}/a"))
    node, before = other.stat().st_ino, other.read_text()
    assert fetch(other).stat().st_ino == node, "the same file"
    time.sleep(1.1)  # S3 tells times to the second
    on_node(0)
    write_atomically(path, "two")
    assert fetch(path).read_text() == "two"
    on_node(1)
    assert (before, fetch(other).read_text()) == ("one", "two"), "of the same size, and yet another"


def test_what_is_gone_from_the_bucket_is_gone_from_the_node(bucket, on_node):
    write_atomically(local_path(f"{bucket}/a"), "one")
    on_node(1)
    copy = fetch(local_path(f"{bucket}/a"))
    on_node(0)
    remove(local_path(f"{bucket}/a"))
    assert not local_path(f"{bucket}/a").exists()
    on_node(1)
    assert not exists(copy)
    assert not fetch(copy).exists()


def test_a_folder_is_made_what_the_bucket_has(bucket, on_node):
    folder = local_path(f"{bucket}/cache")
    for name in ("rows-0.parquet", "rows-1.parquet", "sub/manifest.json"):
        write_atomically(folder / name, name)
    on_node(1)
    folder = local_path(f"{bucket}/cache")
    (folder / "sub").mkdir(parents=True)
    for stale in ("rows-7.parquet", "other.txt", ".lock"):
        (folder / stale).write_text("stale")
    found = fetch_folder(folder, lambda name: name.startswith("rows-"))
    assert found == ["rows-0.parquet", "rows-1.parquet"]
    assert files_in(folder) == [".lock", "other.txt", "rows-0.parquet", "rows-1.parquet"]
    assert fetch_folder(folder)[-1] == "sub/manifest.json"
    assert (folder / "sub" / "manifest.json").read_text() == "sub/manifest.json"


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    with replacing(tmp_path / "study" / "result.json") as temporary:
        left = temporary
    left.write_text("half of it")
    names = (".lock", "result.json", "study/.hidden", ".result.json.0123abcg", ".0123abcd")
    for name in names:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert not left.exists()
    assert all((tmp_path / name).exists() for name in names)


def test_a_published_folder_replaces_the_one_before(bucket, on_node):
    model = local_path(f"{bucket}/models/a")
    model.mkdir(parents=True)
    (model / "old.txt").write_text("1")
    publish(model)
    (model / "old.txt").unlink()
    (model / "new.txt").write_text("2")
    publish(model)
    on_node(1)
    assert fetch_folder(local_path(f"{bucket}/models/a")) == ["new.txt"]


def test_a_folder_can_be_removed_whole(bucket):
    for name in ("a", "b/c"):
        write_atomically(local_path(f"{bucket}/trials/{name}"), "x")
    write_atomically(local_path(f"{bucket}/trials-2/a"), "x")
    remove(local_path(f"{bucket}/trials"))
    assert fetch_folder(local_path(bucket)) == ["trials-2/a"]
    remove(local_path(f"{bucket}/trials"))  # nothing is left to remove


def test_local_data_is_uploaded_with_its_folders(bucket, tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"png")
    image = tmp_path / "images" / "cat" / "1.png"
    upload({f"{bucket}/.data/images-1/cat/1.png": image})
    folder = local_path(f"{bucket}/.data")
    assert fetch_folder(folder) == ["images-1/cat/1.png"]
    image.write_bytes(b"gnp")  # of one size: what was interrupted goes on, and is not begun again
    upload({f"{bucket}/.data/images-1/cat/1.png": image})
    assert (fetch(folder / "images-1" / "cat" / "1.png")).read_bytes() == b"png"


def test_ordinary_folders_need_no_moving(tmp_path):
    path = tmp_path / "a" / "b"
    write_atomically(path, "x")
    assert (exists(path), fetch(path), fetch_folder(tmp_path)) == (True, path, ["a/b"])
    publish(path)
    remove(path)
    remove(path)
    assert not exists(path)
    remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Caches


def test_a_cache_is_fetched_whole_and_without_leftovers(bucket, on_node):
    folder = local_path(f"{bucket}/.cache/features-1/a-pass")
    for first in (0, 64):
        write_atomically(folder / f"rows-{first:012d}.parquet", "rows")
    write_atomically(folder.parent / "going-on" / "rows-000000000000.parquet", "rows")
    on_node(1)
    folder = local_path(f"{bucket}/.cache/features-1/a-pass")
    write_atomically_here(folder / "rows-abc.f16")
    for other in ("cut-short", "going-on"):  # of passes that have run on this node too
        write_atomically_here(folder.parent / other / "rows-000000000032.parquet")
    assert fetched(f"{bucket}/.cache/features-1/a-pass") == str(folder)
    assert [name for name in files_in(folder.parent) if ".lock" not in name] == [
        "a-pass/rows-000000000000.parquet", "a-pass/rows-000000000064.parquet", "a-pass/rows-abc.f16",
        "going-on/rows-000000000032.parquet",
    ]  # fmt: skip


def write_atomically_here(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("stale")


def test_what_a_pass_left_is_removed_when_the_next_one_ends(bucket, on_node):
    """And not what another head writes meanwhile."""
    folder = local_path(f"{bucket}/.cache/features-1")
    write_atomically(folder / "cut-short" / "rows-000000000032.parquet", "left")
    write_atomically(folder / "of-another-head" / "rows-000000000000.parquet", "rows")
    write_atomically(folder / "rows-000000000016.parquet", "as an earlier version wrote it")
    time.sleep(1.1)  # S3 tells times to the second
    on_node(1)
    folder = local_path(f"{bucket}/.cache/features-1")
    write_atomically_here(folder / "cut-short" / "rows-000000000032.parquet")
    assert num_leftover_bytes(folder) == len("stale")
    remove_leftovers(folder)
    assert num_leftover_bytes(folder) == 0, "what is said to be free is freed"
    for first in (0, 64):
        write_atomically(folder / "a-pass" / f"rows-{first:012d}.parquet", "rows")
    on_node(2)
    write_atomically(local_path(f"{bucket}/.cache/features-1/of-another-head/rows-000000000064.parquet"), "rows")
    on_node(1)
    write_atomically(folder / "manifest.json", "{}")
    remove_older_passes(folder / "a-pass")
    assert fetch_folder(folder) == [
        "a-pass/rows-000000000000.parquet", "a-pass/rows-000000000064.parquet", "manifest.json",
        "of-another-head/rows-000000000000.parquet", "of-another-head/rows-000000000064.parquet",
    ]  # fmt: skip


def test_a_pass_that_wrote_no_rows_removes_nothing(bucket):
    folder = local_path(f"{bucket}/.cache/features-1")
    write_atomically(folder / "another" / "rows-000000000032.parquet", "rows")
    remove_older_passes(folder / "a-pass")
    assert fetch_folder(folder) == ["another/rows-000000000032.parquet"]


def test_what_a_pass_left_in_a_folder_is_removed_when_the_next_one_begins(tmp_path):
    for name in ("a/rows-000000000032.parquet", "a/.rows-7.arrow.abc", "rows-abc.f16", "manifest.json", "a/.lock"):
        write_atomically_here(tmp_path / name)
    assert num_leftover_bytes(tmp_path) == 3 * len("stale")
    assert num_leftover_bytes(tmp_path / "none") == 0
    remove_leftovers(tmp_path)
    write_atomically(tmp_path / "a-pass" / "rows-000000000000.parquet", "rows")
    remove_older_passes(tmp_path / "a-pass")
    assert files_in(tmp_path) == ["a-pass/rows-000000000000.parquet", "manifest.json"]


MANIFEST = {"num_rows": 1, "bad_rows": [], "seconds": 1.0, "peak_memory_bytes": 1, "peak_gpu_memory_bytes": 0}


def test_a_cache_that_another_head_has_made_meanwhile_is_there(bucket, on_node):
    folder = local_path(f"{bucket}/.cache/features-1")
    assert not has_cache(folder)
    on_node(1)
    write_json(local_path(f"{bucket}/.cache/features-1") / "manifest.json", MANIFEST | {"rows": "a-pass"})
    on_node(0)
    assert has_cache(folder)
    write_json(folder / "manifest.json", MANIFEST)
    assert not has_cache(folder), "all passes in one folder, as an earlier version wrote them"


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_heads_that_make_one_cache_at_once_do_not_spoil_it(bucket, on_node, monkeypatch, first_to_end):
    """Each in blocks of its own: one with GPUs, say, and one without. The pass of the first to end counts."""
    num_rows, uri = 12, f"{bucket}/.cache/pixels-1"
    ids = pa.array(range(num_rows))
    table = pa.table({"row_id": ids, "path": [f"{row_id}.png" for row_id in range(num_rows)]})
    index = SimpleNamespace(table=table, row_signature="rows")
    pixels = np.arange(num_rows, dtype=np.uint8).repeat(2 * 2 * 3).reshape(num_rows, 2, 2, 3)

    def head(number, rows_per_block):
        """Writes a block at each step."""
        on_node(number)
        steps = []

        def dataset(requests, key, *_arguments):
            def iter_batches(**_options):
                on_node(number)
                for start in range(0, num_rows, rows_per_block):
                    block = np.arange(start, min(num_rows, start + rows_per_block))
                    files = [write_pixels(str(local_path(uri) / key), block, pixels[block])]
                    yield build_reports(block, pa.nulls(len(block), pa.string()), np.ones(2), files=files)

            return SimpleNamespace(iter_batches=iter_batches)

        def progress(*_numbers):
            if not steps and number != first_to_end:  # after its first block, all of the other's pass
                steps.append(head(first_to_end, 3 + 2 * first_to_end))
                on_node(number)

        monkeypatch.setattr(passes, "_dataset", dataset)
        request = PixelRequest(local_path(uri), Preprocessing("exact", (2, 2), None, 3, (0,) * 3, (1,) * 3))
        (cache,) = passes.build_caches([request], index, num_gpus=0, processes=PassProcesses(), on_progress=progress)
        return cache.rows, *(folder for folder, *_ in steps)

    last = 1 - first_to_end
    folders = head(last, 3 + 2 * last)
    assert len(set(folders)) == 1
    for number in (0, 1, 2):
        on_node(number)
        files = open_pixels(fetched(folders[0]), np.arange(num_rows), (2, 2, 3))
        (found,) = files.read([torch.arange(num_rows)])
        assert np.array_equal(found.numpy(), pixels)
    passes_left = {name.partition("/")[0] for name in written(local_path(uri))}
    assert passes_left == {"manifest.json", folders[0].rpartition("/")[2]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path, number):
    (tmp_path / "x").write_text("old")

    def write():
        with storage.replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError, match=f"x: it cannot be written: the disk of {tmp_path} is full.* set storage"):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_beyond_the_permitted_size_is_told_by_every_writer(tmp_path, monkeypatch):
    """RLIMIT_FSIZE: what writes fail with is real, also through Arrow and safetensors."""
    tensor = torch.zeros(100_000)
    table = pa.table({"x": np.zeros(100_000)})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writers = [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: pq.write_table(table, path, compression="none", use_dictionary=False),
        lambda path: save_file({"x": tensor}, path),
    ]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for write in writers:
            with pytest.raises(ResourceError, match="it cannot be written"), storage.replacing(tmp_path / "x") as path:
                write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_linked_scratch_folder_is_one_all_the_same(bucket, monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "link"))
    paths = SweepPaths(f"{bucket}/team", "x")
    assert location(paths.root) == f"{bucket}/team/x"
    write_json(paths.leaderboard_json, [])
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "another"))
    assert exists(local_path(f"{bucket}/team/x/leaderboard.json"))


def test_a_node_forgets_copies_and_nothing_else(bucket, tmp_path):
    for folder in (local_path(f"{bucket}/trials/0"), tmp_path / "trials"):
        write_atomically(folder / "last.safetensors", "weights")
        forget(folder)
    assert not local_path(f"{bucket}/trials/0").exists()
    assert exists(local_path(f"{bucket}/trials/0/last.safetensors"))
    assert (tmp_path / "trials" / "last.safetensors").exists()


def test_a_sweep_begins_with_its_small_files(bucket, on_node):
    paths = SweepPaths(bucket, "beans")
    write_atomically(paths.optuna_journal, "journal")
    write_atomically(paths.study("s", "k") / "trials" / "0" / "best.safetensors", "weights")
    write_atomically(paths.cache("features", "f") / "manifest.json", "{}")
    write_atomically(paths.cache("features", "f") / "rows-0.parquet", "rows")
    on_node(1)
    paths = SweepPaths(bucket, "beans")
    paths.fetch()
    assert files_in(local_path(bucket)) == [".cache/features-f/manifest.json", "beans/optuna.journal"]
    assert paths.has_features


# What goes wrong


def test_a_bucket_that_is_not_there_is_a_clear_error(bucket):
    path = local_path("s3://no-such-bucket-here/x/a.json")
    with pytest.raises(RaysweepError, match=r"s3://no-such-bucket-here/x/a.json: the storage cannot be used"):
        write_atomically(path, "x")
    with pytest.raises(RaysweepError, match=r"s3://no-such-bucket-here/x: cannot be written to"):
        upload({"s3://no-such-bucket-here/x": Path(__file__)})


def test_a_download_that_breaks_off_leaves_nothing(bucket, on_node, monkeypatch):
    write_atomically(local_path(f"{bucket}/a"), "one")
    on_node(1)
    monkeypatch.setattr(os, "replace", lambda *_paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RaysweepError, match="disk full"):
        fetch(local_path(f"{bucket}/a"))
    assert files_in(local_path(bucket)) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_credentials_stay_out_of_locations():
    with pytest.raises(DataError, match="credentials belong into the environment"):
        storage.open_filesystem("s3://key:secret@bucket/x")


def test_files_can_be_listed_in_gs_and_s3_alike(bucket):
    filesystem, inner = storage.open_filesystem(bucket)
    assert isinstance(filesystem, fs.S3FileSystem)
    assert inner.endswith("/some/prefix")


# Names that whoever writes to the bucket has chosen


@pytest.mark.parametrize("key", ["../../../.bashrc", "a/../../b", "./a", "a//b", "..", "a\\..\\b"])
def test_the_name_of_an_object_cannot_lead_out_of_the_folder_of_its_copy(bucket, tmp_path, key):
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/model/{key}", Body=b"harm")
    write_atomically(local_path(f"{bucket}/model/model.json"), "{}")
    before = files_in(tmp_path)
    with pytest.raises(RaysweepError, match="cannot become the path of a local copy") as error:
        fetch_folder(local_path(f"{bucket}/model"))
    assert key.rsplit("/", maxsplit=1)[-1] in str(error.value).replace("\\\\", "\\")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("uri", ["s3://b/../../x", "s3://../x", "gs://b/a//c", "s3://b/./c", "s3://"])
def test_a_location_cannot_lead_out_of_the_folder_of_copies(on_node, uri):
    on_node(0)
    with pytest.raises(RaysweepError, match="cannot become the path of a local copy"):
        local_path(uri)
