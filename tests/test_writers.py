"""Many writers at once: an MLflow server on PostgreSQL, and Optuna's studies in PostgreSQL, lose nothing."""

import os
import subprocess
import sys
import textwrap
from collections import defaultdict

import pytest
from services import PASSWORD, mlflow_server, postgres

from raysweep.errors import ConfigError
from raysweep.sweep.trial_store import open_store

NUM_WRITERS, NUM_TRIALS, NUM_EPOCHS = 32, 4, 10

THREADS = 4  # writers a process: 32 imports of MLflow at once would measure imports

# Runs `write` for each of its writers in a thread, once all processes are ready, which the test says by a line.
PROGRAM = """
    import sys, threading

    def run_all(write):
        failures = []

        def guarded(writer):
            try:
                write(writer)
            except Exception as error:
                failures.append(error)

        first, count = int(sys.argv[2]), int(sys.argv[3])
        threads = [threading.Thread(target=guarded, args=(first + number,)) for number in range(count)]
        print("ready", flush=True)
        sys.stdin.readline()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
"""

LOG = """
    import mlflow
    from raysweep.results.tracking import LoggedTrial, open_tracker

    uri, num_trials, num_epochs = sys.argv[1], int(sys.argv[4]), int(sys.argv[5])
    # Opened one after another, since that changes the environment, which the HTTP client of other threads reads.
    trackers = [open_tracker(uri, "many writers") for _ in range(int(sys.argv[3]))]

    def write(writer):
        tracker = trackers[writer - int(sys.argv[2])]
        study, _ = tracker.start_run(f"study-{writer}", f"study-{writer}", "study")
        for trial in range(num_trials):
            history = [{"val/accuracy": writer + trial / 100 + epoch / 10_000} for epoch in range(num_epochs)]
            logged = LoggedTrial({"learning_rate": 0.1}, history, history[-1], "FINISHED")
            tracker.log_trial(study, f"study-{writer}/{trial}", f"{writer}-{trial}", logged)
        tracker.finish(study)

    run_all(write)
"""

SEARCH = """
    import optuna
    from raysweep.sweep.trial_store import open_store

    uri, num_trials = sys.argv[1], int(sys.argv[4])

    def write(writer):
        study = optuna.create_study(storage=open_store(uri), study_name="many writers", load_if_exists=True)
        for number in range(num_trials):
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            trial.set_user_attr("writer", [writer, number])
            study.tell(trial, writer + number / 100)

    run_all(write)
"""


@pytest.fixture(scope="module")
def database():
    with postgres() as url:
        yield url


@pytest.fixture(autouse=True)
def password(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", PASSWORD)


def run_writers(code, uri, *arguments):
    """Runs a program in several processes, the writers of which all begin at the same time."""
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(code)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, uri, *map(str, (first, THREADS, *arguments))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
        )
        for first in range(0, NUM_WRITERS, THREADS)
    ]  # fmt: skip
    for process in processes:
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "a process ended before it was ready"
    for process in processes:
        process.stdin.write("begin\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[-3000:]


@pytest.mark.end_to_end
def test_32_writers_lose_no_metric(database, tmp_path):
    import psycopg

    with mlflow_server(tmp_path, database) as uri:
        run_writers(LOG, uri, NUM_TRIALS, NUM_EPOCHS)
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

    run_writers(SEARCH, f"{database}/optuna", NUM_TRIALS)
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
