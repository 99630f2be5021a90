"""Opens the store of a sweep's trials: Optuna's journal file, or a PostgreSQL database."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.errors import ConfigError, one_line

if TYPE_CHECKING:
    import optuna

SECONDS_TO_CONNECT = 10
SCHEMA_LOCK = 0x7261797377656570  # "raysweep"


def open_store(store: Path | str, warn: Callable[[str], None] = warnings.warn) -> optuna.storages.BaseStorage:
    """Opens Optuna's storage: a journal file, which is created if missing, or a PostgreSQL database.

    Args:
        store: path of the journal, or URI of the database.
        warn: is told what was mended in the journal.

    Raises:
        ConfigError: the database cannot be used.
        DataError: the journal is damaged.
    """
    import optuna
    from optuna.storages import RDBStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(store, Path):
        from raysweep.sweep.journal import open_journal

        return open_journal(store, warn)
    try:
        import psycopg

        with psycopg.connect(store, connect_timeout=SECONDS_TO_CONNECT) as connection:
            # Optuna creates its tables without a lock, and several sweeps may start at once. This lock ends with the
            # connection.
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            # psycopg 3; the pre-ping notices a connection that the server has closed.
            uri = f"postgresql+psycopg://{store.partition('://')[2]}"
            connect_args = {"connect_timeout": SECONDS_TO_CONNECT}
            return RDBStorage(uri, engine_kwargs={"pool_pre_ping": True, "connect_args": connect_args})
    except Exception as error:  # the driver's many types, from a wrong host to a missing privilege
        reason = one_line(error, 300)
        hint = "it needs a database of its own, since MLflow's has a table of the same name"
        raise ConfigError(f"tracking.optuna_uri: '{store}' cannot be used by Optuna ({reason}); {hint}") from error
