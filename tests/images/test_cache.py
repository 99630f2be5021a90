"""The lock and the manifest of a cache."""

import json
import subprocess
import sys
import threading

import pytest

from raysweep.images.cache import Cache, only_writer, open_cache, write_manifest
from raysweep.images.index import BadRow

HOLD = """
import sys, time
from pathlib import Path
from raysweep.images.cache import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def waiting_thread(tmp_path):
    """A thread that waits for the lock of a cache, and an event that it sets when it has the lock."""
    entered = threading.Event()

    def wait():
        with only_writer(tmp_path / "cache"):
            entered.set()

    thread = threading.Thread(target=wait, daemon=True)
    yield thread, entered
    thread.join(10)


def test_two_threads_of_a_process_exclude_each_other(tmp_path, waiting_thread):
    thread, entered = waiting_thread
    with only_writer(tmp_path / "cache"):
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)


def test_processes_exclude_each_other_and_a_killed_one_gives_its_lock_back(tmp_path, waiting_thread):
    thread, entered = waiting_thread
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    thread.start()
    assert not entered.wait(0.3)
    holder.kill()
    holder.communicate()
    assert entered.wait(10)


def test_locks_of_several_caches_are_held_at_once_and_again(tmp_path):
    for _ in range(2):
        with only_writer(tmp_path / "a"), only_writer(tmp_path / "b"):
            assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_a_block_that_raises_gives_its_lock_back(tmp_path, waiting_thread):
    with pytest.raises(KeyError), only_writer(tmp_path / "cache"):
        raise KeyError
    thread, entered = waiting_thread
    thread.start()
    assert entered.wait(10)


def test_a_manifest_has_these_keys_and_gives_the_cache_back(tmp_path):
    folder = tmp_path / "pixels-1"
    cache = Cache(
        folder=str(folder),
        rows=str(folder / "a-pass"),
        num_rows=3,
        bad_rows=(BadRow(7, "x.jpg", "truncated"),),
        seconds=1.5,
        peak_memory_bytes=2,
        peak_gpu_memory_bytes=0,
        made_now=False,
        streamed=True,
        files={"rows-1.arrow": 17},
        blank_rows=(4,),
    )
    write_manifest(folder, cache)
    expected = {
        "num_rows": 3,
        "bad_rows": [{"row_id": 7, "source": "x.jpg", "reason": "truncated"}],
        "seconds": 1.5,
        "peak_memory_bytes": 2,
        "peak_gpu_memory_bytes": 0,
        "streamed": True,
        "files": {"rows-1.arrow": 17},
        "blank_rows": [4],
        "rows": "a-pass",
        "checksum": 1119416450,
    }
    assert (folder / "manifest.json").read_text() == json.dumps(expected, indent=2) + "\n"
    assert open_cache(folder) == cache
