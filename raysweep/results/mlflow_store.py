"""Opens MLflow stores, makes new SQLite stores, and tells an unreachable store from one that refuses a call."""

from __future__ import annotations

import glob
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from raysweep.errors import KEPT, RaysweepError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What a server or database answers while it starts, is overloaded, or has an error of its own.
AWAY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
# Libraries that carry an artifact to a server or a bucket, and let their own errors through.
TRANSPORTS = ("requests", "urllib3", "botocore", "boto3", "google", "azure", "sqlalchemy", "psycopg")


def open_client(uri: str) -> MlflowClient:
    """Returns a client of a store that answers; makes a SQLite store that does not exist.

    Tracking and registry both use `uri`, whatever MLflow's environment variables say.

    Raises:
        RaysweepError: the store does not exist, is damaged, or cannot be reached.
    """
    # MLflow sets its logger's level when it is imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # Otherwise MLflow prints the URL of every run.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A store raises many types, from a missing driver to a folder that cannot be created; the cause is the URI.
    try:
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It prints a traceback for an error that it raises, too, as on a full disk.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        _check_postgresql_answers(uri)
        with without_retries(), _schema_lock(uri) as path:
            if path is not None:
                _complete_sqlite_store(uri, path)
            client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
        return client
    except RaysweepError:
        raise
    except Exception as error:
        raise RaysweepError(f"tracking.uri: '{uri}' cannot be used as an MLflow store ({error})") from error


def _check_postgresql_answers(uri: str) -> None:
    """Connects once to a PostgreSQL server, and raises if it does not answer: MLflow would retry for minutes."""
    scheme, _, rest = uri.partition("://")
    if scheme.partition("+")[0] == "postgresql":
        import psycopg

        psycopg.connect(f"postgresql://{rest}", connect_timeout=10).close()


@contextmanager
def without_retries() -> Iterator[None]:
    """Makes MLflow's HTTP client try only once; by default it retries for minutes before it raises."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def _schema_lock(uri: str) -> Iterator[Path | None]:
    """Locks a SQLite store while its tables are made: two processes at once would break it for good.

    Yields the path of the database; None if the store is not a SQLite file.
    """
    path = _sqlite_path(uri)
    if path is None:
        yield None
        return
    if not path.parent.is_dir():  # FileLock would create the folder of a mistyped URI
        raise FileNotFoundError(f"no such folder: '{path.parent}'")
    with FileLock(path.with_name(f".{path.name}.lock")):  # the kernel frees it when its holder is killed
        yield path


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


def _complete_sqlite_store(uri: str, path: Path) -> None:
    """Makes or migrates a store beside its place, and moves it there when it is complete: MLflow takes seconds.

    Raises:
        RaysweepError: MLflow was killed while it made this store, and cannot go on from there.
    """
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import make_url

    tables = _tables(path)
    if tables >= set(Base.metadata.tables):
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.new-*"):  # of a process that was killed here
        left.unlink()
    # A name of its own, because MLflow keeps its connections to a file by name.
    unfinished = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
    if tables:
        with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(unfinished)) as new:
            old.backup(new)
    address = make_url(uri).set(database=str(unfinished)).render_as_string(hide_password=False)
    try:
        SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
    except Exception as error:
        _remove_database(unfinished)
        if not tables:
            raise
        reason = one_line(error, 200)
        raise RaysweepError(
            f"tracking.uri: '{uri}' cannot be used as an MLflow store: its tables are incomplete, as when MLflow is "
            f"killed while it makes them ({reason}); it holds {_num_runs(path, tables)} runs. Move {path} away: a new "
            "store is made, and gets the trials and models that the sweeps' own folders hold"
        ) from error
    _remove_database(path)  # with a journal beside it, which would be applied to the new store
    os.replace(unfinished, path)


def _tables(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path, timeout=20)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _num_runs(path: Path, tables: set[str]) -> int:
    if "runs" not in tables:
        return 0
    with closing(sqlite3.connect(path, timeout=20)) as database:
        return int(database.execute("SELECT count(*) FROM runs").fetchone()[0])


def _remove_database(path: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def convert_mlflow_errors(uri: str) -> Iterator[None]:
    """Converts errors of MLflow and of what carries its artifacts, because the store worked when the sweep started.

    Raises:
        RaysweepError: the store refused a call, or nothing can be written to it.
    """
    from mlflow import MlflowException

    try:
        yield
    except RaysweepError:
        raise
    except OSError as error:
        raise RaysweepError(f"tracking.uri: nothing can be written to '{uri}' ({error})") from error
    except Exception as error:
        if not isinstance(error, MlflowException) and not _is_of_transport(error):
            raise
        reason = one_line(error, 500)
        raise RaysweepError(f"tracking.uri: the MLflow store '{uri}' refused: {reason}; {KEPT}") from error


def is_away(error: BaseException) -> bool:
    """Whether a store could not be reached, or was too busy to answer: the same call may succeed later."""
    from mlflow import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in AWAY_CODES
    return isinstance(error, ConnectionError | TimeoutError) or _is_of_transport(error)


def _is_of_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in TRANSPORTS
