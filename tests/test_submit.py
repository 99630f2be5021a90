"""Submission: the command line against a job server that is a stand-in, and against one that is real."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nodes import TOKEN, running_nodes
from PIL import Image

from raysweep import submit

DIGITS = "data: {source: 'sklearn://digits'}\nencoders: [{type: stacked_cnn, image_size: 32}]\n"
HEAD = "http://127.0.0.1:8265"


class FakeClient:
    """A job server's client: a job that says `chunks`, connection by connection, and ends with `status`."""

    def __init__(self, connections=(("done\n",),), status="SUCCEEDED", exit_code=0, message=""):
        self.connections, self.submitted, self.stopped = list(connections), [], []
        self.info = SimpleNamespace(status=Status(status), driver_exit_code=exit_code, message=message)

    def submit_job(self, **job):
        job["names"] = zipfile.ZipFile(job["runtime_env"]["working_dir"]).namelist()
        self.submitted.append(job)
        return job["submission_id"]

    def get_job_info(self, job):
        if job == "nothing":
            raise RuntimeError("Request failed with status code 404: Job nothing does not exist.")
        over = not self.connections
        return self.info if over else SimpleNamespace(status=Status("RUNNING"), driver_exit_code=None, message="")

    def stop_job(self, job):
        self.stopped.append(job)
        was_running, self.connections = bool(self.connections), []
        return was_running

    async def tail_job_logs(self, job):
        for chunk in self.connections.pop(0) if self.connections else ():
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


class Status(str):
    def is_terminal(self):
        return self not in ("RUNNING", "PENDING")


@pytest.fixture
def client(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(DIGITS)
    (tmp_path / "constraints.txt").write_text("torch==2.99.0\n")
    monkeypatch.setattr(submit, "SECONDS_BETWEEN_LOOKS", 0)
    found = FakeClient()
    monkeypatch.setattr(submit, "connect", lambda address: found)
    return found


# What is submitted


def test_the_same_command_runs_there(client, capsys):
    assert submit.main(["x.yaml", "--set", "name=a b"]) == 1, "no such name"
    assert "name" in capsys.readouterr().err
    assert client.submitted == []
    assert submit.main(["x.yaml", "--set", "seed=7", "--verbose", "--dry-run"]) == 0
    (job,) = client.submitted
    assert job["entrypoint"] == "python -m raysweep.run x.yaml --set seed=7 --dry-run --verbose"
    assert "x.yaml" in job["names"]
    assert job["submission_id"].startswith("x-")
    assert "torch==2.99.0" in job["runtime_env"]["pip"]
    assert "env_vars" not in job["runtime_env"], "Ray logs them in plain text"
    assert capsys.readouterr().out == "done\n"


def test_nothing_is_installed_where_the_image_has_all(client):
    submit.main(["x.yaml", "--no-pip"])
    assert "pip" not in client.submitted[0]["runtime_env"]


def test_where_uploaded_data_lies_comes_after_the_users_settings(client):
    Path("images/a").mkdir(parents=True)
    Path("images/a/1.png").write_bytes(b"png")
    Path(".gitignore").write_text("images\n")
    assert submit.main(["x.yaml", "--set", "data.source=images", "--upload-data"]) == 0
    (job,) = client.submitted
    assert job["entrypoint"].endswith(
        """x.yaml --set data.source=images --set 'data.source="uploaded/data.source/images"'"""
    )  # fmt: skip
    assert "uploaded/data.source/images/a/1.png" in job["names"]


def test_it_says_what_is_packed_and_left_out(client, capsys):
    Path(".env").write_text("canary")
    Path("id_rsa").write_text("canary")
    assert submit.main(["x.yaml"]) == 0
    said = capsys.readouterr().err
    assert "  constraints.txt\n  x.yaml\n  and raysweep itself, " in said
    assert "  hidden: .env\n  may hold keys or passwords: id_rsa\n" in said
    assert submit.main(["x.yaml", "--include", ".env", "--include", "id_rsa"]) == 0
    without, with_them = (set(job["names"]) for job in client.submitted)
    assert with_them - without == {".env", "id_rsa"}
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--detach"], ["x.yaml", "--detach", "--follow", "j"]])
def test_wrong_usage(client, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        submit.main(arguments)
    assert stopped.value.code == 2
    assert client.submitted == []


# What comes back


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("STOPPED", None, 1)]
)
def test_the_jobs_exit_status_is_the_commands(client, status, exit_code, expected, capsys):
    client.info = SimpleNamespace(status=Status(status), driver_exit_code=exit_code, message="why it ended")
    assert submit.main(["x.yaml"]) == expected
    assert ("why it ended" in capsys.readouterr().err) == (exit_code is None)


