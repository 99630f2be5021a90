"""Many writers at once: an MLflow server on PostgreSQL, and Optuna's studies in PostgreSQL, lose nothing."""

import os
import subprocess
import sys
import textwrap
from collections import defaultdict

import pytest
from services import PASSWORD, mlflow_server, postgres

from raysweep.errors import ConfigError
from raysweep.sweep.optuna_study import open_store

NUM_WRITERS, NUM_TRIALS, NUM_EPOCHS = 32, 4, 10

LOG = """
    import sys, threading, time
    from raysweep.results.tracking import LoggedTrial, open_tracker

    uri, begin, first, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    num_trials, num_epochs = int(sys.argv[5]), int(sys.argv[6])
    failures = []

    def write(writer):
        try:
            time.sleep(max(0, begin - time.time()))
            tracker = open_tracker(uri, "many writers")
            study, _ = tracker.start_run(f"study-{writer}", f"study-{writer}", "study")
            for trial in range(num_trials):
                history = [{"val/accuracy": writer + trial / 100 + epoch / 10_000} for epoch in range(num_epochs)]
                logged = LoggedTrial({"learning_rate": 0.1}, history, history[-1], "FINISHED")
                tracker.log_trial(study, f"study-{writer}/{trial}", f"{writer}-{trial}", logged)
            tracker.finish(study)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(first + number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
"""

SEARCH = """
    import sys, time
    import optuna
    from raysweep.sweep.optuna_study import open_store

    uri, begin, writer, num_trials = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    time.sleep(max(0, begin - time.time()))
    study = optuna.create_study(storage=open_store(uri), study_name="many writers", load_if_exists=True)
    for number in range(num_trials):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("writer", [writer, number])
        study.tell(trial, writer + number / 100)
"""


@pytest.fixture(scope="module")
def database():
    with postgres() as url:
        yield url


@pytest.fixture(autouse=True)
def password(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", PASSWORD)


def run_all(code, *argument_lists):
    """Runs a program once for each list of arguments, side by side."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
        )
        for arguments in argument_lists
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[-3000:]


def soon(seconds):
    import time

    return time.time() + seconds


@pytest.mark.end_to_end
def test_32_writers_lose_no_metric(database, tmp_path):
    """Eight processes of four writers: 32 imports of MLflow at once would measure imports."""
    import psycopg

    with mlflow_server(tmp_path, database) as uri:
        begin = soon(20)
        run_all(LOG, *([uri, begin, first, 4, NUM_TRIALS, NUM_EPOCHS] for first in range(0, NUM_WRITERS, 4)))
        with psycopg.connect(f"{database}/mlflow") as connection:
            runs = connection.execute(
                "SELECT t.value, r.status, r.run_uuid FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
                "WHERE t.key = 'raysweep.key'"
            ).fetchall()
            found = defaultdict(dict)
            query = "SELECT run_uuid, step, value FROM metrics WHERE key = 'val/accuracy'"
            for run, step, value in connection.execute(query):
                found[run][step] = value
            experiments = connection.execute("SELECT name FROM experiments WHERE name = 'many writers'").fetchall()
    assert len(experiments) == 1
    trials = {key: run for key, status, run in runs if "/" in key and status == "FINISHED"}
    expected_keys = {f"study-{w}/{t}" for w in range(NUM_WRITERS) for t in range(NUM_TRIALS)}
    assert set(trials) == expected_keys
    assert len(runs) == len(expected_keys) + NUM_WRITERS, "each run once"
    for key, run in trials.items():
        writer, trial = map(int, key.removeprefix("study-").split("/"))
        expected = {epoch + 1: writer + trial / 100 + epoch / 10_000 for epoch in range(NUM_EPOCHS)}
        assert found[run] == pytest.approx(expected), key


@pytest.mark.end_to_end
def test_32_searches_in_one_database_lose_no_trial(database):
    import optuna

    begin = soon(25)
    run_all(SEARCH, *([f"{database}/optuna", begin, writer, NUM_TRIALS] for writer in range(NUM_WRITERS)))
    study = optuna.load_study(study_name="many writers", storage=open_store(f"{database}/optuna"))
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(NUM_WRITERS * NUM_TRIALS))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    told = {tuple(trial.user_attrs["writer"]): trial.value for trial in trials}
    assert told == {(w, n): w + n / 100 for w in range(NUM_WRITERS) for n in range(NUM_TRIALS)}
    assert all(0 <= trial.params["x"] <= 1 for trial in trials)


def test_a_database_that_refuses_is_named(database, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "another")
    with pytest.raises(ConfigError, match=r"tracking.optuna_uri: 'postgresql://raysweep@127.0.0.1:\d+/optuna' cannot"):
        open_store(f"{database}/optuna")


def test_mlflows_database_is_not_optunas(database, monkeypatch):
    import psycopg

    with psycopg.connect(f"{database}/postgres") as connection:  # as MLflow leaves it
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES ('e0d2c5c1a0b1')")
    with pytest.raises(ConfigError, match="it needs a database of its own"):
        open_store(f"{database}/postgres")
