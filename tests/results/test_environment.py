import os
import subprocess

from raysweep.results.environment import environment_tags


def test_environment_tags_hold_versions_and_the_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    tags = environment_tags("/data/runs/beans")
    assert {"version.python", "version.torch", "version.raysweep"} <= tags.keys()
    assert "mlflow.source.git.commit" not in tags
    subprocess.run(["git", "init", "-q"], check=True)
    assert "mlflow.source.git.commit" not in environment_tags("/data/runs/beans")
    person = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *person, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert len(environment_tags("/data/runs/beans")["mlflow.source.git.commit"]) == 40


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "mlflow.source.git.commit" not in environment_tags("/data/runs/beans")


def test_the_working_directory_starts_no_program(monkeypatch, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho > {tmp_path}/started\n")
    program.chmod(0o755)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for words in (
        ["init", "-q"],
        ["config", "core.fsmonitor", str(program)],
        ["config", "core.hooksPath", str(tmp_path)],
    ):
        subprocess.run(["git", *words], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    environment_tags("/data/runs/beans")
    assert not (tmp_path / "started").exists()