def test_a_lost_connection_is_taken_up_where_it_broke(client, capsys):
    client.connections = [
        ("one\n", "two\nth", OSError("reset by peer")),
        (RuntimeError("WebSocket connection closed unexpectedly"),),
        ("one\ntwo\n", "three\n"),
    ]
    assert submit.main(["--follow", "job"]) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_connection_that_stays_lost_says_how_to_return(client, capsys, monkeypatch):
    monkeypatch.setattr(submit, "LOST_CONNECTIONS", 2)
    client.connections = [(OSError("no route to host"),)] * 5
    assert submit.main(["--follow", "job", "--address", HEAD]) == 1
    err = capsys.readouterr().err
    assert "no route to host" in err
    assert f"raysweep submit --address {HEAD} --follow job" in err


def test_a_silent_connection_is_made_anew(client, capsys, monkeypatch):
    """As one looks that some router on the way has forgotten."""
    monkeypatch.setattr(submit, "SECONDS_OF_SILENCE", 0.05)

    async def tail_job_logs(job):
        yield "one\n"
        if client.connections and client.connections.pop(0) == "silent":
            await asyncio.sleep(60)
        yield "two\n"

    client.connections, client.tail_job_logs = ["silent", "whole"], tail_job_logs
    assert submit.main(["--follow", "job"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_that_waits_says_for_what_once(client, capsys):
    texts = ["at once", "at once", "at once", "packages", "packages", "nodes"]
    waiting = [SimpleNamespace(status=Status("PENDING"), message=text) for text in texts]
    client.get_job_info = lambda job: waiting.pop(0) if waiting else FakeClient.get_job_info(client, job)
    assert submit.main(["--follow", "job"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("done\n", "job waits: packages\njob waits: nodes\n")


def test_what_packages_could_not_be_installed_is_said_last(client, capsys):
    message = "Traceback\n" + 3000 * "x" + "\nERROR: No matching distribution found for torch==9"
    client.info = SimpleNamespace(status=Status("FAILED"), driver_exit_code=None, message=message)
    assert submit.main(["x.yaml"]) == 1
    assert capsys.readouterr().err.endswith("No matching distribution found for torch==9\n")


def test_ctrl_c_while_it_is_handed_over_leaves_it_open(client, capsys):
    def interrupted(**job):
        client.submitted.append(job)
        raise KeyboardInterrupt

    client.submit_job = interrupted
    assert submit.main(["x.yaml", "--address", HEAD]) == 130
    job = client.submitted[0]["submission_id"]
    err = capsys.readouterr().err
    assert f"interrupted; {job} may have been submitted" in err
    assert f"--stop {job}" in err


def test_ctrl_c_before_that_submits_nothing(client, capsys, monkeypatch):
    from raysweep.cluster import package

    monkeypatch.setattr(package, "working_files", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert submit.main(["x.yaml"]) == 130
    assert "interrupted; nothing was submitted" in capsys.readouterr().err
    assert client.submitted == []


def test_a_reader_that_has_seen_enough_is_no_lost_connection(tmp_path):
    code = """
        import sys, types
        from raysweep import submit

        class Client:
            def get_job_info(self, job):
                return types.SimpleNamespace(status=Status("RUNNING"))

            async def tail_job_logs(self, job):
                for number in range(100_000):
                    yield f"{number}\\n"

        class Status(str):
            is_terminal = lambda self: False

        submit.connect = lambda address: Client()
        sys.exit(submit.main(["--follow", "job"]))
    """
    done = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout.readline() == "0\n"
    done.stdout.close()
    err = done.stderr.read()
    done.stderr.close()
    assert done.wait(30) == 141
    assert "the job goes on" in err
    assert "lost" not in err
    assert "Error" not in err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_return(client, capsys):
    client.connections = [("one\n", KeyboardInterrupt())]
    assert submit.main(["x.yaml", "--address", HEAD]) == 130
    err, job = capsys.readouterr().err, client.submitted[0]["submission_id"]
    assert "the job goes on" in err
    assert f"raysweep submit --address {HEAD} --follow {job}" in err
    assert f"raysweep submit --address {HEAD} --stop {job}" in err
    assert client.stopped == []


def test_detached_it_says_the_same_at_once(client, capsys):
    client.connections = [("never read",)]
    assert submit.main(["x.yaml", "--detach"]) == 0
    job = client.submitted[0]["submission_id"]
    assert f"--follow {job}" in capsys.readouterr().out
    assert client.connections == [("never read",)]


def test_a_job_is_stopped_once(client, capsys):
    assert submit.main(["--stop", "job"]) == 0
    assert "the same submission goes on from there" in capsys.readouterr().err
    assert submit.main(["--stop", "job"]) == 1
    assert "job had ended already: succeeded" in capsys.readouterr().err


def test_an_unknown_job_is_named(client, capsys):
    assert submit.main(["--follow", "nothing"]) == 1
    assert "Job nothing does not exist" in capsys.readouterr().err


# Tokens and addresses


def test_tokens_are_found_where_ray_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert submit.read_token() == ("", "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    assert submit.read_token() == ("from home", f"{tmp_path}/.ray/auth_token")
    (tmp_path / "file").write_text("from a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert submit.read_token() == ("from a file", f"{tmp_path}/file")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from the environment")
    assert submit.read_token() == ("from the environment", "RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(submit.ConfigError, match=r"RAY_AUTH_TOKEN_PATH: .*/none cannot be read"):
        submit.read_token()


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://"])
def test_an_address_is_that_of_a_dashboard(address, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(DIGITS)
    assert submit.main(["x.yaml", "--address", address]) == 1
    assert f"--address: '{address}' is not the URL of a dashboard" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["http://canary@head:8265", "https://user:canary@head", "http://head:8265?token=canary"]
)
@pytest.mark.parametrize("action", [["x.yaml"], ["--follow", "job"], ["--stop", "job"]])
def test_credentials_in_an_address_are_refused_and_not_repeated(address, action, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(DIGITS)
    assert submit.main([*action, "--address", address]) == 1
    said = capsys.readouterr()
    assert "--address: the URL holds a user or a query" in said.err
    assert "canary" not in said.out + said.err


@pytest.mark.parametrize("address", ["http://[::1", "http://head:port", "http://canary:8265x@head:port"])
def test_half_an_address_is_no_traceback(address, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(DIGITS)
    assert submit.main(["x.yaml", "--address", address]) == 1
    said = capsys.readouterr().err
    assert "is not the URL of a dashboard" in said
    assert "canary" not in said


@pytest.mark.parametrize("setting", ["data.source=s3://KEY:canary@bucket/x", "storage=s3://b/x?secret_key=canary"])
def test_credentials_in_a_setting_are_refused_and_not_repeated(client, setting, capsys):
    """Ray shows a job's command to everybody who sees its dashboard."""
    assert submit.main(["x.yaml", "--set", setting]) == 1
    said = capsys.readouterr()
    assert setting.partition("=")[0] in said.err
    assert "canary" not in said.out + said.err
    assert client.submitted == []


def test_the_environments_address_is_not_in_the_help(monkeypatch, capsys):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://user:canary@head:8265")
    with pytest.raises(SystemExit):
        submit.main(["--help"])
    assert "canary" not in capsys.readouterr().out


def test_credentials_in_a_jobs_message_are_not_repeated(client, capsys):
    message = "ERROR: Looking in indexes: https://user:canary@pypi.company/simple"
    client.info = SimpleNamespace(status=Status("FAILED"), driver_exit_code=None, message=message)
    assert submit.main(["x.yaml"]) == 1
    said = capsys.readouterr().err
    assert "pypi.company/simple" in said
    assert "canary" not in said


def test_a_server_that_never_answers_is_given_up(monkeypatch, capsys, tmp_path):
    """As a tunnel whose other end is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "SECONDS_TO_ANSWER", 0.5)
    Path("x.yaml").write_text(DIGITS)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert submit.main(["x.yaml", "--address", address]) == 1
    assert f"no Ray dashboard answers at {address}" in capsys.readouterr().err


# A real cluster of two nodes


@pytest.fixture(scope="module")
def cluster():
    with running_nodes(1) as nodes:
        yield nodes


@pytest.fixture
def project(tmp_path):
    """A working directory with images that .gitignore keeps out."""
    for number in range(60):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        pixels[:, :, number % 2] //= 4
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / ".gitignore").write_text("images/\n")
    (tmp_path / "x.yaml").write_text(
        "data: {source: images}\n"
        "encoders: [{type: stacked_cnn, image_size: 32, config: {channels: [8, 16]}}]\n"
        "search: {from_scratch: {num_trials: 2, space: {epochs: 3}}}\n"
    )
    return tmp_path


def run_submit(cluster, folder, *arguments, token=TOKEN, timeout=240):
    environment = os.environ | {"RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "raysweep.submit", *arguments, "--address", cluster.dashboard]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )


def settings(tmp_path):
    return ["--no-pip", "--set", f"storage={tmp_path}/runs", "--set", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]


@pytest.mark.end_to_end
def test_local_images_are_sent_along_and_every_node_finds_them(cluster, project):
    done = run_submit(cluster, project, "x.yaml", "--upload-data", *settings(project))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray is up: 2 CPUs, 0 GPUs on 2 nodes" in done.stdout
    assert f"predict    raysweep predict {project}/runs/x/models/stacked_cnn-from_scratch" in done.stdout
    (row,) = json.loads((project / "runs" / "x" / "leaderboard.json").read_text())
    assert (row["study"], row["num_trials"]) == ("stacked_cnn-from_scratch", 2)


@pytest.mark.end_to_end
def test_a_dry_run_says_what_is_there_and_how_long_it_will_take(cluster, project):
    done = run_submit(cluster, project, "x.yaml", "--upload-data", "--dry-run", *settings(project))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cluster: 2 nodes, 2 CPUs, 0 GPUs\n  2 with 1 CPUs and 0 GPUs\nimages:" in done.stdout
    assert "  stacked_cnn-from_scratch: 2 trials of 3 epochs: about " in done.stdout
    assert "  all: about " in done.stdout
    assert not (project / "runs").exists(), "nothing has run"


@pytest.mark.end_to_end
def test_another_token_is_refused(cluster, project):
    done = run_submit(cluster, project, "x.yaml", "--upload-data", *settings(project), token="another")
    assert done.returncode == 1
    assert "wants a token, another one than that of RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.end_to_end
def test_results_that_would_be_lost_are_refused(cluster, project):
    done = run_submit(cluster, project, "x.yaml", "--upload-data", "--no-pip")
    assert done.returncode == 1
    assert "error: storage: 'runs' is relative" in done.stdout
    done = run_submit(cluster, project, "x.yaml", "--upload-data", *settings(project)[:3])
    assert done.returncode == 1
    assert "error: tracking.uri: 'sqlite:///mlflow.db' is relative" in done.stdout


@pytest.mark.end_to_end
def test_a_job_outlives_its_watcher_and_can_be_stopped(cluster, project):
    long = ["--set", "search.from_scratch.space.epochs=200", "--set", "train.early_stopping_patience=200"]
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-m", "raysweep.submit", "x.yaml", "--upload-data", "--address", cluster.dashboard]
    watcher = subprocess.Popen(
        [*command, *long, *settings(project)], env=environment, cwd=project, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in watcher.stdout:
        if "Ray is up" in line:
            break
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert "the job goes on" in err
    job = err.rpartition("--stop ")[2].split()[0]  # Python may say more when it ends in mid-request
    time.sleep(1)
    stopped = run_submit(cluster, project, "--stop", job)
    assert (stopped.returncode, stopped.stderr.count("stopped")) == (0, 1), stopped.stderr
    again = run_submit(cluster, project, "--follow", job)
    assert again.returncode != 0
    assert "Ray is up" in again.stdout
