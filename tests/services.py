"""PostgreSQL, an MLflow server and an S3 server of this machine, for as long as a test needs them; loopback only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import free_port

SECONDS_TO_START = 120
S3_KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}
PASSWORD = "a-password-of-these-tests"


def postgres_binaries() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps the server's out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    if found := shutil.which("initdb"):
        folders.append(Path(found).parent)
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL with the databases `mlflow` and `optuna`; its URL, whose password is `PASSWORD`."""
    binaries = postgres_binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed")
        pytest.skip("PostgreSQL is not installed")
    # A folder of its own: the server refuses to run as root, and others may not look into pytest's.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        shutil.chown(folder, user)
    port, data = free_port(), folder / "data"
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def run(program: str, *arguments: str) -> None:
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if os.geteuid() == 0 else []
        command = [*as_user, str(binaries / program), *arguments]
        done = subprocess.run(
            command, check=False, cwd=folder, stdin=subprocess.DEVNULL, stdout=(folder / "out").open("a"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {(folder / 'out').read_text()[-2000:]}"

    try:
        run("initdb", "-D", str(data), "-A", "scram-sha-256", "-U", "raysweep", f"--pwfile={folder}/password", "-N")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c max_connections=200 -c fsync=off"
        run("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            import psycopg

            server = f"postgresql://raysweep@127.0.0.1:{port}"
            with psycopg.connect(f"{server}/postgres", password=PASSWORD, autocommit=True) as connection:
                for name in ("mlflow", "optuna"):
                    connection.execute(f"CREATE DATABASE {name}")
            yield server
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _serving(command: Sequence[str], url: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def mlflow_server(folder: Path, postgres_url: str) -> Iterator[str]:
    """An MLflow server on PostgreSQL that keeps artifacts in a folder and hands them out itself; its URI."""
    port = free_port()
    store = postgres_url.replace("postgresql://raysweep@", f"postgresql+psycopg://raysweep:{PASSWORD}@") + "/mlflow"
    command = [
        str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts"), "--workers", "2",
    ]  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    # Without its job workers: seven processes that import MLflow.
    with _serving(command, f"{uri}/health", folder / "mlflow.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield uri


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server with one bucket; the environment that leads to it."""
    port = free_port()
    environment = {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, f"http://127.0.0.1:{port}/moto-api/data.json", folder / "s3.log", {}):
        import boto3

        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "key", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], **keys).create_bucket(Bucket=bucket)
        yield environment
