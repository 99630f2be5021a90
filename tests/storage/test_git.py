import os
import subprocess

import pytest

from raysweep.errors import ConfigError
from raysweep.storage import git
from raysweep.storage.git import run_git


@pytest.fixture
def trap(tmp_path):
    """A repository, a program that leaves a file when it is started, and that file."""
    started, program, repository = tmp_path / "started", tmp_path / "program", tmp_path / "repository"
    program.write_text(f"#!/bin/sh\necho > {started}\n")
    program.chmod(0o755)
    subprocess.run(["git", "init", "-q", repository], check=True)
    (repository / "file").write_text("text")
    subprocess.run(["git", "add", "file"], cwd=repository, check=True)
    return repository, program, started


def configure(repository, key, value):
    subprocess.run(["git", "config", key, value], cwd=repository, check=True)


def test_the_trap_works(trap):
    repository, program, started = trap
    configure(repository, "core.fsmonitor", str(program))
    subprocess.run(["git", "ls-files", "--others"], cwd=repository, check=True, capture_output=True)
    assert started.exists()


@pytest.mark.parametrize(
    "command", [["ls-files", "--others"], ["status"], ["rev-parse", "HEAD"], ["update-index", "-q", "--refresh"]]
)
def test_a_repository_starts_no_program(trap, command):
    repository, program, started = trap
    configure(repository, "core.fsmonitor", str(program))
    hook = repository / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(program.read_text())
    hook.chmod(0o755)
    (repository / "file").write_text("another text")
    run_git(repository, *command)
    assert not started.exists()


@pytest.mark.parametrize("given", ["count", "parameters", "global", "directory"])
def test_the_environment_starts_no_program(trap, tmp_path, monkeypatch, given):
    repository, program, started = trap
    (tmp_path / "config").write_text(f"[core]\n\tfsmonitor = {program}\n")
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", other], check=True)
    configure(other, "core.fsmonitor", str(program))
    variables = {
        "count": {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": str(program)},
        "parameters": {"GIT_CONFIG_PARAMETERS": f"'core.fsmonitor'='{program}'"},
        "global": {"GIT_CONFIG_GLOBAL": str(tmp_path / "config")},
        "directory": {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other)},
    }
    for name, value in variables[given].items():
        monkeypatch.setenv(name, value)
    listed = run_git(repository, "ls-files", "--cached", "--others")
    assert listed.stdout == b"file\n"
    assert not started.exists()


def test_another_index_can_be_read(trap, tmp_path):
    repository, _, _ = trap
    assert run_git(repository, "ls-files", "--cached", index=tmp_path / "none").stdout == b""
    assert run_git(repository, "ls-files", "--cached").stdout == b"file\n"


def test_messages_are_in_english(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert b"not a git repository" in run_git(tmp_path, "rev-parse").stderr
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"


def test_a_pipe_called_gitignore_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(git, "SECONDS", 0.5)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    os.mkfifo(tmp_path / ".gitignore")
    with pytest.raises(ConfigError, match=r"git has not ended within 0.5 s; is a pipe there called .gitignore\?"):
        run_git(tmp_path, "ls-files", "--others", "--exclude-standard")
