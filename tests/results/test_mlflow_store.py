import logging
import logging.handlers
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import mlflow
import pytest

from raysweep.errors import RaysweepError
from raysweep.results import mlflow_store
from raysweep.results.mlflow_store import is_away, open_client
from raysweep.results.tracking import open_tracker

pytestmark = pytest.mark.process

OPEN = """
import sys
import mlflow
from raysweep.results.tracking import open_tracker
print("ready", flush=True)
tracker = open_tracker(sys.argv[1], "x")
print(tracker.start_run("key", "name", "sweep")[0], flush=True)
"""
# MLflow alone, as raysweep 0.1 used it.
IN_PLACE = """
import sys
import mlflow
print("ready", flush=True)
mlflow.MlflowClient(sys.argv[1]).get_experiment_by_name("x")
"""


def kill_while_it_opens(code, uri, seconds, until=lambda: False):
    """Kills a process some time after it began to open a store; returns whether it had not finished."""
    process = subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not until():
        time.sleep(0.01)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return was_running


def has_all_tables(path):
    from mlflow.store.db.base_sql_model import Base

    return mlflow_store._tables(path) >= set(Base.metadata.tables)


@pytest.mark.slow
def test_a_new_store_survives_a_kill_at_any_moment(tmp_path):
    path, num_cut = tmp_path / "mlflow.db", 0
    for third in range(1, 11):
        num_cut += kill_while_it_opens(OPEN, f"sqlite:///{path}", 0.3 * third)
        assert not path.exists() or has_all_tables(path)
        again = subprocess.run(
            [sys.executable, "-c", OPEN, f"sqlite:///{path}"], capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stderr
        assert sorted(item.name for item in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]
        path.unlink()
    assert num_cut >= 6, "kills that came too late try nothing"


def test_a_kill_in_mid_migration_leaves_nothing_that_is_used(tmp_path):
    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"

    def is_in_mid_migration():
        return any(item.stat().st_size > 60_000 for item in tmp_path.glob(".mlflow.db.new-*"))

    assert kill_while_it_opens(OPEN, uri, 60, until=is_in_mid_migration)
    assert not path.exists()
    (tmp_path / ".mlflow.db.new-x-journal").write_bytes(b"of the process that was killed")
    assert open_tracker(uri, "x").start_run("key", "name", "sweep")[1]
    assert sorted(item.name for item in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A complete store with one run."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_tracker(f"sqlite:///{path}", "x").start_run("key", "name", "sweep")
    return path


def copy_of(store, folder):
    path = folder / "mlflow.db"
    path.write_bytes(store.read_bytes())
    return path


def test_a_store_that_an_older_version_left_in_mid_migration_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:  # as MLflow leaves it: tables of a step that is not noted as done
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        database.execute("CREATE TABLE runs (run_uuid TEXT)")
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('451aebb31d03')")
        database.execute("INSERT INTO runs VALUES ('one')")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(
        RaysweepError, match=rf"its tables are incomplete.*holds 1 runs\. Move {path} away: a new store"
    ):
        open_client(f"sqlite:///{path}")
    assert path.read_bytes() == before
    path.rename(tmp_path / "away.db")
    open_client(f"sqlite:///{path}")


@pytest.mark.slow
def test_what_mlflow_itself_leaves_when_it_is_killed_is_named_or_mended(tmp_path):
    path = tmp_path / "mlflow.db"
    cut = kill_while_it_opens(
        IN_PLACE, f"sqlite:///{path}", 60, until=lambda: path.exists() and path.stat().st_size > 60_000
    )
    assert cut
    problem = None
    try:
        open_client(f"sqlite:///{path}")
    except RaysweepError as error:
        problem = str(error)
    if problem is not None:  # it was killed within a step of MLflow's migration
        assert re.search(r"its tables are incomplete.*holds 0 runs\. Move .* away", problem)
    else:  # it was killed between two steps
        assert has_all_tables(path)
        assert open_tracker(f"sqlite:///{path}", "x").start_run("key", "name", "sweep")[1]


def test_a_store_of_an_older_mlflow_is_migrated_beside_its_place(store, tmp_path, monkeypatch):
    path = copy_of(store, tmp_path)
    with closing(sqlite3.connect(path)) as database:
        newest = database.execute("SELECT version_num FROM alembic_version").fetchone()
    replaced = []
    replace = os.replace

    def complete(source, target):
        replaced.append(has_all_tables(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", complete)
    open_client(f"sqlite:///{path}")
    assert replaced == []
    real = mlflow_store._tables
    monkeypatch.setattr(mlflow_store, "_tables", lambda path: real(path) - {"logged_models"})
    monkeypatch.setattr(mlflow_store, "_num_runs", lambda path, tables: 0)
    open_client(f"sqlite:///{path}")
    monkeypatch.undo()
    assert len(replaced) == 1
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == newest
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)


@pytest.mark.parametrize("content", [b"no database at all, but longer than a header " * 9, None])
def test_a_file_that_is_no_database_is_named(store, tmp_path, content):
    path = tmp_path / "mlflow.db"
    path.write_bytes(content or store.read_bytes()[:40_000])
    with pytest.raises(RaysweepError, match=rf"^tracking\.uri: 'sqlite:///{path}' cannot be used as an MLflow store"):
        open_client(f"sqlite:///{path}")


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "mlflow.db").touch()
    open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert has_all_tables(tmp_path / "mlflow.db")


def test_the_lock_of_a_process_that_was_killed_does_not_count(store, tmp_path):
    path = copy_of(store, tmp_path)
    code = (
        "import sys, time; from filelock import FileLock\n"
        "FileLock(sys.argv[1]).acquire(); print(1, flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".mlflow.db.lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / ".mlflow.db.lock").exists()
    started = time.monotonic()
    open_client(f"sqlite:///{path}")
    assert time.monotonic() - started < 20


def test_a_store_may_lie_in_a_folder_of_any_name(store, tmp_path, monkeypatch):
    folder = tmp_path / "a b#c%d'ü"
    folder.mkdir()
    monkeypatch.chdir(folder)
    copy_of(store, folder)
    tracker = open_tracker("sqlite:///mlflow.db", "y")
    run_id, _ = tracker.start_run("key", "name", "sweep")
    (folder / "file.txt").write_text("content")
    tracker.log_file(run_id, folder / "file.txt")
    tracker.log_dict(run_id, {}, "empty.json")
    assert {item.path for item in tracker.client.list_artifacts(run_id)} == {"file.txt", "empty.json"}
    assert [item.name for item in tmp_path.iterdir()] == [folder.name]


def test_which_errors_say_that_a_store_is_away():
    from mlflow.exceptions import MlflowException, RestException
    from requests.exceptions import ChunkedEncodingError

    away = [
        MlflowException("API request to http://h failed with exception ..."),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "starting"}),
        ConnectionResetError(),
        ChunkedEncodingError(),
    ]
    refused = [
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}),
        RestException({"error_code": "PERMISSION_DENIED", "message": "no"}),
        PermissionError(13, "no"),
        TypeError("a mistake of ours"),
    ]
    assert [is_away(error) for error in (*away, *refused)] == [True] * len(away) + [False] * len(refused)
    assert mlflow.__name__ == "mlflow"


def test_an_error_of_a_database_is_raised_and_not_printed_too(tmp_path):
    tracker = open_tracker(f"sqlite:///{tmp_path}/mlflow.db", "x")
    run_id, _ = tracker.start_run("key", "name", "sweep")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DROP TABLE metrics")
    printed = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("mlflow.store.db.utils")
    logger.addHandler(printed)
    with pytest.raises(mlflow.MlflowException, match="no such table"):
        tracker.log_metrics(run_id, {"val/accuracy": 0.5})
    logger.removeHandler(printed)
    assert printed.buffer == []
